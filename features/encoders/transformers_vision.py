"""Vision models of transformers: ViT, DINO, Swin, ResNet, ConvNeXt and whatever else `AutoModel` knows."""

from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor

from features.encoders.base import Encoder, EncoderInfo, ImageTransform
from features.encoders.controls import blank_texts
from features.encoders.transformers_files import (
    ModelFiles,
    Plan,
    first_line,
    floating_dtype,
    load_model,
    make_info,
    on_meta,
)
from features.encoders.transformers_pixels import image_transform, transform_settings
from features.errors import EncoderError

VisionPool = Literal["cls", "mean", "pooler"]

_PREFIX_TENSORS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
"""Tensors of tokens that stand before the patches, by the last part of their names."""

_POOLER_FIRST = frozenset(
    {"clip_vision_model", "chinese_clip_vision_model", "metaclip_2_vision_model", "beit", "data2vec-vision"}
)
"""The last normalisation of these belongs to the pooler; the tokens of the output lack it."""

_IDLE = r"(^|\.)mask_token$"
"""Only training hides patches."""


class VisionModelEncoder(Encoder):
    """A vision model and how one vector is made of what it gives.

    Args:
        info: What this encoder is.
        model: transformers' model without a head.
        transform: Its image transform.
        pool: cls: the first token; mean: of the patches, without first token and registers, or of a map;
            pooler: the model's own.
        layer: Which hidden state, as transformers counts them (-2: the last but one); None: the output.
    """

    def __init__(
        self, info: EncoderInfo, model: Any, transform: ImageTransform, pool: VisionPool, layer: int | None
    ) -> None:
        super().__init__(info, transform, blank_texts)
        self.model = model
        self.files: ModelFiles | None = None
        """Where it came from, by which it can be saved."""
        self.pool = pool
        self.layer = layer

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D) float32."""
        return vision_vectors(self.model, pixels, self.pool, self.layer)


def vision_vectors(model: Any, pixels: Tensor, pool: VisionPool, layer: int | None) -> Tensor:
    """(B, 3, H, W) -> (B, D) float32.

    Raises:
        ValueError: The model has no pooler, no first token, or no such layer.
    """
    more = {} if layer is None else {"output_hidden_states": True}
    given = model(pixel_values=pixels.to(floating_dtype(model)), **more)
    if pool == "pooler":
        pooled = getattr(given, "pooler_output", None)
        if pooled is None:
            raise ValueError("it has no pooler")
        vectors: Tensor = pooled
        return vectors.flatten(1).float()
    states: Tensor = given.last_hidden_state if layer is None else _hidden_state(given.hidden_states, layer)
    if pool == "mean" and model.config.model_type == "yolos":
        raise ValueError("its tokens behind the patches stand for things to detect")
    if pool == "mean":
        return _mean(states, _n_prefix(model, states))
    if not _n_prefix(model, states) or states.ndim != 3:
        raise ValueError("it has no first token that stands for the picture")
    return states[:, 0].float()


def _mean(states: Tensor, n_prefix: int) -> Tensor:
    if states.ndim == 4:  # (B, C, H, W)
        return states.float().mean(dim=(2, 3))
    return states[:, n_prefix:].float().mean(dim=1)


def _hidden_state(states: Any, layer: int) -> Tensor:
    n_states = len(states or ())
    if not -n_states <= layer < n_states:
        raise ValueError(f"it has {n_states} hidden states, so expected {-n_states} to {n_states - 1}")
    state: Tensor = states[layer]
    return state


def _n_prefix(model: Any, states: Tensor) -> int:
    """How many tokens stand before the patches."""
    if states.ndim != 3:
        return 0
    if model.config.model_type == "dinov3_convnext":
        return 1  # the pooled map, put in front of it
    widths = getattr(model.config, "hidden_sizes", None)
    if widths and states.shape[2] != widths[-1]:
        return 0  # PVT, which puts its first token before the last stage only
    found = _prefix_tensors(model)
    return sum(value.shape[1] if name == "register_tokens" else 1 for name, value in found.items())


def _prefix_tensors(model: Any) -> dict[str, Tensor]:
    """Those of the embeddings; AIMv2's pooling head has one by the same name, which stands nowhere."""
    return {
        name.rpartition(".")[2]: value
        for name, value in model.named_parameters()
        if name.rpartition(".")[2] in _PREFIX_TENSORS and "embed" in name
    }


