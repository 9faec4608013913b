"""Encoders fitted on a catalogue, real text encoders and vectors of other tools go through the stages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from features.encoders.tfidf import TfidfEncoder, fit_tfidf
from features.errors import EncoderError, FeatureError
from features.feature_table import FeatureSet, read_rows
from features.indexing import IndexConfig
from pipeline.datasets.config import DatasetConfig
from pipeline.errors import ConfigError
from pipeline.exporting import export_features
from pipeline.queries import Query, similar_items
from pipeline.reading import read_catalogue
from pipeline.stages.build_index import build_index
from pipeline.stages.extract_features import (
    FeaturesConfig,
    encoder_label,
    extract_features,
    restore_encoder,
)
from pipeline.stages.prepare_dataset import prepare_dataset
from pipeline.store import Artefact, Store
from tests.features.small_sentence import save_sentence
from tests.pipeline.small_runs import SMALL_DATASET


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("texts") / "store")


@pytest.fixture(scope="module")
def dataset(store: Store) -> Artefact:
    return prepare_dataset(store, DatasetConfig.model_validate(SMALL_DATASET)).artefact


def extract(store: Store, dataset: Artefact, encoder: str, modality: str = "text", **more: bool) -> Artefact:
    config = FeaturesConfig.model_validate({"encoder": encoder, "modality": modality, "device": "cpu"})
    return extract_features(store, dataset.key, config, **more).artefact


def vectors(features: Artefact) -> np.ndarray:
    return FeatureSet.read(features.paths("part-*.parquet")).vectors.float().numpy()


def test_tfidf_is_fitted_on_the_catalogue_and_says_so(store: Store, dataset: Artefact) -> None:
    made = extract(store, dataset, "tfidf+dim=8")
    assert made.slug == "tfidf-8-text"
    catalogue = read_catalogue(dataset)
    texts = [text for text in catalogue.texts() if text]
    encoder = fit_tfidf(texts, "tfidf+dim=8")
    with torch.inference_mode():
        expected = encoder.encode_texts(encoder.tokenize(texts)).numpy()
    present = FeatureSet.read(made.paths("part-*.parquet")).present.numpy()
    np.testing.assert_allclose(vectors(made)[present], expected, atol=1e-3)  # stored as float16
    fitted = made.manifest.facts["fitted"]
    assert isinstance(fitted, dict)
    assert fitted["vocabulary"] == len(encoder.fitted.words)
    assert fitted["texts"] == len(texts) == made.manifest.facts["n_ok"]
    assert fitted["explained_variance"] == pytest.approx(encoder.fitted.explained_variance)
    assert fitted["weights_sha256"] == encoder.info.weights_sha256


def test_tfidf_is_reused_and_made_again_alike(store: Store, dataset: Artefact) -> None:
    config = FeaturesConfig(encoder="tfidf+dim=8", modality="text", device="cpu")
    first = extract_features(store, dataset.key, config).artefact
    before = vectors(first)
    assert extract_features(store, dataset.key, config).reused
    again = extract_features(store, dataset.key, config, force=True)
    assert not again.reused
    assert again.artefact.key == first.key
    np.testing.assert_array_equal(vectors(again.artefact), before)


def test_tfidf_of_another_catalogue_shares_no_rows(store: Store, dataset: Artefact) -> None:
    settings = {**SMALL_DATASET, "demo": {**SMALL_DATASET["demo"], "n_items": 44}}
    other = prepare_dataset(store, DatasetConfig.model_validate(settings)).artefact
    first, second = extract(store, dataset, "tfidf+dim=8"), extract(store, other, "tfidf+dim=8")
    assert first.key != second.key
    assert second.manifest.facts["reused"] == 0
    assert first.manifest.facts["recipe"] != second.manifest.facts["recipe"]


def test_a_killed_extraction_with_tfidf_goes_on_where_it_was(
    store: Store, dataset: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FeaturesConfig.model_validate(
        {"encoder": "tfidf+dim=7", "modality": "text", "device": "cpu", "extraction": {"rows_per_part": 8}}
    )
    encode = TfidfEncoder.encode_texts
    calls: list[int] = []

    def killed(self: TfidfEncoder, tokens: torch.Tensor) -> torch.Tensor:
        calls.append(len(tokens))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, tokens)

    monkeypatch.setattr(TfidfEncoder, "encode_texts", killed)
    with pytest.raises(KeyboardInterrupt):
        extract_features(store, dataset.key, config)
    resumed = extract_features(store, dataset.key, config).artefact
    assert resumed.manifest.facts["kept_rows"] == 8  # the second part was encoded, and not yet written
    whole = extract_features(store, dataset.key, config, force=True).artefact
    assert whole.manifest.facts["kept_rows"] == 0
    np.testing.assert_array_equal(vectors(resumed), vectors(whole))
    assert extract_features(store, dataset.key, config, retry_failed=True).artefact.key == whole.key


def test_a_text_finds_its_item_by_refitting(store: Store, dataset: Artefact) -> None:
    for encoder in ("tfidf+dim=8", "tfidf+dim=8+l2=yes"):
        features = extract(store, dataset, encoder)
        index = build_index(store, features.key, IndexConfig()).artefact
        catalogue = read_catalogue(dataset)
        item_id, text = next((i, t) for i, t in zip(catalogue.item_ids, catalogue.texts(), strict=True) if t)
        hits = similar_items(store, index.key, Query(text=text), k=3)
        assert hits[0].similarity == pytest.approx(1, abs=1e-2)
        same = {i for i, t in zip(catalogue.item_ids, catalogue.texts(), strict=True) if t == text}
        assert item_id in same
        assert hits[0].item_id in same or hits[0].similarity == pytest.approx(hits[1].similarity, abs=1e-3)
        assert restore_encoder(store, features).info.spec == encoder


def test_tfidf_refuses_pictures_and_too_many_numbers(store: Store, dataset: Artefact) -> None:
    with pytest.raises(ConfigError, match="encodes text, not image"):
        extract(store, dataset, "tfidf+dim=8", "image")
    with pytest.raises(EncoderError, match=r"give at most \d+ numbers a vector, not 5000"):
        extract(store, dataset, "tfidf+dim=5000")


def test_a_local_model_leaves_no_path_in_names(store: Store, dataset: Artefact, tmp_path: Path) -> None:
    folder = save_sentence(tmp_path / "my-shop", "mean")
    spec = f"sentence-transformers/local-dir:{folder}"
    made = extract(store, dataset, spec)
    assert made.slug == "my-shop-model-text"
    assert made.manifest.parameters["label"] == "my-shop-model"
    assert made.manifest.parameters["encoder"] == spec
    dealt = extract(store, dataset, f"shuffled:{spec}@3")
    assert dealt.slug == "shuffled-my-shop-model-3-text"
    index = build_index(store, made.key, IndexConfig()).artefact
    assert len(similar_items(store, index.key, Query(text="a red mug"), k=3)) == 3


def test_labels_keep_controls_apart_from_encoders(tmp_path: Path) -> None:
    from features.encoders.registry import describe_encoder

    for spec in ("random:8", "constant", "shuffled:random:8@2"):
        assert encoder_label(spec, describe_encoder(spec)) == spec
    assert encoder_label("tiny", describe_encoder("tiny")) == "tiny"
    folder = save_sentence(tmp_path, "mean").rename(tmp_path / "random, one")
    info = describe_encoder(f"sentence-transformers/local-dir:{folder}")
    assert encoder_label(info.spec, info) == "sentence-transformers-random-one"


def test_vectors_of_another_tool_become_features(store: Store, dataset: Artefact, tmp_path: Path) -> None:
    ids = read_catalogue(dataset).item_ids
    rows = np.random.default_rng(0).standard_normal((len(ids), 5)).astype(np.float32)
    rows[2, 0] = np.nan
    np.save(tmp_path / "image.npy", rows[::-1])
    (tmp_path / "ids.txt").write_text("\n".join(reversed([*ids[:-1], "foreign"])))
    spec = f"precomputed/npy:{tmp_path}/image.npy+ids={tmp_path}/ids.txt"
    made = extract(store, dataset, spec, "image")
    assert made.slug == "precomputed-image-image"
    facts = made.manifest.facts
    assert (facts["n_ok"], facts["n_missing"], facts["n_unreadable"], facts["unused"]) == (
        len(ids) - 2,
        1,
        1,
        1,
    )
    table = read_rows(made.paths("part-*.parquet"))
    assert table["item_id"].to_list() == ids
    assert table["reason"][2] == "its vector holds NaN"
    np.testing.assert_array_equal(vectors(made)[0], rows[0])
    unit = extract(store, dataset, f"{spec}+l2=yes", "image")
    np.testing.assert_allclose(np.linalg.norm(vectors(unit)[0]), 1, rtol=1e-5)
    assert unit.key != made.key
    moved = tmp_path / "elsewhere.npy"
    (tmp_path / "image.npy").rename(moved)
    again = extract(store, dataset, f"precomputed/npy:{moved}+ids={tmp_path}/ids.txt", "image")
    assert again.key == made.key  # a path does not belong to an artefact's key
    index = build_index(store, made.key, IndexConfig()).artefact
    with pytest.raises((ConfigError, EncoderError), match=r"encodes nothing|cannot encode"):
        similar_items(store, index.key, Query(text="a red mug"))
    (tmp_path / "ids.txt").write_text("\n".join(f"x{row}" for row in range(len(ids))))
    with pytest.raises(FeatureError, match=r"none of the ids .* is in the catalogue: the file has 'x0'"):
        extract(store, dataset, f"precomputed/npy:{moved}+ids={tmp_path}/ids.txt", "image")


@pytest.mark.parametrize("layout", ["npy", "lists", "mmrec"])
def test_exported_features_come_back(store: Store, dataset: Artefact, tmp_path: Path, layout: str) -> None:
    made = extract(store, dataset, "random:6", "text")
    output = {"npy": "x.npy", "lists": "x.parquet", "mmrec": "x"}[layout]
    export_features(store, made.key, tmp_path / output, layout)  # type: ignore[arg-type]  # one of the three
    spec = {
        "npy": f"precomputed/npy:{tmp_path}/x.npy",
        "lists": f"precomputed/parquet:{tmp_path}/x.parquet",
        "mmrec": f"precomputed/npy:{tmp_path}/x/text_feat.npy+ids={tmp_path}/x/i_id_mapping.csv",
    }[layout]
    back = extract(store, dataset, spec)
    present = FeatureSet.read(made.paths("part-*.parquet")).present.numpy()
    np.testing.assert_allclose(vectors(back)[present], vectors(made)[present])
    table = read_rows(back.paths("part-*.parquet"))
    assert table["item_id"].to_list() == read_catalogue(dataset).item_ids
