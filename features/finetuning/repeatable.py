"""What makes a fine-tuning repeatable: its numbers' type, its seeds, and digests of what it starts from."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from features.errors import FeatureError
from features.finetuning.config import FinetuningConfig
from features.precision import has_bfloat16


def settled_precision(config: FinetuningConfig, device: torch.device) -> str:
    """What is computed in.

    Raises:
        FeatureError: float16 on a CPU, where its gradients cannot be scaled to anything of use.
    """
    if config.precision == "auto":
        return "bfloat16" if device.type == "cuda" and has_bfloat16(device) else "float32"
    if config.precision == "float16" and device.type != "cuda":
        raise FeatureError("precision is float16, which needs a GPU; set it to auto, float32 or bfloat16.")
    return config.precision


def seed_of(*parts: int) -> int:
    """One seed of several numbers, for each purpose and each time another."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and numbers."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
