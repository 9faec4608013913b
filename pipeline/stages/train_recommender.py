"""Stage: a dataset and feature artefacts in, one trained and measured recommender out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator

from features.catalogue import Modality
from features.feature_table import FeatureSet
from pipeline.comparison.records import NO_FEATURES
from pipeline.device import DeviceChoice, choose_device
from pipeline.errors import ConfigError
from pipeline.peak_memory import forget_peak_memory, peak_memory
from pipeline.progress import SILENT, Progress, Reporter
from pipeline.reading import (
    ReadingConfig,
    modality_names,
    read_dataset,
    read_feature_table,
    read_features,
)
from pipeline.run_files import USER_EMBEDDINGS, measure_and_write
from pipeline.stages.build_index import ITEM_EMBEDDINGS
from pipeline.stages.result import StageResult
from recommenders.evaluation import EvaluationConfig, Scorer
from recommenders.feature_input import FeatureTable
from recommenders.models.registry import Setting, build_model, model_config, model_entry
from recommenders.search_space import with_choice
from recommenders.settings import identity
from recommenders.training import HistoryRow, TrainingConfig, TrainingResult, train

if TYPE_CHECKING:
    from pydantic import JsonValue

    from pipeline.store import Artefact, Draft, Store
    from recommenders.interactions import Interactions
    from recommenders.models.base import Recommender

MODALITY_ORDER: tuple[str, ...] = get_args(Modality)
"""The order in which models are given them, whatever order they are named in."""
SMALL_MODEL = 1_000_000
"""Parameters below which one thread trains a model."""


class RunSettings(BaseModel, frozen=True, extra="forbid"):
    """One recommender, how it reads features, how it is trained and measured, and its seed."""

    model: str = Field("vbpr", description="Name of the recommender; `tandem recommenders` lists them.")
    settings: dict[str, Setting] = Field(
        default_factory=dict, description="Settings of this recommender that differ from its defaults."
    )
    reading: ReadingConfig = Field(default_factory=ReadingConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    seed: int = Field(0, description="Of initial parameters, of sampling and of the order of training.")
    device: DeviceChoice = Field("auto", description="`auto` takes the GPU where there is one.")

    @model_validator(mode="after")
    def _known(self) -> RunSettings:
        model_config(self.model, self.settings)  # raises for a name or a key that does not exist
        return self


def train_recommender(
    store: Store,
    dataset: str,
    features: Sequence[str],
    config: RunSettings,
    *,
    search: str = "",
    reporter: Reporter = SILENT,
    force: bool = False,
) -> StageResult:
    """Train one recommender with one seed, choose its epoch on validation, and measure the test part once.

    Args:
        store: Where everything lies.
        dataset: Name, key or folder of a dataset artefact.
        features: Feature artefacts, several of one modality if wanted; none for models that read none.
        config: Model, settings, reading, training, evaluation, seed.
        search: Search artefact whose choice is put into ``config``; the search must have been of the same
            dataset, features, model and settings. Empty: nothing was searched.
        reporter: Told of epochs.
        force: Train again although the store has the run.

    Raises:
        ConfigError: Features without a model that reads them, one artefact twice, a search of other things.
        FeatureError: The features cannot be read as asked: too few numbers, widths that do not add.
        RecommenderError: The model cannot be built or trained as asked.
    """
    data = store.get(dataset, "dataset")
    tables = by_name([store.get(ref, "features") for ref in features], config.model)
    found = store.get(search, "search") if search else None
    if found is not None:
        config = chosen_settings(found, data, tables, config)
    device = choose_device(config.device)
    label = feature_label({modality: shown_encoder(a) for modality, a in tables.items()})

    def make(draft: Draft) -> None:
        with reporter.progress(f"{config.model} {label} seed {config.seed}") as progress:
            _train_and_measure(
                draft, data, tables, config, device=device, progress=progress, say=reporter.say
            )
            if found is not None:
                draft.record(**_search_costs(found))

    outcome = store.produce(
        "run",
        slug=f"{config.model}-{label}-seed-{config.seed}".replace(NO_FEATURES * 3, NO_FEATURES),
        identity=run_identity(data, tables, config, device) | ({"search": found.key} if found else {}),
        inputs=[
            data.as_input("interactions"),
            *(artefact.as_input(modality) for modality, artefact in tables.items()),
            *([found.as_input("settings")] if found else []),
        ],
        parameters={
            **config.model_dump(mode="json", exclude={"settings"}),
            "settings": model_config(config.model, config.settings).model_dump(mode="json"),
            "feature_set": label,
            "dataset": data.key,
            "split_fingerprint": data.manifest.facts["split_fingerprint"],
            **({"search": _searched(found)} if found else {}),
        },
        make=make,
        resumable=True,
        force=force,
    )
    return StageResult.of(outcome)


def shown_encoder(features: Artefact) -> str:
    """What the encoder behind features is called: its label, or as it was typed where there is none."""
    shown = features.manifest.parameters
    return str(shown.get("label", shown["encoder"]))


def feature_label(encoders: Mapping[str, str]) -> str:
    """What a feature set is called: "tiny image+text", or "clip image, minilm text" where encoders differ.

    Args:
        encoders: Name in the feature table, such as ``image`` or ``image:2`` -> encoder.
    """
    if not encoders:
        return NO_FEATURES
    short = [
        (name.partition(":")[0], encoder.removeprefix("open_clip/")) for name, encoder in encoders.items()
    ]
    if len({encoder for _, encoder in short}) == 1:
        return f"{short[0][1]} {'+'.join(modality for modality, _ in short)}"
    return ", ".join(f"{encoder} {modality}" for modality, encoder in short)


def restore_scorer(store: Store, run: Artefact) -> Scorer:
    """Return what scores all items for a block of users, from a finished run.

    Raises:
        StoreError: What the run was made from is no longer in the store.
    """
    if ITEM_EMBEDDINGS in run.manifest.files:
        users = FeatureSet.read([run.path(USER_EMBEDDINGS)]).vectors
        items = FeatureSet.read([run.path(ITEM_EMBEDDINGS)]).vectors
        return lambda rows: users[rows] @ items.T
    inputs = run.manifest.inputs
    data = read_dataset(store.get(next(ref.key for ref in inputs if ref.kind == "dataset"), "dataset"))
    tables = {ref.role: store.get(ref.key, "features") for ref in inputs if ref.kind == "features"}
    shown = run.manifest.parameters
    reading = ReadingConfig.model_validate(shown["reading"])
    table = read_feature_table(tables, data.item_ids, reading, data.split.train)
    settings = shown["settings"]
    assert isinstance(settings, dict)  # noqa: S101 - as _train_and_measure wrote it
    rng = np.random.default_rng(0)  # a model without parameters draws nothing that stays
    model = build_model(str(shown["model"]), settings, data.split.train, table, rng)  # type: ignore[arg-type]  # JSON scalars
    return model.scorer(table)


def by_name(features: Sequence[Artefact], model: str) -> dict[str, Artefact]:
    """Return feature artefacts by their name in the model's table, in the one order of modalities.

    Raises:
        ConfigError: The model reads no features, or one artefact is given twice.
    """
    if features and not model_entry(model).model.needs_features:
        raise ConfigError(f"{model} reads no features; leave {features[0].ref} out, or choose another model.")
    for ref, times in Counter(artefact.ref for artefact in features).items():
        if times > 1:
            raise ConfigError(f"{ref} is given {times} times; give each feature artefact once.")
    # One order of modalities, as models draw and join in this order and the key does not know another.
    modalities = [str(artefact.manifest.parameters["modality"]) for artefact in features]
    ordered = sorted(zip(modalities, features, strict=True), key=lambda pair: MODALITY_ORDER.index(pair[0]))
    names = modality_names([modality for modality, _ in ordered])
    return {name: artefact for name, (_, artefact) in zip(names, ordered, strict=True)}


def run_identity(
    data: Artefact, tables: Mapping[str, Artefact], config: RunSettings, device: torch.device
) -> dict[str, JsonValue]:
    """All that can change the run. Block sizes cannot; a GPU's sums differ in their last digits."""
    reads = bool(tables)
    return {
        "dataset": data.key,
        "features": {modality: artefact.key for modality, artefact in tables.items()},
        "model": config.model,
        "settings": identity(model_config(config.model, config.settings)),
        "reading": config.reading.identity() if reads else {},
        "training": identity(config.training),
        "evaluation": config.evaluation.model_dump(mode="json", exclude={"block_users", "block_mb"}),
        "seed": config.seed,
        "device": device.type,
    }


