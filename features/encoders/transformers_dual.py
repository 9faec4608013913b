"""Dual encoders of transformers: CLIP and its kin, whose picture and text vectors can be compared."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from features.catalogue import Modality
from features.encoders.base import Encoder, EncoderInfo, ImageTransform
from features.encoders.transformers_files import (
    ModelFiles,
    Plan,
    floating_dtype,
    load_model,
    make_info,
    square_px,
)
from features.encoders.transformers_pixels import image_transform, transform_settings, unpack_patches
from features.encoders.transformers_tokens import (
    PADDING,
    LibraryTokenizer,
    find_tokenizer,
    masked,
    padding_id,
    tokenizer_settings,
    wants_mask,
)
from features.errors import EncoderError

Towers = Callable[..., Tensor]


@dataclass(frozen=True)
class DualKind:
    """What sets one kind of dual encoder apart."""

    images: Towers
    """(model, pixels) -> (B, D)."""
    texts: Towers
    """(model, ids, mask) -> (B, D)."""
    dims: Callable[[Any], dict[Modality, int]]
    """Of a configuration."""
    fused: Towers | None = None
    """(model, pixels, ids, mask) -> (B, D)."""
    text_end: bool = False
    """Whether the text's vector is taken at its end token, which the tokenizer therefore has to set."""
    pads: bool = False
    """Whether the tower sees the padding, and needs every text at full length."""
    context_length: int = 0
    """Tokens of the texts it was trained on, where it has more positions."""
    any_size: bool = False
    """Whether pictures may have another size than the configuration states."""
    idle: str = ""
    """Regular expression of tensors that no vector depends on."""
    model: str = ""
    """transformers' class where it is not the one of `AutoModel`."""


class DualEncoder(Encoder):
    """Both towers of a dual encoder of transformers, and their fusion where there is one.

    Args:
        info: What this encoder is.
        model: transformers' model.
        kind: What sets it apart.
        transform: Its image transform.
        tokenizer: Its tokenizer.
        fill: The id in place of the padding.
        uses_mask: Whether the text tower is told which tokens are real.
    """

    def __init__(
        self,
        info: EncoderInfo,
        model: Any,
        kind: DualKind,
        transform: ImageTransform,
        tokenizer: LibraryTokenizer,
        *,
        fill: int,
        uses_mask: bool,
    ) -> None:
        pads_to = info.context_length if kind.pads else 0
        super().__init__(info, transform, tokenizer, pad_id=PADDING, pads_to=pads_to)
        self.model = model
        self.files: ModelFiles | None = None
        """Where it came from, by which it can be saved."""
        self._kind = kind
        self.fill = fill
        self.uses_mask = uses_mask

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the inverse temperature the towers were trained with; not every model keeps it."""
        scale = getattr(self.model, "logit_scale", None)
        if not isinstance(scale, nn.Parameter):
            raise AttributeError(f"{type(self.model).__name__} has no logit_scale.")  # noqa: TRY004 - of a property
        return scale

    @property
    def first_query(self) -> bool:
        """Whether BLIP-2's first query was asked for instead of the queries' mean."""
        return self._kind is _BLIP2_FIRST_QUERY

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D) float32."""
        return self._kind.images(self.model, pixels).float()

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, D) float32."""
        ids, mask = masked(tokens, self.fill)
        return self._kind.texts(self.model, ids, mask if self.uses_mask else None).float()

    def encode_pairs(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """(B, 3, H, W) and (B, L) -> (B, D) float32."""
        if self._kind.fused is None:
            return super().encode_pairs(pixels, tokens)
        ids, mask = masked(tokens, self.fill)
        return self._kind.fused(self.model, pixels, ids, mask).float()


def _images(model: Any, pixels: Tensor) -> Tensor:
    features: Tensor = model.get_image_features(pixel_values=_typed(model, pixels)).pooler_output
    return features


def _texts(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    features: Tensor = model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    return features


def _aimv2_texts(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    """With a causal mask of our own.

    The library (5.23) makes one only for batches with padding, and lets every token see all in others: a text
    would have another vector alone than in a batch.
    """
    length = ids.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()[None, None]
    if mask is not None:
        allowed = allowed & mask[:, None, None].bool()
    dtype = floating_dtype(model)
    hidden = torch.zeros(allowed.shape, dtype=dtype, device=ids.device)
    return _texts(model, ids, hidden.masked_fill(~allowed, torch.finfo(dtype).min))


def _typed(model: Any, pixels: Tensor) -> Tensor:
    return pixels.to(floating_dtype(model))


def _naflex_images(model: Any, pixels: Tensor) -> Tensor:
    """SigLIP 2 on patches of a picture that keeps its aspect."""
    patches, mask, shapes = unpack_patches(pixels)
    features: Tensor = model.get_image_features(
        pixel_values=_typed(model, patches), pixel_attention_mask=mask, spatial_shapes=shapes
    ).pooler_output
    return features


def _flava_images(model: Any, pixels: Tensor) -> Tensor:
    """The first token's projection, as FLAVA's contrastive loss takes it; the library projects all tokens."""
    return _images(model, pixels)[:, 0]


def _flava_texts(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    return _texts(model, ids, mask)[:, 0]


def _flava_fused(model: Any, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The first token of the multimodal tower."""
    given = model(input_ids=ids, pixel_values=_typed(model, pixels), attention_mask=mask)
    states: Tensor = given.multimodal_embeddings
    return states[:, 0]


