"""Runs with chosen figures, for the comparison's tests."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from pipeline.comparison.records import RunRecord

N_USERS = 60
READING = ("tiny image+text", "tiny image", "random image+text", "shuffled:tiny image+text")
STRENGTH = {"-": 0.0, "tiny image+text": 0.3, "tiny image": 0.2, "random image+text": 0.02}
BASE = {"popularity": 0.1, "bpr": 0.1005, "itemknn_content": 0.12, "vbpr": 0.2}


def record(
    model: str = "vbpr",
    feature_set: str = "tiny image+text",
    seed: int = 0,
    *,
    users: Sequence[float] | None = None,
    valid: float | None = None,
    **changes: Any,
) -> RunRecord:
    """Return a run whose users' recall is ``users``, or drawn around what model and features are worth."""
    level = BASE.get(model, 0.2) + STRENGTH.get(feature_set, 0.01)
    if users is None:
        of_user = np.random.default_rng(9).random(N_USERS)
        luck = np.random.default_rng([seed, len(model), len(feature_set)]).normal(0, 0.02, N_USERS)
        users = np.clip(level * 2 * of_user + luck, 0, 1).tolist()
    recall = np.asarray(users, dtype=np.float64)
    fields: dict[str, Any] = {
        "label": f"run/{model}-{feature_set}-seed-{seed}",
        "model": model,
        "feature_set": feature_set,
        "seed": seed,
        "dataset": "d" * 64,
        "split_fingerprint": "f" * 64,
        "settings": {"settings": {"dim": 32}},
        "valid": {"recall@20": level if valid is None else valid, "ndcg@20": level / 2, "coverage@20": 0.5},
        "test": {
            "recall@20": float(recall.mean()),
            "ndcg@20": float(recall.mean()) / 2,
            "coverage@20": 0.4 + seed / 10,
        },
        "per_user": pl.DataFrame(
            {"user_row": np.arange(len(recall)), "recall@20": recall, "ndcg@20": recall / 2}
        ),
        "evaluation": {"mask_valid_in_test": False},
        "facts": {"train_seconds": 10.0 + seed, "feature_seconds": 4.0, "feature_bytes": 2e6},
    }
    return RunRecord(**fields | changes)


def demo_runs(seeds: Sequence[int] = (0, 1, 2)) -> list[RunRecord]:
    """Return runs with every floor: two models without features and two that read four feature sets."""
    rows = [("popularity", "-"), ("bpr", "-")]
    rows += [(model, features) for model in ("itemknn_content", "vbpr") for features in READING]
    return [record(model, features, seed) for model, features in rows for seed in seeds]