def chosen_settings(
    search: Artefact, data: Artefact, tables: Mapping[str, Artefact], config: RunSettings
) -> RunSettings:
    """Return ``config`` with what a search chose, which must have been a search of just this.

    Raises:
        ConfigError: It was of another dataset, other features, or other settings; it says which.
    """
    searched = searched_settings(search)
    keys = {"dataset": [data.key], "features": [artefact.key for artefact in tables.values()]}
    inputs = search.manifest.inputs
    of_search = {
        "dataset": [ref.key for ref in inputs if ref.kind == "dataset"],
        "features": [ref.key for ref in inputs if ref.kind == "features"],
    }
    differ = [name for name, wanted in keys.items() if of_search[name] != wanted]
    differ += [
        name
        for name in RunSettings.model_fields
        if name not in {"seed", "device"} and getattr(searched, name) != getattr(config, name)
    ]
    if differ:
        raise ConfigError(
            f"{search.ref} was a search with another {' and another '.join(differ)}; its choice says nothing "
            "here. Search again with `tandem search`, or give the settings that were searched."
        )
    choice = best_choice(search)
    settings, training = with_choice(config.model, config.settings, config.training, choice)
    return RunSettings.model_validate({**config.model_dump(), "settings": settings, "training": training})


def searched_settings(search: Artefact) -> RunSettings:
    """Return what a search was of, without what it chose."""
    shown = search.manifest.parameters
    return RunSettings.model_validate({name: shown[name] for name in RunSettings.model_fields})


