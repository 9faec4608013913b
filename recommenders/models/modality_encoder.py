"""Ids and modalities propagated side by side and read out as one: what SLMRec and MMGCL train."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from recommenders.feature_input import FeatureTable
from recommenders.graphs import propagate_beside
from recommenders.models.base import xavier_uniform
from recommenders.models.layers import Affine


class ModalityEncoder(nn.Module):
    """LightGCN on the ids, and once for each modality on its projected features, then one linear layer.

    The users' ids are their layer 0 beside every modality, as in the authors' code of both papers. The parts
    of a row are told apart by their place: first that of the ids, then the modalities in the table's order.
    """

    def __init__(
        self, n_users: int, n_items: int, features: FeatureTable, dim: int, rng: np.random.Generator
    ) -> None:
        super().__init__()
        self.dim = dim
        self.modalities = features.modalities
        self.users = xavier_uniform(rng, n_users, dim)
        self.items = xavier_uniform(rng, n_items, dim)
        self.projections = nn.ModuleDict(
            {name: Affine(rng, width, dim) for name, width in features.dims.items()}
        )
        width = dim * (1 + len(self.modalities))
        self.read_users = Affine(rng, width, dim)
        self.read_items = Affine(rng, width, dim)

    def inputs(self, features: FeatureTable) -> list[Tensor]:
        """Return the layer 0 of the items, (I, D) each: the ids, then every modality."""
        return [self.items, *(self.projections[name](features.vectors[name]) for name in self.modalities)]

    def propagate(self, adjacency: Tensor, inputs: Sequence[Tensor], n_layers: int) -> tuple[Tensor, Tensor]:
        """Return (U, T D) and (I, T D), the parts one beside the other, from T inputs (I, D)."""
        return propagate_beside(adjacency, self.users, inputs, n_layers)

    def replace(self, parts: Tensor, place: int, other: Tensor) -> Tensor:
        """Return (R, T D) parts with the one at a place taken from elsewhere, (R, D)."""
        before, after = parts[:, : place * self.dim], parts[:, (place + 1) * self.dim :]
        return torch.cat([before, other, after], dim=1)

    def part(self, parts: Tensor, place: int) -> Tensor:
        """Return the (R, D) part at a place."""
        return parts[:, place * self.dim : (place + 1) * self.dim]
