"""What a setting may be while it is searched: some values, or all between two ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
from pydantic import BaseModel, Field, model_validator

Number = int | float
Choices = tuple[str | int | float | bool, ...]


class Between(BaseModel, frozen=True, extra="forbid"):
    """Every number between two ends, both included; whole numbers where both ends are."""

    low: Number = Field(description="Smallest value.")
    high: Number = Field(description="Largest value.")
    log: bool = Field(False, description="Whether 1 to 10 is as likely as 10 to 100.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low is {self.low} and high is {self.high}; expected low below high")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low}, which has no logarithm; raise it above 0 or drop log")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether only whole numbers are meant."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def spread(self, count: int) -> Choices:
        """Return up to ``count`` values from end to end, evenly apart (by their logarithms for ``log``)."""
        space = np.geomspace if self.log else np.linspace
        values: Sequence[float] = space(self.low, self.high, count).tolist()
        inner = [float(f"{value:.6g}") for value in values[1:-1]]
        if self.is_whole:
            return tuple(dict.fromkeys([self.low, *(round(value) for value in inner), self.high]))
        return (float(self.low), *inner, float(self.high))


Range = Choices | Between
"""A tuple: one of these values."""
