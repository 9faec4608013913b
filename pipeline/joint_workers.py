"""A joint training by several processes of this machine, each of which encodes a share of every step."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import torch

from pipeline.errors import ConfigError
from pipeline.joint_work import JointlyTrained, JointWork, train, tuned_encoder
from pipeline.peak_memory import forget_peak_memory, peak_memory
from pipeline.together import Place, work_together
from recommenders.checkpoints import Checkpoint, read_checkpoint, with_prefix, write_checkpoint
from recommenders.peers import join_peers
from recommenders.training_settings import TrainingResult

if TYPE_CHECKING:
    from pipeline.progress import Reporter

FOLDER_PREFIX = "processes-"
"""Of the folder in scratch where processes meet, keep decoded pictures and leave their result."""


def check_processes(n_processes: int, device: torch.device) -> None:
    """Refuse what cannot be started.

    Raises:
        ConfigError: More processes than GPUs, where the device is a GPU.
    """
    if n_processes == 1 or device.type != "cuda":
        return
    n_gpus = torch.cuda.device_count()
    if n_processes > n_gpus:
        raise ConfigError(
            f"processes is {n_processes} on GPUs, and torch sees {n_gpus} of them; each process "
            f"needs one of its own. Set processes to {n_gpus} or fewer, or device to cpu."
        )


def train_in_processes(work: JointWork, n_processes: int, reporter: Reporter) -> tuple[JointlyTrained, int]:
    """Train in several new processes; stopped, the same call goes on from the checkpoint in scratch.

    Args:
        work: What is trained on what.
        n_processes: How many; with GPUs each has its own.
        reporter: Told of epochs.

    Returns:
        What was trained, the encoder on the CPU; and the peak memory of process 0 in bytes, on its GPU where
        there is one.

    Raises:
        TrainingError: A process was killed.
        Exception: What a process raised; see ``joint_work.train``.
    """
    for left in work.scratch.glob(f"{FOLDER_PREFIX}*"):  # by a training that was killed
        shutil.rmtree(left, ignore_errors=True)
    if work.device.type == "cuda":
        torch.cuda.empty_cache()  # process 0 has the same GPU
    with TemporaryDirectory(dir=work.scratch, prefix=FOLDER_PREFIX) as folder:
        work_together(_Share(work, Path(folder)), n_processes, reporter)
        found = read_checkpoint(Path(folder) / "result")
    if found is None:
        raise RuntimeError("process 0 ended without a result.")
    tuned = tuned_encoder(work, torch.device("cpu"))
    tuned.load_state(found.part("encoder"))
    facts = cast("dict[str, Any]", found.facts)  # as _Share wrote them
    result = TrainingResult(**facts["result"])
    return JointlyTrained(tuned, found.part("recommender"), result, facts["n_trained"]), facts["peak_bytes"]


@dataclass(frozen=True)
class _Share:
    """What each process does; process 0 writes the result."""

    work: JointWork
    folder: Path

    def __call__(self, place: Place, reporter: Reporter) -> None:
        """Train with the others."""
        cpu = self.work.device.type == "cpu"
        peers = join_peers(place.rank, place.n_processes, self.folder / "meeting", cpu=cpu)
        forget_peak_memory(peers.device)
        trained = train(self.work, reporter, live_folder=self.folder / f"live-{place.rank}", peers=peers)
        if place.rank == 0:
            tensors = with_prefix("encoder", trained.tuned.state())
            tensors |= with_prefix("recommender", trained.recommender)
            facts: dict[str, Any] = {
                "result": asdict(trained.result),
                "n_trained": trained.n_trained,
                "peak_bytes": peak_memory(peers.device),
            }
            write_checkpoint(self.folder / "result", Checkpoint(tensors, facts))
        torch.distributed.destroy_process_group()
