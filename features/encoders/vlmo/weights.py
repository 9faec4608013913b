"""Released VLMo files -> weights of `Vlmo`: positions resized, nothing silently missing."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from features.encoders.vlmo.config import VlmoConfig
from features.encoders.vlmo.model import HEADS, Head, Vlmo
from features.encoders.vlmo.positions import resize_bias_table, resize_positions
from features.errors import EncoderError

_DERIVED = (
    "relative_position_index",
    "text_relative_position_index",
    "text_imag_relative_position_index",
    "text_embeddings.position_ids",
)
"""Buffers of the released files that are computed here."""

_HEAD_TENSORS: dict[Head, tuple[str, ...]] = {
    "itc": ("itc_text_proj.fc.weight", "itc_image_proj.fc.weight", "logit_scale"),
    "itc_vl": ("itc_vl_text_proj.fc.weight", "itc_vl_image_proj.fc.weight", "logit_vl_scale"),
    "pooler": ("pooler.dense.weight", "pooler.dense.bias"),
    "itm": ("itm_score.fc.weight", "itm_score.fc.bias"),
    "mlm": (
        "mlm_score.bias",
        "mlm_score.transform.dense.weight",
        "mlm_score.transform.dense.bias",
        "mlm_score.transform.LayerNorm.weight",
        "mlm_score.transform.LayerNorm.bias",
        "mlm_score.decoder.weight",
    ),
}
_LISTED = 5
_TEXT_POSITIONS = "text_embeddings.position_embeddings.weight"
_TABLE = "relative_position_bias_table"


@dataclass(frozen=True)
class LoadReport:
    """What a loader should say."""

    heads: tuple[Head, ...]
    """Heads that the file has whole."""
    unused: tuple[str, ...]
    """Tensors of the file that nothing here reads."""
    resized: bool
    """Whether positions were interpolated to another picture size."""


def heads_of_weights(names: Mapping[str, object]) -> tuple[Head, ...]:
    """Heads that a checkpoint has whole."""
    return tuple(head for head in HEADS if all(name in names for name in _HEAD_TENSORS[head]))


def load_vlmo(
    weights: Mapping[str, Tensor], stored: VlmoConfig, config: VlmoConfig | None = None
) -> tuple[Vlmo, LoadReport]:
    """Build the network of a checkpoint, in evaluation mode.

    Args:
        weights: As `read_weights` gives them.
        stored: The sizes of the checkpoint.
        config: The sizes wanted, if others: picture size, text length, stochastic depth.

    Raises:
        EncoderError: The encoder lacks a tensor, or one has another shape.
    """
    config = config or stored
    heads = heads_of_weights(weights)
    model = Vlmo(config, heads)
    prepared = {name: tensor for name, tensor in weights.items() if name not in _DERIVED}
    if _TABLE in prepared and config.relative:
        prepared[_TABLE] = resize_bias_table(prepared[_TABLE], stored, config)
    if "transformer.pos_embed" in prepared and not config.relative:
        prepared["transformer.pos_embed"] = resize_positions(prepared["transformer.pos_embed"], config)
    if _TEXT_POSITIONS in prepared and not config.relative:
        prepared[_TEXT_POSITIONS] = _first_positions(prepared[_TEXT_POSITIONS], config)
    types = "token_type_embeddings.weight"
    if types in prepared and prepared[types].shape[0] > 2:  # a third one is a second picture's
        prepared[types] = prepared[types][:2]
    own = model.state_dict()
    missing = [name for name in own if name not in prepared]
    reshaped = [
        f"{name} is {tuple(prepared[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in prepared and prepared[name].shape != own[name].shape
    ]
    if missing or reshaped:
        what = [f"lack {len(missing)} tensors ({_some(missing)})"] if missing else []
        what += [f"have {len(reshaped)} of another shape ({_some(reshaped)})"] if reshaped else []
        raise EncoderError(
            f"the weights {' and '.join(what)} of a VLMo of width {config.width} and {config.depth} blocks; "
            "expected a released file, such as vlmo_base_patch16_224.pt; fetch it again."
        )
    model.load_state_dict({name: prepared[name] for name in own})
    unused = tuple(name for name in weights if name not in own and name not in _DERIVED)
    return model.eval(), LoadReport(heads, unused, resized=stored.grid != config.grid)


def _first_positions(positions: Tensor, config: VlmoConfig) -> Tensor:
    """Stored text positions, cut to those that are read."""
    if len(positions) < config.text_length:
        raise EncoderError(
            f"this VLMo has positions for {len(positions)} tokens of a text; {config.text_length} were asked "
            f"for; ask for at most {len(positions)}."
        )
    return positions[: config.text_length]


def _some(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
