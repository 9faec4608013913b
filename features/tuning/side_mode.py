"""Training of side networks alone: an encoder in, one with side networks out."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from features.catalogue import Modality
from features.encoders.base import Encoder
from features.encoders.side import SideEncoder, side_widths
from features.errors import EncoderError
from features.tuning.side import SideConfig, SideTower
from features.tuning.towers import tower_of, towers_of

_MODALITIES: tuple[Modality, ...] = ("image", "text")


class SideTuned:
    """A `SideEncoder` while its side networks are trained; it is used as `features.tuning.modes.Tuned` is.

    Args:
        encoder: Its inner encoder stays as it is.
    """

    def __init__(self, encoder: SideEncoder) -> None:
        self.encoder = encoder
        self.trainable: dict[str, nn.Parameter] = {
            name: value for name, value in encoder.named_parameters() if name.startswith("sides.")
        }
        """Name in the encoder -> parameter; what an optimizer gets."""

    @property
    def recomputes(self) -> bool:
        """Whether blocks are computed again in the backward pass: none is, as no gradient reaches them."""
        return False

    def train(self) -> None:
        """Switch on the side networks' dropout; the frozen encoder behaves as in use."""
        self.encoder.train()

    def eval(self) -> None:
        """Behave as in use."""
        self.encoder.eval()

    def frozen_blocks(self, modality: Modality) -> int:
        """How many of the lowest blocks are frozen: all.

        Raises:
            EncoderError: The encoder shows no such tower.
        """
        return tower_of(self.encoder.inner, modality).n_blocks

    def state(self) -> dict[str, Tensor]:
        """Name -> copy of each trained tensor, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self._own().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave.

        Raises:
            EncoderError: It is of other side networks.
        """
        own = self._own()
        misfits = sorted(set(own) ^ set(state))
        misfits += [name for name in own if name in state and state[name].shape != own[name].shape]
        if misfits:
            raise EncoderError(
                f"the checkpoint does not fit the side networks of encoder {self.encoder.info.spec!r}: "
                f"{len(misfits)} tensors differ, first {misfits[0]!r}; start again, or tune as before."
            )
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(state[name])

    def finish(self) -> None:
        """Make it a plain encoder in evaluation mode, whose `info` tells of the learnt weights."""
        for value in self.trainable.values():
            value.grad = None
        self.trainable = {}
        self.encoder.eval()
        self.encoder.update_info()

    def _own(self) -> dict[str, Tensor]:
        own = self.encoder.state_dict(keep_vars=True)
        return {name: value for name, value in own.items() if name.startswith("sides.")}


def prepare_side(encoder: Encoder, config: SideConfig, *, seed: int = 0) -> SideTuned:
    """Put side networks beside an encoder, which is frozen; what is trained and saved is ``.encoder``.

    Args:
        encoder: Its weights stay as they are, and no longer ask for gradients.
        config: Which side networks.
        seed: Of their weights. torch's own stream is left as it was.

    Raises:
        EncoderError: The encoder shows no such tower.
    """
    if isinstance(encoder, SideEncoder):
        raise EncoderError(
            f"encoder {encoder.info.spec!r} has side networks already; choose the encoder that they stand "
            "beside."
        )
    towers = (
        {modality: tower_of(encoder, modality) for modality in _MODALITIES if modality in config.towers}
        if config.towers
        else towers_of(encoder)
    )
    device = next(encoder.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    sides: dict[Modality, SideTower] = {}
    with torch.random.fork_rng(devices=[]):  # modules draw weights when they are made
        for modality, tower in towers.items():
            sides[modality] = SideTower(side_widths(tower, config), encoder.info.dims[modality], config)
            sides[modality].initialise(generator)
    return SideTuned(SideEncoder(encoder, sides, config).to(device))
