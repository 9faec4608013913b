"""Gradient descent that knows nothing of derivatives: central differences of a plain loss, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tests.references.plain_bpr import Floats, PlainBatch

Parameters = dict[str, Floats]
PlainLoss = Callable[[Parameters, Parameters, PlainBatch], float]
"""Loss of a batch at the first parameters. The second are the same numbers at the start of the step: what a
paper puts behind a stop-gradient is computed from them, and so stays as it is while the first are varied."""

_STEP = 1e-5


def descend(
    parameters: Parameters, loss: PlainLoss, batches: Sequence[PlainBatch], *, learning_rate: float
) -> list[float]:
    """Take one SGD step per batch on the arrays in place; return the loss of each batch before its step."""
    losses = []
    for batch in batches:
        start = {name: value.copy() for name, value in parameters.items()}
        losses.append(float(loss(parameters, start, batch)))
        slopes = {name: np.zeros_like(value) for name, value in parameters.items()}
        for name, value in parameters.items():
            for place in np.ndindex(value.shape):
                sides = []
                for shift in (_STEP, -_STEP):
                    value[place] = start[name][place] + shift
                    sides.append(loss(parameters, start, batch))
                value[place] = start[name][place]
                slopes[name][place] = (sides[0] - sides[1]) / (2 * _STEP)
        for name in parameters:
            parameters[name] -= learning_rate * slopes[name]
    return losses
