"""Small random models in the layout of timm's repositories, for the tests of its family."""

import json
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file

from tests.features.small_transformers import scaled

FACTS: dict[str, Any] = {
    "input_size": [3, 32, 32],
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 0.25],
    "num_classes": 7,
}

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 12, 16]}),
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
    ),
    "registers": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "reg_tokens": 3},
    ),
    "attention": (
        "vit_tiny_patch16_224",
        {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 24,
            "depth": 2,
            "num_heads": 2,
            "class_token": False,
            "global_pool": "map",
        },
    ),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 12, 16]}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": 32,
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [2, 2],
        },
    ),
    "mobilenet": ("mobilenetv3_small_050", {}),
}
"""Name -> architecture of timm and what makes it small."""


def build(name: str = "vit") -> Any:
    """The model itself, seeded."""
    architecture, arguments = SMALL[name]
    return scaled(timm.create_model(architecture, num_classes=FACTS["num_classes"], **arguments))


def save_timm(folder: Path, name: str = "vit", **facts: Any) -> Path:
    """Write config.json and model.safetensors as timm's `save_for_hf` does."""
    architecture, arguments = SMALL[name]
    model = build(name)
    own = {key: model.pretrained_cfg[key] for key in ("first_conv", "classifier")}
    config = {
        "architecture": architecture,
        "num_classes": FACTS["num_classes"],
        "model_args": arguments,
        "pretrained_cfg": {**FACTS, **own, **facts},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder
