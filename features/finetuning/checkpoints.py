"""The state of a fine-tuning on disk: one safetensors file, written whole, checked when read."""

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

from features.errors import FeatureError

FILE_NAME = "finetuning.safetensors"
_FORMAT = "tandem-finetuning-1"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Tensors by name, and the facts that are no tensors."""

    tensors: dict[str, Tensor]
    facts: dict[str, JsonValue]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below ``prefix/``, without it."""
        start = f"{prefix}/"
        return {
            name.removeprefix(start): value
            for name, value in self.tensors.items()
            if name[: len(start)] == start
        }


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the folder's checkpoint in one step: killed at any moment, there is the old or the new one."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in checkpoint.tensors.items()}
    header = {"format": _FORMAT, "crc32": str(_crc32(tensors)), "facts": json.dumps(checkpoint.facts)}
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{FILE_NAME}.unfinished"
    save_file(tensors, unfinished, metadata=header)
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())  # or the rename may reach the disk before the bytes do
    unfinished.replace(folder / FILE_NAME)


def read_checkpoint(folder: Path, identity: Mapping[str, str]) -> Checkpoint | None:
    """The folder's checkpoint, on the CPU; None where there is none.

    Args:
        folder: Where it was written.
        identity: What decides how this fine-tuning goes, as it was put under ``identity`` of the facts.

    Raises:
        FeatureError: It is damaged, or of another fine-tuning; the message names what differs.
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
    facts: dict[str, JsonValue] = json.loads(header["facts"])
    found = facts["identity"]
    theirs = found if isinstance(found, dict) else {}
    different = [name for name in identity if theirs.get(name) != identity[name]]
    if different:
        raise _unusable(path, f"belongs to a fine-tuning with other {', '.join(different)}")
    return Checkpoint(tensors, facts)


def _unusable(path: Path, what: str) -> FeatureError:
    return FeatureError(
        f"{path} {what}; expected the checkpoint of this very fine-tuning. Delete the file to begin anew, or "
        "hand in another folder."
    )


def _crc32(tensors: Mapping[str, Tensor]) -> int:
    """Checksum over the bytes of all tensors, in the order of their names."""
    checksum = 0
    for name in sorted(tensors):
        flat = tensors[name].reshape(-1).view(torch.uint8)  # reshape: a scalar has no bytes to view
        checksum = zlib.crc32(flat.numpy().data, checksum)
    return checksum
