"""CLIP and its kin, by way of open_clip: any of its architectures, any of its weights."""

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import PIL
import torch
from pydantic import JsonValue
from torch import Tensor, nn

from features.encoders.base import Encoder, EncoderInfo, Tokenizer, digest_file, digest_json
from features.encoders.clip_specs import TOKENIZER_FILES, ClipSource, resolve_clip
from features.encoders.clip_tokens import ClipTokenizer, FolderTokenizer
from features.encoders.clip_weights import count_numbers, load_weights
from features.encoders.hub import fetch_from_hub
from features.encoders.pixels import PixelConfig, PixelTransform
from features.errors import EncoderError
from features.images import IMAGE_DECODING_VERSION
from features.texts import TEXT_CLEANING_VERSION

_DEFAULT_CONTEXT_LENGTH = 77
"""Of open_clip's text towers that state none."""


class ClipEncoder(Encoder):
    """Both towers of a dual encoder that open_clip built.

    Args:
        info: What this encoder is.
        model: open_clip's CLIP, CustomTextCLIP or CoCa.
        pixels: How pictures are prepared.
        tokenizer: Its ids end with the highest id of each text if ``model`` pools there.
        model_cfg: open_clip's settings, by which it can be saved; None for one that cannot.
    """

    def __init__(
        self,
        info: EncoderInfo,
        model: nn.Module,
        pixels: PixelConfig,
        tokenizer: Tokenizer,
        *,
        model_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        tower = _causal_tower(model)
        cut = tower is not None and not isinstance(tokenizer, FolderTokenizer)
        super().__init__(info, PixelTransform(pixels), tokenizer, pads_to=0 if cut else info.context_length)
        self.model = model
        self.model_cfg = model_cfg

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the inverse temperature the towers were trained with."""
        scale = self.model.logit_scale
        if not isinstance(scale, nn.Parameter):
            raise TypeError(
                f"{type(self.model).__name__}.logit_scale is {type(scale).__name__}, no parameter."
            )
        return scale

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D) float32."""
        features: Tensor = cast("Any", self.model).encode_image(pixels, normalize=False)
        return features.float()

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, D) float32; a causal tower runs on L tokens, however short."""
        tower = None if self.pads_to else _causal_tower(self.model)
        if tower is None:
            features: Tensor = cast("Any", self.model).encode_text(tokens, normalize=False)
        else:
            features = encode_causal(tower, tokens)
        return features.float()


def _causal_tower(model: nn.Module) -> Any:
    """The text tower if what follows a text's end cannot change its vector, else None.

    That holds where attention is causal and the vector is taken at the end of text; not for towers that see
    every token (SigLIP), or pool the first, the last or an appended token (CoCa).
    """
    tower = getattr(model, "text", model)
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    causal = getattr(tower, "attn_mask", None) is not None
    appended = getattr(tower, "cls_emb", None) is not None or getattr(tower, "use_pad_mask", False)
    return tower if causal and pool == "argmax" and not appended else None


def encode_causal(tower: Any, tokens: Tensor) -> Tensor:
    """open_clip's text forward on the first L positions; it refuses fewer than all.

    Args:
        tower: A text tower for which `_causal_tower` holds.
        tokens: (B, L), every row with its end of text, which has the highest id.

    Returns:
        (B, D), what the full context length gives.
    """
    dtype = tower.transformer.get_cast_dtype()
    length = tokens.shape[1]
    hidden = tower.token_embedding(tokens).to(dtype) + tower.positional_embedding[:length].to(dtype)
    hidden = tower.transformer(hidden, attn_mask=tower.attn_mask[:length, :length])
    hidden = tower.ln_final(hidden)  # (B, L, W)
    pooled: Tensor = hidden[torch.arange(len(tokens), device=tokens.device), tokens.argmax(dim=1)]
    projection = tower.text_projection
    if projection is None:
        return pooled
    projected: Tensor = projection(pooled) if isinstance(projection, nn.Module) else pooled @ projection
    return projected


def describe_clip(spec: str) -> EncoderInfo:
    """Info of `open_clip/...`: the weights are fetched and hashed, nothing is built."""
    return _describe(resolve_clip(spec))


def load_clip(spec: str) -> Encoder:
    """The encoder of `open_clip/...`.

    Raises:
        EncoderError: It cannot be had, or the weights do not fit the architecture.
    """
    source = resolve_clip(spec)
    info = _describe(source)
    model = build_clip(source.model)
    load_weights(model, source.weights, source.spec)
    return ClipEncoder(info, model, source.pixels, _tokenizer(source), model_cfg=source.model)


def build_clip(config: Mapping[str, Any]) -> nn.Module:
    """open_clip's module of a `model_cfg`, with random weights.

    Raises:
        EncoderError: open_clip refuses it, or it is built around a text model whose settings are not cached
            and cannot be fetched.
    """
    import open_clip  # noqa: PLC0415 - seconds of imports

    settings = deepcopy(dict(config))
    custom = settings.pop("custom_text", False) or "hf_model_name" in settings["text_cfg"]
    if "timm_model_name" in settings["vision_cfg"]:
        settings["vision_cfg"]["timm_model_pretrained"] = False  # no weights beside those of the file
    if "hf_model_name" in settings["text_cfg"]:
        folder = text_model_folder(settings["text_cfg"]["hf_model_name"])
        settings["text_cfg"] |= {"hf_model_pretrained": False, "hf_model_name": str(folder)}
    kind = open_clip.CLIP
    if custom:
        kind = open_clip.CoCa if "multimodal_cfg" in settings else open_clip.CustomTextCLIP
    try:
        model: nn.Module = kind(**settings)
    except Exception as error:  # open_clip asserts, and passes on what timm and transformers raise
        raise EncoderError(
            f"open_clip cannot build the architecture ({error!r}); check `model_cfg`, and that the packages "
            "open_clip_torch and timm are new enough."
        ) from error
    return model


def text_model_folder(repository: str) -> Path:
    """Where the settings of a text model are; given its name, transformers would ask the hub for minutes.

    A path of a folder with `config.json` stands for itself.
    """
    if Path(repository).is_absolute():
        return Path(repository)
    instead = f"the same again, with the hub's cache of {repository} in its place"
    return fetch_from_hub(repository, ["config.json"], instead=instead).parent


def preprocessing_digest(
    model: Mapping[str, Any], pixels: PixelConfig, tokenizer: Mapping[str, JsonValue]
) -> str:
    """Digest of all that changes vectors beside the weights; the decoder and the activation belong to it."""
    return digest_json(
        {
            "architecture": dict(model),
            "pixels": pixels.model_dump(mode="json"),
            "decoder": {"pillow": PIL.__version__.split(".")[0], "version": IMAGE_DECODING_VERSION},
            "tokenizer": dict(tokenizer),
            "text_cleaning": TEXT_CLEANING_VERSION,
        }
    )


def _describe(source: ClipSource) -> EncoderInfo:
    text = source.model["text_cfg"]
    tokenizer: dict[str, JsonValue] = {
        "name": text.get("hf_tokenizer_name") or "clip",
        "kwargs": text.get("tokenizer_kwargs") or {},
        "mode": text.get("tokenizer_mode") or "",
        "sha256": _tokenizer_sha256(source.tokenizer),
    }
    dim = int(source.model["embed_dim"])
    return EncoderInfo(
        spec=source.spec,
        name=source.name,
        family="open_clip",
        weights_sha256=digest_file(source.weights),
        preprocessing_sha256=preprocessing_digest(source.model, source.pixels, tokenizer),
        modalities=("image", "text"),
        dims={"image": dim, "text": dim},
        image_size_px=source.pixels.size_px,
        context_length=_context_length(source),
        n_parameters=count_numbers(source.weights),
    )


def _context_length(source: ClipSource) -> int:
    return int(source.model["text_cfg"].get("context_length", _DEFAULT_CONTEXT_LENGTH))


def _tokenizer(source: ClipSource) -> Tokenizer:
    """CLIP's own byte pairs, or what lies in the folder of the tower's own tokenizer."""
    text = source.model["text_cfg"]
    settings = dict(text.get("tokenizer_kwargs") or {})
    if source.tokenizer is None:
        clean = settings.pop("clean", "lower")
        if settings:
            raise EncoderError(f"encoder {source.spec!r}: tokenizer_kwargs {settings} are for training only.")
        return ClipTokenizer(_context_length(source), clean)
    if text.get("tokenizer_mode"):
        settings["tokenizer_mode"] = text["tokenizer_mode"]
    tokenizer = FolderTokenizer(
        str(source.tokenizer), _context_length(source), json.dumps(settings, sort_keys=True)
    )
    try:
        tokenizer([""])
    except Exception as error:  # transformers raises many kinds for a missing or damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EncoderError(
            f"encoder {source.spec!r}: no tokenizer can be made of {str(source.tokenizer)!r} ({reason}); "
            "fetch the whole repository again."
        ) from error
    return tokenizer


def _tokenizer_sha256(folder: Path | None) -> str:
    """Of the file that a tokenizer cannot do without; "" for CLIP's own byte pairs."""
    if folder is None:
        return ""
    return digest_file(next(folder / name for name in TOKENIZER_FILES if (folder / name).is_file()))
