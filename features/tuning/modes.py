"""Which parameters of an encoder are trained: all, the last blocks, or low-rank updates."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from features.catalogue import Modality
from features.encoders.base import Encoder
from features.errors import EncoderError
from features.tuning.checkpointing import checkpoint_blocks
from features.tuning.lora import LowRank
from features.tuning.towers import Tower, has_tower, tower_of, towers_of

TEMPERATURES = ("logit_scale", "logit_bias", "logit_vl_scale")
"""What a contrastive loss scales and shifts similarities by, by the last part of the name."""


class TuningConfig(BaseModel, frozen=True, extra="forbid"):
    """What of an encoder is trained."""

    mode: Literal["full", "last-n", "lora"] = Field(
        "full",
        description="full: everything; last-n: the last blocks of each tower, and its head; lora: low-rank "
        "updates of the layers in all blocks.",
    )
    last_n: PositiveInt = Field(2, description="Blocks of each tower that mode last-n trains.")
    head: bool = Field(
        True, description="Whether mode last-n trains final norm and projection of each tower, too."
    )
    temperature: bool = Field(
        True, description="Whether logit scale and bias are trained, where there are any."
    )
    lora_rank: PositiveInt = Field(8, description="Rank of an update.")
    lora_alpha: PositiveFloat = Field(16.0, description="An update counts lora_alpha / lora_rank.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Of what goes into an update.")
    lora_targets: tuple[str, ...] = Field(
        (), description="How names of layers end that are updated; empty: attention and MLP of all blocks."
    )
    frozen_towers: tuple[Literal["image", "text"], ...] = Field(
        (),
        description="Towers whose vectors stay as they are (LiT), in any mode; what they share stays, too.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Blocks are computed again in the backward pass instead of kept: less memory."
    )

    @model_validator(mode="after")
    def _something_is_left(self) -> "TuningConfig":
        if len(set(self.frozen_towers)) == 2:
            raise ValueError("frozen_towers has both towers, so that nothing would be trained; leave one out")
        return self


class Tuned:
    """An encoder while it is trained.

    Args:
        encoder: Its `requires_grad` say what is trained.
        low_rank: Its low-rank updates, in mode lora.
        checkpointed: Takes the checkpointing of its blocks away.
        before: `requires_grad` of each parameter as they were.
    """

    def __init__(
        self,
        encoder: Encoder,
        low_rank: LowRank | None,
        checkpointed: list[nn.Module],
        before: Mapping[str, bool],
    ) -> None:
        self.encoder = encoder
        self._low_rank = low_rank
        self._checkpointed = checkpointed
        self._before = before
        self.trainable: dict[str, nn.Parameter] = {
            name: value for name, value in encoder.named_parameters() if value.requires_grad
        }
        """Name in the encoder -> parameter; what an optimizer gets."""

    @property
    def recomputes(self) -> bool:
        """Whether blocks are computed again in the backward pass, so that activations are not to be kept."""
        return bool(self._checkpointed)

    def train(self) -> None:
        """Switch on dropout where something is trained, and only there.

        Frozen blocks behave as they do in use, so that their states can be kept. Batch normalisation stays as
        it was learnt, though its scales are trained: chunks of a batch must not see each other, nor one that
        is run twice count twice. `encoder.train()` knows nothing of that: call this one.
        """
        self.encoder.train()
        _rest(self.encoder)
        for module in self.encoder.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        for modality in self.encoder.info.modalities:
            if has_tower(self.encoder, modality) and self.frozen_blocks(modality) is not None:
                _rest_stem(tower_of(self.encoder, modality))

    def eval(self) -> None:
        """Behave as in use."""
        self.encoder.eval()

    def frozen_blocks(self, modality: Modality) -> int | None:
        """How many of the lowest blocks are frozen: states up to there can be kept while training goes on.

        None where the stem is trained, so that nothing can be kept; all of them in a frozen tower.

        Raises:
            EncoderError: The encoder shows no such tower.
        """
        tower = tower_of(self.encoder, modality)
        trained = [
            any(value.requires_grad for value in part.values())
            for part in (tower.stem_parameters(), *map(tower.block_parameters, range(tower.n_blocks)))
        ]
        if trained[0]:
            return None
        return next((number for number, one in enumerate(trained[1:]) if one), tower.n_blocks)

    def state(self) -> dict[str, Tensor]:
        """Name -> copy of each trained tensor, and of the running statistics beside them, on the CPU."""
        own = self.encoder.state_dict(keep_vars=True)
        return {name: own[name].detach().cpu().clone() for name in self._state_names()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave.

        Raises:
            EncoderError: It is of another encoder or another mode.
        """
        wanted = self._state_names()
        own = self.encoder.state_dict(keep_vars=True)
        misfits = sorted(set(wanted) ^ set(state))
        misfits += [name for name in wanted if name in state and state[name].shape != own[name].shape]
        if misfits:
            raise EncoderError(
                f"the checkpoint does not fit encoder {self.encoder.info.spec!r} as it is tuned: "
                f"{len(misfits)} tensors differ, first {misfits[0]!r}; start again, or tune as before."
            )
        with torch.no_grad():
            for name in wanted:
                own[name].copy_(state[name])

    def finish(self) -> None:
        """Make it a plain encoder in evaluation mode: updates merged, checkpointing off, flags as before."""
        for block in self._checkpointed:
            del block.forward
        self._checkpointed = []
        if self._low_rank is not None:
            self._low_rank.merge()
            self._low_rank = None
        for name, value in self.encoder.named_parameters():
            value.requires_grad_(self._before[name])
            value.grad = None
        self.trainable = {}
        self.encoder.eval()

    def _state_names(self) -> list[str]:
        names = list(self.trainable)
        for prefix, module in self.encoder.named_modules():
            own = [value for _, value in module.named_parameters(recurse=False)]
            if any(value.requires_grad for value in own):
                kept = module._non_persistent_buffers_set
                buffers = (name for name, _ in module.named_buffers(recurse=False) if name not in kept)
                names += [f"{prefix}.{name}" if prefix else name for name in buffers]
        return names


