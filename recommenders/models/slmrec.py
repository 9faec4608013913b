"""SLMRec: users and items from ids and modalities, and what an item's modalities tell about each other.

Source: Tao, Liu, Xia, Wang, Yang, Huang and Chua, "Self-supervised learning for multimedia recommendation",
IEEE Transactions on Multimedia 25, 2022.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from typing_extensions import override

from recommenders.dropout import dropout
from recommenders.feature_input import FeatureTable
from recommenders.graphs import UserItemGraph
from recommenders.info_nce import info_nce, info_nce_of_pairs
from recommenders.interactions import Interactions
from recommenders.item_graphs import are_live
from recommenders.losses import bpr_loss, half_squared_norm, pair_scores
from recommenders.models.base import Recommender, batch_items, rows_of, unit_rows
from recommenders.models.layers import Affine
from recommenders.models.modality_encoder import ModalityEncoder, SmoothFeatures
from recommenders.propagation import KeptFor, UserItemMatrix
from recommenders.sampling import Batch

SEARCH = {"ssl_weight": (0.01, 0.05, 0.1, 0.5, 1.0), "ssl_temperature": (0.1, 0.2, 0.5, 1.0)}
"""As in the authors' configuration."""


class SlmrecConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of SLMRec; defaults as in the authors' configuration."""

    dim: PositiveInt = Field(64, description="Length of a user's and an item's embedding, and of each part.")
    n_layers: PositiveInt = Field(3, description="Times embeddings are propagated between users and items.")
    main_loss: Literal["infonce", "bpr"] = Field(
        "infonce",
        description="Ranking loss: the other positives of a batch as negatives, or drawn negatives.",
    )
    temperature: PositiveFloat = Field(0.2, description="Temperature of the ranking loss infonce.")
    task: Literal["fac", "fd", "fm", "fd+fm"] = Field(
        "fac",
        description="What is contrasted: fine and coarse spaces of modalities, or two views of users and "
        "items by feature dropout, feature masking, or both.",
    )
    ssl_weight: NonNegativeFloat = Field(
        0.1, description="Weight of the contrast; tried: 0.01, 0.05, 0.1, 0.5, 1."
    )
    ssl_temperature: PositiveFloat = Field(
        0.2, description="Temperature of the contrast; tried: 0.1, 0.2, 0.5, 1."
    )
    cosine: bool = Field(
        True,
        description="Compare fine and coarse by cosine; false: by inner product, as the authors' code does.",
    )
    dropout: float = Field(0.3, ge=0, lt=1, description="Share of numbers that feature dropout removes.")
    l2: NonNegativeFloat = Field(
        1e-4, description="Weight of the squared length of the id embeddings in a batch."
    )
    cache_mb: NonNegativeInt = Field(
        1024,
        description="Most memory in MiB for features smoothed once; larger ones are propagated each step.",
    )


