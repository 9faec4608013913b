"""The stages on a small rendered dataset: what they leave, that they reuse it, and how they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from features.encoding import ExtractionConfig
from features.errors import EncoderError
from features.feature_table import FeatureSet, read_rows
from features.indexing import IndexConfig
from pipeline.comparison.config import ComparisonConfig
from pipeline.datasets.config import DatasetConfig
from pipeline.errors import ConfigError, DatasetError, StoreError
from pipeline.exporting import export_features
from pipeline.queries import Query, similar_items, write_recommendations
from pipeline.reading import read_dataset
from pipeline.stages.build_index import build_index
from pipeline.stages.compare_features import compare_features, restore_comparison
from pipeline.stages.extract_features import FeaturesConfig, extract_features
from pipeline.stages.prepare_dataset import prepare_dataset
from pipeline.stages.result import StageResult
from pipeline.stages.train_recommender import RunSettings, feature_label, run_identity, train_recommender
from pipeline.store import Store
from pipeline.two_stage import PlainStages, TwoStageResult, run_two_stage
from recommenders.training import TrainingConfig
from tests.pipeline.small_runs import SMALL_DATASET, small_run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("stages") / "store")


@pytest.fixture(scope="module")
def finished(store: Store) -> TwoStageResult:
    return run_two_stage(small_run(), PlainStages(store))


def test_a_run_leaves_every_kind_of_artefact_whole(store: Store, finished: TwoStageResult) -> None:
    kinds = {result.artefact.kind for result in finished.all()}
    assert kinds == {"dataset", "features", "run", "comparison"}  # controls are compared, not searched
    assert store.verify_all() == {artefact.ref: [] for artefact in store.list()}


def test_the_second_run_reuses_every_stage_and_gives_the_same_artefacts(
    store: Store, finished: TwoStageResult
) -> None:
    again = run_two_stage(small_run(), PlainStages(store))
    assert all(result.reused for result in again.all())
    assert [result.artefact.key for result in again.all()] == [
        result.artefact.key for result in finished.all()
    ]


def test_models_run_once_per_feature_set_they_read_and_seed(finished: TwoStageResult) -> None:
    shown = [result.artefact.manifest.parameters for result in finished.runs]
    combinations = {(run["model"], run["feature_set"], run["seed"]) for run in shown}
    assert len(shown) == len(combinations) == 2 * (1 + 3 + 3)
    assert ("popularity", "-", 0) in combinations
    assert ("vbpr", "shuffled:random:8 image+text", 1) in combinations


def test_every_item_is_accounted_for(store: Store, finished: TwoStageResult) -> None:
    facts = finished.dataset.artefact.manifest.facts
    for (modality, encoder), result in finished.features.items():
        counts = [result.artefact.manifest.facts[f"n_{status}"] for status in ("ok", "missing", "unreadable")]
        assert sum(int(str(count)) for count in counts) == 40, (modality, encoder)
    image = finished.features["image", "random:8"].artefact.manifest.facts
    assert image["n_missing"] == facts["items_without_image"]


def test_shuffled_features_are_the_same_rows_at_other_items(finished: TwoStageResult) -> None:
    plain, dealt = (
        FeatureSet.read(finished.features["image", encoder].artefact.paths("part-*.parquet"))
        for encoder in ("random:8", "shuffled:random:8")
    )
    assert plain.item_ids.equals(dealt.item_ids)
    assert not np.array_equal(plain.vectors.numpy(), dealt.vectors.numpy())
    np.testing.assert_array_equal(
        np.sort(plain.vectors.numpy(), axis=0), np.sort(dealt.vectors.numpy(), axis=0)
    )


def test_another_split_of_the_same_items_reuses_their_features(
    store: Store, finished: TwoStageResult
) -> None:
    config = DatasetConfig.model_validate({**SMALL_DATASET, "split": {"rule": "leave_one_out", "seed": 5}})
    other = prepare_dataset(store, config)
    assert other.artefact.key != finished.dataset.artefact.key
    features = extract_features(
        store, other.artefact.key, FeaturesConfig(encoder="random:8", modality="image")
    )
    assert features.reused


def test_the_split_on_disk_is_the_split_that_was_fingerprinted(finished: TwoStageResult) -> None:
    split = read_dataset(finished.dataset.artefact).split
    assert split.fingerprint == finished.dataset.artefact.manifest.facts["split_fingerprint"]


def test_the_stored_test_figures_are_the_means_of_the_stored_users(finished: TwoStageResult) -> None:
    for run in finished.runs:
        metrics = pl.read_parquet(run.artefact.path("metrics.parquet"))
        test = dict(metrics.filter(pl.col("part") == "test").select("metric", "value").iter_rows())
        users = pl.read_parquet(run.artefact.path("per_user.parquet"))
        assert users["recall@5"].mean() == pytest.approx(test["recall@5"])


def test_runs_know_their_estimated_memory_and_both_parts_which_items_lists_show(
    finished: TwoStageResult,
) -> None:
    for run in finished.runs:
        facts = run.artefact.manifest.facts
        trained = run.artefact.manifest.parameters["model"] == "vbpr"
        assert ("estimated_memory_bytes" in facts) == trained
        metrics = pl.read_parquet(run.artefact.path("metrics.parquet"))
        valid, test = (set(metrics.filter(pl.col("part") == part)["metric"]) for part in ("valid", "test"))
        assert {"gini@5", "arp@10", "aplt@5", "epc@5", "efd@10"} <= valid & test
        assert not any(name.startswith("ild") for name in valid)


def test_a_comparison_shows_what_lists_are_like(store: Store, finished: TwoStageResult) -> None:
    keys = [run.artefact.key for run in finished.runs]
    config = ComparisonConfig(metric="recall@5", more_metrics=("ndcg@5", "gini@5", "epc@10"))
    shown = restore_comparison(compare_features(store, keys, config).artefact)
    for row in shown.rows:
        assert 0 <= row.valid["gini@5"].mean <= 1
        assert 0 <= row.test["epc@10"].mean <= 1


def test_settings_that_came_later_leave_keys_as_they_were(finished: TwoStageResult) -> None:
    run = next(run for run in finished.runs if run.artefact.manifest.parameters["model"] == "vbpr")
    settings = RunSettings(model="bpr")
    known = run_identity(run.artefact, {}, settings, torch.device("cpu"))
    assert set(known["training"]) == {
        *("epochs", "batch_size", "learning_rate", "optimizer", "weight_decay", "n_negatives"),
        *("patience", "eval_every", "monitor"),
    }
    assert set(known["settings"]) == {"dim", "l2", "item_bias"}
    other = RunSettings(model="bpr", settings={"loss": "bce"}, training=TrainingConfig(negatives="hard"))
    changed = run_identity(run.artefact, {}, other, torch.device("cpu"))
    assert changed["settings"] == known["settings"] | {"loss": "bce"}
    assert changed["training"] == known["training"] | {"negatives": "hard"}


def test_the_comparison_names_its_split_and_the_floor_that_it_lacks(finished: TwoStageResult) -> None:
    assert finished.comparison is not None
    text = finished.comparison.artefact.path("comparison.md").read_text()
    fingerprint = str(finished.dataset.artefact.manifest.facts["split_fingerprint"])
    assert fingerprint[:12] in text
    # Every feature set of the small run is a control, so no content ItemKNN reads features with a meaning.
    assert "**Uncontrolled**: no floor of content ItemKNN" in text
    assert finished.comparison.summary["controlled"] is False


def test_recommendations_leave_out_what_the_user_has(
    store: Store, finished: TwoStageResult, tmp_path: Path
) -> None:
    data = finished.dataset.artefact
    known = pl.read_parquet(data.path("interactions.parquet"))
    items = pl.read_parquet(data.path("items.parquet"))["item_id"]
    users = pl.read_parquet(data.path("users.parquet"))["user_id"]
    had = set(zip(users[known["user_row"]].to_list(), items[known["item_row"]].to_list(), strict=True))
    for model in ("vbpr", "itemknn_content", "popularity"):
        run = next(r for r in finished.runs if r.artefact.manifest.parameters["model"] == model)
        output = tmp_path / f"{model}.parquet"
        written = write_recommendations(store, run.artefact.key, output, k=4)
        table = pl.read_parquet(output)
        assert table.columns == ["user_id", "rank", "item_id", "score"]
        assert written["rows"] == len(table) > 0
        assert not had & set(table.select("user_id", "item_id").iter_rows())
        assert table.group_by("user_id").agg(pl.col("score").is_sorted(descending=True))["score"].all()


def test_unknown_users_and_unwritable_outputs_are_told(
    store: Store, finished: TwoStageResult, tmp_path: Path
) -> None:
    run = finished.runs[0].artefact.key
    with pytest.raises(ConfigError, match="no user 'nobody'"):
        write_recommendations(store, run, tmp_path / "x.parquet", users=["nobody"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_recommendations(store, run, tmp_path / "file" / "x.parquet")


def test_an_index_of_a_runs_items_answers_by_item(store: Store, finished: TwoStageResult) -> None:
    run = next(r for r in finished.runs if r.artefact.manifest.parameters["model"] == "vbpr")
    index = build_index(store, run.artefact.key, IndexConfig(kind="flat"))
    hits = similar_items(store, index.artefact.key, Query(item="item-00003"), 3)
    assert [hit.rank for hit in hits] == [1, 2, 3]
    assert "item-00003" not in [hit.item_id for hit in hits]


def test_similar_items_by_item_agree_with_plain_cosines(store: Store, finished: TwoStageResult) -> None:
    features = finished.features["text", "random:8"].artefact
    index = build_index(store, features.key, IndexConfig(kind="flat"))
    table = FeatureSet.read(features.paths("part-*.parquet"))
    vectors = table.vectors.float().numpy()
    query = vectors[table.item_ids.to_list().index("item-00001")]
    cosines = vectors @ query / np.maximum(np.linalg.norm(vectors, axis=1) * np.linalg.norm(query), 1e-9)
    cosines[~table.present.numpy()] = -2
    expected = [
        table.item_ids[int(row)] for row in np.argsort(-cosines) if table.item_ids[int(row)] != "item-00001"
    ]
    hits = similar_items(store, index.artefact.key, Query(item="item-00001"), 5)
    assert [hit.item_id for hit in hits] == expected[:5]
    assert all(hit.title for hit in hits)


def test_queries_that_cannot_be_answered_say_why(
    store: Store, finished: TwoStageResult, tmp_path: Path
) -> None:
    features = finished.features["text", "random:8"].artefact
    index = build_index(store, features.key, IndexConfig(kind="flat")).artefact.key
    with pytest.raises(ConfigError, match="one of --item, --text and --picture; got none"):
        Query()
    with pytest.raises(ConfigError, match="no item 'nothing'"):
        similar_items(store, index, Query(item="nothing"))
    with pytest.raises(ConfigError, match="cannot encode a text query"):
        similar_items(store, index, Query(text="a mug"))
    missing = read_rows(features.paths("part-*.parquet")).filter(pl.col("status") == "missing")["item_id"]
    assert len(missing)
    with pytest.raises(ConfigError, match="its status is missing"):
        similar_items(store, index, Query(item=missing[0]))


def test_exports_hold_the_same_vectors_in_item_order(
    store: Store, finished: TwoStageResult, tmp_path: Path
) -> None:
    features = finished.features["image", "random:8"].artefact
    table = FeatureSet.read(features.paths("part-*.parquet"))
    present = table.present.numpy()
    expected = table.vectors.float().numpy()
    export_features(store, features.key, tmp_path / "lists.parquet", "lists")
    lists = pl.read_parquet(tmp_path / "lists.parquet")
    np.testing.assert_array_equal(np.array(lists["embedding"].to_list())[present], expected[present])
    assert lists["present"].to_list() == present.tolist()
    export_features(store, features.key, tmp_path / "x.npy", "npy")
    array = np.load(tmp_path / "x.npy")
    assert np.isnan(array[~present]).all()
    written = export_features(store, features.key, tmp_path / "mmrec", "mmrec")
    filled = np.load(tmp_path / "mmrec" / "image_feat.npy")
    np.testing.assert_allclose(filled[~present][0], expected[present].mean(axis=0), rtol=1e-5)
    assert [Path(file).name for file in written["files"]] == ["image_feat.npy", "i_id_mapping.csv"]


def test_refusals_of_the_stages(store: Store, finished: TwoStageResult) -> None:
    data = finished.dataset.artefact.key
    image, text = (finished.features[modality, "random:8"].artefact.key for modality in ("image", "text"))
    with pytest.raises(EncoderError, match="tinny"):
        extract_features(store, data, FeaturesConfig(encoder="tinny"))
    with pytest.raises(ConfigError, match="brought no image features"):
        extract_features(store, data, FeaturesConfig(encoder="given"))
    with pytest.raises(ConfigError, match="reads no features"):
        train_recommender(store, data, [image], RunSettings(model="popularity"))
    with pytest.raises(StoreError, match="not in the store"):
        train_recommender(store, "nothing-there", [text], RunSettings())
    knn = next(r for r in finished.runs if r.artefact.manifest.parameters["model"] == "itemknn_content")
    with pytest.raises(ConfigError, match="holds no vectors to index"):
        build_index(store, knn.artefact.key, IndexConfig())


def test_features_of_other_items_are_refused(store: Store, finished: TwoStageResult) -> None:
    raw = {**SMALL_DATASET, "demo": {**SMALL_DATASET["demo"], "n_items": 41}}
    other = prepare_dataset(store, DatasetConfig.model_validate(raw))
    image = finished.features["image", "random:8"].artefact.key
    with pytest.raises(DatasetError, match="covers 40 of 41 items"):
        train_recommender(store, other.artefact.key, [image], RunSettings())


def test_only_the_unreadable_rows_are_encoded_again(tmp_path: Path) -> None:
    pictures = tmp_path / "photos"
    pictures.mkdir()
    for number in range(6):
        Image.new("RGB", (20, 20), (40 * number, 10, 10)).save(pictures / f"{number}.png")
    whole = (pictures / "3.png").read_bytes()
    (pictures / "3.png").write_bytes(whole[:40])
    ids = [str(number) for number in range(6)]
    pl.DataFrame({"item_id": ids, "title": ids, "image": [f"{i}.png" for i in ids]}).write_csv(
        tmp_path / "items.csv"
    )
    pairs = [(f"u{user}", item) for user in range(4) for item in ids]
    pl.DataFrame(pairs, schema=["user_id", "item_id"], orient="row").write_csv(tmp_path / "pairs.csv")
    tables = {
        "items": str(tmp_path / "items.csv"),
        "interactions": str(tmp_path / "pairs.csv"),
        "image_folder": str(pictures),
    }
    store = Store(tmp_path / "store")
    split = {"rule": "leave_one_out"}
    config = DatasetConfig.model_validate({"importer": "tables", "tables": tables, "split": split})
    data = prepare_dataset(store, config).artefact.key
    settings = FeaturesConfig(encoder="random:8", modality="image")
    first = extract_features(store, data, settings).artefact
    assert first.manifest.facts["n_unreadable"] == 1
    rows = read_rows(first.paths("part-*.parquet"))
    assert rows.filter(pl.col("status") == "unreadable")["reason"][0]
    again = extract_features(store, data, settings, retry_failed=True)
    assert not again.reused
    assert (again.artefact.manifest.facts["encoded"], again.artefact.manifest.facts["reused"]) == (0, 5)


def test_feature_labels_name_encoders_and_modalities() -> None:
    assert feature_label({}) == "-"
    assert feature_label({"image": "tiny", "text": "tiny"}) == "tiny image+text"
    assert (
        feature_label({"image": "open_clip/ViT-B-32:openai", "text": "tiny"})
        == "ViT-B-32:openai image, tiny text"
    )


def test_precision_auto_is_probed_recorded_and_shares_vectors_with_what_it_took(
    store: Store, finished: TwoStageResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = finished.dataset.artefact.key
    monkeypatch.setattr("features.precision.has_bfloat16", lambda _: True)
    monkeypatch.setattr("features.extraction.has_bfloat16", lambda _: True)

    def made(precision: str) -> StageResult:
        extraction = ExtractionConfig(precision=precision)
        return extract_features(store, dataset, FeaturesConfig(encoder="tiny", extraction=extraction))

    auto = made("auto")
    facts = auto.artefact.manifest.facts
    assert facts["precision"] == facts["precision_probe"]["taken"]
    assert facts["precision_probe"]["cosine"] > 0.9
    asked = made(facts["precision"])
    assert asked.artefact.key != auto.artefact.key
    assert asked.artefact.manifest.facts["encoded"] == 0  # the same vectors, so nothing was encoded again
    monkeypatch.setattr("features.precision.has_bfloat16", lambda _: False)
    assert made("auto").artefact.key == made("float32").artefact.key
