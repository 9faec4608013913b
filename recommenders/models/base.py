"""What every recommender can do, whatever its paper."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from recommenders.errors import RecommenderError
from recommenders.feature_input import FeatureTable
from recommenders.interactions import Interactions
from recommenders.sampling import Batch

_SHORTEST = 1e-12
"""What the length of a row of zeros counts as."""

Scorer = Callable[[Tensor], Tensor]
"""Takes (B,) int64 user rows and returns their (B, I) scores of all items, higher is better."""


class Recommender(nn.Module, ABC):
    """A module that ranks items for users from interactions and, where its paper says so, item features.

    Features are an argument of each call and never kept: in two-stage training the table is a constant, in
    joint training some of its rows carry gradient. A model learns from the table given to its constructor
    only how wide each modality is.

    Raises:
        RecommenderError: The model reads features and there are none, or they are not the items of ``train``.
    """

    scoring: ClassVar[Literal["inner_product", "neighbours"]] = "inner_product"
    """How scores come about. "neighbours" has no embeddings: ``forward`` raises, no index can be built."""
    needs_features: ClassVar[bool] = False
    """Whether the features can change the scores."""
    scores_pairs: ClassVar[bool] = False
    """Whether ``score_pairs`` is there and cheap enough to be asked in every step, as hard negatives do."""

    @abstractmethod
    def __init__(
        self, train: Interactions, features: FeatureTable, config: BaseModel, rng: np.random.Generator
    ) -> None:
        super().__init__()
        self.n_users = train.n_users
        self.n_items = train.n_items
        if not self.needs_features:
            return
        name = type(self).__name__
        if not features.modalities:
            raise RecommenderError(
                f"{name} reads item features and was given none; "
                "expected at least one modality; name a feature set for the run, or choose another model."
            )
        if features.n_items != self.n_items:
            raise RecommenderError(
                f"{name} was given features of {features.n_items} items, interactions of {self.n_items}; "
                "expected one row an item; align the feature sets with this dataset."
            )

    @property
    def is_trainable(self) -> bool:
        """Whether there is anything for gradients to change."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def reads_negatives(self) -> bool:
        """Whether the loss looks at a batch's negatives; if not, joint training does not encode them."""
        return True

    @abstractmethod
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Return (U, D) user and (I, D) item embeddings; a score is their inner product."""

    def loss(self, batch: Batch, features: FeatureTable) -> Tensor:  # noqa: ARG002 - a model without parameters has no loss
        """Return the scalar to minimise on one batch, regularisation included."""
        raise TypeError(f"{type(self).__name__} has no parameters, so there is no loss to minimise.")

    def score_pairs(self, users: Tensor, items: Tensor, features: FeatureTable) -> Tensor:  # noqa: ARG002 - as above
        """Score items, (B, K) rows, for users, (B,) rows, without gradients, as the model is now.

        Raises:
            TypeError: The model is none that ``scores_pairs``.
        """
        raise TypeError(f"{type(self).__name__} scores all items of a user or none; ask its scorer.")

    def working_bytes(self, n_pairs: int, n_negatives: int) -> int:
        """Estimate the memory of one step beside parameters, gradients and optimiser, within a factor of 2.

        Here: the embeddings of a batch and what the loss makes of them; and, of a model with a graph, three
        layers of its whole tables with their gradients. A model that computes much more than that adds it.

        Args:
            n_pairs: B, rows of a batch.
            n_negatives: N, negatives of each row.
        """
        widths = [parameter.shape[-1] for parameter in self.parameters() if parameter.ndim > 1]
        # Rows gathered, multiplied, squared, and the gradients of the first.
        of_batch = 4 * n_pairs * (2 + n_negatives) * max(widths, default=1) * 4
        has_graph = any(True for _ in self.buffers())
        return of_batch + (6 * sum(parameter.nbytes for parameter in self.parameters()) if has_graph else 0)

    def start_epoch(self, features: FeatureTable) -> None:
        """Prepare an epoch: draw edges anew, rebuild what follows the parameters; most models need nothing.

        Training calls this before the first batch of each epoch. What is drawn comes from torch's global
        stream, which training seeds, and keeps in its checkpoints.
        """

    def refresh_graph(self, features: FeatureTable) -> None:
        """Rebuild what was derived from features whose rows have changed since; most models need nothing.

        Joint training calls this on its schedule: while rows are live, a graph between items stays as it is.
        """

    @torch.no_grad()
    def scorer(self, features: FeatureTable) -> Scorer:
        """Do all work that does not depend on the user once, and return what scores blocks of users."""
        users, items = (embeddings.detach() for embeddings in self(features))
        return lambda rows: users[rows] @ items.T


def batch_items(batch: Batch) -> Tensor:
    """Return (B, 1 + N) item rows: the positive of each row, then its negatives."""
    return torch.cat([batch.positives.unsqueeze(1), batch.negatives], dim=1)


def rows_of(table: Tensor, rows: Tensor) -> Tensor:
    """Return ``table[rows]``, (*rows.shape, D), by the gather whose backward is the fastest on a CPU.

    The backward of ``table[rows]`` sorts the rows; that of ``index_select`` adds them up as they come (0.3 ms
    against 0.9 for 6,144 rows of 64).
    """
    return table.index_select(0, rows.reshape(-1)).reshape(*rows.shape, *table.shape[1:])


def rows_minus_first(table: Tensor, rows: Tensor) -> Tensor:
    """Return ``table[rows[b, n]] - table[rows[b, 0]]`` for n >= 1, row after row, (B N, D).

    Args:
        table: (R, D); one in half precision is subtracted in float32.
        rows: (B, 1 + N).
    """
    if table.dtype in (torch.float16, torch.bfloat16):
        lead = rows_of(table, rows[:, 1:]).float() - rows_of(table, rows[:, :1]).float()
        return lead.flatten(0, 1)
    first = rows[:, :1].expand(-1, rows.shape[1] - 1)
    pairs = torch.stack([first, rows[:, 1:]], dim=-1).reshape(-1, 2)
    signs = torch.tensor([-1.0, 1.0], dtype=table.dtype, device=rows.device).expand(len(pairs), 2)
    # As sums of bags of two, which write no copy of either row: a third faster on a CPU.
    return embedding_bag(pairs, table, mode="sum", per_sample_weights=signs)


def unit_rows(table: Tensor) -> Tensor:
    """Return (R, D) rows scaled to length 1, as torch's ``normalize`` does, with a third of its backward."""
    unit: Tensor = _UnitRows.apply(table)
    return unit


class _UnitRows(torch.autograd.Function):
    """y = x / |x|, so that dx = (dy - y (y . dy)) / |x|."""

    @staticmethod
    def forward(ctx: Any, table: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(table, dim=1, keepdim=True).clamp_min(_SHORTEST)
        unit: Tensor = table / lengths
        ctx.save_for_backward(unit, lengths)
        return unit

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        unit, lengths = ctx.saved_tensors
        along = (gradients[0] * unit).sum(dim=1, keepdim=True)
        result: Tensor = torch.addcmul(gradients[0], unit, along, value=-1) / lengths
        return result


def xavier_uniform(rng: np.random.Generator, *shape: int) -> nn.Parameter:
    """Draw a float32 matrix from U(-a, a), a = sqrt(6 / (rows + columns)).

    Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks",
    AISTATS 2010, eq. 16.
    """
    bound = np.sqrt(6.0 / sum(shape))
    return nn.Parameter(torch.from_numpy(rng.uniform(-bound, bound, size=shape).astype(np.float32)))
