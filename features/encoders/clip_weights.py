"""Weights files: what is in them, whether they fit, and what they would fit."""

import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from features.encoders.clip_specs import architecture_config, architectures
from features.errors import EncoderError

_READING_ERRORS = (
    SafetensorError,
    OSError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    pickle.UnpicklingError,
)
"""What the readers raise for damaged files."""

_WRAPPINGS = ("state_dict", "module", "model")
"""Under which name training scripts keep the tensors among other things."""

_LISTED = 3
"""Names shown of each kind of misfit."""


def count_numbers(path: Path) -> int:
    """How many numbers a weights file holds; safetensors are counted from the header alone.

    Raises:
        EncoderError: Damaged, or not a file of tensors.
    """
    if path.suffix != ".safetensors":
        return sum(tensor.numel() for tensor in read_weights(path).values())
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())  # no mapping: `for name in file` fails
            return sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of a weights file, on the CPU; pickles are read without running what is in them.

    A training checkpoint's `state_dict`, `module` (DeepSpeed) or `model` is taken out, in this order, and the
    `module.` of data-parallel training removed.

    Raises:
        EncoderError: Damaged, TorchScript, or not a file of named tensors.
    """
    weights = _read(path)
    for wrapping in _WRAPPINGS:
        if isinstance(weights, Mapping) and isinstance(weights.get(wrapping), Mapping):
            weights = weights[wrapping]
            break
    named = isinstance(weights, Mapping) and all(isinstance(value, Tensor) for value in weights.values())
    if not named or not weights:
        raise EncoderError(
            f"the weights file {str(path)!r} holds no named tensors; expected a state_dict, best as "
            ".safetensors."
        )
    if all(name.startswith("module.") for name in weights):
        return {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    return dict(weights)


def _read(path: Path) -> Any:
    if _is_torchscript(path):
        raise EncoderError(
            f"the weights file {str(path)!r} is a TorchScript program, which is not run; convert it once: "
            "torch.save(torch.jit.load(file, 'cpu').state_dict(), 'weights.pt')."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _READING_ERRORS as error:
        raise _damaged(path, error) from error


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _damaged(path: Path, error: Exception) -> EncoderError:
    reason = str(error).strip().split("\n")[0]
    return EncoderError(
        f"the weights file {str(path)!r} cannot be read ({reason}); it is damaged, cut short, or holds more "
        "than tensors; fetch it again, or save its state_dict as .safetensors."
    )


def load_weights(model: nn.Module, path: Path, spec: str) -> None:
    """Put the weights of a file into a model built by open_clip; every tensor must have its place.

    Unlike open_clip's loader this one does not stretch position embeddings that belong to another picture
    size or context length.

    Raises:
        EncoderError: Unreadable, or of another architecture, which is named if open_clip knows it.
    """
    from open_clip.convert import convert_state_dict  # noqa: PLC0415 - seconds of imports
    from open_clip.model import convert_to_custom_text_state_dict  # noqa: PLC0415 - seconds of imports

    read = read_weights(path)
    weights = convert_state_dict(model, dict(read))
    if "positional_embedding" in weights and not hasattr(model, "positional_embedding"):
        weights = convert_to_custom_text_state_dict(weights)  # CLIP's old flat layout
    own = model.state_dict()
    for scalar in ("logit_scale", "logit_bias"):  # stored as () or (1,)
        if scalar in weights and scalar in own and weights[scalar].numel() == own[scalar].numel():
            weights[scalar] = weights[scalar].reshape(own[scalar].shape)
    for derived in ("input_resolution", "context_length", "vocab_size", "attn_mask", "text.attn_mask"):
        weights.pop(derived, None)  # of OpenAI's archives, not learnt
    if "text.transformer.embeddings.position_ids" not in own:
        weights.pop("text.transformer.embeddings.position_ids", None)  # of transformers before 4.31
    misfits = _misfits(own, weights)
    if misfits:
        fits = [name for name in architectures() if _shapes(read) and _shapes(read) == _config_shapes(name)]
        hint = (
            f"they have the shapes of {', '.join(fits)}" if fits else "name the architecture they belong to"
        )
        raise EncoderError(
            f"the weights file {str(path)!r} does not fit encoder {spec!r}: {'; '.join(misfits)}; {hint}."
        )
    model.load_state_dict(weights)


def _misfits(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """What is missing, unexpected or of another shape; empty if all fits."""
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    reshaped = [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    return [
        f"{len(names)} {kind} ({', '.join(names[:_LISTED])}{', ...' if len(names) > _LISTED else ''})"
        for kind, names in kinds.items()
        if names
    ]


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """The settings that a CLIP's tensors betray; {} for towers that are no plain ViT and transformer."""
    text = "text." if "text.positional_embedding" in weights else ""
    names = (
        "visual.conv1.weight",
        "visual.proj",
        f"{text}positional_embedding",
        f"{text}token_embedding.weight",
    )
    if any(name not in weights for name in names):
        return {}
    patches, projection, positions, tokens = (weights[name] for name in names)
    return {
        "embed_dim": projection.shape[1],
        "width": patches.shape[0],
        "patch_size": patches.shape[-1],
        "n_positions": weights["visual.positional_embedding"].shape[0],
        "layers": _count_blocks(weights, "visual.transformer.resblocks."),
        "text_width": tokens.shape[1],
        "text_layers": _count_blocks(weights, f"{text}transformer.resblocks."),
        "vocab_size": tokens.shape[0],
        "context_length": positions.shape[0],
    }


def _count_blocks(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})


def _config_shapes(architecture: str) -> dict[str, int]:
    """The same settings, as an architecture states them."""
    config = architecture_config(architecture)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision or "hf_model_name" in text or not isinstance(vision.get("layers"), int):
        return {}
    patch = vision["patch_size"]
    return {
        "embed_dim": config["embed_dim"],
        "width": vision["width"],
        "patch_size": patch,
        "n_positions": (vision["image_size"] // patch) ** 2 + 1,
        "layers": vision["layers"],
        "text_width": text["width"],
        "text_layers": text["layers"],
        "vocab_size": text["vocab_size"],
        "context_length": text["context_length"],
    }
