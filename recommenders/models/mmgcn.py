"""MMGCN: a graph network for each modality over users and items, added up.

Source: Wei, Wang, Nie, He, Hong and Chua, "MMGCN: Multi-modal graph convolution network for personalized
recommendation of micro-video", MM 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, normalize
from typing_extensions import override

from recommenders.feature_input import FeatureTable
from recommenders.graphs import csr_tensor, user_item_adjacency
from recommenders.interactions import Interactions
from recommenders.losses import bpr_loss, half_squared_norm, pair_scores
from recommenders.models.base import Recommender, batch_items, rows_of, xavier_uniform
from recommenders.models.layers import Affine
from recommenders.propagation import symmetric_product
from recommenders.sampling import Batch

SEARCH = {"n_layers": (1, 2, 3), "l2": (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)}
"""What the paper tries."""


class MmgcnConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of MMGCN."""

    dim: PositiveInt = Field(64, description="Length of the embeddings of users and items; the paper's 64.")
    latent_dim: PositiveInt = Field(
        64,
        description="Length that features are projected to and users' preferences have; the authors' code "
        "has 256 for images and takes texts as they are.",
    )
    n_layers: PositiveInt = Field(
        2, description="Layers of each modality's network; the paper tries 1, 2, 3."
    )
    combination: Literal["concatenation", "sum"] = Field(
        "concatenation", description="How a layer joins neighbours and node: g_co or g_ele of the paper."
    )
    normalise_inputs: bool = Field(
        True, description="Scale the inputs of the first layer to length 1, as the authors' code does."
    )
    l2: NonNegativeFloat = Field(
        1e-3,
        description="Weight of the squared length of the embeddings and preferences in a batch; the paper "
        "tries 1e-5 to 1e-1.",
    )


class Mmgcn(Recommender):
    """u = sum over modalities of u_m, i likewise, from one network a modality.

    A layer turns x, (U + I, D), into g(h, x^) with h = LeakyReLU(mean over neighbours of W1 x), the paper's
    aggregation layer with f_avg; x^ = LeakyReLU(W2 x) + the embedding of the node's id; and, its combination
    layer, g = LeakyReLU(W3 [h, x^]) or LeakyReLU(W3 h + x^). W2 and W3 have biases, as in the authors' code.
    The first x of an item is its projected features, of a user a preference per modality. A node without
    neighbours has h = 0.

    Loss of a batch of B rows (u, i, j...): BPR, plus l2 / 2 times the mean over rows of the squares of the id
    embeddings of u, i and j and of u's preferences.

    Ids and preferences are parameters here; in the authors' code they are plain tensors, which their
    optimiser never sees. Their code divides the sum over modalities by the number of them, which orders items
    the same, and skips the projection of texts; the paper says nothing of a projection.
    """

    needs_features = True
    neighbours: Tensor
    degrees: Tensor

    def __init__(
        self, train: Interactions, features: FeatureTable, config: MmgcnConfig, rng: np.random.Generator
    ) -> None:
        super().__init__(train, features, config, rng)
        self.config = config
        self.ids = xavier_uniform(rng, self.n_users + self.n_items, config.dim)  # users first
        self.networks = nn.ModuleDict(
            {name: _Network(self.n_users, width, config, rng) for name, width in features.dims.items()}
        )
        # Unweighted: the mean divides by the degree after the product, and the gradient before it.
        normal = user_item_adjacency(train)
        starts, ones = normal.crow_indices(), torch.ones_like(normal.values())
        self.register_buffer("neighbours", csr_tensor(starts, normal.col_indices(), ones), persistent=False)
        degrees = starts.diff().clamp_min(1).unsqueeze(1).float()
        self.register_buffer("degrees", degrees, persistent=False)

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Add up the networks' last layers."""
        nodes = torch.arange(self.n_users + self.n_items, device=self.ids.device)
        last = self._last_layer(nodes, features)
        return last[: self.n_users], last[self.n_users :]

    @override
    def loss(self, batch: Batch, features: FeatureTable) -> Tensor:
        """Return BPR plus L2; the last layer is computed for the batch's nodes only."""
        item_rows = batch_items(batch)
        wanted = torch.cat([batch.users, self.n_users + item_rows.reshape(-1)])
        nodes, places = torch.unique(wanted, return_inverse=True)
        last = rows_of(self._last_layer(nodes, features), places)
        n_rows = len(batch.users)
        users, items = last[:n_rows], last[n_rows:].reshape(*item_rows.shape, -1)
        own = [rows_of(self.ids, wanted)]
        own += [rows_of(network.preferences, batch.users) for network in self._networks().values()]
        penalty = self.config.l2 / n_rows * half_squared_norm(*own)
        return bpr_loss(pair_scores(users, items)) + penalty

    @override
    def working_bytes(self, n_pairs: int, n_negatives: int) -> int:
        """Add what a layer keeps of all nodes: their products with W1, and the means over neighbours."""
        kept = 2 * self.config.n_layers * len(self.networks) * 4 * self.config.dim * len(self.ids)
        return super().working_bytes(n_pairs, n_negatives) + kept

    def _last_layer(self, nodes: Tensor, features: FeatureTable) -> Tensor:
        """Return (R, D) sums over modalities of some nodes' last layer."""
        parts = [
            network(features.vectors[name], self.ids, self._mean_of_neighbours, nodes)
            for name, network in self._networks().items()
        ]
        return torch.stack(parts).sum(dim=0)

    def _mean_of_neighbours(self, table: Tensor) -> Tensor:
        return symmetric_product(self.neighbours, table) / self.degrees

    def _networks(self) -> dict[str, _Network]:
        return {name: network for name, network in self.networks.items() if isinstance(network, _Network)}


