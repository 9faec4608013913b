"""Encoder artefacts: typed as `store/...`, wherever the store is, and recorded without a path."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from features.encoders.base import Encoder
from features.encoders.registry import load_encoder
from features.encoders.saved import save_encoder
from features.feature_table import FeatureSet
from features.sharding import Shard
from pipeline.cli import app
from pipeline.config import FeatureSetConfig
from pipeline.datasets.config import DatasetConfig
from pipeline.encoder_specs import resolve_encoder, store_encoder, stored_spec
from pipeline.errors import ConfigError, StoreError
from pipeline.knockout import knockouts
from pipeline.stages.extract_features import FeaturesConfig, extract_features, restore_encoder
from pipeline.stages.extract_shards import can_shard, extract_shard
from pipeline.stages.prepare_dataset import prepare_dataset
from pipeline.stages.result import StageResult
from pipeline.store import Artefact, Draft, Store
from tests.pipeline.small_runs import SMALL_DATASET


def tuned_tiny(seed: int) -> Encoder:
    """`tiny` with other weights in its text head."""
    encoder = load_encoder("tiny")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        projection = encoder.get_parameter("model.text_projection")
        projection.add_(torch.randn(projection.shape, generator=generator), alpha=0.05)
    return encoder


def keep(store: Store, seed: int, name: str = "tuned") -> Artefact:
    def make(draft: Draft) -> None:
        store_encoder(draft, tuned_tiny(seed), name=name, provenance={"seed": seed})

    return store.produce("encoder", slug=name, identity={"seed": seed, "name": name}, make=make).artefact


def with_dataset(store: Store) -> Store:
    store.name("shop", prepare_dataset(store, DatasetConfig.model_validate(SMALL_DATASET)).artefact)
    return store


def config(encoder: str, modality: str = "text") -> FeaturesConfig:
    return FeaturesConfig.model_validate({"encoder": encoder, "modality": modality, "device": "cpu"})


def vectors(features: Artefact) -> torch.Tensor:
    return FeatureSet.read(features.paths("part-*.parquet")).vectors


def test_features_of_an_encoder_in_any_store(any_store: Store, tmp_path: Path) -> None:
    with_dataset(any_store)
    encoder = keep(any_store, 1)
    any_store.name("mine", encoder)
    made = extract_features(any_store, "shop", config("store/mine"))
    assert not made.reused
    features = made.artefact
    assert features.slug == "tuned-text"
    assert [(one.kind, one.key) for one in features.manifest.inputs][1:] == [("encoder", encoder.key)]
    assert (
        features.manifest.parameters["encoder"] == stored_spec(encoder) == f"store/{encoder.manifest.folder}"
    )
    shown = json.dumps(features.manifest.model_dump(mode="json", exclude={"hardware"}))
    assert str(tmp_path) not in shown
    assert "saved:" not in shown
    for typed in (f"store/{encoder.key}", f"store/encoder/{encoder.manifest.folder}", stored_spec(encoder)):
        again = extract_features(any_store, "shop", config(typed))
        assert again.reused
        assert again.artefact.key == features.key
    plain = extract_features(any_store, "shop", config("tiny")).artefact
    assert not torch.allclose(vectors(plain).float(), vectors(features).float(), atol=1e-3)
    restored = restore_encoder(any_store, features)
    assert restored.info.spec == stored_spec(encoder)
    tokens = restored.tokenize(["a red bag"])
    with torch.inference_mode():
        assert torch.equal(restored.encode_texts(tokens), tuned_tiny(1).encode_texts(tokens))


def test_a_name_that_moves_gives_other_features_and_equal_weights_the_same(
    local_store: Store, tmp_path: Path
) -> None:
    store = with_dataset(local_store)
    first, second = keep(store, 1), keep(store, 2)
    store.name("mine", first)
    before = extract_features(store, "shop", config("store/mine")).artefact
    store.name("mine", second)
    after = extract_features(store, "shop", config("store/mine")).artefact
    assert before.key != after.key
    assert (
        restore_encoder(store, before).info.weights_sha256
        != restore_encoder(store, after).info.weights_sha256
    )
    copied = keep(store, 1, name="another-name")
    assert extract_features(store, "shop", config(stored_spec(copied))).artefact.key == before.key
    save_encoder(tuned_tiny(1), tmp_path / "elsewhere", name="tuned")
    assert (
        extract_features(store, "shop", config(f"saved:{tmp_path / 'elsewhere'}")).artefact.key == before.key
    )


def test_options_and_the_shuffled_control(local_store: Store) -> None:
    store = with_dataset(local_store)
    encoder = keep(store, 1)
    store.name("mine", encoder)
    plain = extract_features(store, "shop", config("store/mine")).artefact
    unit = extract_features(store, "shop", config("store/mine+l2=yes")).artefact
    assert unit.manifest.parameters["encoder"] == f"{stored_spec(encoder)}+l2=yes"
    assert unit.key != plain.key
    lengths = vectors(unit).float().norm(dim=1)
    torch.testing.assert_close(lengths[lengths > 0], torch.ones(int((lengths > 0).sum())), atol=1e-3, rtol=0)
    dealt = extract_features(store, "shop", config("shuffled:store/mine@3")).artefact
    assert dealt.manifest.parameters["encoder"] == f"shuffled:{stored_spec(encoder)}@3"
    assert dealt.manifest.parameters["label"] == "shuffled:tuned@3"
    assert "saved:" not in json.dumps(dealt.manifest.model_dump(mode="json"))
    rows, shuffled = ({tuple(row) for row in vectors(one).tolist()} for one in (plain, dealt))
    assert rows == shuffled
    assert not torch.equal(vectors(plain), vectors(dealt))
    kinds = [line.split("/")[0].strip() for line in store.lineage(dealt).lines()]
    assert any("encoder" in kind for kind in kinds)


def test_shards_make_the_same_artefact(tmp_path: Path) -> None:
    whole = with_dataset(Store(tmp_path / "whole"))
    shared = with_dataset(Store(tmp_path / "shared"))
    expected = extract_features(whole, "shop", config(stored_spec(keep(whole, 1)))).artefact
    wanted = config(stored_spec(keep(shared, 1)))
    assert can_shard(wanted)
    assert not can_shard(config(f"shuffled:{wanted.encoder}"))
    extract_shard(shared, "shop", wanted, Shard(1, 2))
    made = extract_shard(shared, "shop", wanted, Shard(0, 2))
    assert isinstance(made, StageResult)
    assert made.artefact.key == expected.key
    assert made.artefact.manifest.inputs == expected.manifest.inputs
    assert made.artefact.manifest.parameters == expected.manifest.parameters
    assert torch.equal(vectors(made.artefact), vectors(expected))


def test_a_killed_try_is_written_over(local_store: Store) -> None:
    def make(draft: Draft, *, killed: bool) -> None:
        (draft.folder / "history.txt").write_text("epoch 0")
        store_encoder(draft, tuned_tiny(3 if killed else 1), name="tuned", provenance={})
        if killed:
            raise KeyboardInterrupt

    def produce(*, killed: bool) -> Artefact:
        return local_store.produce(
            "encoder", slug="x", identity={}, make=partial(make, killed=killed), resumable=True
        ).artefact

    with pytest.raises(KeyboardInterrupt):
        produce(killed=True)
    made = produce(killed=False)
    assert {"history.txt", "encoder.json", "model.safetensors", "tokenizer.json"} == set(made.manifest.files)
    weights = resolve_encoder(local_store, stored_spec(made)).load().state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in tuned_tiny(1).state_dict().items())


def test_a_shipped_encoder_that_was_trained_again_is_read_as_one(local_store: Store) -> None:
    from features.encoders.tiny import build_tiny, save_tiny, train_tiny_tokenizer

    def make(draft: Draft) -> None:
        save_tiny(build_tiny(train_tiny_tokenizer(["a red bag"], 270), seed=0), draft.folder)

    made = local_store.produce("encoder", slug="tiny", identity={"old": 1}, make=make).artefact
    resolved = resolve_encoder(local_store, stored_spec(made))
    assert resolved.describe().spec == stored_spec(made)
    assert resolved.load().info == resolved.describe()
    empty = local_store.produce(
        "encoder", slug="none", identity={"old": 2}, make=lambda draft: _write(draft.path("x.txt"))
    ).artefact
    with pytest.raises(ConfigError, match=r"holds no encoder\.json"):
        resolve_encoder(local_store, stored_spec(empty))


def _write(path: Path) -> None:
    path.write_text("x")


def test_what_is_no_encoder_artefact_is_refused(local_store: Store) -> None:
    store = with_dataset(local_store)
    with pytest.raises(StoreError, match="'nothing' is not in the store"):
        extract_features(store, "shop", config("store/nothing"))
    with pytest.raises(StoreError, match="a encoder artefact was expected"):
        extract_features(store, "shop", config("store/shop"))
    assert resolve_encoder(store, "tiny+l2=yes").local == "tiny+l2=yes"
    assert resolve_encoder(store, "shuffled:tiny@2").spec == "shuffled:tiny@2"
    assert resolve_encoder(store, "tiny").inputs == []


def test_the_list_of_encoders_names_those_in_the_store(local_store: Store) -> None:
    store = with_dataset(local_store)
    encoder = keep(store, 1)
    extract_features(store, "shop", config(stored_spec(encoder)))
    printed = CliRunner().invoke(app, ["encoders", "--json", "--store", store.url])
    forms = {form["spec"]: form["cached"] for form in json.loads(printed.stdout)["forms"]}
    assert forms[stored_spec(encoder)] == 1


def test_a_knock_out_knows_how_long_its_vectors_are(local_store: Store) -> None:
    spec = stored_spec(keep(local_store, 1))
    describe: Callable[..., object] = lambda typed: resolve_encoder(local_store, typed).describe()  # noqa: E731
    found = knockouts(FeatureSetConfig(text=spec), describe)  # type: ignore[arg-type]
    assert found[0].feature_set.text == ("random:96",)
