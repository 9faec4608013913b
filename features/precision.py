"""In which numbers an encoder computes: float32 is the reference, less is faster, and `auto` asks a probe.

The weights themselves are cast: automatic mixed precision, which casts them anew for every operation, gave
nothing on a CPU, where a ViT-B/32 with weights of bfloat16 ran at three to five times the speed of float32.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from features.encoders.base import Encoder

Precision = Literal["float32", "bfloat16", "float16"]
PrecisionChoice = Literal["float32", "bfloat16", "float16", "auto"]

PROBE_ITEMS = 64
MIN_COSINE = 0.999
"""Of a vector in bfloat16 with its float32 self, for the worst item of the probe."""
MIN_OVERLAP = 0.9
"""Share of an item's ten nearest neighbours that stay, on average over the probe."""
_NEIGHBOURS = 10
_AMPERE = 8
"""First major compute capability of CUDA devices with bfloat16."""


@dataclass(frozen=True)
class PrecisionReport:
    """What was taken, and why; a line a person can read is `reason`."""

    taken: Precision
    reason: str
    cosine: float | None = None
    """Lowest cosine with float32 over the probe; None where nothing was probed."""
    overlap: float | None = None
    """Share of ten nearest neighbours that are float32's, over the probe."""


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is computed by instructions made for it, so that it is faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= _AMPERE
    instructions: Any = torch.cpu
    return device.type == "cpu" and any(
        getattr(instructions, name, lambda: False)()
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def precision_in_key(asked: PrecisionChoice, device: torch.device) -> str:
    """What of the precision belongs into a key, known before anything is loaded.

    `auto` decides by the same probe on all devices with bfloat16, so that only their having it matters.
    """
    if asked != "auto":
        return asked
    return "auto" if has_bfloat16(device) else "float32"


def in_precision(encoder: Encoder, precision: Precision) -> Encoder:
    """A copy of an encoder that computes in ``precision``; the encoder itself for float32.

    Only the cast weights take memory. Batch normalisation keeps its statistics in float32, as PyTorch's
    kernels take such mixtures there.
    """
    if precision == "float32" or not any(True for _ in encoder.parameters()):
        return encoder
    dtype = getattr(torch, precision)
    kept = {
        id(tensor)
        for module in encoder.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    casts: dict[int, Any] = {}
    for tensor in (*encoder.parameters(), *encoder.buffers()):
        if id(tensor) in kept or not tensor.is_floating_point():
            casts[id(tensor)] = tensor
        elif isinstance(tensor, nn.Parameter):
            casts[id(tensor)] = nn.Parameter(tensor.detach().to(dtype), requires_grad=tensor.requires_grad)
        else:
            casts[id(tensor)] = tensor.to(dtype)
    return copy.deepcopy(encoder, casts)


def compute_dtype(encoder: Encoder) -> torch.dtype:
    """The type an encoder's pictures must have: that of its first weights, float32 if it has none."""
    floats = (tensor.dtype for tensor in encoder.parameters() if tensor.is_floating_point())
    return next(floats, torch.float32)


def judge(reference: Tensor, reduced: Tensor) -> PrecisionReport:
    """Decide for bfloat16 if its vectors are close to float32's and name the same neighbours.

    Args:
        reference: (N, D) in float32.
        reduced: (N, D) of the same items in bfloat16.
    """
    if not bool(reduced.isfinite().all()):
        return PrecisionReport("float32", "float32, as bfloat16 gave vectors that are not finite", 0.0, 0.0)
    cosine = float(cosine_similarity(reference, reduced, dim=1).min())
    overlap = neighbour_overlap(reference, reduced)
    figures = (
        f"over {len(reference)} items the lowest cosine with float32 is {cosine:.5f} (at least {MIN_COSINE}) "
        f"and {overlap:.1%} of {_NEIGHBOURS} nearest neighbours stay (at least {MIN_OVERLAP:.0%})"
    )
    if cosine >= MIN_COSINE and overlap >= MIN_OVERLAP:
        return PrecisionReport("bfloat16", f"bfloat16: {figures}", cosine, overlap)
    return PrecisionReport("float32", f"float32, as bfloat16 is too far from it: {figures}", cosine, overlap)


def neighbour_overlap(reference: Tensor, other: Tensor, k: int = _NEIGHBOURS) -> float:
    """Share of each row's k nearest neighbours by cosine that both (N, D) tables name; 1.0 for one row."""
    k = min(k, len(reference) - 1)
    if k < 1:
        return 1.0
    sets = [_neighbours(table, k) for table in (reference, other)]
    same = (sets[0][:, :, None] == sets[1][:, None, :]).any(dim=2)
    return float(same.float().mean())


def _neighbours(table: Tensor, k: int) -> Tensor:
    unit = normalize(table.double(), dim=1)
    similarity = unit @ unit.T
    return similarity.fill_diagonal_(-torch.inf).topk(k, dim=1).indices


def spread(n_contents: Sequence[int], n_wanted: int = PROBE_ITEMS) -> list[int]:
    """Up to ``n_wanted`` of some numbers, evenly spaced."""
    step = max(1, len(n_contents) // n_wanted)
    return list(n_contents[::step][:n_wanted])
