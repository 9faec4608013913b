"""Products of sparse graphs with dense tables that gradients pass through, and what is kept between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from recommenders.feature_input import FeatureTable
from recommenders.graphs import UserItemGraph, bag_sums, outside_compiler, sparse_product
from recommenders.item_graphs import SeenFeatures, are_live

Kept = TypeVar("Kept")


@outside_compiler
def symmetric_product(adjacency: Tensor, table: Tensor) -> Tensor:
    """Return ``A x``, (N, D); gradients reach x.

    Args:
        adjacency: (N, N) sparse CSR, equal to its transpose, so that the gradient is the same product.
        table: (N, D), x.
    """
    result: Tensor = _SymmetricProduct.apply(adjacency, table)
    return result


class _SymmetricProduct(torch.autograd.Function):
    """y = A x with A' = A, so that dx = A dy."""

    @staticmethod
    def forward(ctx: Any, adjacency: Tensor, table: Tensor) -> Tensor:
        ctx.adjacency = adjacency
        return sparse_product(adjacency, table.contiguous())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, symmetric_product(ctx.adjacency, gradients[0])


class UserItemMatrix(nn.Module):
    """A (U, I) sparse matrix with an entry for each training pair, and its transpose, ready to multiply."""

    user_starts: Tensor
    user_items: Tensor
    user_weights: Tensor
    item_starts: Tensor
    item_users: Tensor
    item_weights: Tensor

    def __init__(self, graph: UserItemGraph, weights: Tensor) -> None:
        """Take the weights (E,) in the order of the graph's pairs; nothing of it is saved."""
        super().__init__()
        self.n_users, self.n_items = graph.n_users, graph.n_items
        of_user, of_item = graph.degrees()
        arrays = {
            "user_starts": _starts(of_user),
            "user_items": graph.items.int(),
            "user_weights": weights.float(),
            "item_starts": _starts(of_item),
            "item_users": graph.users[graph.by_item].int(),
            "item_weights": weights.float()[graph.by_item],
        }
        for name, values in arrays.items():
            self.register_buffer(name, values, persistent=False)

    @staticmethod
    def symmetric(graph: UserItemGraph) -> UserItemMatrix:
        """Return the matrix of 1 / sqrt(degree(u) degree(i)): LightGCN's, without its square form."""
        of_user, of_item = graph.degrees()
        return UserItemMatrix(graph, (of_user[graph.users] * of_item[graph.items]).double().rsqrt())

    @staticmethod
    def mean(graph: UserItemGraph) -> UserItemMatrix:
        """Return the matrix of 1 / degree(u), whose product with items is the mean over a user's items."""
        return UserItemMatrix(graph, graph.degrees()[0][graph.users].double().reciprocal())

    @outside_compiler
    def to_users(self, items: Tensor) -> Tensor:
        """Return (U, D), each user's weighted sum of its items' rows in an (I, D) table."""
        result: Tensor = _BipartiteProduct.apply(items, *self._by_user(), *self._by_item())
        return result

    @outside_compiler
    def to_items(self, users: Tensor) -> Tensor:
        """Return (I, D), each item's weighted sum of its users' rows in a (U, D) table."""
        result: Tensor = _BipartiteProduct.apply(users, *self._by_item(), *self._by_user())
        return result

    def _by_user(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.user_items, self.user_starts, self.user_weights

    def _by_item(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.item_users, self.item_starts, self.item_weights


def spread_from_users(matrix: UserItemMatrix, users: Tensor, n_layers: int) -> tuple[Tensor, Tensor]:
    """Return what the sum over layers 0 to L makes of users' rows when items start at zero.

    Of each layer only one side is not zero, so this takes L products with R or R', half of a walk over the
    whole graph: the sum of (R R')^j over the even layers 2j, and R' times that over the odd ones, by Horner's
    rule. As layers are linear, this plus ``spread_from_items`` is L + 1 times `mean_propagation` of both.

    Args:
        matrix: R, (U, I); its transpose is its other side.
        users: (U, D).
        n_layers: L, 0 or more.

    Returns:
        (U, D) and (I, D).
    """
    return _spread(matrix.to_users, matrix.to_items, users, n_layers, matrix.n_items)


def spread_from_items(matrix: UserItemMatrix, items: Tensor, n_layers: int) -> tuple[Tensor, Tensor]:
    """Return, (U, D) and (I, D), what layers make of items' rows (I, D) when users start at zero."""
    near, far = _spread(matrix.to_items, matrix.to_users, items, n_layers, matrix.n_users)
    return far, near


def _spread(
    to_near: Callable[[Tensor], Tensor],
    to_far: Callable[[Tensor], Tensor],
    near: Tensor,
    n_layers: int,
    n_far: int,
) -> tuple[Tensor, Tensor]:
    """Spread from the side where rows are; the far side's rows start at zero."""
    if not n_layers:
        return near, near.new_zeros(n_far, near.shape[1])
    total = near  # over layers 0, 2, ... of those before the last odd one
    for _ in range((n_layers + 1) // 2 - 1):
        total = near + to_near(to_far(total))
    far = to_far(total)
    return (total if n_layers % 2 else near + to_near(far)), far


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


class _BipartiteProduct(torch.autograd.Function):
    """y = R x, dx = R' dy, with R and R' both given by columns, starts and weights."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, *sides: Tensor) -> Tensor:
        ctx.sides = sides
        columns, starts, weights, *_ = sides
        return bag_sums(columns, starts, weights, table.contiguous())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        forth, back = ctx.sides[:3], ctx.sides[3:]
        result: Tensor = _BipartiteProduct.apply(gradients[0], *back, *forth)
        return result, *([None] * 6)


class KeptFor(Generic[Kept]):
    """What was made from a feature table, made anew for another table.

    While rows are live, as in joint training, where the table is another in every batch, it stays as it is
    until ``refresh``. A measurement on another table leaves no trace in the training.
    """

    def __init__(self, make: Callable[[FeatureTable], Kept], features: FeatureTable) -> None:
        self._make = make
        self.refresh(features)

    def of(self, features: FeatureTable, *, training: bool) -> Kept:
        """Return what belongs to these features."""
        if self._seen.are(features) or (training and are_live(features)):
            return self._kept
        if training:
            self.refresh(features)
            return self._kept
        with torch.no_grad():
            return self._make(features)

    def refresh(self, features: FeatureTable) -> None:
        """Make it anew from these features."""
        with torch.no_grad():
            self._kept = self._make(features)
        self._seen = SeenFeatures(features)
