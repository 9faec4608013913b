"""Losses shared by the models: ranking of pairs and of batches, and L2."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, softplus

from recommenders.sampling import InBatch
from recommenders.settings import Counts


class LossConfig(BaseModel, frozen=True, extra="forbid"):
    """Which loss trains a model whose paper is about its embeddings, not about its loss."""

    loss: Annotated[Literal["bpr", "softmax", "bce", "directau"], Counts.IF_CHANGED] = Field(
        "bpr",
        description="bpr: positives above negatives; softmax: the positive among the negatives, with "
        "`training.negatives: in-batch` among all of the batch; bce: positives 1, negatives 0; directau: "
        "pairs close and all else spread out, without negatives.",
    )
    temperature: Annotated[PositiveFloat, Counts.IF_CHANGED] = Field(
        1.0, description="What `softmax` divides scores by; smaller means that hard negatives count more."
    )
    uniformity_weight: Annotated[NonNegativeFloat, Counts.IF_CHANGED] = Field(
        1.0, description="Weight gamma of the uniformity in `directau`."
    )


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
    _refuse_without_negatives(scores)
    return bpr_loss_of_leads(scores[:, 1:] - scores[:, :1])


def bpr_loss_of_leads(leads: Tensor) -> Tensor:
    """Return ``bpr_loss`` from x_uj - x_ui, (B, N): how far each negative's score is above the positive's."""
    return softplus(leads).mean()


def bce_loss(scores: Tensor) -> Tensor:
    """Return the mean over positives i of -ln sigmoid(x_ui) and over negatives j of -ln (1 - sigmoid(x_uj)).

    Args:
        scores: (B, 1 + N) scores of the positive (column 0) and of the N negatives of each row.

    Raises:
        ValueError: ``scores`` has no negatives, or is not a matrix.

    Source: He et al., "Neural collaborative filtering", WWW 2017, eq. 7, as a mean over all B (1 + N) terms.
    """
    _refuse_without_negatives(scores)
    return torch.cat([softplus(-scores[:, :1]), softplus(scores[:, 1:])], dim=1).mean()


def softmax_loss(scores: Tensor, temperature: float) -> Tensor:
    """Return the mean over rows of -ln (exp(x_ui / t) / sum over i and all negatives j of exp(x_uj / t)).

    Args:
        scores: (B, 1 + N) scores of the positive (column 0) and of the N negatives of each row.
        temperature: t.

    Raises:
        ValueError: ``scores`` has no negatives, or is not a matrix.

    Source: Wu et al., "On the effectiveness of sampled softmax loss for item recommendation", TOIS 2024,
    without a correction, which negatives drawn uniformly do not need.
    """
    _refuse_without_negatives(scores)
    scaled = scores / temperature
    return (scaled.logsumexp(dim=1) - scaled[:, 0]).mean()


def in_batch_softmax_loss(
    users: Tensor, items: Tensor, temperature: float, *, log_q: Tensor, taken: Tensor
) -> Tensor:
    """Return the softmax loss of each user's positive among those of the batch, freed of sampling bias.

    The mean over rows b of -ln (exp(s_bb) / sum over c of exp(s_bc)), s_bc = u_b . v_c / t - ln q_c: an item
    that is often a negative because it is popular is not pushed down for it. Other items of a user's own
    training pairs are left out of the sum. Needs (B, B) memory.

    Args:
        users: (B, D) user embeddings.
        items: (B, D) embeddings of their positives.
        temperature: t.
        log_q: (B,) logarithm of each positive's chance to be in a batch.
        taken: (B, B) bool: the row's user has the column's item in training.

    Source: Yi et al., "Sampling-bias-corrected neural modeling for large corpus item recommendations", RecSys
    2019, sec. 3, with rewards of 1.
    """
    logits = users @ items.T / temperature - log_q
    own = torch.eye(len(users), dtype=torch.bool, device=users.device)
    logits = logits.masked_fill(taken & ~own, -torch.inf)
    return cross_entropy(logits, torch.arange(len(users), device=users.device))


def directau_loss(users: Tensor, items: Tensor, uniformity_weight: float) -> Tensor:
    """Return how far pairs are apart, plus gamma times how close users, and items, are among themselves.

    With all rows scaled to length 1: the mean over pairs of |u - i|^2 (alignment), plus gamma times the mean
    of the users' and the items' ln mean over b != c of exp(-2 |x_b - x_c|^2) (uniformity).
    Needs (B, B) memory.

    Args:
        users: (B, D) user embeddings; 0 uniformity where B is 1, as there is no other row.
        items: (B, D) embeddings of their positives.
        uniformity_weight: gamma.

    Source: Wang et al., "Towards representation alignment and uniformity in collaborative filtering", KDD
    2022, sec. 4.
    """
    users, items = normalize(users, dim=1), normalize(items, dim=1)
    alignment = (users - items).square().sum(dim=1).mean()
    if len(users) < 2:
        return alignment
    return alignment + uniformity_weight * (_uniformity(users) + _uniformity(items)) / 2


def _uniformity(rows: Tensor) -> Tensor:
    """Return ln mean over b != c of exp(-2 |x_b - x_c|^2) of (B, D) unit rows: |x - y|^2 = 2 - 2 x . y."""
    exponents = 4 * (rows @ rows.T) - 4
    own = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    n_pairs = len(rows) * (len(rows) - 1)
    return exponents.masked_fill(own, -torch.inf).flatten().logsumexp(dim=0) - math.log(n_pairs)


def _refuse_without_negatives(scores: Tensor) -> None:
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores is {tuple(scores.shape)}; expected (B, 1 + N) with N >= 1 negatives.")


def reads_negatives(config: LossConfig, in_batch: InBatch | None) -> bool:
    """Tell whether the loss looks at the negatives of a batch; if not, their rows need not be gathered."""
    return config.loss in ("bpr", "bce") or (config.loss == "softmax" and in_batch is None)


def loss_of_pairs(
    config: LossConfig, scores: Tensor, users: Tensor, items: Tensor, in_batch: InBatch | None
) -> Tensor:
    """Return the loss that the settings name, without regularisation.

    Args:
        config: Settings.
        scores: (B, 1 + N) scores of the positive and the negatives of each row; (B, 1) for a loss that reads
            no negatives.
        users: (B, D) user embeddings.
        items: (B, D) embeddings of the positives, whose products with ``users`` are ``scores[:, 0]``.
        in_batch: As in the batch.
    """
    match config.loss:
        case "bpr":
            return bpr_loss(scores)
        case "bce":
            return bce_loss(scores)
        case "directau":
            return directau_loss(users, items, config.uniformity_weight)
        case "softmax":
            if in_batch is None:
                return softmax_loss(scores, config.temperature)
            return in_batch_softmax_loss(
                users, items, config.temperature, log_q=in_batch.log_q, taken=in_batch.taken
            )


def half_squared_norm(*tensors: Tensor) -> Tensor:
    """Return half of the sum of squares of all entries: its gradient is the tensor itself.

    Rendle et al. (UAI 2009, fig. 4) and He and McAuley (AAAI 2016, sec. "Learning") state regularisation by
    that gradient, ``lambda * theta``; half a square is the penalty it belongs to.
    """
    result: Tensor = _HalfSquaredNorm.apply(*tensors)
    return result


class _HalfSquaredNorm(torch.autograd.Function):
    """The gradient in one pass over the numbers: that of a square, of a sum and of a factor take three."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return 0.5 * torch.stack([tensor.square().sum() for tensor in tensors]).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor * gradients[0].to(tensor.dtype) for tensor in ctx.saved_tensors)
