"""Importer `tables`: formats, columns, pictures, and what is refused or counted."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import fsspec
import polars as pl
import pytest
from PIL import Image
from pydantic import ValidationError

from pipeline.datasets import registry
from pipeline.datasets.base import RawDataset
from pipeline.datasets.config import DatasetConfig
from pipeline.datasets.filters import FilterConfig
from pipeline.datasets.pictures import hash_pictures
from pipeline.datasets.tables import (
    TablesConfig,
    import_tables,
    ratings,
    seconds,
    split_labels,
    tables_identity,
)
from pipeline.errors import DatasetError

ITEMS = pl.DataFrame(
    {
        "item_id": ["007", "b", "c"],
        "title": ["Bond", "Bee", None],
        "description": ["A spy", None, None],
        "image": ["pictures/007.png", "pictures/b.png", None],
        "year": [1962, 1999, 2004],
    }
)
PAIRS = pl.DataFrame(
    {
        "user_id": ["u", "v", "u"],
        "item_id": ["b", "007", "c"],
        "rating": [4.5, 3.0, 5.0],
        "timestamp": [10, 20, 30],
    }
)
WRITERS: dict[str, Callable[[pl.DataFrame, Path], object]] = {
    ".parquet": lambda table, path: table.write_parquet(path),
    ".csv": lambda table, path: table.write_csv(path),
    ".tsv": lambda table, path: table.write_csv(path, separator="\t"),
    ".jsonl": lambda table, path: table.write_ndjson(path),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tables as Parquet, and the pictures they name."""
    (tmp_path / "pictures").mkdir()
    for name, colour in (("007", "red"), ("b", "blue")):
        Image.new("RGB", (4, 3), colour).save(tmp_path / "pictures" / f"{name}.png")
    write(tmp_path, ITEMS, PAIRS)
    return tmp_path


def write(folder: Path, items: pl.DataFrame, pairs: pl.DataFrame, suffix: str = ".parquet") -> None:
    WRITERS[suffix](items, folder / f"items{suffix}")
    WRITERS[suffix](pairs, folder / f"interactions{suffix}")


def config(folder: Path, suffix: str = ".parquet", **settings: object) -> TablesConfig:
    files = {"items": str(folder / f"items{suffix}"), "interactions": str(folder / f"interactions{suffix}")}
    return TablesConfig.model_validate({**files, **settings})


def load(folder: Path, suffix: str = ".parquet", **settings: object) -> RawDataset:
    return import_tables(config(folder, suffix, **settings), folder / "copied")


@pytest.mark.parametrize("suffix", list(WRITERS))
def test_every_format_gives_the_same_dataset(folder: Path, suffix: str) -> None:
    write(folder, ITEMS, PAIRS, suffix)
    raw = load(folder, suffix)
    assert raw.items["item_id"].to_list() == ["007", "b", "c"], "an id keeps its zeros"
    assert (
        raw.items.select("title", "description", "image").rows()
        == ITEMS.select("title", "description", "image").rows()
    )
    assert [int(year) for year in raw.items["year"]] == [1962, 1999, 2004], "further columns stay"
    assert raw.interactions.rows() == PAIRS.rows()
    assert raw.interactions.schema["rating"] == pl.Float32
    assert raw.image_root == str(folder)
    assert raw.drops == {"items without a picture listed": 1}


def test_compressed_text_is_read(folder: Path) -> None:
    write(folder, ITEMS, PAIRS, ".csv")
    packed = folder / "items.csv.gz"
    packed.write_bytes(gzip.compress((folder / "items.csv").read_bytes()))
    raw = import_tables(config(folder, ".csv", items=str(packed)), folder)
    assert raw.items["item_id"].to_list() == ["007", "b", "c"]


