"""What the test lists of a finished run are like, and for whom they are right."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

from pipeline.measuring import beyond_accuracy, by_group, item_groups
from recommenders.beyond_accuracy import intra_list_distance
from recommenders.evaluation import Evaluation, EvaluationConfig, evaluate_part
from recommenders.feature_input import FeatureTable
from tests.worlds import random_world

CONFIG = EvaluationConfig(ks=(2, 5))


@pytest.fixture
def world():
    return random_world(n_users=30, n_items=25)


@pytest.fixture
def table() -> FeatureTable:
    present = torch.arange(25) % 5 != 0
    return FeatureTable(
        {"image": torch.randn(25, 6, generator=torch.Generator().manual_seed(0))}, {"image": present}
    )


@pytest.fixture
def measured(world) -> Evaluation:
    scores = torch.from_numpy(np.random.default_rng(0).standard_normal((30, 25), dtype=np.float32))
    return evaluate_part(lambda users: scores[users], world.split, "test", CONFIG, keep_lists=True)


def test_lists_are_described_on_every_modality_and_on_categories(world, table, measured) -> None:
    items = pl.DataFrame(
        {"item_id": [str(i) for i in range(25)], "categories": [["a"], ["b"], ["a", "b"], [], None] * 5}
    )
    found = beyond_accuracy(measured, world.split, table, items, CONFIG)
    names = ("gini", "arp", "aplt", "epc", "efd", "ild_image", "ild_categories")
    assert {f"{name}@{k}" for name in names for k in (2, 5)} <= set(found)
    distances = intra_list_distance(measured.lists, table.vectors["image"], table.present["image"], 5)
    assert found["ild_image@5"] == pytest.approx(np.nanmean(distances))
    assert "ild_categories@5" not in beyond_accuracy(
        measured, world.split, table, items.drop("categories"), CONFIG
    )


def test_groups_of_users_average_to_the_whole(world, table, measured) -> None:
    groups = by_group(measured, world.split, table, CONFIG)
    users = groups.filter((pl.col("grouping") == "user activity") & (pl.col("metric") == "recall@5"))
    assert users["group"].to_list() == ["low", "middle", "high"]
    assert users["n_users"].sum() == measured.n_users
    filled = users.filter(pl.col("n_users") > 0)
    mean = (filled["value"] * filled["n_users"]).sum() / measured.n_users
    assert mean == pytest.approx(measured.metrics["recall@5"])


def test_groups_of_items_split_the_catalogue_and_the_hits(world, table, measured) -> None:
    groups = by_group(measured, world.split, table, CONFIG)
    assert set(groups["grouping"]) == {"user activity", "item popularity", "item training", "item image"}
    for grouping, members in item_groups(world.split, table).items():
        assert np.sum(list(members.values())) == 25, grouping
    present = groups.filter((pl.col("group") == "present") & (pl.col("metric") == "recall@5"))
    relevant: dict[int, set[int]] = {}
    for user, item in zip(
        world.split.test.user_rows.tolist(), world.split.test.item_rows.tolist(), strict=True
    ):
        if table.present["image"][item]:
            relevant.setdefault(user, set()).add(item)
    shown = dict(zip(measured.per_user["user_row"].to_list(), measured.lists[:, :5].tolist(), strict=True))
    recalls = [len(items & set(shown[user])) / len(items) for user, items in relevant.items()]
    assert present["value"][0] == pytest.approx(np.mean(recalls))
    assert present["n_users"][0] == len(recalls)
