"""MMGCL: two views of every user and item, one without some edges, one without a modality.

Source: Yi, Wang, Ounis and Macdonald, "Multi-modal graph contrastive learning for micro-video
recommendation", SIGIR 2022.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import normalize
from typing_extensions import override

from recommenders.feature_input import FeatureTable
from recommenders.graphs import UserItemGraph
from recommenders.info_nce import info_nce
from recommenders.interactions import Interactions
from recommenders.losses import bpr_loss, half_squared_norm, pair_scores
from recommenders.models.base import Recommender, batch_items, rows_of
from recommenders.models.modality_encoder import ModalityEncoder
from recommenders.sampling import Batch

SEARCH = {"ssl_weight": (0.1, 0.2, 0.5, 1.0), "ssl_temperature": (0.1, 0.2, 0.5, 1.0)}
"""Between the ends of what the paper tries, 0.1 to 1."""


class MmgclConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of MMGCL; defaults and ranges as in the authors' configuration."""

    dim: PositiveInt = Field(64, description="Length of a user's and an item's embedding, and of each part.")
    n_layers: PositiveInt = Field(3, description="Times embeddings are propagated between users and items.")
    edge_dropout: float = Field(
        0.3,
        ge=0,
        lt=1,
        description="Share of user-item pairs left out of the first view's graph in an epoch.",
    )
    challenging_negatives: bool = Field(
        True, description="Whether items are also told from themselves with another item's modality."
    )
    contrast: Literal["views", "pairs"] = Field(
        "views",
        description="What belongs together: the two views of a user or item; or, as in the authors' code, "
        "the user and item of a pair within a view.",
    )
    ssl_weight: NonNegativeFloat = Field(0.1, description="Weight of the contrast; tried: 0.1 to 1.")
    ssl_temperature: PositiveFloat = Field(0.2, description="Temperature of the contrast; tried: 0.1 to 1.")
    l2: NonNegativeFloat = Field(
        1e-4, description="Weight of the squared length of the id embeddings in a batch."
    )


class Draws(NamedTuple):
    """What is drawn for a batch's second view and its challenging negatives."""

    masked: int
    """Place of the modality that is masked, counted from 1: 0 are the ids."""
    noise: Tensor
    """(I, D) what stands in its place."""
    swapped: int
    """Place of the modality that a challenging negative takes from another item."""


