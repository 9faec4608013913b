"""What one run needed, from nothing to a measured recommender: time, memory, disk, and on which device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.paradigms.way import SeedRun

if TYPE_CHECKING:
    from pydantic import JsonValue

    from pipeline.store import Artefact


@dataclass(frozen=True)
class Costs:
    """Of one run; of a row the means over its seeds, and the highest peak.

    What several runs share, such as features or a search, counts whole for each of them.
    """

    encode_s: float
    """Seconds of encoding: of all features read, of those that joint training started from, and of states."""
    tune_s: float
    """Seconds in which the encoder was trained: fine-tuning, or joint training."""
    train_s: float
    """Seconds in which the recommender was trained; 0 where joint training trained it."""
    search_s: float
    """Seconds of the search that chose the settings; 0 where there was none."""
    peak_bytes: float
    """Peak memory of encoding and training: of the GPU's tensors where there is one, else of the process."""
    stored_bytes: float
    """Bytes in the store: features, and the encoder where it was trained here, with the states below it."""
    device: str
    """What trained the recommender: the GPU's name, or the processor's."""

    @property
    def seconds(self) -> float:
        """All of them; on a GPU these are GPU-seconds."""
        return self.encode_s + self.tune_s + self.train_s + self.search_s


def costs_of(runs: Sequence[SeedRun]) -> Costs:
    """Return the costs of one run of a row: means over the seeds, the highest peak."""
    each = [_of_run(one) for one in runs]
    return Costs(
        encode_s=float(np.mean([one.encode_s for one in each])),
        tune_s=float(np.mean([one.tune_s for one in each])),
        train_s=float(np.mean([one.train_s for one in each])),
        search_s=float(np.mean([one.search_s for one in each])),
        peak_bytes=max(one.peak_bytes for one in each),
        stored_bytes=float(np.mean([one.stored_bytes for one in each])),
        device=", ".join(dict.fromkeys(one.device for one in each)),
    )


def _of_run(one: SeedRun) -> Costs:
    encoded = (*one.features.before, *one.features.states, *one.features.made)
    read = [stage.artefact for stage in encoded]
    run = one.run.artefact
    trained = one.features.encoder
    kept = [*read]
    tune_s = 0.0
    peaks = [_fact(artefact, "peak_memory_bytes") for artefact in (run, *read)]
    if trained is not None:
        kept.append(trained.artefact)
        tune_s = _fact(trained.artefact, "finetune_seconds" if not one.features.before else "train_seconds")
        peaks.append(_fact(trained.artefact, "peak_memory_bytes"))
    return Costs(
        encode_s=sum(artefact.manifest.seconds for artefact in read),
        tune_s=tune_s,
        # A joint run repeats the seconds of the training that made its encoder, too.
        train_s=0.0 if one.features.before else _fact(run, "train_seconds"),
        search_s=_fact(one.search.artefact, "trial_seconds") if one.search is not None else 0.0,
        peak_bytes=max(peaks),
        stored_bytes=sum(artefact.manifest.bytes for artefact in kept),
        device=_device(run),
    )


def _fact(artefact: Artefact, name: str) -> float:
    value: JsonValue = artefact.manifest.facts.get(name, 0.0)
    return float(value) if isinstance(value, int | float) else 0.0


def _device(run: Artefact) -> str:
    hardware = run.manifest.hardware
    if run.manifest.identity.get("device") == "cuda":
        return hardware.gpus[0] if hardware.gpus else "GPU"
    return f"CPU ({hardware.cpu})"
