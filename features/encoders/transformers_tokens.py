"""Texts -> token ids, by the tokenizer that lies beside a model of transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic import JsonValue
from torch import Tensor

from features.encoders.base import digest_files
from features.encoders.transformers_files import TOKENIZER_FILES, ModelFiles, first_line, quiet
from features.errors import EncoderError
from features.texts import MAX_TEXT_CHARS

PADDING = -1
"""Fills rows of `tokenize`, as no id of a vocabulary means padding alone; `masked` takes it out again."""

_STATED_NOTHING = 10**9
"""transformers writes 10^30 where a tokenizer states no length."""


@dataclass(frozen=True)
class LibraryTokenizer:
    """transformers' own tokenizer.

    Args:
        folder: Holds its files.
        sha256: Of these files.
        context_length: Most ids of a text, start and end included.
        pads: Whether every row is filled up to the context length, on the side that the tokenizer prefers;
            for towers that see the padding.
    """

    folder: str
    sha256: str
    context_length: int
    pads: bool = False

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; one without any becomes the token that ends texts, or else the padding's."""
        if not texts:
            return []
        return _encode(_tokenizer(self), self, [text[:MAX_TEXT_CHARS] for text in texts])


def find_tokenizer(files: ModelFiles, context_length: int, *, pads: bool = False) -> LibraryTokenizer:
    """The tokenizer of a model, cut to what both it and the model can read.

    Args:
        files: Of the model.
        context_length: Most tokens the model reads; 0 if it states none.
        pads: As for `LibraryTokenizer`.

    Raises:
        EncoderError: Its files are not there, or nothing can be made of them.
    """
    paths = files.tokenizer_files()
    folder, sha256 = str(paths[0].parent), digest_files(paths)
    try:
        stated = int(_read(folder, sha256).model_max_length)
        limits = [limit for limit in (context_length, stated) if 0 < limit < _STATED_NOTHING]
        tokenizer = LibraryTokenizer(folder, sha256, min(limits, default=0), pads)
        if limits:
            tokenizer([""])
    except Exception as error:  # transformers raises many kinds for a missing or damaged file
        raise EncoderError(
            f"encoder {files.spec!r}: no tokenizer can be made of {folder!r} ({first_line(error)}); expected "
            f"{TOKENIZER_FILES[0]} of its repository. Where only a .model file exists, install sentencepiece."
        ) from error
    if not limits:
        raise EncoderError(
            f"encoder {files.spec!r}: neither its configuration nor its tokenizer says how many tokens it "
            "reads; set model_max_length in tokenizer_config.json."
        )
    return tokenizer


def tokenizer_settings(tokenizer: LibraryTokenizer) -> dict[str, JsonValue]:
    """What of a tokenizer changes its ids; its class, as some have one with and one without sentencepiece."""
    return {
        "kind": type(_tokenizer(tokenizer)).__name__,
        "sha256": tokenizer.sha256,
        "context_length": tokenizer.context_length,
        "pads": tokenizer.pads,
    }


def wants_mask(tokenizer: LibraryTokenizer) -> bool:
    """Whether the library hands the model a mask along with the ids of this tokenizer."""
    return "attention_mask" in _tokenizer(tokenizer).model_input_names


def padding_id(tokenizer: LibraryTokenizer) -> int | None:
    """The id that the library pads with."""
    given: int | None = _tokenizer(tokenizer).pad_token_id
    return given


def masked(tokens: Tensor, fill: int) -> tuple[Tensor, Tensor]:
    """(B, L) ids with ``fill`` in place of the padding, and (B, L) int64 ones where there is a token."""
    mask = tokens >= 0
    return tokens.masked_fill(~mask, fill), mask.long()


def _encode(tokenizer: Any, how: LibraryTokenizer, texts: list[str]) -> list[list[int]]:
    padding = "max_length" if how.pads else False
    given = tokenizer(
        texts,
        padding=padding,
        truncation=True,
        max_length=how.context_length,
        return_attention_mask=True,
        return_token_type_ids=False,
    )
    if how.pads:
        return [
            [token if real else PADDING for token, real in zip(ids, mask, strict=True)]
            for ids, mask in zip(given["input_ids"], given["attention_mask"], strict=True)
        ]
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id, 0)
    nothing = [next(token for token in ends if token is not None)]
    return [list(ids) or nothing for ids in given["input_ids"]]


@lru_cache(maxsize=4)
def _tokenizer(how: LibraryTokenizer) -> Any:
    """Called once before it is handed out: later calls of other threads find its truncation set already."""
    tokenizer = _read(how.folder, how.sha256)
    _encode(tokenizer, how, ["a"])
    return tokenizer


def _read(folder: str, _sha256: str) -> Any:
    from transformers import AutoTokenizer  # noqa: PLC0415 - seconds of imports

    with quiet():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