def test_windows_line_ends_and_a_byte_order_mark_are_read(folder: Path) -> None:
    write(folder, ITEMS, PAIRS, ".csv")
    for name in ("items.csv", "interactions.csv"):
        content = (folder / name).read_bytes().replace(b"\n", b"\r\n")
        (folder / name).write_bytes(b"\xef\xbb\xbf" + content)
    raw = load(folder, ".csv")
    assert raw.interactions.rows() == PAIRS.rows()
    assert raw.items["year"].to_list() == ["1962", "1999", "2004"]


def test_columns_of_other_names_are_read(folder: Path) -> None:
    items = ITEMS.rename({"item_id": "sku", "title": "name", "description": "blurb", "image": "photo"})
    pairs = PAIRS.rename({"user_id": "customer", "item_id": "product", "rating": "stars", "timestamp": "at"})
    write(folder, items, pairs.with_columns(part=pl.Series(["Train", "val", "TEST"])))
    raw = load(
        folder,
        item_id="sku",
        interaction_item_id="product",
        user_id="customer",
        title="name",
        description="blurb",
        image="photo",
        rating="stars",
        timestamp="at",
        split="part",
    )
    assert raw.items.columns == ["item_id", "title", "description", "image", "year"]
    assert raw.interactions["split"].to_list() == ["train", "valid", "test"]
    assert raw.has_split


def test_columns_of_default_names_may_be_lacking_and_empty_names_are_not_read(folder: Path) -> None:
    write(folder, ITEMS.select("item_id", "image"), PAIRS.select("user_id", "item_id"))
    raw = load(folder, image="")
    assert raw.items.columns == ["item_id", "title", "description", "image"]
    assert raw.items.null_count().row(0) == (0, 3, 3, 3)
    assert raw.interactions.columns == ["user_id", "item_id"]
    assert raw.image_root == ""


