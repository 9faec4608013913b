"""SMORE by the book: Ong and Khong, WSDM 2025, on dense matrices and with sums for the Fourier transforms."""

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

FUSED = "fused by spectrum"


def convolve(rows: Floats, factors: Floats) -> Floats:
    """Rows through a filter: each frequency's amplitude is multiplied by a complex factor."""
    dim = rows.shape[1]
    return back(forth(rows) * (factors[:, 0] + 1j * factors[:, 1]), dim)


def forth(rows: Floats) -> np.ndarray:
    dim = rows.shape[1]
    waves = np.exp(-2j * np.pi * np.outer(np.arange(dim), np.arange(dim // 2 + 1)) / dim)
    return rows @ waves / np.sqrt(dim)


def back(spectra: np.ndarray, dim: int) -> Floats:
    """The real rows whose half spectra these are; frequencies that are their own mirror have no sine."""
    rows = np.zeros((len(spectra), dim))
    places = np.arange(dim)
    for f in range(dim // 2 + 1):
        twice = 1 if f in {0, dim / 2} else 2
        angle = 2 * np.pi * f * places / dim
        if twice == 2:
            rows += 2 * (
                np.outer(spectra[:, f].real, np.cos(angle)) - np.outer(spectra[:, f].imag, np.sin(angle))
            )
        else:
            rows += np.outer(spectra[:, f].real, np.cos(angle))
    return rows / np.sqrt(dim)


class PlainSmore:
    def __init__(
        self,
        matrix: Floats,
        features: dict[str, Floats],
        present: dict[str, np.ndarray],
        *,
        n_layers: int,
        k: int,
        image_k: int,
        temperature: float,
        contrast_weight: float,
        l2: float,
    ) -> None:
        self.matrix, self.features = matrix, features
        self.graphs = {
            name: over_roots(np.maximum(nearest(table, present[name], image_k if name == "image" else k), 0))
            for name, table in features.items()
        }
        self.graphs[FUSED] = np.max(list(self.graphs.values()), axis=0)
        self.n_layers, self.temperature = n_layers, temperature
        self.contrast_weight, self.l2 = contrast_weight, l2

    def parts(self, p: Parameters) -> tuple[Floats, Floats]:
        """Behavioural and side embeddings, (U + I, D) each."""
        n_users = len(self.matrix)
        x = p["embeddings"]
        behaviour = mean_of_layers(bipartite(self.matrix), x, self.n_layers)
        projected = {
            name: table @ p[f"projections.{name}.weight"] + p[f"projections.{name}.bias"]
            for name, table in self.features.items()
        }
        filtered = {name: convolve(rows, p[f"filters.{name}"]) for name, rows in projected.items()}
        product = np.prod([forth(rows) for rows in projected.values()], axis=0)
        factors = p[f"filters.{FUSED}"]
        filtered[FUSED] = back(product * (factors[:, 0] + 1j * factors[:, 1]), x.shape[1])
        modal = {}
        for name, rows in filtered.items():
            gate = logistic(rows @ p[f"gates.{name}.weight"] + p[f"gates.{name}.bias"])
            items = self.graphs[name] @ (x[n_users:] * gate)
            modal[name] = np.vstack([symmetric(self.matrix) @ items, items])
        side = []
        for name, part in modal.items():
            seen = part
            if name != FUSED:
                hidden = np.tanh(modal[FUSED] @ p[f"queries.{name}.0.weight"] + p[f"queries.{name}.0.bias"])
                seen = softmax(hidden @ p[f"queries.{name}.2.weight"]) * part
            wanted = logistic(behaviour @ p[f"preferences.{name}.weight"] + p[f"preferences.{name}.bias"])
            side.append(wanted * seen)
        return behaviour, np.mean(side, axis=0)

    def loss(self, p: Parameters, _: Parameters, batch: PlainBatch) -> float:
        users, positives, drawn = batch
        n_users = len(self.matrix)
        behaviour, side = self.parts(p)
        final = behaviour + side
        total = bpr(final[:n_users], final[n_users:], batch)
        for nodes in (np.unique(users), n_users + np.unique(positives)):
            total += self.contrast_weight * info_nce(side[nodes], behaviour[nodes], self.temperature)
        x = p["embeddings"]
        own = half_squares(x[users], x[n_users + positives], x[n_users + drawn])
        return total + self.l2 / len(users) * own
