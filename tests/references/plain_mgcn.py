"""MGCN by the book: Yu et al., MM 2023, on dense matrices."""

from __future__ import annotations

import numpy as np

from tests.references.numeric import Parameters
from tests.references.plain_bpr import Floats, PlainBatch
from tests.references.plain_graphs import (
    bipartite,
    bpr,
    half_squares,
    info_nce,
    logistic,
    mean_of_layers,
    nearest,
    over_roots,
    softmax,
    symmetric,
)


class PlainMgcn:
    def __init__(
        self,
        matrix: Floats,
        features: dict[str, Floats],
        present: dict[str, np.ndarray],
        *,
        n_layers: int,
        n_item_layers: int,
        k: int,
        temperature: float,
        contrast_weight: float,
        l2: float,
        released_fuser: bool,
    ) -> None:
        self.matrix, self.features = matrix, features
        self.graphs = {
            name: over_roots(np.maximum(nearest(table, present[name], k), 0))
            for name, table in features.items()
        }
        self.n_layers, self.n_item_layers, self.temperature = n_layers, n_item_layers, temperature
        self.contrast_weight, self.l2, self.released_fuser = contrast_weight, l2, released_fuser

    def parts(self, p: Parameters) -> tuple[Floats, Floats]:
        """Behavioural and multimodal embeddings, (U + I, D) each."""
        n_users = len(self.matrix)
        x = p["embeddings"]
        behaviour = mean_of_layers(bipartite(self.matrix), x, self.n_layers)
        modal = []
        for name, table in self.features.items():
            projected = table @ p[f"projections.{name}.weight"] + p[f"projections.{name}.bias"]
            gate = logistic(projected @ p[f"gates.{name}.weight"] + p[f"gates.{name}.bias"])
            items = x[n_users:] * gate
            for _ in range(self.n_item_layers):
                items = self.graphs[name] @ items
            modal.append(np.vstack([symmetric(self.matrix) @ items, items]))
        logits = [
            np.tanh(h @ p["attention.0.weight"] + p["attention.0.bias"]) @ p["attention.2.weight"]
            for h in modal
        ]
        weights = softmax(np.hstack(logits))
        shared = sum(weights[:, [m]] * h for m, h in enumerate(modal))
        own = [
            logistic(behaviour @ p[f"preferences.{name}.weight"] + p[f"preferences.{name}.bias"])
            * (h - shared)
            for name, h in zip(self.features, modal, strict=True)
        ]
        if self.released_fuser:
            return behaviour, (shared + sum(own)) / (len(own) + 1)
        return behaviour, shared + sum(own) / len(own)

    def loss(self, p: Parameters, _: Parameters, batch: PlainBatch) -> float:
        users, positives, drawn = batch
        n_users = len(self.matrix)
        behaviour, fused = self.parts(p)
        final = behaviour + fused
        total = bpr(final[:n_users], final[n_users:], batch)
        for nodes in (np.unique(users), n_users + np.unique(positives)):
            total += self.contrast_weight * info_nce(fused[nodes], behaviour[nodes], self.temperature)
        x = p["embeddings"]
        own = half_squares(x[users], x[n_users + positives], x[n_users + drawn])
        return total + self.l2 / len(users) * own