class Mmgcl(Recommender):
    """x_ui = z_u . z_i, z a linear layer on the id part and one part per modality, each from LightGCN.

    Loss: BPR, plus ssl_weight times the contrast (InfoNCE on cosines) of users and of items between two views
    of the batch's distinct users and positive items, plus L2 on the ids of the batch's rows.

    - First view, modality edge dropout: all parts over a graph that misses a share of the pairs, drawn anew
      every epoch.
    - Second view, modality masking: one modality, drawn anew every batch with equal chances, is replaced by
      random numbers at the input layer; nothing else changes, so only that part is propagated again.
    - Challenging negatives: the item's second view, with one modality's part taken from the item's negative
      sample. An item's first view is told from these as well as from the other items.

    The authors' later code differs, and its slips are not offered: it compares the first view with itself
    where the second belongs, exchanges images and texts in the second view, drops nodes there, and computes
    the challenging negatives without using them. ``contrast: pairs`` is its reading of what belongs together.
    """

    needs_features = True
    adjacency: Tensor

    def __init__(
        self, train: Interactions, features: FeatureTable, config: MmgclConfig, rng: np.random.Generator
    ) -> None:
        super().__init__(train, features, config, rng)
        self.config = config
        self.encoder = ModalityEncoder(self.n_users, self.n_items, features, config.dim, rng)
        self.graph = UserItemGraph(train)
        self.register_buffer("adjacency", self.graph.adjacency(), persistent=False)
        self._thinned: Tensor | None = None

    @override
    def start_epoch(self, features: FeatureTable) -> None:
        """Draw the pairs that stay in the first view's graph."""
        if self.config.edge_dropout:
            n_kept = int(len(self.graph) * (1 - self.config.edge_dropout))
            self._thinned = self.graph.adjacency(self.graph.sample(n_kept))

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Propagate the parts over the whole graph and read them out."""
        parts = self._propagate(self.adjacency, self.encoder.inputs(features))
        return self.encoder.users_from(parts), self.encoder.items_from(parts)

    @override
    def loss(self, batch: Batch, features: FeatureTable) -> Tensor:
        """Return BPR plus contrast plus L2, reading out the batch's rows only."""
        item_rows = batch_items(batch)
        inputs = self.encoder.inputs(features)
        parts = self._propagate(self.adjacency, inputs)
        users = self.encoder.users_from(parts, batch.users)
        items = self.encoder.items_from(parts, item_rows.reshape(-1)).reshape(*item_rows.shape, -1)
        loss = bpr_loss(pair_scores(users, items))
        if self.config.ssl_weight:
            loss = loss + self.config.ssl_weight * self._contrast(batch, inputs, parts)
        own = [rows_of(self.encoder.users, batch.users), rows_of(self.encoder.items, item_rows)]
        return loss + self.config.l2 / len(batch.users) * half_squared_norm(*own)

    def _propagate(self, adjacency: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        return self.encoder.propagate(adjacency, inputs, self.config.n_layers)

    def draw(self) -> Draws:
        """Draw from torch's global stream what a batch needs; the noise is spread as ids are at first."""
        places = torch.randint(1, 1 + len(self.encoder.modalities), (2,)).tolist()
        bound = (6.0 / sum(self.encoder.items.shape)) ** 0.5
        noise = torch.empty_like(self.encoder.items).uniform_(-bound, bound)
        return Draws(places[0], noise, places[1])

    def _contrast(self, batch: Batch, inputs: list[Tensor], parts: list[Tensor]) -> Tensor:
        """Return the contrast of users plus that of items.

        Args:
            batch: The pairs and their negatives.
            inputs: T tables (I, D), the layer 0 of the items.
            parts: T tables (U + I, D), propagated over the whole graph.
        """
        users, user_places = torch.unique(batch.users, return_inverse=True)
        items, item_places = torch.unique(batch.positives, return_inverse=True)
        drawn = self.draw()
        first = self._propagate(self.adjacency if self._thinned is None else self._thinned, inputs)
        second = list(parts)
        (second[drawn.masked],) = self._propagate(self.adjacency, [drawn.noise])
        z_users = [self._unit_users(view, users) for view in (first, second)]
        z_items = [self._unit_items(self.encoder.items_of(view, items)) for view in (first, second)]
        hard = []
        if self.config.challenging_negatives:
            # The negative of the first pair that each item is in.
            n_rows = len(batch.users)
            pairs = torch.arange(n_rows, device=items.device)
            earliest = torch.full_like(items, n_rows).scatter_reduce(0, item_places, pairs, "amin")
            others = batch.negatives[earliest, 0]
            challenging = self.encoder.items_of(second, items)
            (challenging[drawn.swapped],) = self.encoder.items_of([second[drawn.swapped]], others)
            hard = [self._unit_items(challenging)]
        temperature = self.config.ssl_temperature
        if self.config.contrast == "views":
            of_users = info_nce(z_users[0], z_users[1], temperature)
            return of_users + info_nce(z_items[0], torch.cat([z_items[1], *hard]), temperature)
        within = [
            info_nce(
                rows_of(of_users, user_places),
                torch.cat([rows_of(of_items, item_places), *hard]),
                temperature,
            )
            for of_users, of_items in zip(z_users, z_items, strict=True)
        ]
        return within[0] + within[1]

    def _unit_users(self, parts: list[Tensor], rows: Tensor) -> Tensor:
        return normalize(self.encoder.users_from(parts, rows), dim=1)

    def _unit_items(self, rows: list[Tensor]) -> Tensor:
        """Return (R, D) embeddings of length 1 from the T rows (R, D) of each item."""
        return normalize(self.encoder.read_items(torch.cat(rows, dim=1)), dim=1)
