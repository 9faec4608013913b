"""LGMRec by the book: Guo et al., AAAI 2024, on dense matrices, without Gumbel noise and dropout."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from tests.references.numeric import Parameters
from tests.references.plain_bpr import Floats, PlainBatch
from tests.references.plain_graphs import bipartite, bpr, half_squares, mean_of_layers, softmax, unit


class PlainLgmRec:
    def __init__(
        self,
        matrix: Floats,
        features: dict[str, Floats],
        *,
        n_layers: int,
        n_modality_layers: int,
        n_hyper_layers: int,
        alpha: float,
        temperature: float,
        contrast_weight: float,
        contrast_with: str,
        l2: float,
    ) -> None:
        self.matrix, self.features = matrix, features
        self.n_layers, self.n_modality_layers, self.n_hyper_layers = (
            n_layers,
            n_modality_layers,
            n_hyper_layers,
        )
        self.alpha, self.temperature, self.contrast_weight = alpha, temperature, contrast_weight
        self.contrast_with, self.l2 = contrast_with, l2

    def parts(self, p: Parameters) -> tuple[Floats, list[Floats]]:
        """Final embeddings, and the global ones of each modality, (U + I, D) each, users first."""
        n_users = len(self.matrix)
        adjacency = bipartite(self.matrix)
        behaviour = mean_of_layers(adjacency, p["embeddings"], self.n_layers)
        local = behaviour
        globals_ = []
        for name, table in self.features.items():
            items = table @ p[f"projections.{name}"]
            means = self.matrix @ items / np.maximum(self.matrix.sum(axis=1, keepdims=True), 1)
            nodes = np.vstack([means, items])
            for _ in range(self.n_modality_layers):
                nodes = adjacency @ nodes
            local = local + unit(nodes)
            dependencies = table @ p[f"hyperedges.{name}"]
            item_shares = softmax(dependencies / self.temperature)
            user_shares = softmax(self.matrix @ dependencies / self.temperature)
            items = behaviour[n_users:]
            for _ in range(self.n_hyper_layers):
                users = user_shares @ (item_shares.T @ items)
                items = item_shares @ (item_shares.T @ items)
            globals_.append(np.vstack([users, items]))
        return local + self.alpha * unit(sum(globals_)), globals_

    def contrast(self, one: Floats, other: Floats, rows: np.ndarray) -> float:
        total = 0.0
        for row in rows:
            told_from = range(len(other)) if self.contrast_with == "all" else rows
            similar = {r: np.exp(unit(one[row]) @ unit(other[r]) / self.temperature) for r in told_from}
            total -= np.log(similar[row] / sum(similar.values()))
        return float(total)

    def loss(self, p: Parameters, _: Parameters, batch: PlainBatch) -> float:
        users, positives, drawn = batch
        n_users = len(self.matrix)
        final, by_modality = self.parts(p)
        total = bpr(final[:n_users], final[n_users:], batch)
        for one, other in combinations(by_modality, 2):
            told = self.contrast(one[:n_users], other[:n_users], np.unique(users))
            told += self.contrast(one[n_users:], other[n_users:], np.unique(positives))
            total += self.contrast_weight * told
        x = p["embeddings"]
        own = half_squares(x[users], x[n_users + positives], x[n_users + drawn])
        return total + self.l2 / len(users) * own
