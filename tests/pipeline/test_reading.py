"""Reading cached features: what the settings do to a recommender's input, to keys, facts and labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from pydantic import ValidationError

import pipeline.stages.train_recommender as stage
from features.errors import FeatureError
from features.feature_table import FeatureSet, StatusType, write_features
from pipeline.comparison.rows import modalities
from pipeline.config import FeatureSetConfig, RunConfig, parse_config
from pipeline.config_template import template
from pipeline.errors import ConfigError
from pipeline.reading import ReadingConfig, modality_names, read_dataset, read_feature_table, read_features
from pipeline.stages.compare_features import read_record
from pipeline.stages.extract_features import FeaturesConfig, extract_features
from pipeline.stages.prepare_dataset import prepare_dataset
from pipeline.stages.train_recommender import (
    RunSettings,
    feature_label,
    restore_scorer,
    train_recommender,
)
from pipeline.store import Artefact, Draft, Store
from pipeline.two_stage import PlainStages, run_two_stage
from recommenders.interactions import Interactions, Split
from tests.pipeline.small_runs import SMALL_DATASET, SMALL_RUN
from tests.worlds import random_world

N_ITEMS = 40
ITEM_IDS = [f"i{row}" for row in range(N_ITEMS)]
SMALL_TRAINING = {"training": {"epochs": 1, "monitor": "recall@5"}, "evaluation": {"ks": [5]}}
CHANGED: dict[str, Any] = {
    "absent": "mean",
    "normalise": "standardise",
    "truncate_dim": 4,
    "center": "mean",
    "project": "pca",
    "project_dim": 3,
    "whiten_ridge": 0.1,
    "absent_neighbours": 3,
    "propagate_steps": 3,
    "fuse": "concat",
    "fuse_dim": 5,
}
"""Each setting of reading with another value than its default."""
NEEDS: dict[str, dict[str, Any]] = {"project_dim": {"project": "pca"}, "fuse_dim": {"fuse": "pca"}}


def keep(store: Store, modality: str, seed: int, width: int = 6, absent: Sequence[int] = ()) -> Artefact:
    """A feature artefact of random vectors, in another order than the items'."""
    vectors = torch.randn(N_ITEMS, width, generator=torch.Generator().manual_seed(seed))
    vectors[list(absent)] = 0
    status = ["missing" if row in absent else "ok" for row in range(N_ITEMS)]
    order = np.random.default_rng(seed).permutation(N_ITEMS)
    table = FeatureSet(
        pl.Series("item_id", [ITEM_IDS[row] for row in order], dtype=pl.String),
        vectors[order],
        pl.Series("status", [status[row] for row in order], dtype=StatusType),
    )

    def make(draft: Draft) -> None:
        write_features(draft.folder, table)

    return store.produce(
        "features",
        slug=f"{modality}-{seed}",
        identity={"modality": modality, "seed": seed, "width": width, "absent": list(absent)},
        inputs=[],
        parameters={"modality": modality, "encoder": f"given-{seed}"},
        make=make,
    ).artefact


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artefact]:
    """Images of three quarters of the items, texts of half, reviews of nearly all; i0 has nothing."""
    store = Store(tmp_path_factory.mktemp("reading") / "store")
    return {
        "image": keep(store, "image", 0, absent=[0, *range(30, 40)]),
        "text": keep(store, "text", 1, width=8, absent=range(20)),
        "image:2": keep(store, "image", 2, absent=[0, 1]),
    }


def train_of(world_seed: int = 0) -> Interactions:
    return random_world(n_items=N_ITEMS, seed=world_seed).split.train


@pytest.mark.parametrize("names", [["image"], ["image", "text", "image:2"]])
@pytest.mark.parametrize("absent", ["zero", "mean", "neighbours", "propagate"])
def test_every_filling_reads_one_and_three_modalities(
    kept: dict[str, Artefact], names: list[str], absent: Any
) -> None:
    features = {name: kept[name] for name in names}
    read = read_features(features, ITEM_IDS, ReadingConfig(absent=absent), train_of())
    zero = read_feature_table(features, ITEM_IDS, ReadingConfig())
    assert list(read.table.vectors) == names
    for name, vectors in read.table.vectors.items():
        present = read.table.present[name]
        assert torch.equal(vectors[present], zero.vectors[name][present])
        counts = read.counts[name]
        assert isinstance(counts, dict)
        without = int((~vectors.any(dim=1)).sum())
        n_present = int(present.sum())
        assert counts == {
            "width": vectors.shape[1],
            "present": n_present,
            "filled": N_ITEMS - n_present - without,
            "zero": without,
        }
    if absent == "neighbours":
        # i0 is in none of the three; with one modality there is no other to look in.
        left = [counts["zero"] for counts in read.counts.values() if isinstance(counts, dict)]
        assert left == ([11] if len(names) == 1 else [1, 1, 1])


