"""Losses shared by the models: pairwise ranking, contrast within a batch, and L2, on tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

_BLOCK_ANCHORS = 512
"""Anchors compared at once on a CPU: their products with 2,048 others, 4 MiB, fit its cache."""
_SAFE_EXPONENT = 60.0
"""exp of this and the sum of 10^12 such numbers are finite in float32, and exp of its negative is no zero."""


def pair_scores(users: Tensor, items: Tensor) -> Tensor:
    """Score each user against the items of its own row.

    Args:
        users: (B, D) user embeddings.
        items: (B, K, D) item embeddings; row b belongs with ``users[b]``.

    Returns:
        (B, K) inner products.
    """
    return (users.unsqueeze(1) * items).sum(dim=-1)


def bpr_loss(scores: Tensor) -> Tensor:
    """Return the mean of -ln sigmoid(x_ui - x_uj) over all pairs of a positive i and a negative j.

    ``-ln sigmoid(x)`` is ``softplus(-x)``, which does not overflow where the model is badly wrong.

    Args:
        scores: (B, 1 + N) scores of the positive (column 0) and of the N negatives of each row.

    Raises:
        ValueError: ``scores`` has no negatives, or is not a matrix.

    Source: Rendle et al., "BPR", UAI 2009, BPR-OPT (sec. 4.1), as a mean instead of a sum so that the
    learning rate does not depend on the batch size.
    """
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores is {tuple(scores.shape)}; expected (B, 1 + N) with N >= 1 negatives.")
    return softplus(scores[:, 1:] - scores[:, :1]).mean()


def half_squared_norm(*tensors: Tensor) -> Tensor:
    """Return half of the sum of squares of all entries: its gradient is the tensor itself.

    Rendle et al. (UAI 2009, fig. 4) and He and McAuley (AAAI 2016, sec. "Learning") state regularisation by
    that gradient, ``lambda * theta``; half a square is the penalty it belongs to.
    """
    return 0.5 * torch.stack([tensor.square().sum() for tensor in tensors]).sum()


def info_nce(anchors: Tensor, others: Tensor, temperature: float) -> Tensor:
    """Return the mean over rows b of -ln (exp(a_b . o_b / t) / sum over c of exp(a_b . o_c / t)).

    Args:
        anchors: (B, D); callers that mean cosines hand in rows of length 1.
        others: (C, D), C >= B: row b belongs with ``anchors[b]``, all rows beside it are its negatives.
        temperature: t.

    Source: van den Oord et al., "Representation learning with contrastive predictive coding", 2018, eq. 4.
    """
    result: Tensor = _InfoNce.apply(anchors, others, temperature)
    return result


class _InfoNce(torch.autograd.Function):
    """The softmax of the products gives both gradients, block by block of anchors: nothing (B, C) is kept."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, others: Tensor, temperature: float) -> Tensor:
        n_rows = len(anchors)
        step = _BLOCK_ANCHORS if anchors.device.type == "cpu" else max(n_rows, 1)
        scaled = anchors / temperature
        # By Cauchy-Schwarz; cosines need no search for the largest product. A GPU would have to wait.
        bounded = anchors.device.type == "cpu" and n_rows > 0
        bounded = bounded and bool(_longest(scaled) * _longest(others) < _SAFE_EXPONENT)
        to_anchors, to_others = torch.zeros_like(anchors), torch.zeros_like(others)
        losses = []
        for start in range(0, n_rows, step):
            block = scaled[start : start + step]
            products = block @ others.T
            own = products.diagonal(start).clone()
            if not bounded:
                largest = products.amax(dim=1, keepdim=True)
                own -= largest.squeeze(1)
                products -= largest
            shares = products.exp_()
            totals = shares.sum(dim=1, keepdim=True)
            losses.append(totals.squeeze(1).log() - own)
            to_anchors[start : start + step] = (shares @ others) / totals
            to_others.addmm_(shares.T, block / totals)
        to_anchors -= others[:n_rows]
        to_others[:n_rows] -= scaled
        ctx.gradients = (to_anchors / (n_rows * temperature), to_others / n_rows)
        return torch.cat(losses).mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        to_anchors, to_others = (gradients[0] * part for part in ctx.gradients)
        return to_anchors, to_others, None


def _longest(rows: Tensor) -> Tensor:
    """Return the length of the longest row."""
    return rows.square().sum(dim=1).max().sqrt()
