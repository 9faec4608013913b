"""A configuration is checked once, at the door, and its errors name what to type."""

from pathlib import Path

import pytest
import yaml

from pipeline.config import FeatureSetConfig, RunConfig, load_config, parse_config, with_overrides
from pipeline.config_template import template
from pipeline.errors import ConfigError
from recommenders.errors import RecommenderError
from tests.pipeline.small_runs import SMALL_RUN


def test_an_empty_file_is_the_default_run(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("")
    assert load_config(path, RunConfig) == RunConfig()


def test_a_misspelt_key_names_its_place_and_the_near_match(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("training: {epohcs: 3}\n")
    with pytest.raises(ConfigError, match=r"training\.epohcs: unknown key; did you mean 'epochs'\?"):
        load_config(path, RunConfig)


def test_a_misspelt_key_inside_a_list_is_found() -> None:
    with pytest.raises(ConfigError, match=r"feature_sets\.0\.imgae: unknown key; did you mean 'image'\?"):
        parse_config({"feature_sets": [{"imgae": "tiny"}]}, RunConfig)


def test_every_wrong_value_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"training": {"epochs": 0, "learning_rate": "fast"}}, RunConfig)
    assert "training.epochs" in str(caught.value)
    assert "training.learning_rate" in str(caught.value)


def test_an_empty_feature_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one of image, text, fused"):
        parse_config({"feature_sets": [{}]}, RunConfig)


def test_a_recommender_setting_that_does_not_exist_is_refused() -> None:
    with pytest.raises(RecommenderError, match="vbpr has no setting 'dimm'"):
        parse_config({"recommenders": [{"model": "vbpr", "settings": {"dimm": 3}}]}, RunConfig)


def test_a_missing_file_and_a_file_that_is_no_mapping_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no configuration file"):
        load_config(tmp_path / "no.yaml", RunConfig)
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds a list"):
        load_config(path, RunConfig)
    path.write_text("a: [1\n")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(path, RunConfig)


def test_overrides_reach_nested_keys_and_leave_the_original_alone() -> None:
    raw = {"training": {"epochs": 3}}
    changed = with_overrides(raw, ["training.epochs=7", "dataset.demo.n_items=50", "seeds=[4]"])
    assert changed == {"training": {"epochs": 7}, "dataset": {"demo": {"n_items": 50}}, "seeds": [4]}
    assert raw == {"training": {"epochs": 3}}


@pytest.mark.parametrize("override", ["epochs", "=3", "seeds.first=1"])
def test_an_override_that_is_none_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        with_overrides({"seeds": [1]}, [override])


@pytest.mark.parametrize(
    "raw",
    [
        {"training": {"monitor": "recall@7"}},
        {"comparison": {"metric": "recal@20"}},
        {"comparison": {"more_metrics": ["ndcg@7"]}},
        {"comparison": {"metric": "coverage@20"}},
    ],
)
def test_a_metric_that_nobody_measures_is_refused_before_the_work(raw: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"is not measured at evaluation\.ks"):
        parse_config(raw, RunConfig)


def test_a_comparison_may_show_what_lists_are_like_where_that_is_always_defined() -> None:
    parse_config({"comparison": {"more_metrics": ["ndcg@20", "gini@20", "epc@5", "coverage@10"]}}, RunConfig)
    with pytest.raises(ConfigError, match=r"is not measured at evaluation\.ks"):
        parse_config({"comparison": {"more_metrics": ["popreo@20"]}}, RunConfig)


def test_a_feature_set_names_its_encoders_by_modality() -> None:
    assert FeatureSetConfig(image="tiny", text="random").encoders() == [
        ("image", "tiny"),
        ("text", "random"),
    ]


def test_the_template_of_a_configuration_reads_back_to_it() -> None:
    config = parse_config(SMALL_RUN, RunConfig)
    text = template(config)
    assert parse_config(yaml.safe_load(text), RunConfig) == config
    assert "# Most passes over the training pairs." in text
    assert "# One of" not in text.split("dataset:")[0]


def test_the_documented_configuration_is_the_default_one() -> None:
    documented = Path(__file__).parents[2] / "docs" / "configuration.yaml"
    assert documented.read_text().split("\n", 1)[1] == template(RunConfig()), (
        "run: tandem config > docs/configuration.yaml"
    )
