"""VLMo's matching and masked-word losses over chunks: the joint passes give outputs, the heads a loss.

The same as `features.encoders.vlmo.losses` gives for a batch that is run whole.

Source: Bao et al., "VLMo", NeurIPS 2022, sec. 3.3; the share of masks, random and kept words is BERT's
(Devlin et al., 2019, sec. 3.1).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from features.encoders.vlmo.encoder import VlmoEncoder
from features.encoders.vlmo.losses import IGNORED
from features.encoders.vlmo.model import Vlmo
from features.encoders.word_pieces import SPECIAL_TOKENS, WordPieceTokenizer
from features.errors import FeatureError
from features.gradient_cache import Pass

Enter = Callable[[Callable[[], Tensor]], Pass]
"""Wraps a pass in what it runs in, such as automatic mixed precision."""

_MASKED, _RANDOM = 0.8, 0.1
"""Of the words to be told; the others stay as they are."""


def check_heads(encoder: VlmoEncoder, *heads: str) -> None:
    """Refuse an objective whose heads a checkpoint lacks.

    Raises:
        FeatureError: It names them.
    """
    missing = [head for head in heads if head not in encoder.model.heads]
    if missing:
        raise FeatureError(
            f"encoder {encoder.info.spec!r} has no head {', '.join(missing)}; take a checkpoint with it, or "
            "set the weight of that objective to 0."
        )


def matching_passes(
    model: Vlmo, pixels: Tensor, tokens: Tensor, negatives: tuple[Tensor, Tensor], *, size: int, enter: Enter
) -> list[Pass]:
    """Passes whose outputs are (3 B, D): the pairs, each text with a wrong picture, each picture with one.

    Args:
        model: With a pooler.
        pixels: (B, 3, H, W).
        tokens: (B, L), -1 where there is padding.
        negatives: Of `draw_negatives`: (B,) pictures for the texts, (B,) texts for the pictures.
        size: Rows of a chunk.
        enter: What a pass runs in.
    """
    own = torch.arange(len(pixels), device=pixels.device)
    pictures = torch.cat([own, negatives[0], own])
    texts = torch.cat([own, own, negatives[1]])

    def joint(some: slice) -> Pass:
        def run() -> Tensor:
            words = tokens[texts[some]]
            return model.pooled(model.joint_pass(pixels[pictures[some]], words.clamp(min=0), words >= 0))

        return enter(run)

    return [joint(slice(start, start + size)) for start in range(0, len(pictures), size)]


def matching_loss(model: Vlmo, pooled: Tensor) -> Tensor:
    """(3 B, D) of `matching_passes` -> cross entropy of whether picture and text belong together."""
    matches = torch.zeros(len(pooled), dtype=torch.int64, device=pooled.device)
    matches[: len(pooled) // 3] = 1
    scores: Tensor = model.itm_score(pooled)
    return cross_entropy(scores.float(), matches)


def mask_words(
    tokens: Tensor, tokenizer: WordPieceTokenizer, vocabulary: int, share: float
) -> tuple[Tensor, Tensor]:
    """Hide words, drawn from torch's global generator of the tokens' device.

    Args:
        tokens: (B, L), -1 where there is padding.
        tokenizer: Knows the mask and the special tokens, which are never hidden.
        vocabulary: Ids in all, that random words are drawn from.
        share: Of the words that are to be told.

    Returns:
        (B, L) tokens with words hidden, and (B, L) labels: the hidden ids, `IGNORED` elsewhere.
    """
    special = torch.tensor([tokenizer.special_id(each) for each in SPECIAL_TOKENS], device=tokens.device)
    told = (torch.rand(tokens.shape, device=tokens.device) < share) & (tokens >= 0)
    told &= ~torch.isin(tokens, special)
    draw = torch.rand(tokens.shape, device=tokens.device)
    random = torch.randint(vocabulary, tokens.shape, device=tokens.device)
    mask_id = tokenizer.special_id("[MASK]")
    hidden = torch.where(told & (draw < _MASKED), mask_id, tokens)
    hidden = torch.where(told & (draw >= _MASKED) & (draw < _MASKED + _RANDOM), random, hidden)
    return hidden, torch.where(told, tokens, IGNORED)


def masked_passes(
    model: Vlmo, pixels: Tensor, tokens: Tensor, labels: Tensor, *, size: int, enter: Enter
) -> list[Pass]:
    """Passes whose outputs are the (W, D) states of the W hidden words, read beside their pictures."""

    def joint(some: slice) -> Pass:
        def run() -> Tensor:
            words = tokens[some]
            states = model.joint_pass(pixels[some], words.clamp(min=0), words >= 0)
            return states[:, : words.shape[1]][labels[some] != IGNORED]

        return enter(run)

    return [joint(slice(start, start + size)) for start in range(0, len(tokens), size)]


def masked_loss(model: Vlmo, states: Tensor, labels: Tensor) -> Tensor:
    """(W, D) of `masked_passes` and (B, L) labels -> mean cross entropy of a hidden word; 0 for no words."""
    if not len(states):
        return states.sum()
    words: Tensor = model.mlm_score(states)
    return cross_entropy(words.float(), labels[labels != IGNORED])
