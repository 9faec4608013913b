"""ItemKNN: what resembles the user's items, by who took them or by their content, without any training.

Source: the item-based top-N scheme of Deshpande and Karypis, "Item-based top-N recommendation algorithms",
TOIS 2004, sec. 4. The shrunk cosine and the variant on content cosines are the ItemKNN-CF and ItemKNN-CBF
baselines of Ferrari Dacrema et al., "Are we really making much progress?", RecSys 2019, sec. 2.3.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import normalize
from typing_extensions import override

from recommenders.co_occurrence import co_occurrence_neighbours
from recommenders.feature_input import FeatureTable
from recommenders.interactions import Interactions
from recommenders.models.base import Recommender, Scorer
from recommenders.neighbours import cosine_neighbours
from recommenders.ranges import Between, Range

SEARCH: dict[str, Range] = {"k": Between(low=5, high=1000), "shrinkage": Between(low=0.0, high=1000.0)}
SEARCH_CONTENT: dict[str, Range] = {"k": Between(low=5, high=1000)}
"""Ferrari Dacrema et al., for both kinds of ItemKNN; content ItemKNN has no shrinkage here."""


class ItemKnnConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of ItemKNN; Ferrari Dacrema et al. search k in 5 .. 1000 and shrinkage in 0 .. 1000."""

    k: PositiveInt = Field(100, description="Nearest items kept for each item, the item itself not counted.")
    shrinkage: NonNegativeFloat = Field(
        10.0, description="Added to the cosine's denominator, so that few common users count for less."
    )


class ItemKnnContentConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of content ItemKNN."""

    k: PositiveInt = Field(10, description="Nearest items kept for each item, the item itself not counted.")


class _NeighbourLists(Recommender):
    """Score of item j for user u: the sum of s(i, j) over u's training items i that have j in their list."""

    scoring = "neighbours"

    history_starts: Tensor
    history_items: Tensor

    def __init__(
        self, train: Interactions, features: FeatureTable, config: BaseModel, rng: np.random.Generator
    ) -> None:
        super().__init__(train, features, config, rng)
        history = train.csr()
        # What the dataset already holds need not be in a checkpoint again.
        for name, values in (("history_starts", history.indptr), ("history_items", history.indices)):
            rows = torch.from_numpy(values.astype(np.int64))
            self.register_buffer(name, rows, persistent=False)

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Raise: a k-nearest-neighbour graph is no product of two embeddings."""
        raise TypeError(f"{type(self).__name__} has no embeddings; ask its scorer(features) for scores.")

    def _scorer_of(self, neighbours: Tensor, similarities: Tensor) -> Scorer:
        """Return what adds up the (I, k) lists of a user's items."""

        def score(users: Tensor) -> Tensor:
            block_rows, items = self._histories(users)
            scores = similarities.new_zeros(len(users) * self.n_items)
            cells = block_rows.unsqueeze(1) * self.n_items + neighbours[items]  # (H, k)
            scores.index_add_(0, cells.reshape(-1), similarities[items].reshape(-1))
            return scores.reshape(len(users), self.n_items)

        return score

    def _histories(self, users: Tensor) -> tuple[Tensor, Tensor]:
        """Return the training items of (B,) users, one after the other, with the row of each in the block.

        Returns:
            block_rows: (H,) position in ``users``, H the number of their training items.
            items: (H,) item rows.
        """
        starts = self.history_starts[users]
        lengths = self.history_starts[users + 1] - starts
        block_rows = torch.repeat_interleave(lengths)
        first = torch.cumsum(lengths, dim=0) - lengths  # where each user's items begin among the H
        steps = torch.arange(len(block_rows), device=users.device) - first[block_rows]
        return block_rows, self.history_items[starts[block_rows] + steps]


class ItemKnn(_NeighbourLists):
    """Neighbour lists by the cosine of the items' columns of the training matrix, shrunk.

    s(i, j) = n_ij / (sqrt(n_i n_j) + shrinkage), with n_ij the users who took both. Lists are found block by
    block on sparse matrices; of equally similar items the lower row makes the list.
    """

    neighbours: Tensor
    similarities: Tensor

    def __init__(
        self, train: Interactions, features: FeatureTable, config: ItemKnnConfig, rng: np.random.Generator
    ) -> None:
        super().__init__(train, features, config, rng)
        matrix = train.csr().T.tocsr()  # (I, U)
        lengths = np.sqrt(np.diff(matrix.indptr).astype(np.float64))
        neighbours, similarities = co_occurrence_neighbours(
            matrix,
            config.k,
            lambda common, i, j: common / (lengths[i] * lengths[j] + config.shrinkage),
        )
        self.register_buffer("neighbours", torch.from_numpy(neighbours), persistent=False)
        self.register_buffer("similarities", torch.from_numpy(similarities), persistent=False)

    @override
    def scorer(self, features: FeatureTable) -> Scorer:
        """Return what adds up the lists found when the model was built."""
        return self._scorer_of(self.neighbours, self.similarities)


class ItemKnnContent(_NeighbourLists):
    """Neighbour lists by the cosine of the items' features: s(i, j) = cos(i, j).

    Several modalities are each scaled to length 1 and concatenated: where both items have all of them, the
    cosine is the mean of the modalities' cosines. A modality that an item has no features for (a row of
    zeros) takes no part.
    """

    needs_features = True

    def __init__(
        self,
        train: Interactions,
        features: FeatureTable,
        config: ItemKnnContentConfig,
        rng: np.random.Generator,
    ) -> None:
        super().__init__(train, features, config, rng)
        self.k = config.k

    @override
    @torch.no_grad()
    def scorer(self, features: FeatureTable) -> Scorer:
        """Find the neighbour lists of these features, in I x k memory; a block of users adds up theirs."""
        tables = [normalize(vectors.float(), dim=1) for vectors in features.vectors.values()]
        return self._scorer_of(*cosine_neighbours(torch.cat(tables, dim=1), self.k))
