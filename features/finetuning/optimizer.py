"""AdamW with a group of parameters for each rate and decay."""

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import nn

from features.encoders.base import Encoder
from features.errors import FeatureError
from features.finetuning.config import OptimizerConfig
from features.tuning.modes import TEMPERATURES
from features.tuning.towers import has_tower, tower_of

_HEADS = ("itc_", "itm_score", "mlm_score", "pooler")
"""In the names of VLMo's heads, which belong to no tower."""


def rate_factors(
    encoder: Encoder, trainable: Mapping[str, nn.Parameter], config: OptimizerConfig
) -> dict[str, float]:
    """The rate of each parameter, in times `learning_rate`.

    Heads, final norms and temperatures have `head_factor`; block n of N has layer_decay^(N - 1 - n), and what
    runs before the blocks has layer_decay^N. Towers that share a block take the larger factor.

    Source: Clark et al., "ELECTRA", 2020, table 7, for the decay over layers.

    Raises:
        FeatureError: `layer_decay` for an encoder whose blocks cannot be told apart.
    """
    known: dict[int, float] = {}
    heads: set[int] = set()
    for modality in encoder.info.modalities:
        if modality == "fused" or not has_tower(encoder, modality):
            continue
        tower = tower_of(encoder, modality)
        heads.update(map(id, tower.head_parameters().values()))
        parts = [tower.stem_parameters(), *map(tower.block_parameters, range(tower.n_blocks))]
        for depth, part in enumerate(parts):
            factor = config.layer_decay ** (tower.n_blocks - depth)
            for parameter in part.values():
                known[id(parameter)] = max(factor, known.get(id(parameter), 0.0))
    if config.layer_decay < 1 and not known:
        raise FeatureError(
            f"layer_decay is {config.layer_decay}, but the blocks of {encoder.info.spec!r} cannot be told "
            "apart; set optimizer.layer_decay to 1."
        )
    return {
        name: config.head_factor
        if id(value) in heads or name.endswith(TEMPERATURES) or any(head in name for head in _HEADS)
        else known.get(id(value), 1.0)
        for name, value in trainable.items()
    }


def make_optimizer(
    trainable: Mapping[str, nn.Parameter], factors: Mapping[str, float], config: OptimizerConfig
) -> torch.optim.AdamW:
    """AdamW over all parameters; vectors and scalars do not decay.

    Args:
        trainable: In an order that stays, as the optimiser's state is kept by it.
        factors: Of `rate_factors`.
        config: The constants.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in trainable.items():
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups[factors[name], decay].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": config.learning_rate * factor, "weight_decay": decay}
            for (factor, decay), parameters in groups.items()
        ],
        betas=(0.9, config.beta2),
        eps=1e-6,
    )


def temperature_limits(trainable: Mapping[str, nn.Parameter], config: OptimizerConfig) -> dict[str, float]:
    """The largest logarithm of an inverse temperature, by name; an encoder that starts higher may stay there.

    SigLIP, for one, was trained to a temperature below CLIP's limit of 0.01.
    """
    return {
        name: max(-math.log(config.min_temperature), parameter.item())
        for name, parameter in trainable.items()
        if name.endswith(("logit_scale", "logit_vl_scale"))
    }