def prepare_tuning(encoder: Encoder, config: TuningConfig, *, seed: int = 0) -> Tuned:
    """Mark what is trained, put low-rank updates in, and switch checkpointing on; the encoder is changed.

    Parameters that both towers share (all attention of VLMo) stay as they are once one tower is frozen: a
    frozen tower's vectors do not change, not by a bit. In mode last-n VLMo's table of position biases, whose
    columns belong to all blocks, counts as part of the stem and is not trained.

    Args:
        encoder: To be trained, in place.
        config: What of it.
        seed: Of the low-rank updates.

    Raises:
        EncoderError: The encoder shows no towers where the mode needs them, or has fewer blocks.
    """
    before = {name: value.requires_grad for name, value in encoder.named_parameters()}
    frozen = _frozen(encoder, config)
    low_rank: LowRank | None = None
    towers = _trained_towers(encoder, config)
    if config.mode == "full":
        wanted = set(before) - frozen
    elif config.mode == "last-n":
        wanted = _last(encoder, towers, config) - frozen
    else:
        low_rank = LowRank(
            encoder,
            towers,
            frozen,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            targets=config.lora_targets,
            seed=seed,
        )
        wanted = {name for name, _ in encoder.named_parameters() if ".lora_" in name}
    for name, value in encoder.named_parameters():
        is_temperature = name.rpartition(".")[2] in TEMPERATURES
        value.requires_grad_(config.temperature if is_temperature else name in wanted)
    blocks = checkpoint_blocks(towers) if config.gradient_checkpointing else []
    return Tuned(encoder, low_rank, blocks, before)


def _frozen(encoder: Encoder, config: TuningConfig) -> set[str]:
    """Names of all parameters that a frozen tower's vectors depend on."""
    return {name for modality in config.frozen_towers for name in tower_of(encoder, modality).parameters()}


def _trained_towers(encoder: Encoder, config: TuningConfig) -> list[Tower]:
    """The towers that are trained; in mode full they are only asked for where something needs them.

    Raises:
        EncoderError: One cannot be seen, or both are frozen.
    """
    if config.mode == "full" and not config.gradient_checkpointing:
        return []
    towers = [tower for name, tower in towers_of(encoder).items() if name not in config.frozen_towers]
    if not towers:
        raise EncoderError(
            f"encoder {encoder.info.spec!r} has no tower but the frozen {config.frozen_towers[0]} one, so "
            "that nothing would be trained; leave frozen_towers out."
        )
    return towers


def _last(encoder: Encoder, towers: list[Tower], config: TuningConfig) -> set[str]:
    names: set[str] = set()
    for tower in towers:
        if config.last_n > tower.n_blocks:
            raise EncoderError(
                f"last_n is {config.last_n}, but the {tower.modality} tower of {encoder.info.spec!r} has "
                f"{tower.n_blocks} blocks; lower it, or choose mode `full`."
            )
        for number in range(tower.n_blocks - config.last_n, tower.n_blocks):
            names.update(tower.block_parameters(number))
        if config.head:
            names.update(tower.head_parameters())
    return names


def _rest_stem(tower: Tower) -> None:
    """Switch off what a frozen stem does at random without a parameter, such as leaving patches out."""
    for part in tower.stem_parts():
        if isinstance(part, nn.Module):
            part.eval()


def _rest(module: nn.Module) -> None:
    """Put the parts without trained parameters into evaluation mode."""
    own = list(module.parameters())
    if own and not any(value.requires_grad for value in own):
        module.eval()
        return
    for child in module.children():
        _rest(child)
