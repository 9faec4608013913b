"""Updates against AdamW written out: schedule, rates, decay, clipping, the limit of a temperature."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from features.errors import FeatureError
from features.finetuning.config import OptimizerConfig
from features.finetuning.objectives import BatchReport
from features.finetuning.updates import Updates

CONFIG = OptimizerConfig(
    learning_rate=0.1, weight_decay=0.3, warmup_share=0.5, max_gradient_norm=0.5, min_temperature=0.5
)
FACTORS = {"matrix": 1.0, "vector": 0.25, "logit_scale": 2.0}
GRADIENTS = [
    {"matrix": 3.0, "vector": -4.0, "logit_scale": 0.0},
    {"matrix": 0.1, "vector": 0.2, "logit_scale": -0.1},
]


def parameters() -> dict[str, nn.Parameter]:
    return {
        "matrix": nn.Parameter(torch.full((1, 1), 2.0, dtype=torch.float64)),
        "vector": nn.Parameter(torch.full((1,), -1.0, dtype=torch.float64)),
        "logit_scale": nn.Parameter(torch.tensor(math.log(2.0), dtype=torch.float64)),
    }


def updates(trainable: dict[str, nn.Parameter]) -> Updates:
    return Updates(trainable, FACTORS, CONFIG, n_updates=4, precision="float32")


def take(made: Updates, trainable: dict[str, nn.Parameter], gradients: dict[str, float]) -> dict[str, float]:
    made.start()
    for name, value in gradients.items():
        trainable[name].grad = torch.full_like(trainable[name], value)
    return made.finish([BatchReport({"image_text": 1.5, "loss": 3.0}, {"image_text": 0.5})])


def test_two_updates_are_those_of_the_formulas() -> None:
    trainable = parameters()
    made = updates(trainable)
    noted = [take(made, trainable, gradients) for gradients in GRADIENTS]
    assert noted[0]["gradient_norm"] == pytest.approx(5.0)  # before it is cut
    assert noted[0] == pytest.approx(
        {"gradient_norm": 5.0, "loss": 3.0, "loss_image_text": 1.5, "gradient_norm_image_text": 0.5}
    )
    for name, expected in plain_adamw().items():
        assert trainable[name].item() == pytest.approx(expected, rel=1e-6), name


def plain_adamw() -> dict[str, float]:
    """Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2, by hand."""
    values = {name: value.item() for name, value in parameters().items()}
    first, second = dict.fromkeys(values, 0.0), dict.fromkeys(values, 0.0)
    for step, gradients in enumerate(GRADIENTS, start=1):
        norm = math.sqrt(sum(value**2 for value in gradients.values()))
        cut = min(1.0, CONFIG.max_gradient_norm / (norm + 1e-6))
        rate = CONFIG.learning_rate * step / 2  # two of four updates warm up
        for name in values:
            gradient = gradients[name] * cut
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = CONFIG.beta2 * second[name] + (1 - CONFIG.beta2) * gradient**2
            decay = CONFIG.weight_decay if name == "matrix" else 0.0
            values[name] *= 1 - rate * FACTORS[name] * decay
            mean = first[name] / (1 - 0.9**step)
            spread = math.sqrt(second[name] / (1 - CONFIG.beta2**step))
            values[name] -= rate * FACTORS[name] * mean / (spread + 1e-6)
        values["logit_scale"] = min(values["logit_scale"], -math.log(CONFIG.min_temperature))
    return values


def test_the_rate_rises_then_falls_as_a_cosine() -> None:
    made = updates(parameters())
    shares = [made.share(update) for update in range(4)]
    np.testing.assert_allclose(shares, [0.5, 1.0, 1.0, 0.5])


def test_what_could_not_be_read_changes_nothing_but_the_count() -> None:
    trainable = parameters()
    made = updates(trainable)
    made.start()
    assert made.finish([]) == {}
    assert made.done == 1
    assert trainable["matrix"].item() == 2.0


def test_a_gradient_that_is_no_number_is_refused_before_it_does_harm() -> None:
    trainable = parameters()
    made = updates(trainable)
    with pytest.raises(
        FeatureError, match=r"the gradient's norm is nan in update 1 of 4; .*take precision float32"
    ):
        take(made, trainable, {**GRADIENTS[0], "vector": math.nan})
    assert trainable["vector"].item() == -1.0
