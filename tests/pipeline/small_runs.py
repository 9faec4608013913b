"""A whole pipeline so small that a test can run it: 40 products, 30 users, two epochs."""

from __future__ import annotations

from typing import Any

from pipeline.config import RunConfig, parse_config

SMALL_DATASET: dict[str, Any] = {
    "importer": "demo",
    "demo": {"n_items": 40, "n_users": 30, "image_size_px": 32, "fewest_choices": 10, "most_choices": 14},
}
SMALL_RUN: dict[str, Any] = {
    "name": "small",
    "dataset": SMALL_DATASET,
    "feature_sets": [
        {"image": "random:8", "text": "random:8"},
        {"text": "random:8"},
        {"image": "shuffled:random:8", "text": "shuffled:random:8"},
    ],
    "recommenders": [
        {"model": "popularity"},
        {"model": "itemknn_content"},
        {"model": "vbpr", "settings": {"dim": 4}},
    ],
    "training": {"epochs": 2, "monitor": "recall@5"},
    "evaluation": {"ks": [5, 10]},
    "comparison": {"metric": "recall@5", "more_metrics": ["ndcg@5"]},
    "seeds": [0, 1],
}


def small_run() -> RunConfig:
    """The configuration of the small run."""
    return parse_config(SMALL_RUN, RunConfig)
