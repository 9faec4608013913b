"""The side networks of a saved encoder, in files of their own beside the encoder that they read.

| file | holds |
|---|---|
| `side.json` | format, settings, and for each tower the widths of the states it reads and of its vectors |
| `side.safetensors` | weights of all side networks |
"""

from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, PositiveInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from features.catalogue import Modality
from features.encoders.base import Encoder
from features.encoders.side import SideEncoder
from features.errors import EncoderError
from features.tuning.side import SideConfig, SideTower

FORMAT = 1
SIDE_FILE, WEIGHTS_FILE = "side.json", "side.safetensors"


class SavedTower(BaseModel, frozen=True, extra="forbid"):
    """The shape of one side network."""

    widths: tuple[PositiveInt, ...]
    dim: PositiveInt


class SavedSides(BaseModel, frozen=True, extra="forbid"):
    """What `side.json` holds."""

    format: Literal[1]
    config: SideConfig
    towers: dict[Modality, SavedTower]


def write_sides(encoder: SideEncoder, folder: Path) -> None:
    """Write both files into a folder that is there."""
    towers: dict[Modality, SavedTower] = {}
    for modality in encoder.info.modalities:
        side = encoder.side(modality)
        if side is not None:
            towers[modality] = SavedTower(widths=side.widths, dim=side.dim)
    described = SavedSides(format=FORMAT, config=encoder.config, towers=towers)
    (folder / SIDE_FILE).write_text(described.model_dump_json(indent=2) + "\n", encoding="utf-8")
    weights = encoder.sides.state_dict()
    save_file(
        {name: value.detach().cpu().clone().contiguous() for name, value in weights.items()},
        folder / WEIGHTS_FILE,
    )


def read_sides(inner: Encoder, folder: Path) -> SideEncoder:
    """Put the side networks of a folder beside the encoder they were trained with.

    Raises:
        EncoderError: The files are damaged, of a newer version, or of another encoder's side networks.
    """
    try:
        saved = SavedSides.model_validate_json((folder / SIDE_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise EncoderError(
            f"{str(folder / SIDE_FILE)!r} describes no side networks of format {FORMAT} "
            f"({str(error).splitlines()[0]}); copy the folder again, or upgrade."
        ) from error
    with torch.random.fork_rng(devices=[]):  # modules draw weights when they are made
        sides = {
            modality: SideTower(tower.widths, tower.dim, saved.config)
            for modality, tower in saved.towers.items()
        }
    encoder = SideEncoder(inner, sides, saved.config)
    try:
        encoder.sides.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise EncoderError(
            f"the weights in {str(folder / WEIGHTS_FILE)!r} do not fit ({reason}); copy the folder again."
        ) from error
    encoder.update_info()
    return encoder.eval()
