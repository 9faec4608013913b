"""The sizes of a VLMo, as stated for the released variants or as a checkpoint's shapes betray them."""

import math
from collections.abc import Mapping

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from features.errors import EncoderError

TABLE_TEXT_POSITIONS = 196
"""Text length behind the released bias tables, whatever length is read."""
TEXT_LENGTH = 40
"""Tokens that the released models read."""
_ABSOLUTE_HEADS = 16
"""Heads of base_plus; without a bias table no shape tells."""


class VlmoConfig(BaseModel, frozen=True, extra="forbid"):
    """What a VLMo's modules are made from (arXiv 2111.02358, section 2; released checkpoints)."""

    width: PositiveInt = 768
    depth: PositiveInt = 12
    n_heads: PositiveInt = 12
    mlp_width: PositiveInt = 3072
    vl_start: NonNegativeInt = Field(10, description="First block with a vision-language expert, from 0.")
    patch_px: PositiveInt = 16
    image_size_px: PositiveInt = 224
    text_length: PositiveInt = Field(
        TEXT_LENGTH, description="Most tokens of a text, start and end included."
    )
    table_text_positions: PositiveInt = Field(
        TABLE_TEXT_POSITIONS, description="Text length behind the bias table."
    )
    vocabulary: PositiveInt = 30_522
    relative: bool = Field(True, description="Relative position bias; else absolute positions (base_plus).")
    layer_scale: bool = True
    drop_path: float = Field(0.0, ge=0, lt=1, description="Stochastic depth of the last block, in training.")

    @model_validator(mode="after")
    def _fits(self) -> "VlmoConfig":
        if self.width % self.n_heads:
            raise ValueError(f"width {self.width} is no multiple of n_heads {self.n_heads}")
        if self.image_size_px % self.patch_px:
            raise ValueError(f"image_size_px {self.image_size_px} is no multiple of patch_px {self.patch_px}")
        if self.relative and self.text_length > self.table_text_positions:
            raise ValueError(
                f"text_length {self.text_length} is more than the bias table's {self.table_text_positions}"
            )
        if self.vl_start > self.depth:
            raise ValueError(f"vl_start {self.vl_start} is more than depth {self.depth}")
        return self

    @property
    def grid(self) -> int:
        """Patches along a side of the picture."""
        return self.image_size_px // self.patch_px

    @property
    def image_rows(self) -> int:
        """Rows of the bias table that belong to picture tokens alone."""
        return (2 * self.grid - 1) ** 2 + 3

    @property
    def table_rows(self) -> int:
        """Rows of the bias table."""
        return self.image_rows + 2 * self.table_text_positions + 2


_PLUS = {"width": 544, "depth": 24, "n_heads": 16, "mlp_width": 2176, "vl_start": 21}
_LARGE = {"width": 1024, "depth": 24, "n_heads": 16, "mlp_width": 4096, "vl_start": 21}
VARIANTS: dict[str, VlmoConfig] = {
    "base": VlmoConfig(),
    "base_plus": VlmoConfig(**_PLUS, relative=False, layer_scale=False),
    "large": VlmoConfig(**_LARGE),
}
"""The released models."""


def config_of_weights(
    weights: Mapping[str, Tensor],
    *,
    n_heads: int = 0,
    table_text_positions: int = TABLE_TEXT_POSITIONS,
    text_length: int = TEXT_LENGTH,
) -> VlmoConfig:
    """Read a VLMo's sizes off its tensors.

    Args:
        weights: Name -> tensor, in the layout of the released files; only shapes are looked at.
        n_heads: 0: from the bias table, or 16 where there is none.
        table_text_positions: Text length behind the bias table; no shape tells it apart from the picture's.
        text_length: Most tokens read; less where the stored text positions are fewer.

    Raises:
        EncoderError: A tensor that tells a size is missing, or the sizes contradict each other.
    """
    try:
        width = weights["transformer.cls_token"].shape[-1]
        patches = weights["transformer.patch_embed.proj.weight"].shape
        words = weights["text_embeddings.word_embeddings.weight"].shape
        mlp_width = weights["transformer.blocks.0.mlp_imag.fc1.weight"].shape[0]
        positions = weights["text_embeddings.position_embeddings.weight"].shape
    except KeyError as error:
        raise EncoderError(
            f"the weights have no tensor {error.args[0]!r}, so they are no VLMo; expected a released file "
            "such as vlmo_base_patch16_224.pt."
        ) from error
    blocks = _block_numbers(weights, "norm1.weight")
    with_vl = _block_numbers(weights, "mlp_vl.fc1.weight")
    depth = len(blocks)
    table = weights.get("relative_position_bias_table")
    if table is not None:
        side = math.isqrt(max(table.shape[0] - 2 * table_text_positions - 5, 0))
        if side**2 + 2 * table_text_positions + 5 != table.shape[0] or side % 2 == 0 or not depth:
            raise EncoderError(
                f"the weights' bias table has {table.shape[0]} rows, which no square picture gives; "
                f"expected (2G - 1)^2 + {2 * table_text_positions + 5} for G patches a side."
            )
        grid, heads = (side + 1) // 2, table.shape[1] // depth
    else:
        if "transformer.pos_embed" not in weights:
            raise EncoderError(
                "the weights have neither relative_position_bias_table nor transformer.pos_embed; expected "
                "one of them."
            )
        grid, heads = math.isqrt(weights["transformer.pos_embed"].shape[1] - 1), _ABSOLUTE_HEADS
    return VlmoConfig(
        width=width,
        depth=depth,
        n_heads=n_heads or heads,
        mlp_width=mlp_width,
        vl_start=min(with_vl, default=depth),
        patch_px=patches[-1],
        image_size_px=grid * patches[-1],
        text_length=text_length if table is not None else min(text_length, positions[0]),
        table_text_positions=table_text_positions,
        vocabulary=words[0],
        relative=table is not None,
        layer_scale="transformer.blocks.0.gamma_1" in weights,
    )


def _block_numbers(weights: Mapping[str, Tensor], ending: str) -> list[int]:
    start = "transformer.blocks."
    numbers = (name.removeprefix(start).split(".", 1) for name in weights if name.startswith(start))
    return sorted(int(number) for number, rest in numbers if rest == ending)
