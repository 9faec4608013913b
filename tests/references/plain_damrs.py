"""DA-MRS by the book: Xv et al., KDD 2024, on dense graphs, pair by pair."""

from __future__ import annotations

import numpy as np

from tests.references.numeric import Parameters
from tests.references.plain_bpr import Floats, PlainBatch
from tests.references.plain_graphs import (
    bipartite,
    half_squares,
    logistic,
    mean_of_layers,
    over_roots,
    softmax,
    unit,
)


def content_graphs(features: dict[str, Floats], present: dict[str, np.ndarray], k: int) -> list[Floats]:
    """Edges of 1 to the nearest of the items that every modality finds alike, and to the item itself."""
    similar = {name: unit(table) @ unit(table).T for name, table in features.items()}
    n_items = len(next(iter(similar.values())))
    graphs = []
    for name in features:
        graph = np.eye(n_items)
        for i in range(n_items):
            if not present[name][i]:
                continue
            candidates = []
            for j in range(n_items):
                verdicts = []
                for other, cosines in similar.items():
                    rows = np.flatnonzero(present[other])
                    if present[other][i] and present[other][j]:
                        verdicts.append(cosines[i, j] >= cosines[np.ix_(rows, rows)].mean())
                if present[name][j] and j != i and all(verdicts):
                    candidates.append(j)
            for j in sorted(candidates, key=lambda j: -similar[name][i, j])[: k - 1]:
                graph[i, j] = 1
        graphs.append(over_roots(graph))
    return graphs


def behaviour(matrix: Floats, k: int, min_common: int) -> Floats:
    """Edges of 1 to the items with most users in common, and to the item itself."""
    common = matrix.T @ matrix
    graph = np.eye(len(common))
    for i, row in enumerate(common):
        others = [j for j in range(len(row)) if j != i and row[j] >= min_common]
        for j in sorted(others, key=lambda j: (-row[j], j))[:k]:
            graph[i, j] = 1
    return over_roots(graph)


class PlainDaMrs:
    def __init__(
        self,
        matrix: Floats,
        features: dict[str, Floats],
        present: dict[str, np.ndarray],
        *,
        n_layers: int,
        n_item_layers: int,
        k: int,
        behaviour_k: int,
        min_common: int,
        preference_weight: float,
        relation_weight: float,
        n_positives: int,
        temperature: float,
        l2: float,
    ) -> None:
        self.matrix, self.n_layers, self.n_item_layers = matrix, n_layers, n_item_layers
        self.graphs = [*content_graphs(features, present, k), behaviour(matrix, behaviour_k, min_common)]
        self.preference_weight, self.relation_weight = preference_weight, relation_weight
        self.n_positives, self.temperature, self.l2 = n_positives, temperature, l2

    def parts(self, p: Parameters) -> tuple[Floats, Floats, list[Floats]]:
        """LightGCN's users and items, and the items by each graph."""
        n_users = len(self.matrix)
        nodes = mean_of_layers(bipartite(self.matrix), p["embeddings"], self.n_layers)
        sides = []
        for graph in self.graphs:
            side = p["embeddings"][n_users:]
            for _ in range(self.n_item_layers):
                side = graph @ side
            sides.append(side)
        return nodes[:n_users], nodes[n_users:], sides

    def final(self, p: Parameters) -> tuple[Floats, Floats]:
        users, items, sides = self.parts(p)
        return users, items + sum(sides) / len(sides)

    def trust(self, p: Parameters, batch: PlainBatch) -> list[tuple[float, float]]:
        """How far each row of the batch is believed, and doubted."""
        users, _, sides = self.parts(p)
        sides = [unit(side) for side in sides]
        doubted = np.mean(
            [
                logistic(users[u] @ side[j])
                for u, _, js in zip(*batch, strict=True)
                for j in js
                for side in sides
            ]
        )
        weights = []
        for user, item, _ in zip(*batch, strict=True):
            chances = [logistic(users[user] @ side[item]) for side in sides]
            mean = np.mean(chances)
            down = max(max(chances) - doubted, 0) if mean < doubted else 0.0
            weights.append((mean * np.exp(-np.var(chances, ddof=1)) ** 2, down))
        return weights

    def grades(self, p: Parameters, rows: np.ndarray) -> list[list[tuple[list[int], list[int]]]]:
        """By graph and item: the related items of both grades."""
        chances = [softmax(unit(side)[rows] @ unit(side).T) for side in self.parts(p)[2]]
        found = []
        for own in chances:
            of_graph = []
            for place in range(len(rows)):
                together = sum(each[place] for each in chances) + own[place]
                first = np.argsort(-together)[: self.n_positives].tolist()
                second = [int(j) for j in np.argsort(-own[place]) if j not in first][: self.n_positives]
                of_graph.append((first, second))
            found.append(of_graph)
        return found

    def loss(self, p: Parameters, start: Parameters, batch: PlainBatch) -> float:
        users, items, sides = self.parts(p)
        h_users, h_items = self.final(p)
        ranked = []
        for (user, item, drawn), (up, down) in zip(
            zip(*batch, strict=True), self.trust(start, batch), strict=True
        ):
            for negative in drawn:
                margin = h_users[user] @ h_items[item] - h_users[user] @ h_items[negative]
                ranked.append(-up * np.log(logistic(margin)) - down * np.log(logistic(-margin)))
        rows = np.unique(np.concatenate([batch[1], batch[2].ravel()]))
        content, apart = sum(sides) / len(sides), []
        for user in np.unique(batch[0]):
            for item in rows:
                one = logistic(users[user] @ unit(items[item]))
                other = logistic(users[user] @ unit(content[item]))
                for a, b in ((one, other), (other, one)):
                    apart.append(a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b)))
        related = []
        for side, of_graph in zip(sides, self.grades(start, rows), strict=True):
            for row, (first, second) in zip(rows, of_graph, strict=True):
                exps = np.exp(unit(side) @ unit(side[row]) / self.temperature)
                rest = exps.sum() - exps[first].sum()
                related.append(-np.log(exps[first].sum() / exps.sum()) - np.log(exps[second].sum() / rest))
        x, n_users = p["embeddings"], len(self.matrix)
        own = half_squares(x[batch[0]], x[n_users + batch[1]], x[n_users + batch[2]])
        return float(
            np.mean(ranked)
            + self.preference_weight * 2 * np.mean(apart)
            + self.relation_weight * np.mean(related)
            + self.l2 / len(batch[0]) * own
        )
