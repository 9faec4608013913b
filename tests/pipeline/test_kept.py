"""Named configurations and deployments of a store, and what several names in one field mean."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, StoreError
from pipeline.kept import (
    KeptConfiguration,
    KeptDeployment,
    configurations,
    deployments,
    with_absolute_paths,
)
from pipeline.selecting import listed, runs_meant
from pipeline.store import Store

KEPT = KeptConfiguration(study="two-stage", text="seeds: [0]\n")


@pytest.fixture(params=["local", "remote"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    url = str(tmp_path / "shop") if request.param == "local" else f"memory://{tmp_path}/shop"
    return Store(url, cache=tmp_path / "cache")


def test_a_configuration_is_kept_found_replaced_and_removed(store: Store) -> None:
    shelf = configurations(store)
    assert shelf.names() == []
    shelf.write("nightly", KEPT)
    assert shelf.names() == ["nightly"]
    assert shelf.read("nightly", KeptConfiguration).text == "seeds: [0]\n"
    shelf.write("nightly", KEPT.model_copy(update={"text": "seeds: [1]\n"}))
    assert shelf.read("nightly", KeptConfiguration).text == "seeds: [1]\n"
    assert shelf.remove("nightly")
    assert not shelf.remove("nightly")


def test_what_is_not_there_is_told_with_what_is(store: Store) -> None:
    configurations(store).write("nightly", KEPT)
    with pytest.raises(ConfigError, match=r"no configuration 'daily' .*; there are: nightly\."):
        configurations(store).read("daily", KeptConfiguration)


def test_a_name_cannot_leave_its_folder(store: Store) -> None:
    for name in ("../names", "a/b", "", ".hidden"):
        with pytest.raises(StoreError, match="cannot be named"):
            deployments(store).write(name, KeptDeployment(flow="two-stage", inputs={}, folder="/"))


def test_a_damaged_file_is_told(store: Store) -> None:
    store.write_document("deployments/nightly.json", b"{")
    with pytest.raises(StoreError, match=r"deployments/nightly.json is damaged .*deploy it again"):
        deployments(store).read("nightly", KeptDeployment)


def test_what_is_kept_is_no_garbage(store: Store) -> None:
    configurations(store).write("nightly", KEPT)
    store.collect_garbage(older_than=timedelta(0), dry_run=False)
    assert configurations(store).names() == ["nightly"]


def test_paths_of_the_data_mean_the_same_from_every_folder() -> None:
    raw = {
        "dataset": {"tables": {"items": "items.csv", "image_folder": "s3://shop/photos", "item_id": "sku"}},
        "seeds": [0],
    }
    kept = with_absolute_paths(raw, "/home/ada")
    assert kept["dataset"]["tables"] == {
        "items": "/home/ada/items.csv",
        "image_folder": "s3://shop/photos",
        "item_id": "sku",
    }
    assert raw["dataset"]["tables"]["items"] == "items.csv"  # type: ignore[index]  # a literal above
    assert with_absolute_paths({"dataset": 3}, "/") == {"dataset": 3}


def make(store: Store, kind: str, slug: str, *inputs: object) -> str:
    outcome = store.produce(
        kind,  # type: ignore[arg-type]  # one of the kinds
        slug=slug,
        identity={"slug": slug},
        inputs=list(inputs),  # type: ignore[arg-type]  # artefacts as inputs
        make=lambda draft: draft.path("x.txt").write_text("x") and None,
    )
    return outcome.artefact.ref


def test_names_patterns_and_datasets_mean_runs_each_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    dataset, other = make(store, "dataset", "shop"), make(store, "dataset", "other")
    one = make(store, "run", "vbpr", store.get(dataset).as_input("dataset"))
    two = make(store, "run", "bpr", store.get(dataset).as_input("dataset"))
    three = make(store, "run", "vbpr-other", store.get(other).as_input("dataset"))
    store.name("shop-one", store.get(one))
    store.name("shop-two", store.get(two))
    assert runs_meant(store, ["shop-one", one]) == [one]
    assert runs_meant(store, ["shop-*"]) == [one, two]
    assert set(runs_meant(store, ["vbpr*"])) == {one, three}
    assert set(runs_meant(store, [dataset])) == {one, two}
    with pytest.raises(ConfigError, match="No run is named"):
        runs_meant(store, [])
    with pytest.raises(ConfigError, match=r"'x-\*' means no run"):
        runs_meant(store, ["x-*"])
    with pytest.raises(StoreError, match="'nobody'"):
        runs_meant(store, ["nobody"])


def test_entries_are_parted_by_commas_and_lines() -> None:
    assert listed(" a, b\nc ,,") == ["a", "b", "c"]
    assert listed("") == []
