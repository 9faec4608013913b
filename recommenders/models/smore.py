"""SMORE: modalities filtered and fused as spectra, smoothed between like items, weighed by what users prefer.

Source: Ong and Khong, "Spectrum-based modality representation fusion graph convolutional network for
multimodal recommendation", WSDM 2025.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from typing_extensions import override

from recommenders.dropout import dropout
from recommenders.feature_input import FeatureTable
from recommenders.graphs import UserItemGraph, mean_propagation
from recommenders.interactions import Interactions
from recommenders.item_graphs import Edges, ItemGraph, cosine_graph
from recommenders.models.base import Recommender, xavier_uniform
from recommenders.models.layers import Affine
from recommenders.models.side_loss import Propagated, side_loss
from recommenders.propagation import KeptFor, UserItemMatrix
from recommenders.sampling import Batch

SEARCH = {
    "n_layers": (3, 4),
    "k": (10, 15, 20, 40),
    "image_k": (10, 15, 20, 40),
    "l2": (1e-5, 1e-4),
    "preference_dropout": (0.0, 0.1),
}
"""The released configuration."""

_FUSED = "fused by spectrum"
"""Name of what is made of all modalities, beside theirs; no modality is called so."""


class SmoreConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of SMORE; defaults of the released configuration, those it searches at its first value."""

    dim: PositiveInt = Field(64, description="Length of a user's and an item's embedding.")
    n_layers: PositiveInt = Field(3, description="Times embeddings are propagated between users and items.")
    n_item_layers: PositiveInt = Field(1, description="Times modalities are propagated between items.")
    k: PositiveInt = Field(10, description="Nearest items kept for each item and modality, itself included.")
    image_k: NonNegativeInt = Field(0, description="The same for the modality called image; 0: as k.")
    preference_dropout: float = Field(
        0.0, ge=0, lt=1, description="Chance of an entry of a preference to be dropped in training."
    )
    temperature: PositiveFloat = Field(0.2, description="Temperature of the contrast between the two views.")
    contrast_weight: NonNegativeFloat = Field(0.01, description="Weight of that contrast.")
    l2: NonNegativeFloat = Field(
        1e-4, description="Weight of the squared length of the unpropagated embeddings in a batch."
    )


