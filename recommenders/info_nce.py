"""InfoNCE: each anchor is to tell the row that belongs with it from all others, by their inner products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recommenders.graphs import outside_compiler

_BLOCK_ANCHORS = 768
"""Anchors compared at once on a CPU: their products with 2,048 others, 6 MiB, fit its cache."""
_LINE = 16
"""Numbers in a cache line."""
LOG2_E = math.log2(math.e)
SAFE_EXPONENT = 60.0
"""exp of this and the sum of 10^12 such numbers are finite in float32, and exp of its negative is no zero."""


def info_nce(anchors: Tensor, others: Tensor, temperature: float) -> Tensor:
    """Return the mean over rows b of -ln (exp(a_b . o_b / t) / sum over c of exp(a_b . o_c / t)).

    Args:
        anchors: (B, D); callers that mean cosines hand in rows of length 1.
        others: (C, D), C >= B: row b belongs with ``anchors[b]``, all rows beside it are its negatives.
        temperature: t.

    Source: van den Oord et al., "Representation learning with contrastive predictive coding", 2018, eq. 4.
    """
    return _mean_over_pairs(anchors, others, temperature, None)


def info_nce_of_pairs(
    anchors: Tensor, others: Tensor, temperature: float, pairs: tuple[Tensor, Tensor]
) -> Tensor:
    """Return ``info_nce(anchors[rows], others[columns], t)``, comparing rows that come again only once.

    Of 2,048 interactions of Amazon Baby, 1,905 users and 1,460 items are distinct, so that a third of all
    products would come again.

    Args:
        anchors: (R, D).
        others: (S, D).
        temperature: t.
        pairs: (B,) rows of ``anchors`` and (B,) rows of ``others`` that belong together.
    """
    return _mean_over_pairs(anchors, others, temperature, pairs)


@outside_compiler
def _mean_over_pairs(
    anchors: Tensor, others: Tensor, temperature: float, pairs: tuple[Tensor, Tensor] | None
) -> Tensor:
    with torch.autocast(anchors.device.type, enabled=False):  # its exponentials need float32
        result: Tensor = _InfoNce.apply(
            at_least_float32(anchors), at_least_float32(others), temperature, pairs
        )
        return result


def at_least_float32(rows: Tensor) -> Tensor:
    """Return rows in half precision as float32, others as they are."""
    return rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows


class _InfoNce(torch.autograd.Function):
    """The value with both gradients, which need the same products and shares, kept in their place."""

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, others: Tensor, temperature: float, pairs: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        scaled = anchors / temperature
        if pairs is None:
            n_pairs = len(anchors)
            sums = _log_sums(scaled, others, scaled.new_ones(n_pairs, 1), others.new_ones(len(others), 1))
            own = (scaled * others[:n_pairs]).sum()
            sums.to_anchors.sub_(others[:n_pairs])
            sums.to_others[:n_pairs].sub_(scaled)
        else:
            rows, columns = pairs
            n_pairs = len(rows)
            times = (
                torch.bincount(at, minlength=len(table))
                for at, table in zip(pairs, (anchors, others), strict=True)
            )
            sums = _log_sums(scaled, others, *(count.to(scaled.dtype).unsqueeze(1) for count in times))
            of_rows, of_columns = scaled.index_select(0, rows), others.index_select(0, columns)
            own = (of_rows * of_columns).sum()
            sums.to_anchors.index_add_(0, rows, of_columns, alpha=-1)
            sums.to_others.index_add_(0, columns, of_rows, alpha=-1)
        ctx.gradients = (sums.to_anchors.div_(n_pairs * temperature), sums.to_others.div_(n_pairs))
        return (sums.value - own) / n_pairs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradients[0] * part for part in ctx.gradients), None, None


@dataclass(frozen=True, eq=False)
class _LogSums:
    """The sum over r of n_r ln (sum over c of m_c exp(a_r . o_c)), and its gradients."""

    value: Tensor
    to_anchors: Tensor
    """(R, D)."""
    to_others: Tensor
    """(S, D)."""


def _log_sums(anchors: Tensor, others: Tensor, n: Tensor, m: Tensor) -> _LogSums:
    """Go block by block of anchors: nothing (R, S) is kept.

    Args:
        anchors: (R, D), a.
        others: (S, D), o.
        n: (R, 1).
        m: (S, 1).
    """
    step = _BLOCK_ANCHORS if anchors.device.type == "cpu" else max(len(anchors), 1)
    # By Cauchy-Schwarz; cosines need no search for the largest product. A GPU would have to wait.
    bounded = anchors.device.type == "cpu" and len(anchors) > 0
    bounded = bounded and bool(_longest(anchors) * _longest(others) < SAFE_EXPONENT)
    to_anchors, to_others = torch.empty_like(anchors), torch.zeros_like(others)
    repeated = others * m
    # One for all blocks, so that it stays in a CPU's cache; each row starts where a cache line does.
    width = -(-len(others) // _LINE) * _LINE
    products = anchors.new_empty(min(step, len(anchors)), width)[:, : len(others)]
    value = anchors.new_zeros(())
    for start in range(0, len(anchors), step):
        block, times = anchors[start : start + step], n[start : start + step]
        # As powers of 2, which take a CPU a third of the time of powers of e.
        shares = torch.mm(block * LOG2_E, others.T, out=products[: len(block)])
        if not bounded:
            shares.masked_fill_(m.T == 0, -torch.inf)  # or it may be the largest, and all others 0
            largest = shares.amax(dim=1, keepdim=True)
            value += (largest * times).sum() / LOG2_E
            shares -= largest
        totals = shares.exp2_() @ m
        value += (totals.log() * times).sum()
        scales = times / totals
        torch.mm(shares, repeated, out=to_anchors[start : start + step]).mul_(scales)
        to_others.addmm_(shares.T, block * scales)
    return _LogSums(value, to_anchors, to_others.mul_(m))


def _longest(rows: Tensor) -> Tensor:
    """Return the length of the longest row."""
    return rows.square().sum(dim=1).max().sqrt()
