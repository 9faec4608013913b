"""Stage: features and the encoder behind them in, the encoder trained together with a recommender out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, cast

import torch
from pydantic import Field, PositiveInt
from safetensors.torch import save_file

from features.catalogue import Modality, TextConfig
from features.live.building import LiveConfig
from features.live.keeping import blocks_above
from features.tuning.modes import TuningConfig
from features.tuning.side import SideConfig
from pipeline.device import choose_device
from pipeline.encoder_specs import resolve_encoder, store_encoder
from pipeline.errors import ConfigError
from pipeline.joint_work import JointlyTrained, JointWork, text_of, train
from pipeline.joint_workers import check_processes, train_in_processes
from pipeline.manifest import artefact_key
from pipeline.peak_memory import forget_peak_memory, peak_memory
from pipeline.progress import SILENT, Reporter
from pipeline.reading import read_catalogue
from pipeline.stages.extract_features import encoder_label
from pipeline.stages.keep_states import StatesConfig, keep_encoder_states, states_identity
from pipeline.stages.result import StageResult
from pipeline.stages.train_recommender import (
    RunSettings,
    by_name,
    run_identity,
    shown_encoder,
)
from recommenders.joint import JointConfig
from recommenders.models.registry import model_config

if TYPE_CHECKING:
    from pydantic import JsonValue

    from features.encoders.base import EncoderInfo
    from pipeline.store import Artefact, Draft, Store

HISTORY_FILE = "history.parquet"
RECOMMENDER_FILE = "recommender.safetensors"
"""The recommender's parameters at the chosen epoch, in the encoder's folder; `measure_joint` reads them."""
LIVE_MODALITIES = ("image", "text")


class JointSettings(RunSettings, frozen=True, extra="forbid"):
    """One recommender with one seed, and the encoder that is trained with it."""

    model: str = Field("freedom", description="Name of the recommender, one that reads features.")
    encoder: str = Field("tiny", description="Specification of the encoder, as listed by `tandem encoders`.")
    tuning: TuningConfig = Field(default_factory=TuningConfig)
    side: SideConfig = Field(default_factory=SideConfig)
    trained: Literal["encoder", "side"] = Field(
        "encoder",
        description="encoder: the encoder, as `tuning` says; side: networks on its kept states, as `side` "
        "says, while it stays as it is.",
    )
    live: LiveConfig = Field(default_factory=LiveConfig)
    joint: JointConfig = Field(default_factory=JointConfig)
    processes: PositiveInt = Field(
        1, description="Processes that share the encoding of each step; with GPUs one each."
    )

    def run(self) -> RunSettings:
        """Return the recommender's settings alone."""
        return RunSettings.model_validate({name: getattr(self, name) for name in RunSettings.model_fields})


