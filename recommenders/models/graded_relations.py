"""Alignment guided by graded relations between items, DA-MRS's second one.

Source: Xv, Li, Xie, Lin, Liu, Xia, Kang and Lin, "Improving multi-modal recommender systems by denoising and
aligning multi-modal content and user feedback", KDD 2024, in the form of the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recommenders.graphs import outside_compiler
from recommenders.info_nce import LOG2_E, SAFE_EXPONENT, at_least_float32

BLOCK_NUMBERS = 1 << 20
"""Cosines of a batch's items with all items that are held at once for each graph: 4 MiB."""


@outside_compiler
def graded_relations(rows: Tensor, graphs: Sequence[Tensor], n_positives: int, temperature: float) -> Tensor:
    """Return the mean over graphs and R items of -ln of the shares of the first and of the second grade.

    Let c be an item's cosines with all items by a graph, and its chances their softmax. The K items with the
    largest chances, added up over the graphs with this graph counted twice, are the first grade; of the
    others, the K with the largest chances by this graph alone are the second. The first grade's share is that
    of its exp(c / t) in the sum over all items, the second's that in the sum over all but the first. Which
    items are in a grade gets no gradient.

    Args:
        rows: (R,) distinct items.
        graphs: What each graph makes of all items, (I, D) with rows of length 1.
        n_positives: K; half of the items at most.
        temperature: t.
    """
    n_positives = max(1, min(n_positives, len(graphs[0]) // 2))
    with torch.autocast(rows.device.type, enabled=False):  # its exponentials need float32
        result: Tensor = _GradedRelations.apply(
            rows, n_positives, temperature, *map(at_least_float32, graphs)
        )
        return result


class _GradedRelations(torch.autograd.Function):
    """The value with the gradients, block by block of rows: nothing R x I is kept."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, n_positives: int, temperature: float, *graphs: Tensor) -> Tensor:
        n_terms = len(rows) * len(graphs)
        ctx.gradients = [torch.zeros_like(table) for table in graphs]
        value = graphs[0].new_zeros(())
        block = max(1, BLOCK_NUMBERS // len(graphs[0]))
        for start in range(0, len(rows), block):
            own_rows = rows[start : start + block]
            own = [table.index_select(0, own_rows) for table in graphs]
            cosines = [part @ table.T for part, table in zip(own, graphs, strict=True)]
            chances = [table.softmax(dim=1) for table in cosines]
            total = chances[0].clone()
            for chance in chances[1:]:
                total += chance
            for part, table, gradient, cosine, chance in zip(
                own, graphs, ctx.gradients, cosines, chances, strict=True
            ):
                first = (total + chance).topk(n_positives, dim=1, sorted=False).indices
                second = chance.scatter_(1, first, 0.0).topk(n_positives, dim=1, sorted=False).indices
                losses, scales = _losses_with_gradient(cosine, temperature, first, second)
                value += losses.sum()
                # Of cosines: scales times what now stands in their place.
                scales /= temperature * n_terms
                gradient.index_add_(0, own_rows, (cosine @ table).mul_(scales))
                gradient.addmm_(cosine.T, part * scales)
        return value / n_terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(gradients[0] * part for part in ctx.gradients)


def _losses_with_gradient(
    cosines: Tensor, temperature: float, first: Tensor, second: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the (R, 1) losses of R items, and put their gradient into ``cosines``, but for factors of rows.

    Args:
        cosines: (R, I); afterwards the gradients of the losses with respect to c / t are these times the
            factors.
        temperature: t.
        first: (R, K) the first grade.
        second: (R, K) the second.

    Returns:
        (R, 1) losses and (R, 1) factors.
    """
    of_first, of_second = (cosines.gather(1, grade) / temperature for grade in (first, second))
    in_first, in_second = (values.logsumexp(dim=1, keepdim=True) for values in (of_first, of_second))
    # What follows is in powers of 2, which take a CPU a third of the time of powers of e.
    powers = cosines.mul_(LOG2_E / temperature).scatter_(1, first, -torch.inf)
    largest = powers.new_zeros(len(powers), 1)
    if 1 / temperature > SAFE_EXPONENT:
        largest = powers.amax(dim=1, keepdim=True)
        powers -= largest
    sums = powers.exp2_().sum(dim=1, keepdim=True)
    in_others = sums.log() + largest / LOG2_E
    in_all = torch.logaddexp(in_first, in_others)
    losses = in_all - in_first + in_others - in_second
    scales = (1 + (in_others - in_all).exp()) / sums
    powers.scatter_(1, first, (of_first - in_first).exp() * ((in_first - in_all).exp() - 1) / scales)
    powers.scatter_add_(1, second, -(of_second - in_second).exp() / scales)
    return losses, scales
