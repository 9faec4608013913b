"""Texts -> token ids for CLIP's text towers."""

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from features.texts import MAX_TEXT_CHARS

_KEPT_WORDS = 1 << 16
"""Ids of that many words are remembered; a shop's vocabulary is smaller."""


@dataclass(frozen=True)
class ClipTokenizer:
    """CLIP's byte-pair encoding: the ids of open_clip's tokenizer, without its padding.

    Long texts cost no more than short ones: every word between two spaces gives at least one token, so that
    words past the context length are never read; and a word is merged in n log n steps (100,000 letters
    without a space take open_clip's own loop hours).

    Args:
        context_length: Most ids of a text, start and end included.
        clean: open_clip's name of how a text is cleaned before: lower, whitespace or canonicalize.
    """

    context_length: int
    clean: str = "lower"

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text: start, words, end."""
        return [self._ids(text) for text in texts]

    def _ids(self, text: str) -> list[int]:
        vocabulary = _vocabulary(self.clean)
        room = self.context_length - 2
        words = vocabulary.clean(text[:MAX_TEXT_CHARS]).split(" ", room)[:room]
        ids: list[int] = []
        for word in vocabulary.split(" ".join(words)):
            ids.extend(vocabulary.ids_of(word))
            if len(ids) >= room:
                break
        return [vocabulary.start_id, *ids[:room], vocabulary.end_id]


@dataclass(frozen=True)
class _Vocabulary:
    """What is needed of open_clip's tokenizer, its slow merging loop replaced."""

    clean: Callable[[str], str]
    split: Callable[[str], list[str]]
    ids_of: Callable[[str], Sequence[int]]
    start_id: int
    end_id: int


@cache
def _vocabulary(clean: str) -> _Vocabulary:
    """Built once a process: open_clip's word list and rules; the library `tokenizers` does the merging."""
    from open_clip.tokenizer import SimpleTokenizer, default_bpe  # noqa: PLC0415 - seconds of imports
    from tokenizers import Tokenizer  # noqa: PLC0415 - seconds of imports
    from tokenizers.models import BPE  # noqa: PLC0415 - seconds of imports

    reference = SimpleTokenizer(clean=clean)
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    merges = [(left, right) for left, right in map(str.split, lines[1 : 1 + len(reference.bpe_ranks)])]
    merge = Tokenizer(BPE(vocab=reference.encoder, merges=merges, end_of_word_suffix="</w>"))
    special = dict(zip(("<start_of_text>", "<end_of_text>"), reference.all_special_ids, strict=False))

    @lru_cache(maxsize=_KEPT_WORDS)
    def ids_of(word: str) -> tuple[int, ...]:
        if word in special:
            return (special[word],)
        letters = "".join(reference.byte_encoder[byte] for byte in word.encode())
        return tuple(merge.encode(letters, add_special_tokens=False).ids)

    return _Vocabulary(
        reference.clean_fn, reference.pat.findall, ids_of, reference.sot_token_id, reference.eot_token_id
    )


@dataclass(frozen=True)
class FolderTokenizer:
    """A tokenizer of transformers, as open_clip sets it up; it pads its rows to the context length itself.

    Args:
        folder: Holds its files.
        context_length: Ids of a row.
        settings: JSON of open_clip's `tokenizer_kwargs`, its `tokenizer_mode` among them.
    """

    folder: str
    context_length: int
    settings: str

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, padding included."""
        if not texts:
            return []
        tokenizer = _folder_tokenizer(self.folder, self.settings)
        cut = [text[:MAX_TEXT_CHARS] for text in texts]
        rows: list[list[int]] = tokenizer(cut, context_length=self.context_length).tolist()
        return rows


@lru_cache(maxsize=4)
def _folder_tokenizer(folder: str, settings: str) -> Callable[..., Any]:
    from open_clip.tokenizer import HFTokenizer  # noqa: PLC0415 - seconds of imports

    tokenizer: Callable[..., Any] = HFTokenizer(folder, **json.loads(settings))
    return tokenizer
