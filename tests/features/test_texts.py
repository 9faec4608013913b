"""Strings as shops write them come out readable, bounded, and the same for every tokenizer."""

import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.texts import MAX_TEXT_CHARS, clean_text


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("plain text", "plain text"),
        ("Fisher-Price &amp; friends", "Fisher-Price & friends"),
        ("10&amp;quot; tall", '10" tall'),
        ("“curly” ‘quotes’", "\"curly\" 'quotes'"),
        ("cafÃ© au lait", "café au lait"),
        ("oﬃce ﬁt", "office fit"),
        ("ＡＢＣ１２３", "ABC123"),
        ("  many \t spaces\r\n\nand lines  ", "many spaces and lines"),
        ("no\u00a0break", "no break"),
        ("nul\x00byte and \x07bell", "nulbyte and bell"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("soft\u00adhyphen zero\u200bwidth \ufeffmark", "softhyphen zerowidth mark"),
        ("e\u0301", "é"),
        ("\ud83d\ude00", "😀"),
        ("", ""),
        (" \n\x00 ", ""),
    ],
)
def test_a_raw_text_comes_out_clean(raw: str, clean: str) -> None:
    assert clean_text(raw) == clean


@pytest.mark.parametrize("emoji", ["😀", "👨‍👩‍👧", "👍🏽", "🇩🇪", "❤️", "🏴\U000e0067\U000e0062\U000e007f"])
def test_emoji_stay_joined_ones_and_flags_too(emoji: str) -> None:
    assert clean_text(f"a {emoji} b") == f"a {emoji} b"


def test_a_lone_surrogate_becomes_something_that_can_be_encoded() -> None:
    assert clean_text("a\ud800b").encode() == "a\ufffdb".encode()


@pytest.mark.parametrize(
    "unit",
    ["word ", "x", "Ã©â€œ ", "&amp;amp;lt;", "a\n", "\x00\x1b[31m", "日本語", "😀 ", "e\u0301", "&", "<b>"],
)
def test_100_000_characters_take_a_bounded_time(unit: str) -> None:
    text = (unit * 100_000)[:100_000]
    started = time.process_time()
    cleaned = clean_text(text)
    assert time.process_time() - started < 3
    assert len(cleaned) <= 100_000


def test_longer_texts_are_cut_before_they_are_cleaned() -> None:
    assert clean_text("ab " * MAX_TEXT_CHARS) == clean_text(("ab " * MAX_TEXT_CHARS)[:MAX_TEXT_CHARS])
    assert clean_text("abc def", max_chars=4) == "abc"
    assert len(clean_text("ﬁ" * 50, max_chars=50)) == 50


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(), max_size=80))
def test_what_comes_out_has_no_control_characters_and_single_spaces(raw: str) -> None:
    cleaned = clean_text(raw)
    cleaned.encode()
    assert not any(unicodedata.category(character) == "Cc" for character in cleaned)
    assert cleaned == " ".join(cleaned.split())
