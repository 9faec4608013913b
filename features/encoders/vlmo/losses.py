"""VLMo's training losses (arXiv 2111.02358, section 3.3): contrastive, matching, masked language."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from features.encoders.vlmo.model import Towers, Vlmo

MASKED_LANGUAGE_WEIGHT = 0.25
"""Of the masked language loss in the pre-training total; the others have 1."""
IGNORED = -100
"""Label of a token that was not masked."""


def contrastive_logits(model: Vlmo, image: Towers, text: Towers, *, vl: bool) -> Tensor:
    """(B, B) scaled similarities, pictures in rows."""
    scale: Tensor = model.get_parameter("logit_vl_scale" if vl else "logit_scale").exp()
    pictures = model.unit(model.image_embedding(image, vl=vl))
    texts = model.unit(model.text_embedding(text, vl=vl))
    return scale * pictures @ texts.T


def contrastive_loss(model: Vlmo, image: Towers, text: Towers) -> Tensor:
    """Symmetric InfoNCE over the batch's pairs; the mean of both expert paths where both were run."""
    paths = [False, True] if image.vl is not None and text.vl is not None else [False]
    losses = []
    for vl in paths:
        logits = contrastive_logits(model, image, text, vl=vl)
        pairs = torch.arange(len(logits), device=logits.device)
        losses.append((cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs)) / 2)
    return torch.stack(losses).mean()


def draw_negatives(logits: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """For each text another picture, for each picture another text, likely ones first.

    Args:
        logits: (B, B) of `contrastive_logits`, pictures in rows; B of at least 2.
        generator: On the logits' device.

    Returns:
        (B,) pictures for the texts, (B,) texts for the pictures; no gradient passes.

    Raises:
        ValueError: A batch of one has no other picture.
    """
    if len(logits) < 2:
        raise ValueError(f"{len(logits)} pair has no negatives; give a batch of at least 2")
    with torch.no_grad():
        for_texts = logits.T.float().softmax(dim=1).fill_diagonal_(0)
        for_images = logits.float().softmax(dim=1).fill_diagonal_(0)
        least = torch.finfo(torch.float32).tiny  # a batch that is told apart perfectly still has negatives
        off_diagonal = least * (1 - torch.eye(len(logits), device=logits.device))
        pictures = torch.multinomial(for_texts + off_diagonal, 1, generator=generator).flatten()
        texts = torch.multinomial(for_images + off_diagonal, 1, generator=generator).flatten()
    return pictures, texts


def matching_loss(
    model: Vlmo, pixels: Tensor, tokens: Tensor, mask: Tensor, negatives: tuple[Tensor, Tensor]
) -> Tensor:
    """Cross entropy over 3 B fused passes: the pairs, and each text and picture with a wrong partner.

    Args:
        model: With the heads `pooler` and `itm`.
        pixels: (B, 3, H, W).
        tokens: (B, L).
        mask: (B, L), true for real tokens.
        negatives: Of `draw_negatives`.
    """
    pictures, texts = negatives
    joint = model.joint_pass(
        torch.cat([pixels, pixels[pictures], pixels]),
        torch.cat([tokens, tokens, tokens[texts]]),
        torch.cat([mask, mask, mask[texts]]),
    )
    matches = torch.zeros(len(joint), dtype=torch.int64, device=joint.device)
    matches[: len(pixels)] = 1
    return cross_entropy(model.itm_score(model.pooled(joint)), matches)


def masked_language_loss(model: Vlmo, pixels: Tensor, tokens: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the masked words, read beside the picture; not yet weighted.

    Args:
        model: With the head `mlm`.
        pixels: (B, 3, H, W).
        tokens: (B, L) with words masked.
        mask: (B, L), true for real tokens.
        labels: (B, L) the masked words' ids, `IGNORED` elsewhere.
    """
    joint = model.joint_pass(pixels, tokens, mask)
    logits = model.mlm_score(joint[:, : tokens.shape[1]])
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
