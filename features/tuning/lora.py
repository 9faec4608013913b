"""Low-rank updates of blocks (Hu et al., "LoRA", ICLR 2022, arXiv 2106.09685), by way of peft."""

import difflib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from features.encoders.base import Encoder
from features.errors import EncoderError
from features.tuning.attention import close_attention, open_attention
from features.tuning.tower import Tower

_LISTED = 12


class LowRank:
    """Adapters in an encoder's blocks: at first the identity, at last merged.

    Every linear layer and convolution of a block gets one: the attention's projections and the MLP's layers,
    whatever the family calls them. Not reached are weights that a block multiplies by itself, as the custom
    attention of some of open_clip's architectures does.

    Args:
        encoder: Changed in place, until `merge`.
        towers: Whose blocks are updated.
        frozen: Names of parameters that must not change in effect: another, frozen tower's.
        rank: r of the paper.
        alpha: The update counts alpha / r.
        dropout: Of what goes into the update, in training.
        targets: How the names of the layers end that are wanted; empty for all of the blocks.
        seed: Of the first matrices; the second ones are zeros. torch's own stream is left as it was.

    Raises:
        EncoderError: Nothing fits ``targets``, or no layer is left.
    """

    def __init__(
        self,
        encoder: Encoder,
        towers: Sequence[Tower],
        frozen: set[str],
        *,
        rank: int,
        alpha: float,
        dropout: float,
        targets: Sequence[str],
        seed: int,
    ) -> None:
        from peft import LoraConfig  # noqa: PLC0415 - seconds of imports
        from peft.tuners.lora import LoraModel  # noqa: PLC0415 - seconds of imports

        self._roots = [part for tower in towers for part in _block_modules(tower)]
        fixed = {id(p) for name, p in encoder.named_parameters() if name in frozen}
        for root in self._roots:
            open_attention(root)
        try:
            layers = _layers(encoder, self._roots, fixed)
            self.layers = _chosen(encoder, layers, targets)
        except EncoderError:
            self._close()
            raise
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # peft says int, and divides
            lora_dropout=dropout,
            target_modules=list(self.layers),
            bias="none",
        )
        training = encoder.training
        with torch.random.fork_rng(devices=_gpus(encoder)):
            self._model: Any = LoraModel(encoder, config, "default")
        _initialise(encoder, seed)
        encoder.train(training)

    def merge(self) -> None:
        """Add the updates to the weights; the encoder is then the module it was before, its values tuned."""
        self._model.merge_and_unload()
        self._close()

    def _close(self) -> None:
        for root in self._roots:
            close_attention(root)


def _block_modules(tower: Tower) -> list[nn.Module]:
    parts = [part for number in range(tower.n_blocks) for part in tower.block_parts(number)]
    return [part for part in parts if isinstance(part, nn.Module)]


def _layers(encoder: Encoder, roots: Sequence[nn.Module], fixed: set[int]) -> list[str]:
    """Names of linear layers and convolutions below the roots whose weight may change."""
    within = {id(module) for root in roots for module in root.modules()}
    return [
        name
        for name, module in encoder.named_modules()
        if id(module) in within
        and isinstance(module, nn.Linear | nn.Conv2d)
        and id(module.weight) not in fixed
        if type(module).__name__ != "NonDynamicallyQuantizableLinear"  # of attention that stayed closed
    ]


def _chosen(encoder: Encoder, layers: Sequence[str], targets: Sequence[str]) -> list[str]:
    known = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            near = difflib.get_close_matches(target, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"layers: {', '.join(known[:_LISTED])}."
            raise EncoderError(
                f"encoder {encoder.info.spec!r}: lora_targets has {target!r}, but no layer of its trained "
                f"blocks is called so; {hint}"
            )
    chosen = [
        name
        for name in layers
        if not targets or any(name == target or name.endswith(f".{target}") for target in targets)
    ]
    if not chosen:
        raise EncoderError(
            f"encoder {encoder.info.spec!r} has no layer left for low-rank updates; freeze fewer towers, or "
            "choose mode `last-n` or `full`."
        )
    return chosen


def _initialise(encoder: nn.Module, seed: int) -> None:
    """The first matrices as `nn.Linear` starts (Kaiming's uniform), in the order of their names."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(encoder.named_parameters()):
        if ".lora_A." in name:
            fresh = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
            with torch.no_grad():
                parameter.copy_(fresh)


def _gpus(encoder: nn.Module) -> list[torch.device]:
    return list({value.device for value in encoder.parameters() if value.device.type == "cuda"})
