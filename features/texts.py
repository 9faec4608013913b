"""Strings as shops write them -> strings that every tokenizer reads alike."""

import html
import unicodedata

import ftfy

MAX_TEXT_CHARS = 100_000
"""Characters of a text that are looked at; longer ones are cut before they are cleaned, to bound the time."""

TEXT_CLEANING_VERSION = 1
"""Part of every encoder's preprocessing digest: raise it when `clean_text` gives another result."""

_DROPPED_FORMATS = frozenset("\ufeff\u200b\u2060\u00ad")
"""Format characters that no reader sees; U+200D stays, as it joins emoji."""


def clean_text(text: str, *, max_chars: int = MAX_TEXT_CHARS) -> str:
    """Repair, unescape and fold a text; "" when nothing is left.

    Mojibake, curly quotes, ligatures and full-width letters are repaired (ftfy), HTML entities are resolved
    twice (shops escape twice: `&amp;quot;`), control characters go, unpaired surrogates become U+FFFD, runs
    of white space become one space, and both ends are stripped. Emoji stay, joined ones too. Tokenizers
    disagree on most of these; after this they agree.

    Args:
        text: Any string, NUL bytes and unpaired surrogates included.
        max_chars: Both what is read of ``text`` and what is returned is at most this long.
    """
    repaired = ftfy.fix_text(text[:max_chars])
    unescaped = html.unescape(html.unescape(repaired))
    if not unescaped.isprintable():  # a space is printable; what follows walks every character
        unescaped = "".join(map(_visible, unescaped))
    return " ".join(unescaped.split())[:max_chars].rstrip()


def _visible(character: str) -> str:
    """The character itself, a space for any white space, or nothing."""
    if character.isspace():
        return " "
    return "" if unicodedata.category(character) == "Cc" or character in _DROPPED_FORMATS else character
