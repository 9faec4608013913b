"""Small parts that several papers' models are made of, drawn from a model's own stream."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from typing_extensions import override

from recommenders.models.base import xavier_uniform


class Affine(nn.Module):
    """x W + b for rows x; W starts as Xavier's uniform distribution, b uniform too, or is left out.

    b must not start at 0 where a cosine follows: a row of zeros, an item without the modality, would come out
    as zeros, at which the slope of a cosine has no bound.
    """

    def __init__(self, rng: np.random.Generator, width_in: int, width_out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = xavier_uniform(rng, width_in, width_out)
        self.bias: nn.Parameter | None = None
        if bias:
            drawn = rng.uniform(-1, 1, size=width_out) / np.sqrt(width_in)
            self.bias = nn.Parameter(torch.from_numpy(drawn.astype(np.float32)))

    @override
    def forward(self, rows: Tensor) -> Tensor:
        """Return (..., width_out) of (..., width_in)."""
        return linear(rows.to(self.weight.dtype), self.weight.T, self.bias)


def chained(first: nn.Module, second: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the one affine map that two affine layers with biases are together.

    Its weight is as cheap as the layers are narrow, and saves the product of every row with the second.

    Raises:
        TypeError: A module is no ``Affine`` with a bias.
    """
    if not isinstance(first, Affine) or not isinstance(second, Affine) or first.bias is None:
        raise TypeError(f"{first} and {second} are no affine layers with biases; expected two.")
    weight, bias = first.weight @ second.weight, second(first.bias)
    return lambda rows: torch.addmm(bias, rows.to(weight.dtype), weight)