def train_encoder_jointly(
    store: Store,
    dataset: str,
    features: Sequence[str],
    config: JointSettings,
    *,
    reporter: Reporter = SILENT,
    force: bool = False,
) -> StageResult:
    """Train an encoder and a recommender together, and keep the encoder at the epoch validation chose.

    Stopped or killed, the same call goes on from the last whole epoch. The test part is not read; the
    recommender is measured by `measure_joint`, on features that the trained encoder has extracted. States of
    what stays frozen are found in the store, or made for it.

    Args:
        store: Where everything lies.
        dataset: Name, key or folder of a dataset artefact.
        features: Feature artefacts to start from. Those made by the encoder, of images and texts, become
            live; others stay as they are.
        config: Encoder, recommender, how each is trained, and the seed.
        reporter: Told of epochs.
        force: Train again although the store has the encoder.

    Raises:
        ConfigError: No feature artefact was made by this encoder, reading fuses what has to stay apart, or
            there are fewer GPUs than processes.
        EncoderError: The encoder cannot be had, tuned so, or saved.
        TrainingError: The recommender cannot be trained so, or one of several processes was killed.
    """
    data = store.get(dataset, "dataset")
    tables = by_name([store.get(ref, "features") for ref in features], config.model)
    chosen = resolve_encoder(store, config.encoder)
    config = config.model_copy(update={"encoder": chosen.spec})
    info = chosen.describe()
    live = live_names(tables, info, config)
    device = choose_device(config.device)
    check_processes(config.processes, device)
    label = joint_label(encoder_label(chosen.spec, info), config.model)
    wanted = {modality: states_wanted(config, modality, text_of(tables, live)) for modality in live}
    asked = {modality: states for modality, states in wanted.items() if states is not None}
    identity = _identity(data, tables, config, info=info, device=device, asked=asked)
    if not force and (found := store.find("encoder", artefact_key("encoder", identity))) is not None:
        return StageResult.reusing(found)  # without making states that nobody would read
    kept = {
        modality: keep_encoder_states(store, data.key, states, reporter=reporter).artefact
        for modality, states in asked.items()
    }

    def make(draft: Draft) -> None:
        work = JointWork(
            data=data,
            tables=tables,
            kept=kept,
            config=config,
            chosen=chosen,
            live=live,
            device=device,
            label=label,
            scratch=draft.scratch,
        )
        trained, took = _train(work, reporter)
        _keep(draft, work, trained, took)

    outcome = store.produce(
        "encoder",
        slug=f"{label}-seed-{config.seed}",
        identity=identity,
        inputs=[
            data.as_input("interactions"),
            *(artefact.as_input(name) for name, artefact in tables.items()),
            *(artefact.as_input(f"{modality} states") for modality, artefact in kept.items()),
            *chosen.inputs,
        ],
        parameters={
            **config.model_dump(mode="json", exclude={"settings", "device"}),
            "settings": model_config(config.model, config.settings).model_dump(mode="json"),
            "label": label,
            "live_modalities": list(live),
            "dataset": data.key,
            "features": {name: artefact.key for name, artefact in tables.items()},
        },
        make=make,
        resumable=True,
        force=force,
    )
    return StageResult.of(outcome)


def states_wanted(config: JointSettings, modality: Modality, text: TextConfig) -> StatesConfig | None:
    """Which states of the encoder one modality is trained on, if any.

    Args:
        config: Of the joint training.
        modality: Image or text.
        text: Which text is encoded.
    """
    if modality == "fused" or not config.live.keep_states:
        return None
    which: dict[str, object]
    if config.trained == "side":
        if config.side.towers and modality not in config.side.towers:
            return None
        which = {"above": None, "every_nth": config.side.every_nth, "dtype": config.live.side_states}
    else:
        above = blocks_above(config.tuning, modality)
        if above is None:
            return None
        which = {"above": above}
    if modality == "text":
        which["text"] = text
    shared = {name: getattr(config.live, name) for name in ("chunk", "limits", "n_workers")}
    what = {"encoder": config.encoder, "modality": modality, "device": config.device}
    return StatesConfig.model_validate({**what, **which, **shared})


def joint_label(encoder: str, model: str) -> str:
    """What an encoder that was trained with a recommender is called."""
    return f"{encoder}-joint-{model}"


def live_names(
    tables: Mapping[str, Artefact], info: EncoderInfo, config: JointSettings
) -> tuple[Modality, ...]:
    """Names of the tables whose rows the encoder makes, and keeps making.

    Raises:
        ConfigError: There are none, they are of different texts, or reading fuses modalities.
    """
    if config.reading.fuse != "none":
        raise ConfigError(
            f"reading.fuse is {config.reading.fuse!r}; in joint training each modality stays a table of its "
            "own, whose rows are encoded anew. Set it to none; the recommender joins them."
        )
    live = []
    for name in LIVE_MODALITIES:
        made_by = tables[name].manifest.parameters.get("info") if name in tables else None
        if isinstance(made_by, dict) and all(
            made_by.get(part) == getattr(info, part) for part in ("weights_sha256", "preprocessing_sha256")
        ):
            live.append(name)
    if not live:
        made = ", ".join(f"{name} by {shown_encoder(artefact)}" for name, artefact in tables.items())
        raise ConfigError(
            f"{config.encoder} made none of the features ({made or 'there are none'}), so that nothing would "
            f"be trained. Extract them first: tandem extract <dataset> --encoder {config.encoder} "
            "--modality image."
        )
    return cast("tuple[Modality, ...]", tuple(live))