def test_numbers_as_ids_are_joined_as_strings(folder: Path) -> None:
    items = pl.DataFrame({"item_id": [1.0, 2.0]})  # floats, as after a null in pandas
    pairs = pl.DataFrame({"user_id": [9, 8], "item_id": [2, 1]})
    write(folder, items, pairs)
    raw = load(folder)
    assert raw.items["item_id"].to_list() == ["1", "2"]
    assert raw.interactions.rows() == [("9", "2"), ("8", "1")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"item_id": "Item_Id"}, r"has no column 'Item_Id' \(tables.item_id\); did you mean 'item_id'"),
        ({"user_id": "customer"}, r"has no column 'customer' \(tables.user_id\)"),
        ({"description": "descripton"}, r"\(tables.description\); did you mean 'description'"),
        ({"rating": "ratings"}, r"\(tables.rating\); did you mean 'rating'"),
        ({"interaction_item_id": "sku"}, r"no column 'sku' \(tables.interaction_item_id\)"),
        ({"items": ""}, r"tables.items is empty; give the path"),
        ({"items": "/nowhere/items.parquet"}, r"/nowhere/items.parquet, which does not exist"),
    ],
)
def test_a_wrong_name_is_named_with_what_is_near(
    folder: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        load(folder, **settings)


def test_a_file_of_a_similar_name_is_pointed_at(folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"does not exist; near it there is .*'items.parquet'"):
        load(folder, items=str(folder / "item.parquet"))
    with pytest.raises(DatasetError, match=r"a folder; give the path of a file"):
        load(folder, items=str(folder))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_an_unreadable_table_is_refused(folder: Path, suffix: str) -> None:
    (folder / f"items{suffix}").write_bytes(b"<html>not found</html>")
    write(folder, ITEMS, PAIRS, ".csv")
    with pytest.raises(DatasetError, match=rf"items{suffix} cannot be read as {suffix[1:]}"):
        load(folder, items=str(folder / f"items{suffix}"))


def test_an_unknown_ending_is_refused(folder: Path) -> None:
    (folder / "items.xlsx").write_bytes(b"x")
    with pytest.raises(DatasetError, match=r"ends in '.xlsx'; a table is one of .parquet, .csv"):
        load(folder, items=str(folder / "items.xlsx"))


def test_repeated_item_ids_are_refused(folder: Path) -> None:
    write(folder, pl.concat([ITEMS, ITEMS.head(1)]), PAIRS)
    with pytest.raises(DatasetError, match=r"1 item ids are listed more than once: '007'"):
        load(folder)


def test_rows_without_ids_are_dropped_and_counted(folder: Path) -> None:
    items = ITEMS.with_columns(item_id=pl.Series(["007", "", "c"]))
    pairs = PAIRS.with_columns(user_id=pl.Series(["u", None, "u"]))
    write(folder, items, pairs)
    raw = load(folder)
    assert raw.items["item_id"].to_list() == ["007", "c"]
    assert raw.interactions.rows() == [("u", "c", 5.0, 30)]
    assert raw.drops == {
        "items without an id": 1,
        "interactions without a user or an item": 1,
        "interactions with an unknown item": 1,
        "items without a picture listed": 1,
    }


def test_unknown_items_are_dropped_or_refused(folder: Path) -> None:
    write(folder, ITEMS.head(2), PAIRS)
    assert load(folder).drops == {"interactions with an unknown item": 1}
    with pytest.raises(DatasetError, match=r"1 interactions are with 1 items that .* does not list: 'c'"):
        load(folder, unknown_items="error")


def test_ids_that_never_meet_are_an_error_that_shows_both_sides(folder: Path) -> None:
    write(folder, ITEMS, PAIRS.with_columns(item_id=pl.lit("asin-1")))
    with pytest.raises(DatasetError, match=r"lists '007', 'b', 'c'; the interactions name 'asin-1'"):
        load(folder)


def test_empty_tables_are_refused(folder: Path) -> None:
    write(folder, ITEMS.clear(), PAIRS.clear())
    with pytest.raises(DatasetError, match="lists no item"):
        load(folder)
    write(folder, ITEMS, PAIRS.clear())
    with pytest.raises(DatasetError, match="no interaction left"):
        load(folder)


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "a/../../b.png", "..\\b.png"])
def test_paths_that_leave_the_folder_are_refused(folder: Path, path: str) -> None:
    write(folder, ITEMS.with_columns(image=pl.Series([path, None, None])), PAIRS)
    with pytest.raises(DatasetError, match="1 picture paths leave the folder"):
        load(folder)
    with pytest.raises(DatasetError, match="1 picture paths leave the folder"):
        tables_identity(config(folder))