def _blip_images(model: Any, pixels: Tensor) -> Tensor:
    """Of BlipForImageTextRetrieval, whose projections are the trained ones."""
    features: Tensor = model.vision_proj(model.vision_model(_typed(model, pixels)).last_hidden_state[:, 0])
    return features


def _blip_texts(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    states = model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    features: Tensor = model.text_proj(states[:, 0])
    return features


def _blip_fused(model: Any, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """What the image-text matching head reads: the first token of the text that looked at the picture."""
    seen = model.vision_model(_typed(model, pixels)).last_hidden_state
    states: Tensor = model.text_encoder(
        input_ids=ids,
        attention_mask=mask,
        encoder_hidden_states=seen,
        encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
    ).last_hidden_state
    return states[:, 0]


def _blip2_queries(model: Any, pixels: Tensor) -> Tensor:
    """(B, Q, D) of unit length: what each query saw in the picture."""
    seen = model.vision_model(_typed(model, pixels)).last_hidden_state
    states = model.qformer(
        query_embeds=model.query_tokens.expand(len(seen), -1, -1),
        encoder_hidden_states=seen,
        encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
    ).last_hidden_state
    return nn.functional.normalize(model.vision_projection(states), dim=-1)


def _blip2_images(model: Any, pixels: Tensor, *, first: bool) -> Tensor:
    queries = _blip2_queries(model, pixels)
    return queries[:, 0] if first else queries.mean(dim=1)


def _blip2_texts(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    states = model.qformer(
        query_embeds=model.embeddings(input_ids=ids), query_length=0, attention_mask=mask
    ).last_hidden_state
    return nn.functional.normalize(model.text_projection(states[:, 0]), dim=-1)


def _blip2_fused(model: Any, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The mean of the queries that saw picture and text; the image-text matching head is linear in it."""
    seen = model.vision_model(_typed(model, pixels)).last_hidden_state
    queries = model.query_tokens.expand(len(seen), -1, -1)
    n_queries = queries.shape[1]
    states: Tensor = model.qformer(
        query_embeds=model.embeddings(input_ids=ids, query_embeds=queries),
        query_length=n_queries,
        attention_mask=torch.cat([mask.new_ones(len(mask), n_queries), mask], dim=1),
        encoder_hidden_states=seen,
        encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
    ).last_hidden_state
    return states[:, :n_queries].mean(dim=1)


def _projected(config: Any) -> dict[Modality, int]:
    return {"image": config.projection_dim, "text": config.projection_dim}


def _siglip_dims(config: Any) -> dict[Modality, int]:
    text = config.text_config
    return {"image": config.vision_config.hidden_size, "text": text.projection_size or text.hidden_size}


def _align_dims(config: Any) -> dict[Modality, int]:
    from transformers.models.align.modeling_align import round_filters  # noqa: PLC0415 - seconds of imports

    vision = config.vision_config
    return {"image": round_filters(vision, vision.out_channels[-1]), "text": config.projection_dim}


def _flava_dims(config: Any) -> dict[Modality, int]:
    return {**_projected(config), "fused": config.multimodal_config.hidden_size}


def _blip_dims(config: Any) -> dict[Modality, int]:
    shared = config.image_text_hidden_size
    return {"image": shared, "text": shared, "fused": config.text_config.hidden_size}


def _blip2_dims(config: Any) -> dict[Modality, int]:
    shared = config.image_text_hidden_size
    return {"image": shared, "text": shared, "fused": config.qformer_config.hidden_size}


_CLIP = DualKind(_images, _texts, _projected, text_end=True)

DUAL_KINDS: dict[str, DualKind] = {
    "clip": _CLIP,
    "clipseg": DualKind(_images, _texts, _projected, text_end=True, any_size=True, idle=r"^decoder\."),
    "metaclip_2": _CLIP,
    "aimv2": DualKind(_images, _aimv2_texts, _projected, text_end=True),
    "siglip": DualKind(_images, _texts, _siglip_dims, pads=True),
    "siglip2": DualKind(_naflex_images, _texts, _siglip_dims, pads=True, any_size=True),
    "align": DualKind(
        _images, _texts, _align_dims, context_length=64, any_size=True, idle=r"^text_model\.pooler\."
    ),
    "altclip": DualKind(_images, _texts, _projected, context_length=77, idle=r"\.pooler\."),
    "chinese_clip": DualKind(_images, _texts, _projected, context_length=52, idle=r"\.pooler\."),
    "blip": DualKind(
        _blip_images,
        _blip_texts,
        _blip_dims,
        fused=_blip_fused,
        idle=r"^itm_head\.",
        model="BlipForImageTextRetrieval",
    ),
    "blip-2": DualKind(
        partial(_blip2_images, first=False),
        _blip2_texts,
        _blip2_dims,
        fused=_blip2_fused,
        idle=r"^itm_head\.",
        model="Blip2ForImageTextRetrieval",
    ),
    "flava": DualKind(
        _flava_images, _flava_texts, _flava_dims, fused=_flava_fused, idle=r"\.pooler\.|(^|\.)mask_token$"
    ),
}
"""transformers' model_type -> what sets it apart."""

_BLIP_MODEL = DualKind(_images, _texts, _projected)
"""Of checkpoints of BlipModel itself, which has other projections and no matching."""

_BLIP2_FIRST_QUERY = DualKind(
    partial(_blip2_images, first=True),
    _blip2_texts,
    _blip2_dims,
    fused=_blip2_fused,
    idle=r"^itm_head\.",
    model="Blip2ForImageTextRetrieval",
)

DualPool = Literal["mean", "cls"]


def plan_dual(files: ModelFiles, model_class: Any, config: Any, pool: DualPool | None) -> Plan:
    """How a dual encoder is described and built.

    Args:
        files: Of the model.
        model_class: transformers' class of `AutoModel`.
        config: Its configuration.
        pool: For BLIP-2 only: its queries' mean (the default), or the first one (cls).

    Raises:
        EncoderError: An option does not apply, or tokenizer or processor are missing or do not fit.
    """
    kind = _kind(files, pool)
    if kind.model:
        import transformers  # noqa: PLC0415 - seconds of imports

        model_class = getattr(transformers, kind.model)
    transform, side = image_transform(files)
    stated = square_px(getattr(_vision(config), "image_size", None))
    if stated and stated != side and not kind.any_size:
        raise EncoderError(
            f"encoder {files.spec!r}: its image processor gives {side} x {side} pixels, its model takes "
            f"{stated} x {stated}; set size and crop_size in preprocessor_config.json to {stated}."
        )
    text = getattr(config, "text_config", None)
    if files.model_type == "blip-2":
        text = config.qformer_config
    tokenizer = find_tokenizer(files, kind.context_length or _positions(text), pads=kind.pads)
    context_length = tokenizer.context_length
    uses_mask = not kind.pads or wants_mask(tokenizer)
    fill = _fill(files, kind, text, tokenizer)
    if kind.text_end:
        _check_text_end(files, text, tokenizer)
    info = make_info(
        files,
        vectors={"model": model_class.__name__, "pool": pool, "mask": uses_mask, "fill": fill},
        dims=kind.dims(config),
        pixels=transform_settings(transform),
        tokenizer=tokenizer_settings(tokenizer),
        image_size_px=side,
        context_length=context_length,
    )

    def build() -> Encoder:
        model, notes = load_model(files, model_class, config, {}, idle=kind.idle)
        encoder = DualEncoder(info, model, kind, transform, tokenizer, fill=fill, uses_mask=uses_mask)
        encoder.notes = notes
        return encoder

    return Plan(info, build)


def _kind(files: ModelFiles, pool: DualPool | None) -> DualKind:
    """The kind, after a checkpoint's and a person's choice.

    Raises:
        EncoderError: Pooling is asked for where the model decides it.
    """
    kind = files.model_type
    if pool is not None and kind != "blip-2":
        raise EncoderError(
            f"encoder {files.spec!r}: option pool does not apply to {kind}, whose projections were "
            "trained for one way of pooling; leave it out."
        )
    if kind == "blip" and files.config.get("architectures") == ["BlipModel"]:
        return _BLIP_MODEL
    return _BLIP2_FIRST_QUERY if pool == "cls" else DUAL_KINDS[kind]


def _vision(config: Any) -> Any:
    return getattr(config, "vision_config", None) or getattr(config, "image_config", None)


def _positions(text: Any) -> int:
    return int(getattr(text, "max_position_embeddings", 0) or 0)


def _fill(files: ModelFiles, kind: DualKind, text: Any, tokenizer: LibraryTokenizer) -> int:
    """The id in place of the padding: the library's where the tower sees it or counts positions by it."""
    if kind.pads:
        padding = padding_id(tokenizer)
        if padding is None:
            raise EncoderError(
                f"encoder {files.spec!r}: its tokenizer has no token for padding, which its text tower "
                "sees; set pad_token in tokenizer_config.json."
            )
        return padding
    if kind.text_end:
        return 0  # lies behind the end, where a causal tower does not look
    return int(getattr(text, "pad_token_id", 0) or 0)


def _check_text_end(files: ModelFiles, text: Any, tokenizer: LibraryTokenizer) -> None:
    """See that the tower finds the end of a text: its id, or the highest one in old configurations of CLIP.

    Raises:
        EncoderError: The tokenizer sets no such token; the tower would take the first token's vector.
    """
    (ids,) = tokenizer(["a"])
    end = text.eos_token_id
    highest = end == 2 and files.model_type in ("clip", "clipseg")
    if ids[-1] != (max(ids) if highest else end) or len(ids) < 2:
        expected = "the highest id" if highest else f"the id {end}"
        raise EncoderError(
            f"encoder {files.spec!r}: its tokenizer ends a text with the id {ids[-1]}, but its text tower "
            f"takes the vector at {expected}; expected the tokenizer of the same repository, with "
            "eos_token set."
        )
