"""What several tests of encoders are handed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from features.encoders import clip_specs
from features.encoders.clip import build_clip
from tests.features.small_clip import N_HEADS, VISION


@pytest.fixture
def small_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every architecture keeps its name, its tags and its activation, and shrinks to two narrow layers."""
    real = clip_specs.architecture_config

    def shrunken(architecture: str) -> dict[str, Any]:
        config = real(architecture)
        vision, text = config["vision_cfg"], config["text_cfg"]
        size = {"image_size": 4 * vision.get("patch_size", 16), "patch_size": vision.get("patch_size", 16)}
        config |= {
            "embed_dim": 12,
            "vision_cfg": VISION | size,
            "text_cfg": text | {"width": 16, "heads": N_HEADS},
        }
        config["text_cfg"]["layers"] = 2
        return config

    monkeypatch.setattr(clip_specs, "architecture_config", shrunken)


@pytest.fixture
def save_weights(tmp_path: Path) -> Callable[..., Path]:
    """Write seeded weights of an architecture's layout into a file."""

    def save(config: dict[str, Any], name: str = "weights.safetensors") -> Path:
        torch.manual_seed(0)
        weights = build_clip(config).state_dict()
        for tensor in weights.values():
            tensor.mul_(3)  # far enough from 0 for the activations to differ
        path = tmp_path / name
        if name.endswith(".safetensors"):
            save_file(weights, path)
        else:
            torch.save(weights, path)
        return path

    return save
