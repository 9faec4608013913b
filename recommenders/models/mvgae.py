"""MVGAE: a variational graph auto-encoder for each modality and one for ids, joined as a product of experts.

Source: Yi and Chen, "Multi-modal variational graph auto-encoder for recommendation systems", IEEE
Transactions on Multimedia (TMM), 2021, in the form of the authors' code (github.com/jing-1/MVGAE).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, normalize
from typing_extensions import override

from recommenders.dropout import dropout
from recommenders.feature_input import FeatureTable
from recommenders.graphs import csr_tensor, user_item_adjacency
from recommenders.interactions import Interactions
from recommenders.losses import bpr_loss, half_squared_norm, pair_scores
from recommenders.models.base import Recommender, batch_items, rows_of, xavier_uniform
from recommenders.models.layers import Affine
from recommenders.propagation import symmetric_product
from recommenders.sampling import Batch

SEARCH = {"beta": (0.01, 0.1, 1.0), "training.learning_rate": (1e-4, 1e-3, 0.01, 0.1)}
"""Of MMRec's configuration."""

Gaussians = tuple[Tensor, Tensor]
"""(N, D) means and logarithms of variances, of N nodes."""

_MAX_LOG_VARIANCE = 10.0
"""Where the authors' code cuts logarithms of variances, so that their exponentials stay finite."""


class MvgaeConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of MVGAE; defaults of the authors' code."""

    dim: PositiveInt = Field(64, description="Length of a user's and an item's embedding.")
    latent_dim: PositiveInt = Field(
        128, description="Length that features are projected to, and users' preferences have."
    )
    n_layers: NonNegativeInt = Field(
        1, description="Layers below those of means and variances, which reach one more step themselves."
    )
    dropout: float = Field(
        0.1, ge=0, lt=1, description="Chance of an entry to be dropped after each convolution."
    )
    noise: NonNegativeFloat = Field(
        0.1, description="What the standard deviation is multiplied by where embeddings are drawn."
    )
    squash: bool = Field(
        True,
        description="Put embeddings between 0 and 1 by a logistic, as the authors do for sparse data such as "
        "Amazon's.",
    )
    beta: NonNegativeFloat = Field(
        1.0, description="Weight of the divergence from a standard normal distribution."
    )
    expert_weight: NonNegativeFloat = Field(
        1.0, description="Weight of each expert's own loss beside that of their product."
    )
    l2: NonNegativeFloat = Field(
        0.0, description="Weight of the squared length of preferences and ids in a batch; the authors' is 0."
    )


