"""Losses shared by the models: pairwise ranking and L2, on tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


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