def test_links_that_leave_the_folder_are_refused(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "x.png"
    Image.new("RGB", (2, 2)).save(outside)
    (folder / "pictures" / "b.png").unlink()
    (folder / "pictures" / "b.png").symlink_to(outside)
    with pytest.raises(DatasetError, match=r"leave the folder .*'pictures/b.png'"):
        load(folder)


def test_pictures_named_by_item_id_are_found(folder: Path) -> None:
    raw = load(folder, image_extension=".png", image_folder=str(folder / "pictures"))
    assert raw.items["image"].to_list() == ["007.png", "b.png", None]
    with pytest.raises(ValidationError, match="either image"):
        config(folder, image_extension=".png", image="photo")


def test_pictures_are_referred_to_or_copied(folder: Path) -> None:
    assert load(folder).image_root == str(folder)
    assert not (folder / "copied").exists()
    (folder / "pictures" / "b.png").unlink()
    raw = load(folder, copy_pictures=True)
    assert raw.image_root == str(folder / "copied")
    copied = (folder / "copied" / "pictures" / "007.png").read_bytes()
    assert copied == (folder / "pictures" / "007.png").read_bytes()
    items, counts = hash_pictures(raw.items, raw.image_root)
    assert items["image"].to_list() == ["pictures/007.png", None, None]
    assert counts == {"pictures listed but not found (item kept without picture)": 1}


def test_pictures_can_lie_behind_a_url(folder: Path) -> None:
    remote = fsspec.filesystem("memory")
    remote.pipe("/shop/pictures/007.png", (folder / "pictures" / "007.png").read_bytes())
    raw = load(folder, image_folder="memory://shop")
    items, counts = hash_pictures(raw.items, raw.image_root)
    local, _ = hash_pictures(raw.items, str(folder))
    assert items["image_hash"][0] == local["image_hash"][0]
    assert counts == {"pictures listed but not found (item kept without picture)": 1}


def test_a_changed_picture_table_or_setting_changes_the_identity(folder: Path) -> None:
    first = tables_identity(config(folder))
    assert tables_identity(config(folder)) == first
    assert tables_identity(config(folder, title="")) != first
    names_only = tables_identity(config(folder, picture_identity=False))
    Image.new("RGB", (4, 3), "green").save(folder / "pictures" / "b.png")
    second = tables_identity(config(folder))
    assert second != first
    assert tables_identity(config(folder, picture_identity=False)) == names_only
    write(folder, ITEMS, PAIRS.head(2))
    assert tables_identity(config(folder)) != second


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3, None], [3, None]),
        ([3.9, None], [3, None]),
        (["3", "", None], [3, None, None]),
        (["1672531200123456789"], [1672531200123456789]),
        (["1970-01-02T00:00:01", None], [86401, None]),
        (["1970-01-01 00:00:02.5"], [2]),
    ],
)
def test_times_are_read(values: list[object], expected: list[int | None]) -> None:
    assert seconds(pl.Series("at", values)).to_list() == expected


def test_dates_become_unix_seconds() -> None:
    days = pl.Series("at", ["1970-01-02"]).str.to_date()
    assert seconds(days).to_list() == [86400]
    assert seconds(days.cast(pl.Datetime("ns"))).to_list() == [86400]


def test_what_is_no_time_rating_or_split_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"times in column 'at' hold 'yesterday'"):
        seconds(pl.Series("at", ["2020-01-01", "yesterday"]))
    with pytest.raises(DatasetError, match=r"times in column 'at' are Boolean"):
        seconds(pl.Series("at", [True]))
    with pytest.raises(DatasetError, match=r"ratings in column 'stars' hold 'good'"):
        ratings(pl.Series("stars", ["4", "good", ""]))
    with pytest.raises(DatasetError, match=r"split column 'part' holds 'holdout', None"):
        split_labels(pl.Series("part", ["train", "holdout", None]))


def test_a_title_of_nested_values_is_refused(folder: Path) -> None:
    write(folder, ITEMS.with_columns(title=pl.Series([{"en": "x"}] * 3)), PAIRS)
    with pytest.raises(DatasetError, match=r"Column 'title' \(tables.title\) is Struct"):
        load(folder)


@pytest.mark.real_data
def test_movielens_counts_are_those_of_its_readme(real_data: Callable[[str], Path]) -> None:
    films = real_data("movielens-posters")
    raw_config = TablesConfig(
        items=str(films / "items.parquet"), interactions=str(films / "interactions.parquet")
    )
    raw = import_tables(raw_config, films)
    assert len(raw.items) == 1682
    assert raw.items["image"].null_count() == 14
    assert raw.items["description"].null_count() == 27
    assert len(raw.interactions) == 100_000

    whole = DatasetConfig(importer="tables", tables=raw_config, filters=FilterConfig(min_rating=4, k_core=5))
    filtered = registry.import_dataset(whole, films)
    assert filtered.drops["interactions rated below 4"] == 44_625
    per_user = filtered.interactions.group_by("user_id").len()["len"]
    per_item = filtered.interactions.group_by("item_id").len()["len"]
    assert min(per_user.min(), per_item.min()) >= 5  # type: ignore[type-var]
    assert len(per_item) == len(filtered.items) == 1682 - filtered.drops["items outside of the 5-core"]
    assert filtered.items["image_hash"].null_count() == filtered.items["image"].null_count()
