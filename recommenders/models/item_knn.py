"""Content ItemKNN: what resembles the user's items, without any training.

Source: the item-based top-N scheme of Deshpande and Karypis, "Item-based top-N recommendation algorithms",
TOIS 2004, sec. 4, on content cosines instead of co-occurrence, the ItemKNN-CBF baseline of Ferrari Dacrema et
al., "Are we really making much progress?", RecSys 2019.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor
from torch.nn.functional import normalize
from typing_extensions import override

from recommenders.feature_input import FeatureTable
from recommenders.graphs import cosine_neighbours
from recommenders.interactions import Interactions
from recommenders.models.base import Recommender, Scorer


class ItemKnnContentConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of content ItemKNN."""

    k: PositiveInt = Field(10, description="Nearest items kept for each item, the item itself not counted.")


class ItemKnnContent(Recommender):
    """Score of item j for user u: the sum of cos(i, j) over u's training items i that have j in their list.

    The list of i holds its k nearest items by the cosine of their features. Several modalities are each
    scaled to length 1 and concatenated: where both items have all of them, the cosine is the mean of the
    modalities' cosines. A modality that an item has no features for (a row of zeros) takes no part.
    """

    scoring = "neighbours"
    needs_features = True

    history_starts: Tensor
    history_items: Tensor

    def __init__(
        self,
        train: Interactions,
        features: FeatureTable,
        config: ItemKnnContentConfig,
        rng: np.random.Generator,
    ) -> None:
        super().__init__(train, features, config, rng)
        self.k = config.k
        history = train.csr()
        # What the dataset already holds need not be in a checkpoint again.
        for name, values in (("history_starts", history.indptr), ("history_items", history.indices)):
            rows = torch.from_numpy(values.astype(np.int64))
            self.register_buffer(name, rows, persistent=False)

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Raise: a k-nearest-neighbour graph is no product of two embeddings."""
        raise TypeError("ItemKnnContent has no embeddings; ask its scorer(features) for scores.")

    @override
    @torch.no_grad()
    def scorer(self, features: FeatureTable) -> Scorer:
        """Find the neighbour lists of these features, in I x k memory; a block of users adds up theirs."""
        tables = [normalize(vectors.float(), dim=1) for vectors in features.vectors.values()]
        neighbours, similarities = cosine_neighbours(torch.cat(tables, dim=1), self.k)  # (I, k) each

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
