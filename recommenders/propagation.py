"""Products of sparse graphs with dense tables that gradients pass through, and what is kept between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

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
        result: Tensor = _BipartiteProduct.apply(items, *self.by_user, *self.by_item)
        return result

    @outside_compiler
    def to_items(self, users: Tensor) -> Tensor:
        """Return (I, D), each item's weighted sum of its users' rows in a (U, D) table."""
        result: Tensor = _BipartiteProduct.apply(users, *self.by_item, *self.by_user)
        return result

    @property
    def by_user(self) -> tuple[Tensor, Tensor, Tensor]:
        """Columns, starts and weights of the rows, as ``bag_sums`` takes them."""
        return self.user_items, self.user_starts, self.user_weights

    @property
    def by_item(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same of the columns."""
        return self.item_users, self.item_starts, self.item_weights


def spread_from_items(matrix: UserItemMatrix, items: Tensor, n_layers: int) -> tuple[Tensor, Tensor]:
    """Return what the sum over layers 0 to L makes of items' rows when users start at zero; no gradients.

    Of each layer only one side is not zero, so this takes L products with R or R', half of a walk over the
    whole graph: the sum of (R R')^j over the even layers 2j, and R' times that over the odd ones, by Horner's
    rule. As layers are linear, this plus what spreads from users is L + 1 times `mean_propagation` of both.

    Args:
        matrix: R, (U, I); its transpose is its other side.
        items: (I, D).
        n_layers: L, 0 or more.

    Returns:
        (U, D) and (I, D).
    """
    near, far = _Walk.from_items(matrix).spread(items, n_layers)
    return far, near


class SpreadRows(NamedTuple):
    """Rows of R users and of S items, (R, D) and (S, D)."""

    own: tuple[Tensor, Tensor]
    """As they stand in the tables."""
    from_users: tuple[Tensor, Tensor]
    """What the sum over layers makes of the users' table when items start at zero."""
    from_items: tuple[Tensor, Tensor]
    """What it makes of the items' table when users start at zero."""


@outside_compiler
def spread_rows(
    matrix: UserItemMatrix, tables: tuple[Tensor, Tensor], n_layers: int, rows: tuple[Tensor, Tensor]
) -> SpreadRows:
    """Return rows of both sides' tables, and of what ``spread_from_items`` and its mirror make of them.

    Gradients reach the tables; a backward pass fills one table a side for all three.

    Args:
        matrix: R, (U, I).
        tables: Users' (U, D) and items' (I, D).
        n_layers: L, 0 or more.
        rows: (R,) users and (S,) items.
    """
    found: tuple[Tensor, ...] = _SpreadRows.apply(matrix, n_layers, *tables, *rows)
    return SpreadRows((found[0], found[1]), (found[2], found[3]), (found[4], found[5]))


class _SpreadRows(torch.autograd.Function):
    """The maps of each side onto both, and their transposes."""

    @staticmethod
    def forward(
        ctx: Any, matrix: UserItemMatrix, n_layers: int, users: Tensor, items: Tensor, *rows: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.walks = from_users, from_items = _Walk.from_users(matrix), _Walk.from_items(matrix)
        ctx.n_layers, ctx.rows = n_layers, rows
        of_users, of_items = from_users.spread(users, n_layers), from_items.spread(items, n_layers)
        tables = (users, items, *of_users, *reversed(of_items))
        return tuple(table.index_select(0, rows[place % 2]) for place, table in enumerate(tables))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        users, items = ctx.rows
        own_users, own_items, users_of_users, items_of_users, users_of_items, items_of_items = gradients
        from_users, from_items = ctx.walks
        of_users = from_users.spread_back((users, users_of_users), (items, items_of_users), ctx.n_layers)
        of_items = from_items.spread_back((items, items_of_items), (users, users_of_items), ctx.n_layers)
        of_users.index_add_(0, users, own_users)
        of_items.index_add_(0, items, own_items)
        return None, None, of_users, of_items, None, None


@dataclass(frozen=True, eq=False)
class _Walk:
    """Products that lead from one side of a matrix, the near one, to the other and back; no gradients."""

    near: tuple[Tensor, Tensor, Tensor]
    """Columns, starts and weights of the near side's rows."""
    far: tuple[Tensor, Tensor, Tensor]
    """Those of the far side's."""

    @staticmethod
    def from_users(matrix: UserItemMatrix) -> _Walk:
        return _Walk(matrix.by_user, matrix.by_item)

    @staticmethod
    def from_items(matrix: UserItemMatrix) -> _Walk:
        return _Walk(matrix.by_item, matrix.by_user)

    def to_near(self, far: Tensor) -> Tensor:
        return bag_sums(*self.near, far.contiguous())

    def to_far(self, near: Tensor) -> Tensor:
        return bag_sums(*self.far, near.contiguous())

    def spread(self, near: Tensor, n_layers: int) -> tuple[Tensor, Tensor]:
        """Return both sides' sums over layers 0 to L; the far side's rows start at zero."""
        if not n_layers:
            return near, near.new_zeros(self._n_far, near.shape[1])
        total = self._even_layers(near, n_layers)
        far = self.to_far(total)
        return (total if n_layers % 2 else self.to_near(far).add_(near)), far

    def spread_back(self, near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor], n_layers: int) -> Tensor:
        """Return the transpose of ``spread``: the gradient of its table from those of rows of each side.

        Args:
            near: Rows of the near side and their gradients.
            far: The same of the far side.
            n_layers: L.
        """
        if n_layers % 2:
            total = self.to_near(_scattered(far, self._n_far)).index_add_(0, *near)
            return self._even_layers(total, n_layers)
        of_near = _scattered(near, self._n_near)
        if not n_layers:
            return of_near
        of_far = self.to_far(of_near).index_add_(0, *far)
        return self._even_layers(self.to_near(of_far), n_layers).add_(of_near)

    def _even_layers(self, near: Tensor, n_layers: int) -> Tensor:
        """Return the sum over those of layers 0, 2, ... before the last odd one; a symmetric map."""
        total = near
        for _ in range((n_layers + 1) // 2 - 1):
            total = self.to_near(self.to_far(total)).add_(near)
        return total

    @property
    def _n_near(self) -> int:
        return len(self.near[1]) - 1

    @property
    def _n_far(self) -> int:
        return len(self.far[1]) - 1


def _scattered(rows: tuple[Tensor, Tensor], n_rows: int) -> Tensor:
    """Return zeros (N, D) with rows (R,) and what is in them, (R, D), added up."""
    return rows[1].new_zeros(n_rows, rows[1].shape[1]).index_add_(0, *rows)


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
