"""Blocks that are computed again in the backward pass instead of kept in memory."""

from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from features.tuning.tower import Tower


def checkpoint_blocks(towers: Sequence[Tower]) -> list[nn.Module]:
    """Let each block keep its input only; `del block.forward` undoes it. Gradients stay what they were.

    Blocks with batch statistics are left as they are, as a second pass would count its batch twice.

    Returns:
        The blocks that were changed.
    """
    changed: list[nn.Module] = []
    for block in _blocks(towers):
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in block.modules()):
            continue
        block.forward = MethodType(_forward_again, block)  # a bound method: a copy's is bound to the copy
        changed.append(block)
    return changed


def _blocks(towers: Sequence[Tower]) -> list[nn.Module]:
    """Each module that runs as one block, once, though towers may share it."""
    found: dict[int, nn.Module] = {}
    for tower in towers:
        for block in tower.block_modules():
            found[id(block)] = block
    return list(found.values())


def _forward_again(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
