"""Stage: a jointly trained encoder and the features it extracted in, the measured recommender out."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from safetensors.torch import load_file

from pipeline.comparison.records import NO_FEATURES
from pipeline.device import choose_device
from pipeline.encoder_specs import resolve_encoder, stored_spec
from pipeline.errors import ConfigError
from pipeline.progress import SILENT, Reporter
from pipeline.reading import read_dataset, read_features
from pipeline.run_files import measure_and_write
from pipeline.stages.result import StageResult
from pipeline.stages.train_jointly import HISTORY_FILE, RECOMMENDER_FILE, JointSettings
from pipeline.stages.train_recommender import (
    RunSettings,
    by_name,
    feature_label,
    run_identity,
    shown_encoder,
)
from recommenders.models.registry import build_model, model_config

if TYPE_CHECKING:
    from pydantic import JsonValue

    from pipeline.device import DeviceChoice
    from pipeline.store import Artefact, Draft, Store

COSTS = ("train_seconds", "epochs", "best_epoch", "stopped_early", "peak_memory_bytes", "seconds_by_phase")
"""Facts of the training that the run repeats, as a comparison reads them there."""


def measure_joint(
    store: Store,
    encoder: str,
    features: Sequence[str],
    *,
    device: DeviceChoice = "auto",
    reporter: Reporter = SILENT,
    force: bool = False,
) -> StageResult:
    """Measure the recommender that was trained with an encoder, on features of that encoder.

    Args:
        store: Where everything lies.
        encoder: Name, key or folder of the encoder artefact of `train_encoder_jointly`.
        features: Feature artefacts: those of the trained encoder for what was live, and for what was not the
            very ones it was trained beside.
        device: Where the recommender scores.
        reporter: Told what is done.
        force: Measure again although the store has the run.

    Raises:
        ConfigError: The encoder was not trained jointly, or other features belong to it.
    """
    trained = store.get(encoder, "encoder")
    shown = trained.manifest.parameters
    if RECOMMENDER_FILE not in trained.manifest.files:
        raise ConfigError(
            f"{trained.ref} was not trained with a recommender, so that there is none to measure; expected "
            "the encoder artefact of `tandem joint`."
        )
    names = [name for name in JointSettings.model_fields if name != "device"]
    # What an encoder of before a setting existed does not say of it is the default.
    known = {name: shown[name] for name in names if name in shown}
    settings = JointSettings.model_validate(known | {"device": device})
    config = settings.run()
    data = store.get(str(shown["dataset"]), "dataset")
    tables = by_name([store.get(ref, "features") for ref in features], config.model)
    _check_features(store, trained, tables)
    on_device = choose_device(device)
    label = feature_label({name: shown_encoder(artefact) for name, artefact in tables.items()})

    def make(draft: Draft) -> None:
        reporter.say(f"  {config.model} of {trained.slug}, epoch {trained.manifest.facts['best_epoch']}")
        dataset = read_dataset(data)
        read = read_features(tables, dataset.item_ids, config.reading, dataset.split.train)
        table = read.table.to(on_device)
        rng = np.random.default_rng(0)  # every parameter is replaced
        model = build_model(config.model, config.settings, dataset.split.train, table, rng).to(on_device)
        model.load_state_dict(load_file(trained.path(RECOMMENDER_FILE)))
        best_epoch = int(str(trained.manifest.facts["best_epoch"]))
        measure_and_write(
            draft,
            model,
            table,
            data=data,
            dataset=dataset,
            config=config.evaluation,
            monitor=config.training.monitor,
            device=on_device,
            best_epoch=best_epoch,
        )
        shutil.copyfile(trained.path(HISTORY_FILE), draft.path(HISTORY_FILE))
        facts: dict[str, JsonValue] = {name: trained.manifest.facts[name] for name in COSTS}
        draft.record(
            **facts,
            features_read=read.counts,
            feature_seconds=sum(artefact.manifest.seconds for artefact in tables.values()),
            feature_bytes=sum(artefact.manifest.bytes for artefact in tables.values()),
        )

    outcome = store.produce(
        "run",
        slug=f"{config.model}-{label}-seed-{config.seed}".replace(NO_FEATURES * 3, NO_FEATURES),
        identity={**run_identity(data, tables, config, on_device), "trained_with": trained.key},
        inputs=[
            data.as_input("interactions"),
            *(artefact.as_input(name) for name, artefact in tables.items()),
            trained.as_input("encoder"),
        ],
        parameters={
            **RunSettings.model_dump(config, mode="json", exclude={"settings"}),
            "settings": model_config(config.model, config.settings).model_dump(mode="json"),
            "feature_set": label,
            "dataset": data.key,
            "split_fingerprint": data.manifest.facts["split_fingerprint"],
            "joint": {
                name: shown[name] for name in ("encoder", "trained", "tuning", "side", "live", "joint")
            },
        },
        make=make,
        force=force,
    )
    return StageResult.of(outcome)


def _check_features(store: Store, trained: Artefact, tables: Mapping[str, Artefact]) -> None:
    """Refuse features that are neither the trained encoder's nor those it was trained beside."""
    shown = trained.manifest.parameters
    live, before = shown["live_modalities"], shown["features"]
    assert isinstance(live, list)  # noqa: S101 - as train_encoder_jointly wrote them
    assert isinstance(before, dict)  # noqa: S101
    if list(before) != list(tables):
        raise ConfigError(
            f"{trained.ref} was trained on {', '.join(before)}, and {', '.join(tables) or 'nothing'} is "
            "given; name a feature artefact for each."
        )
    info = resolve_encoder(store, stored_spec(trained)).describe()
    for name, artefact in tables.items():
        made_by = artefact.manifest.parameters.get("info")
        weights = made_by.get("weights_sha256") if isinstance(made_by, dict) else None
        if name in live and weights != info.weights_sha256:
            raise ConfigError(
                f"{artefact.ref} was not made by {trained.ref}, whose {name} features the recommender was "
                f"trained on; run tandem extract <dataset> --encoder {stored_spec(trained)} "
                f"--modality {name}."
            )
        if name not in live and artefact.key != before[name]:
            raise ConfigError(
                f"{artefact.ref} is not the {name} features that {trained.ref} was trained beside; name "
                f"features/{str(before[name])[:12]}."
            )