def test_permuted_items_give_permuted_tables(kept: dict[str, Artefact]) -> None:
    config = ReadingConfig(absent="neighbours", center="mean", project="pca", project_dim=4, fuse="pca")
    order = np.random.default_rng(5).permutation(N_ITEMS)
    table = read_feature_table(kept, ITEM_IDS, config).vectors["fused"]
    permuted = read_feature_table(kept, [ITEM_IDS[row] for row in order], config).vectors["fused"]
    torch.testing.assert_close(permuted, table[order], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("fuse", "width"), [("concat", 12), ("sum", 4), ("mean", 4), ("pca", 5)])
def test_fusing_leaves_one_modality(kept: dict[str, Artefact], fuse: Any, width: int) -> None:
    dims = {"fuse_dim": 5} if fuse == "pca" else {}
    config = ReadingConfig(project="pca", project_dim=4, fuse=fuse, **dims)
    read = read_features(kept, ITEM_IDS, config)
    apart = read_feature_table(kept, ITEM_IDS, ReadingConfig(project="pca", project_dim=4))
    assert read.table.dims == {"fused": width}
    has = torch.stack(list(apart.present.values()))
    assert torch.equal(read.table.present["fused"], has.any(dim=0))
    assert not read.table.vectors["fused"][0].any()
    if fuse == "mean":
        expected = sum(apart.vectors.values()) / has.sum(dim=0).clamp(min=1).unsqueeze(1)
        torch.testing.assert_close(read.table.vectors["fused"], expected)
    if fuse == "concat":
        torch.testing.assert_close(
            read.table.vectors["fused"], torch.cat(list(apart.vectors.values()), dim=1)
        )


def test_what_was_filled_is_fused_too(kept: dict[str, Artefact]) -> None:
    config = ReadingConfig(absent="mean", fuse="concat")
    fused = read_features(kept, ITEM_IDS, config)
    apart = read_feature_table(kept, ITEM_IDS, ReadingConfig(absent="mean"))
    expected = torch.cat(list(apart.vectors.values()), dim=1)
    torch.testing.assert_close(fused.table.vectors["fused"], expected)
    assert fused.counts["fused by concat"] == {"width": 20, "present": 39, "filled": 1, "zero": 0}


def test_sums_of_unequal_widths_name_each(kept: dict[str, Artefact]) -> None:
    with pytest.raises(FeatureError, match=r"are image 6, text 8, image:2 6; .* project_dim: 6 or less"):
        read_feature_table(kept, ITEM_IDS, ReadingConfig(fuse="sum"))


def test_a_dimension_beyond_the_vectors_names_the_artefact(kept: dict[str, Artefact]) -> None:
    with pytest.raises(FeatureError, match=r"truncate_dim is 7, but a vector of image, features/image-0"):
        read_feature_table(kept, ITEM_IDS, ReadingConfig(truncate_dim=7))


def test_propagation_without_interactions_is_a_slip_of_the_caller(kept: dict[str, Artefact]) -> None:
    with pytest.raises(ValueError, match="training interactions; pass train"):
        read_feature_table(kept, ITEM_IDS, ReadingConfig(absent="propagate"))


def test_a_dimension_that_nothing_would_use_is_refused() -> None:
    with pytest.raises(ValidationError, match="fuse_dim is 8, but fuse is sum; set fuse to pca"):
        ReadingConfig(fuse="sum", fuse_dim=8)


# -- through the stages ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("stages") / "store")


@pytest.fixture(scope="module")
def data(store: Store) -> Artefact:
    raw = {**SMALL_DATASET, "demo": {**SMALL_DATASET["demo"], "missing_image_share": 0.2}}
    return prepare_dataset(store, parse_config({"dataset": raw}, RunConfig).dataset).artefact


