"""Small parts that several papers' models are made of, drawn from a model's own stream."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
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
        product = rows.to(self.weight.dtype) @ self.weight
        return product if self.bias is None else product + self.bias
