"""Stage: a dataset and feature artefacts in, the settings of one recommender out, chosen on validation."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field, JsonValue

from pipeline.comparison.records import NO_FEATURES
from pipeline.device import choose_device
from pipeline.progress import SILENT, Reporter
from pipeline.reading import ChoosingData, read_feature_table, read_for_choosing
from pipeline.stages.result import StageResult
from pipeline.stages.train_recommender import (
    RunSettings,
    by_name,
    feature_label,
    fit,
    run_identity,
    shown_encoder,
)
from pipeline.store import artefact_key
from recommenders.evaluation import evaluate
from recommenders.ranges import Between
from recommenders.search import (
    Measured,
    Objective,
    Trial,
    TrialFolder,
    Watch,
    best_trial,
    run_trials,
    trials_frame,
)
from recommenders.search_space import Choice, SearchConfig, Space, search_space, with_choice

if TYPE_CHECKING:
    from pipeline.sharing import SharedFolder
    from pipeline.store import Artefact, Draft, InputRef, Store
    from recommenders.feature_input import FeatureTable
    from recommenders.training import HistoryRow

STUDY_FILE = "study.parquet"


class SearchSettings(RunSettings, frozen=True, extra="forbid"):
    """One recommender as it will be trained, and how those of its settings are searched that have a range."""

    search: SearchConfig = Field(default_factory=SearchConfig)

    def run(self) -> RunSettings:
        """Return the settings without the search."""
        return RunSettings.model_validate(self.model_dump(exclude={"search"}))

    def space(self) -> Space:
        """Return what is searched; settings that are given are not."""
        return search_space(self.model, self.search, self.settings)


def search_recommender(
    store: Store,
    dataset: str,
    features: Sequence[str],
    config: SearchSettings,
    *,
    reporter: Reporter = SILENT,
    force: bool = False,
) -> StageResult:
    """Try settings of one recommender with one seed and choose those that do best on validation.

    The test part is never read. Killed, it goes on with the finished trials, and with the epochs of the one
    that was under way. What other processes are trying (``try_settings``) is waited for.

    Args:
        store: Where everything lies.
        dataset: Name, key or folder of a dataset artefact.
        features: Feature artefacts, several of one modality if wanted; none for models that read none.
        config: Model, fixed settings, reading, training, evaluation, seed, and the search.
        reporter: Told of trials.
        force: Search again although the store has it.

    Raises:
        ConfigError: Features without a model that reads them, or one artefact twice.
        RecommenderError: A range that cannot be, or no trial that could be finished.
    """
    job = _Job.of(store, dataset, features, config)
    if not force and (found := job.found()) is not None:
        return found
    with job.share("choice") as shared:
        result = job.choose(shared, reporter, force=force)
        shared.remove()
    return result


def find_search(
    store: Store, dataset: str, features: Sequence[str], config: SearchSettings
) -> StageResult | None:
    """The search, if the store has it.

    Raises:
        ConfigError: As for ``search_recommender``.
    """
    return _Job.of(store, dataset, features, config).found()


def try_settings(
    store: Store,
    dataset: str,
    features: Sequence[str],
    config: SearchSettings,
    worker: str,
    *,
    reporter: Reporter = SILENT,
    force: bool = False,
) -> int:
    """Try settings beside other processes of this machine until none is left to try, and choose nothing.

    Args:
        store: As for ``search_recommender``, which chooses in the end.
        dataset: As there.
        features: As there.
        config: As there.
        worker: A name of its own for each process.
        reporter: As there.
        force: Try although the store has the search.

    Returns:
        The trials finished by all processes so far; 0 where the store has the search.
    """
    job = _Job.of(store, dataset, features, config)
    if not force and job.found() is not None:
        return 0
    with job.share(worker) as shared:
        return len(job.run_trials(shared, reporter, wait=False))


@dataclass(frozen=True)
class _Job:
    """One search, as each of its processes sees it."""

    store: Store
    data: Artefact
    tables: dict[str, Artefact]
    config: SearchSettings
    device: torch.device

    @classmethod
    def of(cls, store: Store, dataset: str, features: Sequence[str], config: SearchSettings) -> _Job:
        tables = by_name([store.get(ref, "features") for ref in features], config.model)
        device = choose_device(config.device)
        return cls(store, store.get(dataset, "dataset"), tables, config, device)

    @property
    def label(self) -> str:
        return feature_label({name: shown_encoder(artefact) for name, artefact in self.tables.items()})

    @property
    def identity(self) -> dict[str, JsonValue]:
        config = self.config
        return {
            **run_identity(self.data, self.tables, config.run(), self.device),
            "search": config.search.model_dump(mode="json", exclude={"ranges"}),
            "space": _shown(config.space()),
            "fixed": dict(config.settings),
        }

    @property
    def slug(self) -> str:
        return f"{self.config.model}-{self.label}".rstrip(f"-{NO_FEATURES}")

    @property
    def inputs(self) -> list[InputRef]:
        features = [artefact.as_input(modality) for modality, artefact in self.tables.items()]
        return [self.data.as_input("interactions"), *features]

    def found(self) -> StageResult | None:
        artefact = self.store.find("search", artefact_key("search", self.identity))
        return None if artefact is None else StageResult.reusing(artefact)

    def share(self, worker: str) -> AbstractContextManager[SharedFolder]:
        return self.store.share(
            "search", slug=self.slug, identity=self.identity, inputs=self.inputs, worker=worker
        )

    def run_trials(self, shared: SharedFolder, reporter: Reporter, *, wait: bool) -> list[Trial]:
        config = self.config
        data = read_for_choosing(self.data)
        table = read_feature_table(self.tables, data.item_ids, config.reading, data.train).to(self.device)
        objective = trial_objective(config.run(), data, table, self.device)
        with reporter.progress(f"search {config.model} {self.label}") as progress:
            return run_trials(
                config.space(), objective, config.search, shared.folder, progress=progress, wait=wait
            )

    def choose(self, shared: SharedFolder, reporter: Reporter, *, force: bool) -> StageResult:
        """Try what is left to try, choose, and write all trials down."""
        config = self.config

        def make(draft: Draft) -> None:
            trials = self.run_trials(shared, reporter, wait=True)
            if all(trial.state == "failed" for trial in trials):
                TrialFolder(shared.folder).forget()  # so that they can be tried again
            best = best_trial(trials)
            trials_frame(trials).write_parquet(draft.path(STUDY_FILE))
            states = Counter(trial.state for trial in trials)
            failed: dict[str, JsonValue] = {"failed": states["failed"]} if states["failed"] else {}
            draft.record(
                best={"number": best.number, "value": best.value, "settings": dict(best.choice)},
                n_trials=len(trials),
                trials={state: states[state] for state in ("complete", "pruned", "failed")},
                trial_seconds=sum(trial.seconds for trial in trials),
                summary={
                    "trials": len(trials),
                    "ended early": states["pruned"],
                    **failed,
                    f"best valid {config.training.monitor}": best.value,
                    **best.choice,
                },
            )

        outcome = self.store.produce(
            "search",
            slug=self.slug,
            identity=self.identity,
            inputs=self.inputs,
            parameters={
                **config.run().model_dump(mode="json"),
                "search": config.search.model_dump(mode="json", exclude={"ranges"}),
                "space": _shown(config.space()),
                "feature_set": self.label,
                "dataset": self.data.key,
                "split_fingerprint": self.data.manifest.facts["split_fingerprint"],
            },
            make=make,
            force=force,
        )
        return StageResult.of(outcome)


def trial_objective(
    config: RunSettings, data: ChoosingData, table: FeatureTable, device: torch.device
) -> Objective:
    """Return what trains a point as a run would be and tells its best validation value."""
    watched = f"valid_{config.training.monitor}"

    def objective(choice: Choice, watch: Watch, folder: Path) -> Measured:
        settings, training = with_choice(config.model, config.settings, config.training, choice)
        point = config.model_copy(update={"settings": settings, "training": training})

        def each_epoch(row: HistoryRow) -> bool:
            return watched in row and watch(int(row["epoch"]), row[watched])

        started = time.perf_counter()
        model, trained = fit(
            point, data.train, data.valid, table, device=device, checkpoint_folder=folder, watch=each_epoch
        )
        earlier = sum(row["seconds"] for row in trained.history[: trained.resumed_after])
        if trained.history:
            value = trained.history[trained.best_epoch - 1][watched]
        else:  # there was nothing to train
            model.eval()
            measured = evaluate(model.scorer(table), data.valid, data.train, config.evaluation, device=device)
            value = measured.metrics[config.training.monitor]
        seconds = time.perf_counter() - started + earlier
        return Measured(value, len(trained.history), trained.best_epoch, seconds)

    return objective


def _shown(space: Mapping[str, object]) -> dict[str, JsonValue]:
    """Return a space as JSON."""
    return {
        name: values.model_dump(mode="json") if isinstance(values, Between) else list(values)  # type: ignore[call-overload]  # a tuple
        for name, values in space.items()
    }
