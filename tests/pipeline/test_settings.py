"""A configuration as the text of one form field, and back: nothing may get lost on the way."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from features.indexing import IndexConfig
from pipeline.comparison.config import ComparisonConfig
from pipeline.config import RunConfig, parse_config
from pipeline.datasets.config import DatasetConfig
from pipeline.errors import ConfigError
from pipeline.joint_way import JointWayConfig
from pipeline.paradigms.config import ParadigmsConfig
from pipeline.settings import changed, inputs_of, merged, read_settings, settings_text, stage_config
from pipeline.stages.extract_features import FeaturesConfig
from pipeline.stages.finetune_encoder import FinetuneSettings
from pipeline.stages.search_recommender import SearchSettings
from pipeline.stages.train_recommender import RunSettings

CHANGED: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (DatasetConfig, {"importer": "tables", "tables": {"items": "a b.csv", "item_id": "sku"}}),
    (FeaturesConfig, {"encoder": "clip", "text": {"fields": ["title"]}, "extraction": {"dtype": "float32"}}),
    (IndexConfig, {"kind": "hnsw", "recall_sample": 0}),
    (RunSettings, {"settings": {"dim": 4}, "training": {"learning_rate": 1e-5, "amp": "off"}}),
    (SearchSettings, {"model": "bpr", "search": {"ranges": {"bpr": {"dim": [4, 8]}}}}),
    (ComparisonConfig, {"metric": "ndcg@10", "more_metrics": []}),
    (FinetuneSettings, {"finetuning": {"epochs": 2, "objectives": {"co_purchase": 0.5}}}),
    (JointWayConfig, {"tuning": {"mode": "lora"}, "modalities": ["text"]}),
    (ParadigmsConfig, {"encoders": ["clip", "tiny"], "seeds": [3]}),
    (
        RunConfig,
        {
            "name": "yes",
            "feature_sets": [{"image": ["tiny", "clip"]}, {"text": "tfidf"}],
            "recommenders": [{"model": "vbpr", "settings": {"dim": 4}}],
            "search": {"n_trials": 3},
            "seeds": [0],
        },
    ),
]


@pytest.mark.parametrize(("kind", "raw"), CHANGED, ids=[kind.__name__ for kind, _ in CHANGED])
def test_a_configuration_comes_back_from_its_text(kind: type[BaseModel], raw: dict[str, Any]) -> None:
    config = parse_config(raw, kind)
    assert parse_config(read_settings(settings_text(config)), kind) == config
    assert set(changed(config)) <= set(raw) | {"dataset", "search"}


@pytest.mark.parametrize("kind", [kind for kind, _ in CHANGED])
def test_of_defaults_there_is_no_text(kind: type[BaseModel]) -> None:
    assert settings_text(kind()) == ""


def test_inputs_and_settings_give_a_stage_s_configuration_back() -> None:
    config = RunSettings.model_validate({"model": "bpr", "seed": 3, "training": {"epochs": 7}})
    form = inputs_of(config, "model", "seed")
    assert form == {"model": "bpr", "seed": 3, "settings": "training:\n  epochs: 7\n"}
    assert stage_config(RunSettings, form["settings"], model="bpr", seed=3) == config


def test_what_has_a_field_of_its_own_is_refused_in_the_settings() -> None:
    with pytest.raises(ConfigError, match=r"'model' has a field of its own in this form; .* \('bpr'\)"):
        stage_config(RunSettings, "model: bpr", model="vbpr")


def test_a_misspelt_key_is_named_with_the_right_one() -> None:
    with pytest.raises(ConfigError, match=r"settings is not valid:\n  training.epoch: .*'epochs'"):
        stage_config(RunSettings, "training: {epoch: 3}")


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "cannot be read as YAML"), ("- 1", r"holds \[1\]"), ("3", "holds 3")]
)
def test_settings_that_are_no_keys_and_values_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(text)


def test_one_nested_mapping_is_laid_over_another() -> None:
    below = {"a": {"b": 1, "c": [1, 2]}, "d": 4}
    assert merged(below, {"a": {"c": [3]}, "e": 5}) == {"a": {"b": 1, "c": [3]}, "d": 4, "e": 5}
    assert below == {"a": {"b": 1, "c": [1, 2]}, "d": 4}
