"""How much memory a training will take, before it starts, and how much there is."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from recommenders.errors import TrainingError
from recommenders.evaluation import EvaluationConfig, block_bytes
from recommenders.feature_input import FeatureTable
from recommenders.models.base import Recommender

_ROW_BYTES = 8
_PAIR_ROWS = 5
"""int64 numbers for each training pair: user, item, the sampler's key, and the order of an epoch twice."""
_MOMENTS = {"adam": 2, "adamw": 2, "sgd": 0}
_CONTROL_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of tensors at the peak of a training, right to within a factor of 2; libraries come on top."""

    parts: dict[str, int]
    """What they are for; the peak has all of them but the smaller one of ``step`` and ``evaluation``."""

    @property
    def peak_bytes(self) -> int:
        """At the peak, all that exists before the training included."""
        lasting = sum(n_bytes for name, n_bytes in self.parts.items() if name not in {"step", "evaluation"})
        return lasting + max(self.parts["step"], self.parts["evaluation"])

    @property
    def to_come_bytes(self) -> int:
        """At the peak, without what exists before the training: model, graphs and features."""
        return self.peak_bytes - sum(self.parts[name] for name in ("parameters", "graphs", "features"))

    def described(self) -> str:
        """Say it in one line, the largest parts first."""
        largest = sorted(self.parts.items(), key=lambda part: -part[1])[:4]
        of_what = ", ".join(f"{name} {_mb(n_bytes)} MB" for name, n_bytes in largest)
        return f"training is estimated to need {_mb(self.to_come_bytes)} MB of memory (largest: {of_what})"


def estimate_memory(
    model: Recommender,
    features: FeatureTable,
    *,
    n_pairs: int,
    n_users_measured: int,
    batch_size: int,
    n_negatives: int,
    optimizer: str,
    evaluation: EvaluationConfig,
) -> MemoryEstimate:
    """Estimate the memory of a training from shapes alone.

    Args:
        model: As it will be trained; ``working_bytes`` says what a step of it takes.
        features: As it will be given.
        n_pairs: Training pairs.
        n_users_measured: Users with validation pairs.
        batch_size: Pairs of a step.
        n_negatives: Negatives of each pair, candidates included.
        optimizer: adam, adamw or sgd.
        evaluation: Whose blocks of scores are the evaluation's memory.
    """
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    learnt = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    block = block_bytes(evaluation, model.n_items, n_users_measured)
    return MemoryEstimate(
        {
            "parameters": parameters,
            "graphs": sum(map(_bytes, model.buffers())),
            "features": sum(map(_bytes, [*features.vectors.values(), *features.present.values()])),
            "training pairs": n_pairs * _PAIR_ROWS * _ROW_BYTES,
            "gradients": learnt,
            "optimizer": _MOMENTS[optimizer] * learnt,
            "best state": sum(map(_bytes, model.state_dict().values())),
            "step": model.working_bytes(min(batch_size, n_pairs), n_negatives),
            "evaluation": block + parameters,
        }
    )


def check_memory(estimate: MemoryEstimate, available: int) -> None:
    """Refuse a training that does not fit.

    Raises:
        TrainingError: It needs more than is available; the message says for what.
    """
    if estimate.to_come_bytes <= available:
        return
    raise TrainingError(
        f"This {estimate.described()}, and {_mb(available)} MB are free. Lower training.batch_size, "
        "evaluation.block_mb or the model's dim, or set training.check_memory to false to try all the same."
    )


def available_bytes(device: torch.device, control_group: Path = _CONTROL_GROUP) -> int:
    """Return the memory that this process can still get: of the GPU, or of the machine and its container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + unused)
    of_machine = int(psutil.virtual_memory().available)
    return min([of_machine, *_left_in(control_group)])


def _left_in(control_group: Path) -> Iterable[int]:
    """What a container's limit leaves, where there is one; files it has cached can be given back."""
    with suppress(OSError, ValueError):  # no control group of version 2, or the limit is "max"
        limit = int((control_group / "memory.max").read_text(encoding="ascii"))
        used = int((control_group / "memory.current").read_text(encoding="ascii"))
        statistics = (control_group / "memory.stat").read_text(encoding="ascii").split()
        cached = int(statistics[statistics.index("inactive_file") + 1])
        yield max(limit - used + cached, 0)


def _bytes(tensor: Tensor) -> int:
    """Size of a tensor's numbers, and of a sparse one's row starts and columns."""
    if tensor.layout == torch.sparse_csr:
        return sum(part.nbytes for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values()))
    if tensor.layout == torch.sparse_coo:
        whole = tensor.coalesce()
        return whole.indices().nbytes + whole.values().nbytes
    return tensor.nbytes


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f}"