@pytest.fixture(scope="module")
def extracted(store: Store, data: Artefact) -> list[str]:
    """Two encoders of the pictures and one of the texts."""
    wanted = [("image", "random:8"), ("image", "random:6"), ("text", "random:8")]
    return [
        extract_features(store, data.key, FeaturesConfig(encoder=encoder, modality=modality)).artefact.key
        for modality, encoder in wanted
    ]


def settings(model: str = "vbpr", **reading: Any) -> RunSettings:
    own = {"dim": 4, "content_dim": 4} if model == "vbpr" else {}
    return parse_config({"model": model, "settings": own, "reading": reading, **SMALL_TRAINING}, RunSettings)


def train(store: Store, data: Artefact, features: list[str], config: RunSettings) -> Artefact:
    return train_recommender(store, data.key, features, config).artefact


def test_every_setting_of_reading_makes_a_new_key() -> None:
    assert set(CHANGED) == set(ReadingConfig.model_fields)
    for name, value in CHANGED.items():
        before = ReadingConfig(**NEEDS.get(name, {}))
        after = ReadingConfig(**NEEDS.get(name, {}), **{name: value})
        assert after.identity() != before.identity(), name
        assert after.identity()[name] == value


def test_runs_that_use_no_new_setting_keep_their_keys(
    store: Store, data: Artefact, extracted: list[str]
) -> None:
    assert ReadingConfig().identity() == {"absent": "zero", "normalise": "l2"}
    plain = train(store, data, extracted[:1], settings())
    assert plain.manifest.identity["reading"] == {"absent": "zero", "normalise": "l2"}
    assert plain.manifest.identity["features"] == {"image": extracted[0]}
    other = train(store, data, extracted[:1], settings(center="mean"))
    assert other.key != plain.key


def test_a_run_made_before_a_setting_stands_in_one_row_with_those_after_it(
    store: Store, data: Artefact, extracted: list[str]
) -> None:
    run = train(store, data, extracted[:1], settings())
    now = read_record(run).settings_key()
    shown = run.manifest.parameters | {"reading": {"absent": "zero", "normalise": "l2"}}
    before = Artefact(run.manifest.model_copy(update={"parameters": shown}), run.shelf)
    assert read_record(before).settings_key() == now


@pytest.mark.parametrize(
    "reading",
    [
        {},
        {"absent": "neighbours", "fuse": "concat"},
        {"absent": "propagate", "project": "whiten", "project_dim": 3, "fuse": "sum"},
    ],
)
@pytest.mark.parametrize("model", ["vbpr", "itemknn_content"])
def test_two_encoders_of_one_modality_train_and_restore(
    store: Store, data: Artefact, extracted: list[str], model: str, reading: dict[str, Any]
) -> None:
    run = train(store, data, extracted, settings(model, **reading))
    roles = {ref.role: ref.key for ref in run.manifest.inputs if ref.kind == "features"}
    assert roles == dict(zip(["image", "image:2", "text"], extracted, strict=True))
    assert run.manifest.parameters["feature_set"] == "random:8 image, random:6 image, random:8 text"
    read = run.manifest.facts["features_read"]
    assert isinstance(read, dict)
    fused = [f"fused by {reading['fuse']}"] if "fuse" in reading else []
    assert set(read) == {"image", "image:2", "text", *fused}
    n_users, n_items = read_dataset(data).split.n_users, read_dataset(data).split.n_items
    assert restore_scorer(store, run)(torch.arange(n_users)).shape == (n_users, n_items)


def test_the_order_of_two_encoders_of_one_modality_is_part_of_the_key(
    store: Store, data: Artefact, extracted: list[str]
) -> None:
    one = train(store, data, extracted[:2], settings())
    assert train(store, data, extracted[:2][::-1], settings()).key != one.key


def test_the_order_of_modalities_is_not(store: Store, data: Artefact, extracted: list[str]) -> None:
    first_image, second_image, text = extracted
    one = train(store, data, extracted, settings())
    other = train_recommender(store, data.key, [text, first_image, second_image], settings(), force=True)
    assert other.artefact.key == one.key
    assert other.artefact.manifest.parameters == one.manifest.parameters
    for name in ("model.safetensors", "metrics.parquet"):
        assert other.artefact.manifest.files[name] == one.manifest.files[name]


