"""Checkpoints of a training: one safetensors file, written whole, checked when read, without pickle."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import JsonValue
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from recommenders.errors import TrainingError

FILE_NAME = "checkpoint.safetensors"
_FORMAT = "tandem-training-1"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Tensors by name, and the facts that are no tensors."""

    tensors: dict[str, Tensor]
    facts: dict[str, JsonValue]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors below ``prefix.``, without it."""
        start = f"{prefix}."
        return {
            name.removeprefix(start): self.tensors[name] for name in self.tensors if name.startswith(start)
        }


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under names that ``Checkpoint.part`` finds."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return what an optimiser remembers of its parameters, under ``position.name``."""
    states = optimizer.state_dict()["state"]
    return {
        f"{position}.{name}": value
        for position, state in states.items()
        for name, value in state.items()
        if value is not None
    }


def load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take over ``optimizer_tensors`` of one over the same parameters; its settings stay."""
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        position, name = key.split(".")
        states.setdefault(int(position), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": states})


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the folder's checkpoint in one step: killed at any moment, there is the old or the new one.

    The facts are JSON in the file's header, with a checksum of the tensors' bytes.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    header = {"format": _FORMAT, "crc32": str(_crc32(tensors)), "facts": json.dumps(checkpoint.facts)}
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{FILE_NAME}.unfinished"
    save_file(tensors, unfinished, metadata=header)
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())  # or the rename may reach the disk before the bytes do
    unfinished.replace(folder / FILE_NAME)


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the folder's checkpoint with its tensors on the CPU, or None where there is none.

    Raises:
        TrainingError: The file is not a checkpoint of this format, or its bytes were damaged.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise _unusable(path, f"cannot be read ({error})") from error
    if header.get("format") != _FORMAT:
        raise _unusable(path, f"has format {header.get('format')!r}")
    if header["crc32"] != str(_crc32(tensors)):
        raise _unusable(path, "has tensors that do not match their checksum")
    return Checkpoint(tensors, json.loads(header["facts"]))


def delete_checkpoint(folder: Path) -> None:
    """Remove the folder's checkpoint, if there is one, once what was trained is kept elsewhere."""
    (folder / FILE_NAME).unlink(missing_ok=True)


def check_same_training(folder: Path, found: JsonValue, expected: Mapping[str, str]) -> None:
    """Refuse a checkpoint that another training left in the folder.

    Args:
        folder: Where the checkpoint was found.
        found: The identity in the checkpoint: a name to a digest, as ``expected``.
        expected: The identity of the training that wants to go on.

    Raises:
        TrainingError: They differ; the message names the parts that do.
    """
    theirs = found if isinstance(found, dict) else {}
    different = [name for name in expected if theirs.get(name) != expected[name]]
    if different:
        raise _unusable(folder / FILE_NAME, f"belongs to a training with other {', '.join(different)}")


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's numbers as bytes, without a copy where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)  # reshape: a scalar cannot be viewed as bytes
    return flat.view(torch.uint8).numpy().data


def _unusable(path: Path, what: str) -> TrainingError:
    return TrainingError(
        f"{path} {what}; expected the checkpoint of this very training. "
        "Delete the file to train from the first epoch, or hand in another folder."
    )


def _crc32(tensors: Mapping[str, Tensor]) -> int:
    """Checksum the bytes of all tensors in the order of their names."""
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(bytes_of(tensors[name]), checksum)
    return checksum
