"""The canonical shape: what no importer can hand over."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError

from pipeline.datasets.base import RawDataset, few, require_columns
from pipeline.datasets.config import DatasetConfig
from pipeline.datasets.registry import IMPORTERS
from pipeline.errors import DatasetError

ITEMS = pl.DataFrame({"item_id": ["a", "b"]})
PAIRS = pl.DataFrame({"user_id": ["v", "u", "v"], "item_id": ["b", "b", "a"]})


def test_users_are_in_the_order_of_their_first_interaction() -> None:
    raw = RawDataset(ITEMS, PAIRS)
    assert raw.user_ids() == ["v", "u"]
    users, items = raw.user_and_item_rows()
    np.testing.assert_array_equal(users, [0, 1, 0])
    np.testing.assert_array_equal(items, [1, 1, 0])
    assert not raw.has_split


@pytest.mark.parametrize(
    ("items", "interactions", "message"),
    [
        (ITEMS.clear(), PAIRS, "lists no item"),
        (ITEMS, PAIRS.clear(), "no interaction left"),
        (pl.DataFrame({"item_id": ["a", None, "b"]}), PAIRS, "1 of 3 items have no id"),
        (pl.DataFrame({"item_id": ["a", "b", "a"]}), PAIRS, "1 item ids are listed more than once: 'a'"),
        (ITEMS.head(1), PAIRS, "2 interactions are with items that are not listed: 'b'"),
        (ITEMS, PAIRS.with_columns(split=pl.lit("trial")), "split column holds 'trial'; expected train"),
        (ITEMS, PAIRS.with_columns(rating=pl.lit(1)), "rating is Int32; expected Float32"),
    ],
)
def test_what_is_not_a_dataset_is_refused(
    items: pl.DataFrame, interactions: pl.DataFrame, message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        RawDataset(items, interactions)


def test_given_features_need_a_row_for_each_item() -> None:
    with pytest.raises(DatasetError, match=r"image features have shape \(3, 4\); expected .* the 2 items"):
        RawDataset(ITEMS, PAIRS, given_features={"image": np.zeros((3, 4), dtype=np.float32)})


def test_a_wrong_column_names_its_near_match() -> None:
    table = pl.DataFrame({"Item_ID": [1], "title": ["x"]})
    with pytest.raises(DatasetError, match=r"no column 'item_id' \(tables.item_id\); did you mean 'Item_ID'"):
        require_columns(table, {"tables.item_id": "item_id"}, "items.csv")
    with pytest.raises(DatasetError, match=r"set tables.item_id to one of these.*Item_ID, title"):
        require_columns(table, {"tables.item_id": "sku"}, "items.csv")


def test_a_long_list_is_cut() -> None:
    assert few([1, 2, 3], limit=2) == "1, 2 and 1 more"


def test_every_importer_has_a_section_in_the_configuration() -> None:
    assert set(IMPORTERS) <= set(DatasetConfig.model_fields)


def test_a_misspelt_key_is_refused() -> None:
    with pytest.raises(ValidationError, match="n_item"):
        DatasetConfig.model_validate({"demo": {"n_item": 3}})


@pytest.mark.parametrize(
    ("importer", "rule"), [("mmrec", "given"), ("lattice", "given"), ("demo", "ratio_mmrec")]
)
def test_a_published_split_is_kept_unless_another_is_asked_for(importer: str, rule: str) -> None:
    assert DatasetConfig.model_validate({"importer": importer}).split.rule == rule
    asked = DatasetConfig.model_validate({"importer": importer, "split": {"rule": "leave_one_out"}})
    assert asked.split.rule == "leave_one_out"