def best_choice(search: Artefact) -> dict[str, Setting]:
    """Return the settings that a search chose, by name, those of training after ``training.``."""
    best = search.manifest.facts["best"]
    assert isinstance(best, dict)  # noqa: S101 - as search_recommender wrote it
    choice = best["settings"]
    assert isinstance(choice, dict)  # noqa: S101
    return {name: value for name, value in choice.items() if isinstance(value, str | int | float)}


def _searched(search: Artefact) -> dict[str, JsonValue]:
    """What a run keeps of the search behind its settings."""
    shown = search.manifest.parameters
    return {"key": search.key, "space": shown["space"], "search": shown["search"]}


def _search_costs(search: Artefact) -> dict[str, JsonValue]:
    facts = search.manifest.facts
    return {"search_trials": facts["n_trials"], "search_seconds": facts["trial_seconds"]}


def fit(
    config: RunSettings,
    train_pairs: Interactions,
    valid: Interactions,
    table: FeatureTable,
    *,
    device: torch.device,
    checkpoint_folder: Path,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    watch: Callable[[HistoryRow], bool] | None = None,
) -> tuple[Recommender, TrainingResult]:
    """Build a model and train it by its seed, the epoch chosen on validation; the test part is no argument.

    A search's trial and the run that follows it are this one function, so that the run with the search's seed
    repeats the chosen trial.
    """
    init_rng, training_rng = np.random.default_rng(config.seed).spawn(2)
    model = build_model(config.model, config.settings, train_pairs, table, init_rng).to(device)
    with threads_for(model):
        trained = train(
            model,
            train_pairs,
            valid,
            table,
            config.training,
            evaluation=config.evaluation,
            rng=training_rng,
            checkpoint_folder=checkpoint_folder,
            progress=progress,
            say=say,
            watch=watch,
        )
    return model, trained


def _train_and_measure(
    draft: Draft,
    data: Artefact,
    tables: Mapping[str, Artefact],
    config: RunSettings,
    *,
    device: torch.device,
    progress: Progress,
    say: Callable[[str], None],
) -> None:
    dataset = read_dataset(data)
    split = dataset.split
    read = read_features(tables, dataset.item_ids, config.reading, split.train)
    table = read.table.to(device)
    forget_peak_memory(device)
    started = time.perf_counter()
    model, trained = fit(
        config,
        split.train,
        split.valid,
        table,
        device=device,
        checkpoint_folder=draft.scratch,
        progress=progress,
        say=say,
    )
    train_seconds = time.perf_counter() - started
    measure_and_write(
        draft,
        model,
        table,
        data=data,
        dataset=dataset,
        config=config.evaluation,
        monitor=config.training.monitor,
        device=device,
        best_epoch=trained.best_epoch,
    )
    trained.history_frame().write_parquet(draft.path("history.parquet"))
    draft.record(
        train_seconds=train_seconds,
        epochs=len(trained.history),
        best_epoch=trained.best_epoch,
        stopped_early=trained.stopped_early,
        resumed_after=trained.resumed_after,
        seconds_by_phase=dict(trained.seconds),
        peak_memory_bytes=peak_memory(device),
        **({"estimated_memory_bytes": trained.memory.peak_bytes} if trained.memory else {}),
        features_read=read.counts,
        feature_seconds=sum(artefact.manifest.seconds for artefact in tables.values()),
        feature_bytes=sum(artefact.manifest.bytes for artefact in tables.values()),
    )


@contextmanager
def threads_for(model: Recommender) -> Iterator[None]:
    """Train a small model on one thread.

    Its steps take less than a millisecond each, of which a second thread saves a third on a quiet machine; on
    a busy one the threads wait for each other at the end of every operation, and it takes ten times as long.
    """
    before = torch.get_num_threads()
    if sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