def test_an_artefact_given_twice_is_refused(store: Store, data: Artefact, extracted: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"features/.* is given 2 times; give each feature artefact once"):
        train(store, data, [extracted[0], extracted[0]], settings())


def test_validation_and_test_interactions_cannot_change_what_propagates(
    store: Store, data: Artefact, extracted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage is shown a dataset whose held-out pairs are others; the table it trains on stays the same."""
    tables = []

    def remember(*args: Any, **kwargs: Any) -> Any:
        read = read_features(*args, **kwargs)
        tables.append(read.table.vectors["image"])
        return read

    def with_other_held_out(artefact: Artefact) -> Any:
        dataset = read_dataset(artefact)
        train_pairs = dataset.split.train
        rng = np.random.default_rng(len(tables))
        other = Interactions(
            np.arange(train_pairs.n_users),
            rng.integers(0, train_pairs.n_items, train_pairs.n_users),
            train_pairs.n_users,
            train_pairs.n_items,
        )
        return type(dataset)(
            dataset.item_ids, dataset.user_ids, Split(train_pairs, other, other, rule="other")
        )

    monkeypatch.setattr(stage, "read_features", remember)
    features, config = extracted[:1], settings("itemknn_content", absent="propagate")
    train_recommender(store, data.key, features, config, force=True)
    monkeypatch.setattr(stage, "read_dataset", with_other_held_out)
    train_recommender(store, data.key, features, config, force=True)
    assert torch.equal(tables[0], tables[1])
    # The premise: were they read, held-out pairs would change the vectors.
    dataset = read_dataset(data)
    table = {"image": store.get(extracted[0], "features")}
    everything = dataset.split.train.plus(dataset.split.valid).plus(dataset.split.test)
    leaked = read_feature_table(table, dataset.item_ids, config.reading, everything).vectors["image"]
    assert not torch.equal(leaked, tables[0])


def test_a_run_over_lists_of_encoders(tmp_path: Path) -> None:
    raw = {
        **SMALL_RUN,
        "feature_sets": [{"image": ["random:8", "random:6"], "text": "random:8"}, {"image": "random:8"}],
        "recommenders": [{"model": "vbpr", "settings": {"dim": 4}}],
        "reading": {"absent": "neighbours", "fuse": "concat"},
        "seeds": [0],
    }
    config = parse_config(raw, RunConfig)
    result = run_two_stage(config, PlainStages(Store(tmp_path / "store")))
    assert list(result.features) == [("image", "random:8"), ("image", "random:6"), ("text", "random:8")]
    labels = [run.artefact.manifest.parameters["feature_set"] for run in result.runs]
    assert labels == ["random:8 image, random:6 image, random:8 text", "random:8 image"]
    assert parse_config(yaml.safe_load(template(config)), RunConfig) == config


# -- names, labels and lists of encoders -------------------------------------------------------------


def test_several_feature_sets_of_a_modality_are_numbered() -> None:
    assert modality_names(["image", "text", "image", "image"]) == ["image", "text", "image:2", "image:3"]


def test_labels_name_the_modality_of_each_encoder() -> None:
    label = feature_label({"image": "clip", "image:2": "timm", "text": "clip"})
    assert label == "clip image, timm image, clip text"
    assert modalities(label) == {"image", "text"}
    assert feature_label({"text": "tiny", "text:2": "tiny"}) == "tiny text+text"


def test_a_feature_set_lists_encoders_in_the_order_of_its_modalities() -> None:
    listed = FeatureSetConfig.model_validate({"text": "minilm", "image": ["clip", "timm"]})
    assert listed.encoders() == [("image", "clip"), ("image", "timm"), ("text", "minilm")]


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({"image": ["clip", ""]}, "image lists an encoder without a name"),
        ({"text": ["clip", "clip"]}, "text lists 'clip' 2 times; list each encoder once"),
        ({"image": []}, "at least one of image, text, fused"),
    ],
)
def test_lists_that_are_no_feature_set_are_refused(raw: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_config({"feature_sets": [raw]}, RunConfig)


def test_the_documented_example_is_valid_and_every_setting_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reading.md").read_text()
    example = text.split("```yaml\n")[1].split("```")[0]
    config = parse_config(yaml.safe_load(example), RunConfig)
    assert config.reading.identity() != ReadingConfig().identity()
    assert [name for name in ReadingConfig.model_fields if f"`{name}" not in text] == []
