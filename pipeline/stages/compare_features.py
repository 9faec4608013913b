"""Stage: runs in, one comparison out: means, intervals, paired tests, floors and costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import polars as pl

from pipeline.comparison.config import ComparisonConfig
from pipeline.comparison.parquet import COMPARISON_FILE, PAIRS_FILE, read_comparison
from pipeline.comparison.records import NO_FEATURES, RunRecord
from pipeline.comparison.render import write_comparison
from pipeline.comparison.rows import COSTS
from pipeline.comparison.tables import Comparison, compare_runs
from pipeline.progress import SILENT, Reporter
from pipeline.reading import ReadingConfig
from pipeline.stages.result import StageResult
from recommenders.models.registry import model_entry
from recommenders.search_space import TRAINING
from recommenders.settings import identity
from recommenders.training import TrainingConfig

if TYPE_CHECKING:
    from pydantic import JsonValue

    from pipeline.store import Artefact, Draft, Store


def compare_features(
    store: Store,
    runs: Sequence[str],
    config: ComparisonConfig,
    *,
    reporter: Reporter = SILENT,
    force: bool = False,
) -> StageResult:
    """Compare runs of one dataset and split.

    Args:
        store: Where the runs lie.
        runs: Names, keys or folders of run artefacts; one named twice counts once.
        config: Which metrics, which tests.
        reporter: Told what is compared.
        force: Compare again although the store has it.

    Raises:
        ConfigError: The runs do not belong in one table.
    """
    artefacts = list(
        {artefact.key: artefact for artefact in (store.get(run, "run") for run in runs)}.values()
    )

    def make(draft: Draft) -> None:
        reporter.say(f"  comparing {len(artefacts)} runs")
        comparison = compare_runs([read_record(artefact) for artefact in artefacts], config)
        write_comparison(comparison, draft.folder)
        best = comparison.best
        draft.record(
            missing_floors=list(comparison.missing_floors),
            split_fingerprint=comparison.split_fingerprint,
            summary={
                "runs": len(artefacts),
                "best on validation": best.label,
                f"test {config.metric}": best.test[config.metric].mean,
                "controlled": not comparison.missing_floors,
            },
        )

    keys: list[JsonValue] = [*sorted(artefact.key for artefact in artefacts)]
    outcome = store.produce(
        "comparison",
        slug=f"{config.metric}-of-{len(artefacts)}-runs",
        identity={"runs": keys, "config": config.model_dump(mode="json")},
        inputs=[artefact.as_input("run") for artefact in artefacts],
        parameters=config.model_dump(mode="json"),
        make=make,
        force=force,
    )
    return StageResult.of(outcome)


def restore_comparison(artefact: Artefact) -> Comparison:
    """Read a comparison artefact back, to show it again."""
    config = ComparisonConfig.model_validate(artefact.manifest.parameters)
    return read_comparison(artefact.path(COMPARISON_FILE), artefact.path(PAIRS_FILE), config)


def read_record(run: Artefact) -> RunRecord:
    """Read what a comparison needs of a run artefact."""
    shown = run.manifest.parameters
    metrics = pl.read_parquet(run.path("metrics.parquet"))

    def part(name: str) -> dict[str, float]:
        return dict(metrics.filter(pl.col("part") == name).select("metric", "value").iter_rows())

    evaluation = _section(shown["evaluation"])
    # How features are read is no setting of a model that reads none: its runs stay one row.
    settings = (
        ("settings", "training")
        if shown["feature_set"] == NO_FEATURES
        else ("settings", "training", "reading")
    )
    return RunRecord(
        label=run.ref,
        model=str(shown["model"]),
        feature_set=str(shown["feature_set"]),
        seed=int(str(shown["seed"])),
        dataset=str(shown["dataset"]),
        split_fingerprint=str(shown["split_fingerprint"]),
        settings=_settings(
            {name: _as_now(name, shown[name], str(shown["model"])) for name in settings}, shown.get("search")
        ),
        valid=part("valid"),
        test=part("test"),
        per_user=pl.read_parquet(run.path("per_user.parquet")),
        evaluation={name: value for name, value in evaluation.items() if not name.startswith("block_")},
        facts={name: float(str(value)) for name, value in run.manifest.facts.items() if name in COSTS},
    )


def _as_now(name: str, settings: JsonValue, model: str) -> JsonValue:
    """Settings of a run that tell it from others; one of before a setting is a run with its default."""
    if name == "reading":
        return ReadingConfig.model_validate(settings).model_dump(mode="json")
    config = TrainingConfig if name == "training" else model_entry(model).config
    return identity(config.model_validate(settings))


def _settings(settings: dict[str, JsonValue], search: JsonValue) -> dict[str, JsonValue]:
    """Settings with what was searched under the name of the search, not at the values it chose.

    Each feature set has a choice of its own; by the values one recommender would be as many as it has sets.
    """
    searched = _section(search)
    if not searched:
        return settings
    space = _section(searched["space"])
    left: dict[str, JsonValue] = {
        section: {name: value for name, value in _section(values).items() if name not in names}
        for section, values in settings.items()
        for names in [_names_in(section, space)]
    }
    return left | {"search": {**_section(searched["search"]), "space": space}}


def _names_in(section: str, space: dict[str, JsonValue]) -> set[str]:
    """Names within ``settings`` or ``training`` of what a space holds."""
    if section == "training":
        return {name.removeprefix(TRAINING) for name in space if name.startswith(TRAINING)}
    return set(space) if section == "settings" else set()


def _section(value: JsonValue) -> dict[str, JsonValue]:
    return value if isinstance(value, dict) else {}
