"""How many items an encoder takes at a time under a memory budget."""

from typing import Any

import torch
from torch import Tensor, nn

from features.encoders.base import Encoder

_LIVE_TENSORS = 3
"""Tensors of the largest layer's size that a forward pass holds at once: input, output, and a residual."""
_STEP = 8
MOST = {"cpu": 64, "cuda": 1024}
"""Beyond these a larger batch gains nothing: caches on a CPU, enough work to fill a GPU."""
BUDGET_MB = {"cpu": 1024, "cuda": 8192}


def fitting_batch_size(item_bytes: int, device: torch.device, budget_mb: int = 0) -> int:
    """Items of ``item_bytes`` each that fit into a budget.

    Args:
        item_bytes: Of `activation_bytes`.
        device: Where the encoder runs.
        budget_mb: Memory for a batch's activations; 0: 1 GB on a CPU, 8 GB on a GPU.
    """
    budget = (budget_mb or BUDGET_MB.get(device.type, BUDGET_MB["cpu"])) * 2**20
    most = MOST.get(device.type, MOST["cpu"])
    fits = min(most, budget // max(item_bytes, 1))
    return max(1, fits // _STEP * _STEP or fits)


def activation_bytes(encoder: Encoder, pixels: Tensor | None, tokens: Tensor | None) -> int:
    """Bytes that an item's forward pass needs at most, from one pass over a single item.

    An estimate from the largest layer's input and output. It depends on shapes alone, so that the batch size
    is the same whenever an extraction is resumed.

    Args:
        encoder: On its device.
        pixels: (1, 3, H, W), or None for texts.
        tokens: (1, L), or None for pictures.
    """
    most = 0

    def note(_module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        nonlocal most
        most = max(most, sum(map(_bytes, given)) + _bytes(out))

    handles = [module.register_forward_hook(note) for module in encoder.modules() if module is not encoder]
    try:
        with torch.inference_mode():
            if pixels is None and tokens is not None:
                vectors = encoder.encode_texts(tokens)
            elif tokens is None and pixels is not None:
                vectors = encoder.encode_images(pixels)
            elif pixels is not None and tokens is not None:
                vectors = encoder.encode_pairs(pixels, tokens)
            else:
                raise ValueError("neither pixels nor tokens")
    finally:
        for handle in handles:
            handle.remove()
    given = sum(_bytes(tensor) for tensor in (pixels, tokens) if tensor is not None)
    return given + _LIVE_TENSORS * max(most, _bytes(vectors))


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (tuple, list)):
        return sum(map(_bytes, value))
    return sum(map(_bytes, value.values())) if isinstance(value, dict) else 0