def _identity(
    data: Artefact,
    tables: Mapping[str, Artefact],
    config: JointSettings,
    *,
    info: EncoderInfo,
    device: torch.device,
    asked: Mapping[Modality, StatesConfig],
) -> dict[str, JsonValue]:
    """All that can change the encoder."""
    identity: dict[str, JsonValue] = {
        **run_identity(data, tables, config.run(), device),
        "encoder": {"weights": info.weights_sha256, "preprocessing": info.preprocessing_sha256},
        **(
            {"tuning": config.tuning.model_dump(mode="json")}
            if config.trained == "encoder"
            else {"side": config.side.model_dump(mode="json")}
        ),
        "live": config.live.model_dump(
            mode="json", include={"chunk", "precision", "keep_states", "side_states"}
        ),
        "joint": config.joint.model_dump(mode="json"),
    }
    if config.processes > 1:
        # Shares of a step add up in another order, so that last digits differ, as with another live.chunk.
        # One process is left out: encoders that were trained before there were several keep their keys.
        identity["processes"] = config.processes
    if asked:
        catalogue = read_catalogue(data)
        identity["states"] = {
            modality: artefact_key("states", states_identity(catalogue, states, info))
            for modality, states in asked.items()
        }
    return identity


def _train(work: JointWork, reporter: Reporter) -> tuple[JointlyTrained, dict[str, JsonValue]]:
    """Train in as many processes as asked for; return what was trained, and what it took."""
    forget_peak_memory(work.device)
    started = time.perf_counter()
    if work.config.processes == 1:
        trained = train(work, reporter, live_folder=work.scratch / "live")
        peak = peak_memory(work.device)
    else:
        trained, peak = train_in_processes(work, work.config.processes, reporter)
    trained.tuned.finish()
    seconds = time.perf_counter() - started
    return trained, {
        "train_seconds": seconds,
        "peak_memory_bytes": peak,
        "processes": work.config.processes,
    }


def _keep(draft: Draft, work: JointWork, trained: JointlyTrained, took: Mapping[str, JsonValue]) -> None:
    """Fill the draft: the encoder in plain form, the recommender's parameters, the history, the facts."""
    config, result = work.config, trained.result
    store_encoder(
        draft,
        trained.tuned.encoder.cpu(),
        name=work.label,
        provenance={
            "made_by": "joint-training",
            "encoder": config.encoder,
            "recommender": config.model,
            "dataset": work.data.key,
            "seed": config.seed,
            "best_epoch": result.best_epoch,
        },
    )
    save_file(trained.recommender, draft.path(RECOMMENDER_FILE))
    result.history_frame().write_parquet(draft.path(HISTORY_FILE))
    monitor = config.training.monitor
    best = result.history[result.best_epoch - 1][f"valid_{monitor}"] if result.best_epoch else None
    draft.record(
        **took,
        epochs=len(result.history),
        best_epoch=result.best_epoch,
        stopped_early=result.stopped_early,
        resumed_after=result.resumed_after,
        seconds_by_phase=dict(result.seconds),
        states_seconds=sum(states.manifest.seconds for states in work.kept.values()),
        states_bytes=sum(states.manifest.bytes for states in work.kept.values()),
        n_trained=trained.n_trained,
        summary={
            "best epoch": result.best_epoch,
            "of which frozen": config.joint.warmup_epochs,
            f"valid {monitor}": best,
        },
    )
