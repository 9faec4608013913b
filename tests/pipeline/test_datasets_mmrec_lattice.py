"""Importers `mmrec` and `lattice`: the published files as they are, and what is refused of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.datasets.base import RawDataset
from pipeline.datasets.lattice import LatticeConfig, import_lattice, lattice_identity
from pipeline.datasets.mmrec import MmrecConfig, import_mmrec, mmrec_identity
from pipeline.errors import DatasetError

INTER = (
    "userID\titemID\trating\ttimestamp\tx_label\n5\t2\t4.0\t100\t0\n3\t0\t5.0\t200\t1\n5\t1\t1.0\t300\t2\n"
)
ROWS = [
    ("5", "2", 4.0, 100, "train"),
    ("3", "0", 5.0, 200, "valid"),
    ("5", "1", 1.0, 300, "test"),
]


@pytest.fixture
def mmrec(tmp_path: Path) -> Path:
    (tmp_path / "baby.inter").write_text(INTER)
    np.save(tmp_path / "image_feat.npy", np.arange(8, dtype=np.float64).reshape(4, 2))
    np.save(tmp_path / "text_feat.npy", np.ones((4, 3), dtype=np.float32))
    return tmp_path


def load_mmrec(folder: Path, **settings: object) -> RawDataset:
    return import_mmrec(MmrecConfig.model_validate({"folder": str(folder), **settings}))


def test_interactions_split_and_features_are_read(mmrec: Path) -> None:
    raw = load_mmrec(mmrec)
    assert raw.interactions.rows() == ROWS
    assert raw.items["item_id"].to_list() == ["0", "1", "2", "3"], (
        "rows of the features, also item 3 that nobody chose"
    )
    assert raw.user_ids() == ["5", "3"]
    assert raw.given_features["image"].dtype == np.float32
    np.testing.assert_array_equal(raw.given_features["image"][2], [4.0, 5.0])
    assert raw.given_features["text"].shape == (4, 3)


@pytest.mark.parametrize(
    "variant",
    [
        INTER.replace("\n", "\r\n"),
        INTER.replace("\t", ","),
        INTER.replace("\t", ",").replace("\n", "\r\n"),
        "\ufeff" + INTER,
        INTER.replace("userID\titemID\trating", "userID:token\titemID:token\trating:float"),
    ],
    ids=["CRLF", "comma", "comma and CRLF", "byte order mark", "types in the header"],
)
def test_variants_of_the_file_give_the_same_dataset(mmrec: Path, variant: str) -> None:
    (mmrec / "baby.inter").write_bytes(variant.encode())
    assert load_mmrec(mmrec).interactions.rows() == ROWS


def test_optional_columns_and_features_may_be_lacking(mmrec: Path) -> None:
    (mmrec / "baby.inter").write_text("userID\titemID\tx_label\n1\t0\t0\n1\t2\t2\n")
    (mmrec / "image_feat.npy").unlink()
    (mmrec / "text_feat.npy").unlink()
    raw = load_mmrec(mmrec)
    assert raw.interactions.columns == ["user_id", "item_id", "split"]
    assert raw.items["item_id"].to_list() == ["0", "1", "2"]
    assert raw.given_features == {}
    assert not load_mmrec(mmrec, label="").has_split


def test_a_mapping_names_the_items(mmrec: Path) -> None:
    (mmrec / "i_id_mapping.csv").write_text("asin\titemID\nB0\t0\nB3\t3\nB1\t1\nB2\t2\n")
    raw = load_mmrec(mmrec)
    assert raw.items["item_id"].to_list() == ["B0", "B1", "B2", "B3"]
    assert raw.interactions["item_id"].to_list() == ["B2", "B0", "B1"]
    assert load_mmrec(mmrec, item_mapping="").items["item_id"].to_list() == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("asin\titemID\nB0\t0\nB0b\t0\n", r"item number 0 \('B0b'\) is repeated"),
        ("asin\titemID\nB9\t9\n", r"item number 9 \('B9'\) is .* beyond 3"),
        ("asin\titemID\nB0\t0\n", r"names 1 of 4 items; without a name: 1, 2, 3"),
        ("asin\tname\titemID\nB0\tx\t0\n", r"expected 'itemID' and one column of item ids"),
        ("asin\titem\nB0\t0\n", r"no column 'itemID' \(mmrec.item\)"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(mmrec: Path, mapping: str, message: str) -> None:
    (mmrec / "i_id_mapping.csv").write_text(mapping)
    with pytest.raises(DatasetError, match=message):
        load_mmrec(mmrec)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (INTER.replace("x_label", "label"), r"no column 'x_label' \(mmrec.label\)"),
        (INTER.replace("\t2\n", "\t7\n"), r"split column 'x_label' holds '7'"),
        (INTER.replace("5\t2\t", "5\ttwo\t"), r"column 'itemID' holds 'two'; expected item numbers"),
        (INTER.replace("5\t2\t", "5\t4\t"), r"names item 4, but the features have 4 rows"),
        ("nothing here\n", r"expected the names of its columns, separated by tabs or commas"),
        ("userID\titemID\tx_label\n", r"no interaction left"),
    ],
)
def test_an_inter_file_that_does_not_fit_is_refused(mmrec: Path, content: str, message: str) -> None:
    (mmrec / "baby.inter").write_text(content)
    with pytest.raises(DatasetError, match=message):
        load_mmrec(mmrec)


def test_the_inter_file_must_be_clear(mmrec: Path) -> None:
    (mmrec / "other.inter").write_text(INTER)
    with pytest.raises(DatasetError, match=r"2 .inter files \('baby.inter', 'other.inter'\); name the one"):
        load_mmrec(mmrec)
    assert len(load_mmrec(mmrec, inter="other.inter").interactions) == 3
    with pytest.raises(DatasetError, match=r"mmrec.folder is empty"):
        import_mmrec(MmrecConfig())
    with pytest.raises(DatasetError, match=r"is not a folder"):
        load_mmrec(mmrec / "nowhere")


def test_features_that_do_not_fit_are_refused(mmrec: Path) -> None:
    np.save(mmrec / "text_feat.npy", np.ones((5, 3)))
    with pytest.raises(DatasetError, match=r"different numbers of rows: \{'image': 4, 'text': 5\}"):
        load_mmrec(mmrec)
    np.save(mmrec / "text_feat.npy", np.array([[1.0], [np.nan], [1.0], [1.0]]))
    with pytest.raises(DatasetError, match=r"not finite in 1 rows: 1"):
        load_mmrec(mmrec)
    np.save(mmrec / "text_feat.npy", np.ones(4))
    with pytest.raises(DatasetError, match=r"of shape \(4,\); expected"):
        load_mmrec(mmrec)
    np.save(mmrec / "text_feat.npy", np.array([{}] * 4), allow_pickle=True)
    with pytest.raises(DatasetError, match=r"cannot be read as .npy"):
        load_mmrec(mmrec)
    with pytest.raises(DatasetError, match=r"text_features is .*clip.npy, which does not exist"):
        load_mmrec(mmrec, text_features="clip.npy")


def test_changed_features_change_the_identity(mmrec: Path) -> None:
    config = MmrecConfig(folder=str(mmrec))
    first = mmrec_identity(config)
    assert mmrec_identity(config) == first
    np.save(mmrec / "text_feat.npy", np.zeros((4, 3), dtype=np.float32))
    second = mmrec_identity(config)
    assert second != first
    (mmrec / "i_id_mapping.csv").write_text("asin\titemID\nB0\t0\n")
    assert mmrec_identity(config) != second


@pytest.fixture
def lattice(tmp_path: Path) -> Path:
    (tmp_path / "5-core").mkdir()
    parts = {"train": {"0": [2, 1], "1": [0]}, "val": {"0": [0]}, "test": {"1": [2]}}
    for name, part in parts.items():
        (tmp_path / "5-core" / f"{name}.json").write_text(json.dumps(part))
    (tmp_path / "user2id.json").write_text(json.dumps({"anna": 0, "bert": 1}))
    (tmp_path / "item2id.json").write_text(json.dumps({"z": 2, "x": 0, "y": 1}))
    return tmp_path


def load_lattice(folder: Path, **settings: object) -> RawDataset:
    return import_lattice(LatticeConfig.model_validate({"folder": str(folder), **settings}))


def test_the_three_parts_are_read_with_their_ids(lattice: Path) -> None:
    raw = load_lattice(lattice)
    assert raw.interactions.rows() == [
        ("anna", "z", "train"),
        ("anna", "y", "train"),
        ("bert", "x", "train"),
        ("anna", "x", "valid"),
        ("bert", "z", "test"),
    ]
    assert raw.items["item_id"].to_list() == ["x", "y", "z"], "in the order of their numbers"


def test_features_beside_the_json_files_are_read(lattice: Path) -> None:
    np.save(lattice / "image_feat.npy", np.eye(3))
    assert load_lattice(lattice).given_features["image"].shape == (3, 3)
    first = lattice_identity(LatticeConfig(folder=str(lattice)))
    np.save(lattice / "image_feat.npy", np.eye(2))
    assert lattice_identity(LatticeConfig(folder=str(lattice))) != first
    with pytest.raises(DatasetError, match=r"image features have shape \(2, 2\); expected .* the 3 items"):
        load_lattice(lattice)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("item2id.json", '{"x": 0, "y": 1}', r"names item numbers that item2id.json does not have: 2"),
        ("user2id.json", '{"anna": 0}', r"names user numbers that user2id.json does not have: 1"),
        ("item2id.json", '{"x": 0, "y": 0, "z": 1}', r"gives 'y' the number 0; expected each number"),
        ("item2id.json", '["x"]', r"holds a list; expected an object"),
        ("5-core/val.json", '{"0": [0', r"val.json cannot be read as JSON"),
        ("5-core/val.json", '{"anna": [0]}', r"'anna' has \[0\]; expected a user number"),
        ("5-core/val.json", '{"0": ["x"]}', r"expected a user number and item numbers"),
    ],
)
def test_files_that_do_not_fit_are_refused(lattice: Path, name: str, content: str, message: str) -> None:
    (lattice / name).write_text(content)
    with pytest.raises(DatasetError, match=message):
        load_lattice(lattice)


def test_a_missing_part_is_named(lattice: Path) -> None:
    (lattice / "5-core" / "val.json").unlink()
    with pytest.raises(DatasetError, match=r"val.json, which does not exist"):
        load_lattice(lattice)


@pytest.mark.real_data
def test_amazon_baby_counts_are_those_of_its_readme(real_data: Callable[[str], Path]) -> None:
    raw = import_lattice(LatticeConfig(folder=str(real_data("amazon-baby"))))
    sizes = dict(raw.interactions.group_by("split").len().iter_rows())
    assert sizes == {"train": 119_674, "valid": 20_559, "test": 20_559}
    assert len(raw.user_ids()) == 19_445
    assert len(raw.items) == 7_050
    assert raw.interactions.select("user_id", "item_id").is_duplicated().sum() == 0
    trained = raw.interactions.filter(split="train")["item_id"].n_unique()
    assert trained == 7_048
