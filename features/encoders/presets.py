"""Short names for exact specifications, with what a person wants to know before choosing one."""

from functools import cache
from pathlib import Path

import yaml
from pydantic import BaseModel, Field, NonNegativeInt, TypeAdapter

from features.catalogue import Modality


class Preset(BaseModel, frozen=True, extra="forbid"):
    """One encoder under a short name."""

    spec: str = Field(description="What the name stands for.")
    modalities: tuple[Modality, ...]
    dim: NonNegativeInt = Field(description="Length of a vector; 0: of the file's.")
    image_size_px: NonNegativeInt = Field(0, description="0: sees no pictures.")
    context_length: NonNegativeInt = Field(0, description="Tokens read; 0: reads no texts.")
    licence: str = Field(description="Of the weights, as their source states it.")
    source: str = Field(description="Who published the weights, where.")
    use: str = Field(description="What it is good for, in a few words.")


@cache
def presets() -> dict[str, Preset]:
    """Name -> preset, in the order of the file."""
    text = Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8")
    return TypeAdapter(dict[str, Preset]).validate_python(yaml.safe_load(text))
