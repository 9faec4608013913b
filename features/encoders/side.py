"""An encoder beside whose frozen blocks small networks were trained: their sum gives the vectors."""

import hashlib
from collections.abc import Mapping
from typing import Self, cast

from pydantic import JsonValue
from torch import Tensor, nn

from features.catalogue import Modality
from features.encoders.base import Encoder, EncoderInfo, digest_json
from features.errors import EncoderError
from features.tuning.side import SideConfig, SideTower, states_read
from features.tuning.towers import Tower, tower_of


class SideEncoder(Encoder):
    """A frozen encoder and a side network for each of its towers, or for one of them.

    Vectors of a modality without a side network are the frozen encoder's; fused vectors there are none.
    Gradients reach the side networks; the frozen encoder stays in evaluation mode.

    Args:
        inner: The frozen encoder; its parameters no longer ask for gradients.
        sides: Modality -> its side network.
        config: What all of them are made by.

    Raises:
        EncoderError: No side network, one of a tower that is not there, or one of another shape.
    """

    def __init__(self, inner: Encoder, sides: Mapping[Modality, SideTower], config: SideConfig) -> None:
        if not sides:
            raise EncoderError(f"encoder {inner.info.spec!r} was given no side network; give it one a tower.")
        for modality, side in sides.items():
            wanted = side_widths(tower_of(inner, modality), config), inner.info.dims[modality]
            if (side.widths, side.dim) != wanted:
                raise EncoderError(
                    f"the {modality} side network reads states of widths {side.widths} for vectors of "
                    f"{side.dim} numbers; encoder {inner.info.spec!r} has {wanted[0]} and {wanted[1]}. It is "
                    "another encoder's."
                )
        super().__init__(
            inner.info, inner.image_transform, inner.tokenizer, pad_id=inner.pad_id, pads_to=inner.pads_to
        )
        self.notes = inner.notes
        self.config = config
        self.inner = inner.requires_grad_(False).eval()
        self.sides = nn.ModuleDict({str(modality): side for modality, side in sides.items()})
        self.update_info()

    def side(self, modality: Modality) -> SideTower | None:
        """The side network of a modality, if there is one."""
        return cast("SideTower", self.sides[modality]) if modality in self.sides else None

    def train(self, mode: bool = True) -> Self:
        """Switch the side networks; what is frozen stays in evaluation mode."""
        super().train(mode)
        self.inner.eval()
        return self

    def frozen(self, modality: Modality, inputs: Tensor) -> tuple[list[Tensor], Tensor]:
        """What a side network reads: its tower's pooled states, (B, W) each, and the vectors (B, D).

        Raises:
            EncoderError: The encoder shows no such tower.
        """
        return states_and_vectors(tower_of(self.inner, modality), inputs, self.config.every_nth)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D) float32."""
        side = self.side("image")
        return side(*self.frozen("image", pixels)) if side else self.inner.encode_images(pixels)

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, D) float32."""
        side = self.side("text")
        return side(*self.frozen("text", tokens)) if side else self.inner.encode_texts(tokens)

    def update_info(self) -> None:
        """Have `info` tell of the side networks' weights as they are now."""
        self.info = side_info(self.inner.info, self.config, self.sides)


def states_and_vectors(tower: Tower, inputs: Tensor, every_nth: int) -> tuple[list[Tensor], Tensor]:
    """Pixels or tokens -> the pooled states a side network reads, (B, W) each, and the vectors (B, D)."""
    hidden, done = tower.stem(inputs), 0
    states = []
    for number in states_read(tower.n_blocks, every_nth):
        hidden, done = tower.run(hidden, done, number), number
        states.append(tower.pooled(hidden))
    return states, tower.head(hidden)


def side_widths(tower: Tower, config: SideConfig) -> tuple[int, ...]:
    """Widths of the states that a tower's side network reads."""
    return tuple(tower.widths[number] for number in states_read(tower.n_blocks, config.every_nth))


def side_info(inner: EncoderInfo, config: SideConfig, sides: nn.ModuleDict) -> EncoderInfo:
    """The frozen encoder's info with a name and digests of its own, without its fused vectors."""
    weights = hashlib.sha256(inner.weights_sha256.encode())
    n_numbers = 0
    for name, value in sides.state_dict().items():
        weights.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        weights.update(value.detach().cpu().contiguous().numpy().tobytes())
        n_numbers += value.numel()
    preprocessing: dict[str, JsonValue] = {
        "preprocessing": inner.preprocessing_sha256,
        "side": config.model_dump(mode="json"),
    }
    modalities = tuple(each for each in inner.modalities if each != "fused")
    return inner.model_copy(
        update={
            "name": f"{inner.name}-side",
            "family": "side",
            "weights_sha256": weights.hexdigest(),
            "preprocessing_sha256": digest_json(preprocessing),
            "modalities": modalities,
            "dims": {each: inner.dims[each] for each in modalities},
            "n_parameters": inner.n_parameters + n_numbers,
        }
    )
