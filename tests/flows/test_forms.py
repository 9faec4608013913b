"""What a form offers: choices from the store and the registries, text for everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.deployments import SERVED
from flows.forms import ENCODERS, FORMS, NEWEST, Choices, choices, form_schema, with_offers
from flows.prepare_dataset import dataset_source
from flows.studies import StudyForm
from pipeline.config import RunConfig, parse_config
from pipeline.errors import ConfigError
from pipeline.kept import KeptConfiguration, configurations
from pipeline.paradigms.config import ParadigmsConfig
from pipeline.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "shop")


def make(store: Store, slug: str) -> str:
    outcome = store.produce(
        "dataset",
        slug=slug,
        identity={"slug": slug},
        make=lambda draft: draft.path("x.txt").write_text("x") and None,
    )
    return outcome.artefact.ref


def test_names_come_first_then_the_newest_artefacts(store: Store) -> None:
    refs = [make(store, f"toys-{number}") for number in range(NEWEST + 2)]
    store.name("shop", store.get(refs[0]))
    configurations(store).write("nightly", KeptConfiguration(study="two-stage", text=""))
    offered = choices(store)
    assert offered.of(("dataset",)) == ["shop", *refs[::-1][:NEWEST]]
    assert offered.of(("configurations",)) == ["nightly"]
    assert {"tiny", "clip", "random"} <= set(offered.of((ENCODERS,)))
    assert "vbpr" in offered.of(("recommenders",))


def test_an_input_with_offers_can_be_chosen_or_typed() -> None:
    schema = form_schema(SERVED["extract-features"].load(), Choices({"dataset": ("shop",)}))
    assert schema["required"] == ["dataset"]
    assert schema["properties"]["dataset"]["anyOf"] == [
        {"title": "Choose", "type": "string", "enum": ["shop"]},
        {"title": "Type", "type": "string"},
    ]
    assert schema["properties"]["encoder"]["default"] == "tiny"
    assert schema["properties"]["modality"]["enum"] == ["image", "text", "fused"]
    assert schema["properties"]["force"]["type"] == "boolean"
    positions = [shown["position"] for shown in schema["properties"].values()]
    assert positions == sorted(positions)


def test_new_choices_take_the_place_of_old_ones_and_nothing_else_changes() -> None:
    flow = SERVED["train-recommender"].load()
    form = FORMS["train-recommender"]
    old = form_schema(flow, Choices({"dataset": ("shop",), "recommenders": ("vbpr",)}))["properties"]
    offered = Choices({"dataset": ("shop", "toys"), "recommenders": ("vbpr",)})
    new = form_schema(flow, offered)["properties"]
    refreshed = {
        name: with_offers(shown, form[name], offered) if form[name].offers else shown
        for name, shown in old.items()
    }
    assert refreshed == new != old


def test_a_new_store_offers_no_datasets_but_lets_one_be_typed() -> None:
    shown = form_schema(SERVED["train-recommender"].load(), Choices())["properties"]["dataset"]
    assert shown["type"] == "string"
    assert "anyOf" not in shown


def test_a_study_s_form_makes_its_configuration(store: Store) -> None:
    form = StudyForm(
        items="items.csv",
        interactions="orders.csv",
        pictures="photos",
        encoders="clip, baseline/tfidf, timm/resnet50",
        recommenders="popularity, vbpr",
        seeds=2,
        settings="dataset: {tables: {item_id: sku}}\nsharing: {shards: 2}",
    )
    raw, sharing = form.raw(store, "two-stage")
    config = parse_config(raw, RunConfig)
    assert config.dataset.importer == "tables"
    assert config.dataset.tables.items == "items.csv"
    assert config.dataset.tables.item_id == "sku"
    assert config.dataset.tables.image_folder == "photos"
    assert [chosen.encoders() for chosen in config.feature_sets] == [
        [("image", "clip"), ("text", "clip")],
        [("text", "baseline/tfidf")],
        [("image", "timm/resnet50"), ("text", "timm/resnet50")],
    ]
    assert [each.model for each in config.recommenders] == ["popularity", "vbpr"]
    assert config.seeds == (0, 1)
    assert sharing.n_shards == 2


def test_an_empty_form_is_the_default_study(store: Store) -> None:
    assert parse_config(StudyForm().raw(store, "two-stage")[0], RunConfig) == RunConfig()
    assert parse_config(StudyForm().raw(store, "paradigms")[0], ParadigmsConfig) == ParadigmsConfig()


def test_the_form_changes_a_kept_configuration(store: Store) -> None:
    kept = KeptConfiguration(study="paradigms", text="encoders: [tiny]\nseeds: [7]\nname: mine\n")
    configurations(store).write("nightly", kept)
    raw, _ = StudyForm(configuration="nightly", encoders="clip", settings="name: yours").raw(
        store, "paradigms"
    )
    config = parse_config(raw, ParadigmsConfig)
    assert (config.encoders, config.seeds, config.name) == (("clip",), (7,), "yours")
    with pytest.raises(ConfigError, match=r"'nightly' is of paradigms, not of two-stage"):
        StudyForm(configuration="nightly").raw(store, "two-stage")


def test_a_dataset_s_inputs_tell_its_importer() -> None:
    assert dataset_source("", "") == {}
    assert dataset_source("a.csv", "b.csv") == {
        "importer": "tables",
        "tables": {"items": "a.csv", "interactions": "b.csv"},
    }
    assert dataset_source("data/baby", "", importer="mmrec") == {
        "importer": "mmrec",
        "mmrec": {"folder": "data/baby"},
    }
    with pytest.raises(ConfigError, match=r"items is filled in, but the kind of source is 'demo'"):
        dataset_source("a.csv", "", importer="demo")
    with pytest.raises(ConfigError, match=r"lattice reads a folder and no tables; leave interactions empty"):
        dataset_source("data/baby", "b.csv", importer="lattice")
