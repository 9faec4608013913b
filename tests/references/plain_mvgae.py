"""MVGAE by the book: Yi and Chen, TMM 2021, node by node."""

from __future__ import annotations

import numpy as np

from tests.references.numeric import Parameters
from tests.references.plain_bpr import Floats, PlainBatch
from tests.references.plain_graphs import bipartite, half_squares, logistic, unit


def leaky(x: Floats) -> Floats:
    return np.where(x > 0, x, 0.01 * x)


class PlainMvgae:
    def __init__(
        self,
        matrix: Floats,
        features: dict[str, Floats],
        *,
        n_layers: int,
        squash: bool,
        beta: float,
        expert_weight: float,
        l2: float,
    ) -> None:
        self.features, self.n_users, self.n_layers, self.squash = features, len(matrix), n_layers, squash
        self.beta, self.expert_weight, self.l2 = beta, expert_weight, l2
        connected = bipartite(matrix) > 0
        self.around = [[node, *np.flatnonzero(row)] for node, row in enumerate(connected)]

    def convolve(self, p: Parameters, name: str, x: Floats) -> Floats:
        mean = np.array([np.mean([x[other] for other in nodes], axis=0) for nodes in self.around])
        convolved = unit(mean @ p[f"{name}.weight"] + p[f"{name}.bias"])
        return leaky(convolved) @ p[f"{name}.mix.weight"] + p[f"{name}.mix.bias"]

    def encode(self, p: Parameters, name: str, vectors: Floats) -> tuple[Floats, Floats]:
        """Means and variances."""
        projected = vectors @ p[f"{name}.projection.weight"] + p[f"{name}.projection.bias"]
        x = unit(np.vstack([p[f"{name}.preferences"], projected]))
        for layer in range(self.n_layers):
            x = leaky(self.convolve(p, f"{name}.layers.{layer}", x))
        parts = []
        for part in ("mean", "log_variance"):
            skip = x @ p[f"{name}.skips.{part}.weight"] + p[f"{name}.skips.{part}.bias"]
            parts.append(self.convolve(p, f"{name}.heads.{part}", x) + leaky(skip))
        return parts[0], np.exp(parts[1])

    def experts(self, p: Parameters) -> list[tuple[Floats, Floats]]:
        modal = [self.encode(p, f"experts.{name}", table) for name, table in self.features.items()]
        return [*modal, self.encode(p, "id_expert", p["ids"])]

    def product(self, experts: list[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
        precision = sum(1 / variance for _, variance in experts)
        return sum(mean / variance for mean, variance in experts) / precision, 1 / precision

    def squashed(self, x: Floats) -> Floats:
        return logistic(x) if self.squash else x

    def final(self, p: Parameters) -> Floats:
        """What is scored, (U + I, D)."""
        return self.squashed(self.product(self.experts(p))[0])

    def loss_of(self, nodes: tuple[Floats, Floats], batch: PlainBatch, deviation: float) -> float:
        """Each embedding lies ``deviation`` standard deviations beside its mean."""
        means, variances = nodes
        z = self.squashed(means + deviation * np.sqrt(variances))
        total = 0.0
        for user, positive, drawn in zip(*batch, strict=True):
            worst = max(z[user] @ z[self.n_users + item] for item in drawn)
            margin = z[user] @ z[self.n_users + positive] - worst
            total += np.log1p(np.exp(-margin))
        divergence = [
            0.5 * sum(v + m * m - 1 - np.log(v) for m, v in zip(mean, variance, strict=True))
            for mean, variance in zip(means, variances, strict=True)
        ]
        return (total + self.beta * np.mean(divergence)) / len(batch[0])

    def loss(self, p: Parameters, batch: PlainBatch, deviation: float = 0.0) -> float:
        users, positives, drawn = batch
        experts = self.experts(p)
        total = self.loss_of(self.product(experts), batch, deviation)
        total += self.expert_weight * sum(self.loss_of(expert, batch, deviation) for expert in experts)
        own = [p["ids"][positives], p["ids"][drawn]]
        own += [table[users] for name, table in p.items() if name.endswith("preferences")]
        return total + self.l2 / len(users) * half_squares(*own)
