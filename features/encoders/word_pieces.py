"""Texts -> token ids of BERT's WordPiece, from the plain `vocab.txt` that most of its kin come with."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from features.errors import EncoderError
from features.texts import MAX_TEXT_CHARS

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class WordPieceTokenizer:
    """Lower-cased BERT WordPiece: `[CLS]`, the text's pieces, `[SEP]`.

    Args:
        vocabulary: A word piece a line; the line's number is its id.
        context_length: Most ids of a text, both ends included; `[SEP]` is kept when a text is cut.
    """

    vocabulary: str
    context_length: int

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without padding."""
        tokenizer = _tokenizer(self.vocabulary, self.context_length)
        return [
            encoding.ids for encoding in tokenizer.encode_batch([text[:MAX_TEXT_CHARS] for text in texts])
        ]

    def special_id(self, token: str) -> int:
        """Id of one of `SPECIAL_TOKENS`."""
        number: int = _tokenizer(self.vocabulary, self.context_length).token_to_id(token)
        return number


@cache
def _tokenizer(vocabulary: str, context_length: int) -> Any:
    """Built once a process.

    Raises:
        EncoderError: No such file, or one of the special tokens is not in it.
    """
    from tokenizers import BertWordPieceTokenizer  # noqa: PLC0415 - slow to import

    path = Path(vocabulary)
    try:
        pieces = set(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise EncoderError(
            f"the vocabulary {vocabulary!r} cannot be read ({error}); expected BERT's vocab.txt, a word "
            "piece a line."
        ) from error
    missing = [token for token in SPECIAL_TOKENS if token not in pieces]
    if missing:
        raise EncoderError(
            f"the vocabulary {vocabulary!r} lacks {', '.join(missing)}; expected BERT's vocab.txt, a word "
            "piece a line."
        )
    tokenizer = BertWordPieceTokenizer(str(path), lowercase=True)
    tokenizer.enable_truncation(context_length)
    return tokenizer