class Mvgae(Recommender):
    """Embeddings are the logistic of the means of a product of Gaussians, one for each modality and for ids.

    An expert encodes the graph of users and items. Layer 0 of a user is a learnt preference, of an item W f +
    b of its features, or of its learnt id; each of length 1. A convolution c(x) is the mean of W x over a
    node and its neighbours, plus b, of length 1. A layer is x' = lrelu(W' lrelu(c(x)) + b'), lrelu the leaky
    ReLU; mean and log variance are each W' lrelu(c(x)) + b' + lrelu(W" x + b"), with parameters of their own.

    Product of experts: precisions 1 / variance add up, and the mean is that of the experts weighed by them.

    Loss of a batch: for the product, and expert_weight times for each expert, BPR plus beta / B times the
    Kullback-Leibler divergence from N(0, 1), summed over numbers, in the mean over all nodes. BPR is on
    embeddings drawn as mean + noise times deviation times a normal draw, then squashed, and against that
    negative of each row which scores highest. (The authors add up BPR over the batch, in base 2, and so give
    their divergence the same small weight, but for ln 2.) Plus l2 / 2 times the mean over rows of the squared
    lengths of preferences and ids.

    Preferences and ids are parameters here; in the authors' code they are plain tensors, which their
    optimiser never sees. MMRec's port puts a second logistic on the scores, and compares with all negatives
    of the batch.
    """

    needs_features = True
    neighbours: Tensor
    shares: Tensor

    def __init__(
        self, train: Interactions, features: FeatureTable, config: MvgaeConfig, rng: np.random.Generator
    ) -> None:
        super().__init__(train, features, config, rng)
        self.config = config
        self.ids = xavier_uniform(rng, self.n_items, config.dim)
        self.experts = nn.ModuleDict(
            {name: _Expert(self.n_users, width, config, rng) for name, width in features.dims.items()}
        )
        self.id_expert = _Expert(self.n_users, config.dim, config, rng)
        normal = user_item_adjacency(train)
        starts, ones = normal.crow_indices(), torch.ones_like(normal.values())
        self.register_buffer("neighbours", csr_tensor(starts, normal.col_indices(), ones), persistent=False)
        shares = 1 / (1 + starts.diff().unsqueeze(1).float())  # of each neighbour, and of the node itself
        self.register_buffer("shares", shares, persistent=False)

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Return the means of the product, squashed."""
        means, _ = product_of_experts(self._encode(features))
        means = self._squashed(means)
        return means[: self.n_users], means[self.n_users :]

    @override
    def loss(self, batch: Batch, features: FeatureTable) -> Tensor:
        """Return the losses of the product and of each expert, and L2."""
        experts = self._encode(features)
        loss = self._loss_of(product_of_experts(experts), batch)
        if self.config.expert_weight:
            own = torch.stack([self._loss_of(expert, batch) for expert in experts])
            loss = loss + self.config.expert_weight * own.sum()
        tables = [rows_of(expert.preferences, batch.users) for expert in self._experts()]
        tables.append(rows_of(self.ids, batch_items(batch)))
        return loss + self.config.l2 / len(batch.users) * half_squared_norm(*tables)

    @override
    def working_bytes(self, n_pairs: int, n_negatives: int) -> int:
        """Add what each expert keeps of all nodes for its gradients: layer 0, and seven tables a layer."""
        config = self.config
        n_nodes = self.n_users + self.n_items
        of_expert = 4 * n_nodes * (3 * config.latent_dim + 7 * (config.n_layers + 2) * config.dim)
        return super().working_bytes(n_pairs, n_negatives) + of_expert * len(self._experts())

    def _encode(self, features: FeatureTable) -> list[Gaussians]:
        """Return what each expert says of all nodes, (U + I, D), users first."""
        tables = [*(features.vectors[name] for name in self.experts), self.ids]
        return [
            expert(table, self._mean_around) for expert, table in zip(self._experts(), tables, strict=True)
        ]

    def _mean_around(self, table: Tensor) -> Tensor:
        """Return the mean over each node and its neighbours."""
        return (symmetric_product(self.neighbours, table) + table) * self.shares

    def _loss_of(self, nodes: Gaussians, batch: Batch) -> Tensor:
        """Return BPR on embeddings drawn from Gaussians, and the divergence of those."""
        means, log_variances = nodes[0], nodes[1].clamp(max=_MAX_LOG_VARIANCE)
        divergence = -0.5 * (1 + log_variances - means.square() - log_variances.exp()).sum(dim=1).mean()
        item_rows = batch_items(batch)
        wanted = torch.cat([batch.users, self.n_users + item_rows.reshape(-1)])
        rows, places = torch.unique(wanted, return_inverse=True)  # a node is drawn once
        drawn = rows_of(means, rows)
        if self.training:
            deviations = (0.5 * rows_of(log_variances, rows)).exp()
            drawn = drawn + self.config.noise * deviations * torch.randn_like(deviations)
        ends = rows_of(self._squashed(drawn), places)
        n_rows = len(batch.users)
        scores = pair_scores(ends[:n_rows], ends[n_rows:].reshape(*item_rows.shape, -1))
        hardest = scores[:, 1:].amax(dim=1, keepdim=True)
        loss = bpr_loss(torch.cat([scores[:, :1], hardest], dim=1))
        return loss + self.config.beta / n_rows * divergence

    def _squashed(self, embeddings: Tensor) -> Tensor:
        return torch.sigmoid(embeddings) if self.config.squash else embeddings

    def _experts(self) -> list[_Expert]:
        """Return the modalities' experts and the ids'."""
        found = [*self.experts.values(), self.id_expert]
        return [expert for expert in found if isinstance(expert, _Expert)]


class _Convolution(nn.Module):
    """lrelu(c(x)) and the layer on top of it: W' lrelu(c(x)) + b'."""

    def __init__(self, width: int, config: MvgaeConfig, rng: np.random.Generator) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.weight = xavier_uniform(rng, width, config.dim)
        drawn = rng.uniform(-1, 1, size=config.dim) / np.sqrt(width)
        self.bias = nn.Parameter(torch.from_numpy(drawn.astype(np.float32)))
        self.mix = Affine(rng, config.dim, config.dim)

    @override
    def forward(self, x: Tensor, mean_around: Callable[[Tensor], Tensor]) -> Tensor:
        """Return (N, D) of (N, width)."""
        convolved = normalize(mean_around(x @ self.weight) + self.bias, dim=1)
        mixed: Tensor = self.mix(leaky_relu(dropout(convolved, self.dropout, self.training)))
        return mixed


class _Expert(nn.Module):
    """The encoder of one modality, or of the ids."""

    def __init__(self, n_users: int, width: int, config: MvgaeConfig, rng: np.random.Generator) -> None:
        super().__init__()
        self.preferences = xavier_uniform(rng, n_users, config.latent_dim)
        self.projection = Affine(rng, width, config.latent_dim)
        widths = [config.latent_dim] + [config.dim] * config.n_layers
        self.layers = nn.ModuleList(_Convolution(before, config, rng) for before in widths[:-1])
        self.heads = nn.ModuleDict({part: _Convolution(widths[-1], config, rng) for part in _PARTS})
        self.skips = nn.ModuleDict({part: Affine(rng, widths[-1], config.dim) for part in _PARTS})

    @override
    def forward(self, vectors: Tensor, mean_around: Callable[[Tensor], Tensor]) -> Gaussians:
        """Return the Gaussians of all nodes from the items' (I, F) vectors."""
        x = normalize(torch.cat([self.preferences, self.projection(vectors)]), dim=1)
        for layer in self.layers:
            x = leaky_relu(layer(x, mean_around))
        means, log_variances = (
            self.heads[part](x, mean_around) + leaky_relu(self.skips[part](x)) for part in _PARTS
        )
        return means, log_variances


_PARTS = ("mean", "log_variance")


def product_of_experts(experts: Sequence[Gaussians]) -> Gaussians:
    """Return the product of Gaussians: precisions add up, means are weighed by them.

    Source: Cao and Fleet, "Generalized product of experts for automatic and principled fusion of Gaussian
    process predictions", 2014, eq. 2, with weights of 1.
    """
    log_precisions = -torch.stack([log_variance for _, log_variance in experts])
    shares = torch.softmax(log_precisions, dim=0)
    means = (shares * torch.stack([mean for mean, _ in experts])).sum(dim=0)
    return means, -log_precisions.logsumexp(dim=0)