class Slmrec(Recommender):
    """x_ui = z_u . z_i, z a linear layer on the id part and one part per modality, each from LightGCN.

    Loss: ranking, plus ssl_weight times a contrast (InfoNCE), plus L2 on the ids of the batch's rows.

    - fac, "fine and coarse": the items' id part is mapped to a first space, where it is to tell the first
      modality's part of the same item from other items'; from there to a second space for the second
      modality, and so on, so that each space holds what the modalities before it share.
    - fd, fm: two views of users and items, with numbers of the projected features dropped out, or with one
      input (the ids or a modality) of the items set to zero, another one in each view.

    The batch's distinct items (and users) are contrasted, each once; the authors' code leaves repeated ones
    in as negatives of themselves. All spaces have D dimensions; in their code the last has half of that.
    Their feature dropout is after each propagation, here it is on the features it is named for. They train
    ranking on cosines and rank by inner products, which is kept. How rows of features are scaled is not the
    model's affair: length 1 is what the authors use.
    """

    needs_features = True
    adjacency: Tensor

    def __init__(
        self, train: Interactions, features: FeatureTable, config: SlmrecConfig, rng: np.random.Generator
    ) -> None:
        super().__init__(train, features, config, rng)
        self.config = config
        self.encoder = ModalityEncoder(self.n_users, self.n_items, features, config.dim, rng)
        self.to_coarse, self.to_fine = nn.ModuleList(), nn.ModuleList()
        if config.task == "fac":
            for _ in features.modalities:
                self.to_coarse.append(Affine(rng, config.dim, config.dim))
                self.to_fine.append(Affine(rng, config.dim, config.dim))
        graph = UserItemGraph(train)
        self.register_buffer("adjacency", graph.adjacency(), persistent=False)
        self.user_items = UserItemMatrix.symmetric(graph)
        fits = SmoothFeatures.bytes(self.n_users, features) <= config.cache_mb * 2**20
        self._smooth = KeptFor(self._smoothed, features) if fits else None

    @property
    @override
    def reads_negatives(self) -> bool:
        """Only by main_loss bpr."""
        return self.config.main_loss == "bpr"

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Propagate the parts over the whole graph and read them out."""
        parts = self._propagate(self.encoder.inputs(features))
        return self.encoder.users_from(parts), self.encoder.items_from(parts)

    @override
    def loss(self, batch: Batch, features: FeatureTable) -> Tensor:
        """Return ranking plus contrast plus L2, reading out the batch's rows only."""
        item_rows = self._items(batch)
        items, places = torch.unique(item_rows, return_inverse=True)
        users, user_places = torch.unique(batch.users, return_inverse=True)
        of_users, of_items, ids = self._parts_at(features, users, items)
        loss = self._ranking(of_users, of_items, user_places, places)
        if self.config.ssl_weight:
            if self.config.task == "fac":
                if item_rows.shape[1] > 1:  # else all of the distinct items are positives
                    positives = torch.unique(places[:, 0])
                    of_items = [rows_of(part, positives) for part in of_items]
                contrast = self._fine_and_coarse(of_items)
            else:
                inputs = self.encoder.inputs(features)
                contrast = self._two_views(users, torch.unique(batch.positives), inputs)
            loss = loss + self.config.ssl_weight * contrast
        own = rows_of(ids[0], user_places), rows_of(ids[1], places)
        return loss + self.config.l2 / len(batch.users) * half_squared_norm(*own)

    def _smoothed(self, features: FeatureTable) -> SmoothFeatures:
        return SmoothFeatures.of(self.user_items, features, self.config.n_layers)

    def _propagate(self, inputs: list[Tensor]) -> list[Tensor]:
        return self.encoder.propagate(self.adjacency, inputs, self.config.n_layers)

    def _parts_at(
        self, features: FeatureTable, users: Tensor, items: Tensor
    ) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, Tensor]]:
        """Return (R, D) of R users and (S, D) of S items, for the ids and every modality; and their ids."""
        if self._smooth is None or are_live(features):
            parts = self._propagate(self.encoder.inputs(features))
            ids = rows_of(self.encoder.users, users), rows_of(self.encoder.items, items)
            return [rows_of(part, users) for part in parts], self.encoder.items_of(parts, items), ids
        smooth = self._smooth.of(features, training=self.training)
        return self.encoder.parts_at(self.user_items, smooth, self.config.n_layers, users, items)

    def _items(self, batch: Batch) -> Tensor:
        """Return the (B, K) items that the ranking loss scores."""
        return batch_items(batch) if self.config.main_loss == "bpr" else batch.positives.unsqueeze(1)

    def _ranking(
        self, of_users: list[Tensor], of_items: list[Tensor], user_places: Tensor, item_places: Tensor
    ) -> Tensor:
        """Return the ranking loss of pairs, (B,) and (B, K) places, from the parts of R users and S items."""
        users = self.encoder.read_users(torch.cat(of_users, dim=1))
        items = self.encoder.read_items(torch.cat(of_items, dim=1))
        if self.config.main_loss == "bpr":
            return bpr_loss(pair_scores(rows_of(users, user_places), rows_of(items, item_places)))
        users, items = unit_rows(users), unit_rows(items)
        return info_nce_of_pairs(users, items, self.config.temperature, (user_places, item_places.squeeze(1)))

    def _fine_and_coarse(self, parts: list[Tensor]) -> Tensor:
        """Return the sum over modalities of the contrast of R items' parts, (R, D) each."""
        coarse = parts[0]
        losses = []
        for to_coarse, to_fine, part in zip(self.to_coarse, self.to_fine, parts[1:], strict=True):
            coarse, fine = to_coarse(coarse), to_fine(part)
            if self.config.cosine:
                one, other = unit_rows(coarse), unit_rows(fine)
            else:
                one, other = coarse, fine
            losses.append(info_nce(one, other, self.config.ssl_temperature))
        return torch.stack(losses).sum()

    def _two_views(self, users: Tensor, items: Tensor, inputs: list[Tensor]) -> Tensor:
        """Return the contrast of two views of users plus that of items."""
        masked = torch.randperm(len(inputs))[:2].tolist() if "fm" in self.config.task else [-1, -1]
        views = []
        for left_out in masked:
            tables = [self._dropped(table, place) for place, table in enumerate(inputs)]
            if left_out >= 0:
                tables[left_out] = torch.zeros_like(tables[left_out])
            parts = self._propagate(tables)
            of_users, of_items = self.encoder.users_from(parts, users), self.encoder.items_from(parts, items)
            views.append((unit_rows(of_users), unit_rows(of_items)))
        (users_1, items_1), (users_2, items_2) = views
        temperature = self.config.ssl_temperature
        return info_nce(users_1, users_2, temperature) + info_nce(items_1, items_2, temperature)

    def _dropped(self, table: Tensor, place: int) -> Tensor:
        """Return a modality's input with numbers dropped out where the task says so; ids stay."""
        if place == 0 or "fd" not in self.config.task:
            return table
        return dropout(table, self.config.dropout)