class Smore(Recommender):
    """Sum of a behavioural embedding (LightGCN's) and a side embedding of filtered and fused modalities.

    Spectra: z_m = F(W_m f + b_m), F the real Fourier transform along the embedding. Each modality is denoised
    by a complex filter, x_m = F^-1(z_m * w_m); their product is fused and filtered, x_0 = F^-1((prod_m z_m) *
    w_0). Gates let through what agrees with behaviour, e_i * sigmoid(W' x + b'), for each of these parts.
    Each is smoothed over its item graph: the k nearest items by cosine, D^-1/2 S D^-1/2, for a modality; for
    the fused part the largest weight that any modality gives a pair. A user's part is the sum of its items'
    parts over the root of both degrees.

    Preferences: the fused part h_0 tells which entries of h_m to look at, softmax over entries of V_m
    tanh(U_m h_0 + c_m), and the behavioural embedding e' how much of each part is wanted, sigmoid(P e' + p).
    Side is the mean of the M + 1 parts after that.

    Loss of a batch: BPR; contrast_weight times the InfoNCE, on cosines, of side and behavioural embeddings of
    users and of positive items, each once (a batch against itself, as in the released code, which counts
    repeated rows and puts l2 on the final embeddings); l2 / 2 times the mean over rows of the squared lengths
    of the unpropagated embeddings. With one modality the fused part is that modality through a second filter.
    """

    needs_features = True

    adjacency: Tensor

    def __init__(
        self, train: Interactions, features: FeatureTable, config: SmoreConfig, rng: np.random.Generator
    ) -> None:
        super().__init__(train, features, config, rng)
        self.config = config
        dim = config.dim
        parts = (*features.modalities, _FUSED)
        self.embeddings = xavier_uniform(rng, self.n_users + self.n_items, dim)  # users first
        self.projections = nn.ModuleDict({m: Affine(rng, width, dim) for m, width in features.dims.items()})
        # (D // 2 + 1, 2), the real and imaginary part of each frequency's factor, standard normal.
        self.filters = nn.ParameterDict(
            {
                part: nn.Parameter(torch.from_numpy(rng.standard_normal((dim // 2 + 1, 2), np.float32)))
                for part in parts
            }
        )
        self.gates = nn.ModuleDict({part: Affine(rng, dim, dim) for part in parts})
        self.queries = nn.ModuleDict(
            {
                m: nn.Sequential(Affine(rng, dim, dim), nn.Tanh(), Affine(rng, dim, dim, bias=False))
                for m in features.modalities
            }
        )
        self.preferences = nn.ModuleDict({part: Affine(rng, dim, dim) for part in parts})
        graph = UserItemGraph(train)
        self.register_buffer("adjacency", graph.adjacency(), persistent=False)
        self.user_items = UserItemMatrix.symmetric(graph)
        self._item_graphs = KeptFor(self._build, features)

    @override
    def refresh_graph(self, features: FeatureTable) -> None:
        """Build the item graphs from what the rows are now."""
        self._item_graphs.refresh(features)

    @override
    def forward(self, features: FeatureTable) -> tuple[Tensor, Tensor]:
        """Return the sum of both embeddings for all."""
        behaviour, user_parts, item_parts = self._propagate(features)
        users, items = behaviour[: self.n_users], behaviour[self.n_users :]
        return users + self._prefer(users, user_parts), items + self._prefer(items, item_parts)

    @override
    def loss(self, batch: Batch, features: FeatureTable) -> Tensor:
        """Return BPR, contrast and L2; what is done row by row is done for the batch's rows alone."""
        rate = self.config.preference_dropout if self.training else 0.0

        def prefer(behaviour: Tensor, parts: Sequence[Tensor]) -> Tensor:
            return self._prefer(behaviour, parts, rate)

        return side_loss(batch, self.embeddings, self._propagate(features), prefer, self.config)

    def _propagate(self, features: FeatureTable) -> Propagated:
        """Return (U + I, D) behavioural embeddings, and (U, D) and (I, D) parts, the fused one last."""
        behaviour = mean_propagation(self.adjacency, self.embeddings, self.config.n_layers)
        graphs = self._item_graphs.of(features, training=self.training)
        items = self.embeddings[self.n_users :]
        item_parts = []
        for name, part in self._filtered(features).items():
            gated = items * torch.sigmoid(self.gates[name](part))
            item_parts.append(graphs[name].to(gated.device).propagate(gated, self.config.n_item_layers))
        return behaviour, [self.user_items.to_users(part) for part in item_parts], item_parts

    def _filtered(self, features: FeatureTable) -> dict[str, Tensor]:
        """Return each modality denoised and their fusion, (I, D) each."""
        spectra = {
            name: torch.fft.rfft(project(features.vectors[name]), dim=1, norm="ortho")
            for name, project in self.projections.items()
        }
        spectra[_FUSED] = torch.stack(list(spectra.values())).prod(dim=0)
        return {
            name: torch.fft.irfft(
                spectrum * torch.view_as_complex(self.filters[name]), n=self.config.dim, dim=1, norm="ortho"
            )
            for name, spectrum in spectra.items()
        }

    def _prefer(self, behaviour: Tensor, parts: Sequence[Tensor], dropout_rate: float = 0.0) -> Tensor:
        """Return (R, D) side embeddings of R users or items from their parts, the fused one last."""
        fused = parts[-1]
        looked_at = [
            torch.softmax(query(fused), dim=1) * part
            for query, part in zip(self.queries.values(), parts[:-1], strict=True)
        ]
        wanted = [
            dropout(torch.sigmoid(prefer(behaviour)), dropout_rate) * part
            for prefer, part in zip(self.preferences.values(), [*looked_at, fused], strict=True)
        ]
        return torch.stack(wanted).mean(dim=0)

    def _build(self, features: FeatureTable) -> dict[str, ItemGraph]:
        graphs = {}
        for name, vectors in features.vectors.items():
            k = self.config.image_k if name == "image" and self.config.image_k else self.config.k
            graphs[name] = cosine_graph(vectors, features.present[name], k)
        return graphs | {_FUSED: _strongest(graphs)}


def _strongest(graphs: Mapping[str, ItemGraph]) -> ItemGraph:
    """Return the graph of all edges, each with the largest weight that any graph gives it."""
    n_nodes = next(iter(graphs.values())).edges.n_nodes
    edges = [graph.edges for graph in graphs.values()]
    keys = torch.cat([part.sources * n_nodes + part.targets for part in edges])
    distinct, places = torch.unique(keys, return_inverse=True)
    weights = torch.cat([graph.weights for graph in graphs.values()])
    largest = weights.new_zeros(len(distinct)).scatter_reduce(0, places, weights, "amax")
    sources = distinct.div(max(n_nodes, 1), rounding_mode="floor")
    return ItemGraph(Edges.between(sources, distinct - sources * n_nodes, n_nodes), largest)