class _Network(nn.Module):
    """The layers of one modality."""

    def __init__(self, n_users: int, width: int, config: MmgcnConfig, rng: np.random.Generator) -> None:
        super().__init__()
        self.config = config
        self.preferences = xavier_uniform(rng, n_users, config.latent_dim)  # u_m
        self.projection = Affine(rng, width, config.latent_dim)
        self.w1, self.w2, self.w3 = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        self.b2, self.b3 = nn.ParameterList(), nn.ParameterList()
        joined = 2 * config.dim if config.combination == "concatenation" else config.dim
        for layer in range(config.n_layers):
            width_in = config.dim if layer else config.latent_dim
            self.w1.append(xavier_uniform(rng, width_in, config.dim))
            self.w2.append(xavier_uniform(rng, width_in, config.dim))
            self.b2.append(nn.Parameter(torch.zeros(config.dim)))
            self.w3.append(xavier_uniform(rng, joined, config.dim))
            self.b3.append(nn.Parameter(torch.zeros(config.dim)))

    def forward(
        self, vectors: Tensor, ids: Tensor, mean_of_neighbours: Callable[[Tensor], Tensor], nodes: Tensor
    ) -> Tensor:
        """Return the last layer of R nodes, (R, D), from (I, F) vectors and (U + I, D) ids of all."""
        x = torch.cat([self.preferences, self.projection(vectors)])
        if self.config.normalise_inputs:
            x = normalize(x, dim=1)
        for layer in range(self.config.n_layers):
            h = leaky_relu(mean_of_neighbours(x @ self.w1[layer]))
            own_ids = ids
            if layer == self.config.n_layers - 1:
                h, x, own_ids = (rows_of(table, nodes) for table in (h, x, ids))
            node = leaky_relu(torch.addmm(self.b2[layer], x, self.w2[layer])) + own_ids
            joined = torch.cat([h, node], dim=1) if self.config.combination == "concatenation" else h
            x = torch.addmm(self.b3[layer], joined, self.w3[layer])
            x = leaky_relu(x if self.config.combination == "concatenation" else x + node)
        return x
