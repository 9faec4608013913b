"""One joint training as each process does it: from artefacts to a trained encoder and recommender."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from features.catalogue import TextConfig
from features.live.building import live_encoder
from features.tuning.modes import Tuned, prepare_tuning
from features.tuning.side_mode import SideTuned, prepare_side
from pipeline.reading import read_catalogue, read_features, read_for_choosing
from pipeline.stages.extract_features import encoder_label
from pipeline.stages.keep_states import open_states
from recommenders.joint import JointInput, train_jointly
from recommenders.live import LiveTable
from recommenders.models.registry import build_model

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from features.catalogue import Modality
    from pipeline.encoder_specs import ResolvedEncoder
    from pipeline.progress import Reporter
    from pipeline.stages.train_jointly import JointSettings
    from pipeline.store import Artefact
    from recommenders.peers import AcceleratePeers
    from recommenders.training_settings import HistoryRow, TrainingResult


@dataclass(frozen=True)
class JointWork:
    """What is trained on what. It can be pickled: another process opens the same artefacts."""

    data: Artefact
    """The dataset."""
    tables: Mapping[str, Artefact]
    """Name in the feature table -> features."""
    kept: Mapping[Modality, Artefact]
    """States of what stays frozen."""
    config: JointSettings
    chosen: ResolvedEncoder
    live: tuple[Modality, ...]
    device: torch.device
    label: str
    """What the trained encoder will be called."""
    scratch: Path
    """Where the checkpoint is kept."""


@dataclass(frozen=True)
class JointlyTrained:
    """What a joint training leaves, at the epoch that validation chose."""

    tuned: Tuned | SideTuned
    """The encoder, not yet in plain form."""
    recommender: dict[str, Tensor]
    """The recommender's parameters, on the CPU."""
    result: TrainingResult
    n_trained: int
    """Parameters of the encoder that were trained."""


def text_of(tables: Mapping[str, Artefact], live: tuple[Modality, ...]) -> TextConfig:
    """Which text was encoded, where texts are live."""
    if "text" not in live:
        return TextConfig()
    return TextConfig.model_validate(tables["text"].manifest.parameters["text"])


def tuned_encoder(work: JointWork, device: torch.device) -> Tuned | SideTuned:
    """Load the encoder that is to be trained, with all that training puts into it; the same every time."""
    encoder = work.chosen.load(device=device)
    if work.config.trained == "encoder":
        return prepare_tuning(encoder, work.config.tuning, seed=work.config.seed)
    return prepare_side(encoder, work.config.side, seed=work.config.seed)


def train(
    work: JointWork, reporter: Reporter, *, live_folder: Path, peers: AcceleratePeers | None = None
) -> JointlyTrained:
    """Train in this process, alone or as one of several; stopped, it goes on from the checkpoint.

    Args:
        work: What is trained on what.
        reporter: Told of epochs.
        live_folder: Where this process keeps decoded pictures meanwhile.
        peers: The processes that share the encoding, this one among them, which then trains on its device.

    Raises:
        EncoderError: The encoder cannot be tuned so.
        FeatureError: The features or states cannot be read.
        TrainingError: The recommender cannot be trained so.
    """
    config = work.config
    device = work.device if peers is None else peers.device
    pairs = read_for_choosing(work.data)
    read = read_features(work.tables, pairs.item_ids, config.reading, pairs.train)
    table = read.table.to(device)
    tuned = tuned_encoder(work, device)
    init_rng, training_rng = np.random.default_rng(config.seed).spawn(2)
    model = build_model(config.model, config.settings, pairs.train, table, init_rng).to(device)
    name = f"{config.model} with {encoder_label(work.chosen.spec, tuned.encoder.info)} seed {config.seed}"
    share_mb = config.live.pixel_cache_mb // (1 if peers is None else peers.n_processes)
    with (
        reporter.progress(f"states of {work.label}") as states_progress,
        live_encoder(
            tuned,
            read_catalogue(work.data),
            work.live,
            table.present,
            config.live.model_copy(update={"pixel_cache_mb": share_mb}),
            folder=live_folder,
            text=text_of(work.tables, work.live),
            states={modality: open_states(states, pairs.item_ids) for modality, states in work.kept.items()},
            progress=states_progress,
        ) as rows,
        reporter.progress(name) as progress,
    ):
        live = LiveTable(table, rows, lambda modality, raw: read.transforms[modality].map_rows(raw), peers)
        result = train_jointly(
            model,
            pairs.train,
            pairs.valid,
            JointInput(live, rows, config.joint, writes=peers is None or peers.rank == 0),
            config.training,
            evaluation=config.evaluation,
            rng=training_rng,
            checkpoint_folder=work.scratch,
            progress=progress,
            watch=_told(reporter, config.training.monitor),
        )
        n_trained = sum(parameter.numel() for parameter in rows.parameters())
    state = {key: value.contiguous().cpu() for key, value in model.state_dict().items()}
    return JointlyTrained(tuned, state, result, n_trained)


def _told(reporter: Reporter, monitor: str) -> Callable[[HistoryRow], bool]:
    """Say how each epoch went; those before a kill are said again when it goes on."""
    shown = ("loss", "gradient_norm_", f"valid_{monitor}")

    def tell(row: HistoryRow) -> bool:
        figures = [f"{name.replace('_', ' ')} {row[name]:.4g}" for name in row if name.startswith(shown)]
        reporter.say(f"  epoch {row['epoch']:g}: {', '.join(figures)}")
        return False  # never ends the training

    return tell