def plan_vision(
    files: ModelFiles,
    model_class: Any,
    config: Any,
    pool: VisionPool | None,
    layer: int | None,
    *,
    has_pooler: bool,
) -> Plan:
    """How a vision model becomes an encoder; its shapes are asked of a model without memory for weights.

    Args:
        files: Of the model.
        model_class: transformers' class.
        config: Its configuration.
        pool: None for the default: cls where there is such a token, else the pooler, else the mean.
        layer: As for `VisionModelEncoder`.
        has_pooler: Whether the class can be built with and without a pooling layer.

    Raises:
        EncoderError: An option does not apply to the model, or its processor is missing.
    """
    transform, side = image_transform(files)
    config = _deterministic(config)
    chosen, arguments = _choose(files, model_class, config, pool, layer, has_pooler=has_pooler)
    if chosen == "pooler" and layer is not None:
        raise EncoderError(
            f"encoder {files.spec!r}: option pool=pooler does not apply together with a layer; choose cls "
            "or mean."
        )
    skeleton = on_meta(model_class, config, files.spec, **arguments)
    empty = torch.empty(1, 3, side, side, device="meta")
    try:
        if pool is None and chosen == "pooler" and getattr(skeleton(empty), "pooler_output", None) is None:
            chosen = "mean"
        dim = vision_vectors(skeleton, empty, chosen, layer).shape[1]
    except Exception as error:  # ours, and what an architecture says to a picture of another size
        given = f"pool={chosen}" + ("" if layer is None else f", layer={layer}")
        raise EncoderError(
            f"encoder {files.spec!r}: {files.model_type} gives no vectors of {side} x {side} pixels with "
            f"{given} ({first_line(error)}); choose another pool (cls, mean or pooler) or layer."
        ) from error
    info = make_info(
        files,
        vectors={"pool": chosen, "layer": layer},
        dims={"image": dim},
        pixels=transform_settings(transform),
        image_size_px=side,
    )
    final = chosen

    def build() -> Encoder:
        model, notes = load_model(files, model_class, config, arguments, idle=_IDLE)
        encoder = VisionModelEncoder(info, model, transform, final, layer)
        encoder.notes = notes
        return encoder

    return Plan(info, build)


def _choose(
    files: ModelFiles,
    model_class: Any,
    config: Any,
    pool: VisionPool | None,
    layer: int | None,
    *,
    has_pooler: bool,
) -> tuple[VisionPool, dict[str, bool]]:
    """The pooling, and whether the class is built with a pooling layer: checkpoints may lack its weights."""
    if pool is not None:
        return pool, {"add_pooling_layer": pool == "pooler"} if has_pooler else {}
    if layer is None and files.model_type in _POOLER_FIRST:
        return "pooler", {}
    found = _prefix_tensors(on_meta(model_class, config, files.spec))
    if found.keys() & {"cls_token", "class_embedding"} and not hasattr(config, "depths"):
        return "cls", {"add_pooling_layer": False} if has_pooler else {}
    if layer is not None:
        return "mean", {"add_pooling_layer": False} if has_pooler else {}
    return "pooler", {}


def _deterministic(config: Any) -> Any:
    """Without the random hiding of patches that a masked autoencoder is trained with."""
    if not getattr(config, "mask_ratio", 0):
        return config
    changed = deepcopy(config)
    changed.mask_ratio = 0.0
    return changed
