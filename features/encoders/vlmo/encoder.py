"""From `vlmo/base` to an encoder of pictures, texts and pairs."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import PIL
import torch
from pydantic import BaseModel, JsonValue, NonNegativeInt
from torch import Tensor

from features.catalogue import Modality
from features.encoders.base import Encoder, EncoderInfo, digest_file, digest_json
from features.encoders.clip_weights import read_weights
from features.encoders.download import fetch_file
from features.encoders.hub import fetch_from_hub
from features.encoders.options import read_options
from features.encoders.pixels import PixelConfig, PixelTransform
from features.encoders.vlmo.config import TEXT_LENGTH, VARIANTS, VlmoConfig, config_of_weights
from features.encoders.vlmo.model import Head, Vlmo
from features.encoders.vlmo.weights import heads_of_weights, load_vlmo
from features.encoders.word_pieces import WordPieceTokenizer
from features.errors import EncoderError
from features.images import IMAGE_DECODING_VERSION
from features.texts import TEXT_CLEANING_VERSION

RELEASES_URL = "https://github.com/wenhui0924/vlmo_ckpts/releases/download/vlmo/"
RELEASES = {"224": "224", "coco": "384_coco", "f30k": "384_f30k", "nlvr2": "384_nlvr2", "vqa": "480_vqa"}
"""What is typed after the colon -> the ending of the released file's name."""

_FAMILY = "vlmo/"
_CUSTOM = "custom"
_SUFFIXES = (".safetensors", ".pt", ".bin", ".pth", ".ckpt")
_VOCABULARY_REPOSITORY = "google-bert/bert-base-uncased"
_VOCABULARY_FILE = "vocab.txt"
_SIZES = ("width", "depth", "n_heads", "mlp_width", "relative")
"""What must be as the variant says; the picture's size and the text length may differ."""


class VlmoOptions(BaseModel, frozen=True, extra="forbid"):
    """What may follow a specification as `+name=value`."""

    output: Literal["embedding", "vl", "cls"] = "embedding"
    """Of a picture or a text alone: the contrastive embedding, that of the vision-language experts, or the
    class token behind the final norm."""
    fused: Literal["pooled", "cls"] = "pooled"
    """Of a pair: the pooler's output or the first token."""
    image_size: NonNegativeInt = 0
    """Side of the picture in pixels; 0: the checkpoint's. Positions are interpolated."""
    tokens: NonNegativeInt = TEXT_LENGTH
    """Most tokens of a text."""
    vocab: str = ""
    """Path of BERT's vocab.txt; left out: beside the weights, else from the hub."""


@dataclass(frozen=True)
class VlmoSource:
    """Everything that a specification stands for."""

    spec: str
    name: str
    options: VlmoOptions
    weights: Path
    vocabulary: Path
    variant: str


class VlmoEncoder(Encoder):
    """VLMo's single-modality embeddings and its fused vector, raw.

    Args:
        info: What this encoder is.
        model: With the heads that the outputs need.
        options: Which outputs.
        tokenizer: BERT's word pieces.
    """

    def __init__(
        self, info: EncoderInfo, model: Vlmo, options: VlmoOptions, tokenizer: WordPieceTokenizer
    ) -> None:
        super().__init__(info, PixelTransform(pixel_config(model.config.image_size_px)), tokenizer, pad_id=-1)
        self.model = model
        self.options = options

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D) float32, not of unit length."""
        self._check("image")
        towers = self.model.image_pass(self._cast(pixels), vl=self.options.output == "vl")
        if self.options.output == "cls":
            return self.model.first(towers.own).float()
        return self.model.image_embedding(towers, vl=self.options.output == "vl").float()

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, D) float32, not of unit length."""
        self._check("text")
        mask = tokens >= 0
        towers = self.model.text_pass(tokens.clamp(min=0), mask, vl=self.options.output == "vl")
        if self.options.output == "cls":
            return self.model.first(towers.own).float()
        return self.model.text_embedding(towers, vl=self.options.output == "vl").float()

    def encode_pairs(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """(B, 3, H, W) and (B, L) of the same items -> (B, D) float32."""
        self._check("fused")
        joint = self.model.joint_pass(self._cast(pixels), tokens.clamp(min=0), tokens >= 0)
        return (self.model.pooled(joint) if self.options.fused == "pooled" else joint[:, 0]).float()

    def _cast(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.model.transformer.cls_token.dtype)

    def _check(self, modality: Modality) -> None:
        if modality not in self.info.modalities:
            raise self._lacks(modality)


def pixel_config(size_px: int) -> PixelConfig:
    """VLMo's pixels: squashed to a square, scaled to -1..1."""
    half = (0.5, 0.5, 0.5)
    return PixelConfig(size_px=size_px, mean=half, std=half, resize_mode="squash")


def describe_vlmo(spec: str) -> EncoderInfo:
    """Info of `vlmo/...`: the weights are fetched and hashed, nothing is built.

    Raises:
        EncoderError: It cannot be had, or the weights are no VLMo of that variant.
    """
    source = resolve_vlmo(spec)
    weights = read_weights(source.weights)
    stored, config = _configs(source, weights)
    return _info(source, stored, config, heads_of_weights(weights), sum(map(torch.numel, weights.values())))


def load_vlmo_encoder(spec: str) -> Encoder:
    """The encoder of `vlmo/...`.

    Raises:
        EncoderError: It cannot be had, or a tensor is missing.
    """
    source = resolve_vlmo(spec)
    weights = read_weights(source.weights)
    stored, config = _configs(source, weights)
    model, report = load_vlmo(weights, stored, config)
    info = _info(source, stored, config, report.heads, sum(map(torch.numel, weights.values())))
    encoder = VlmoEncoder(
        info, model, source.options, WordPieceTokenizer(str(source.vocabulary), config.text_length)
    )
    encoder.tokenizer([""])  # a vocabulary that cannot be read shows before hours of work
    if report.unused:
        encoder.notes = (
            f"{source.weights.name} holds {len(report.unused)} tensors that are not used: "
            f"{', '.join(report.unused)}",
        )
    return encoder


def resolve_vlmo(spec: str) -> VlmoSource:
    """Look up `vlmo/<variant>`, `vlmo/<variant>:<release>`, `:<file>` or `:<release>@<file>`.

    Raises:
        EncoderError: Unknown variant or release, no such file, or no network; the message says what to type.
    """
    base, options = read_options(spec, VlmoOptions)
    variant, _, rest = base.removeprefix(_FAMILY).partition(":")
    if variant not in (*VARIANTS, _CUSTOM):
        near = difflib.get_close_matches(variant, VARIANTS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "type vlmo/<variant>, for example vlmo/base."
        raise EncoderError(
            f"encoder {spec!r}: {variant!r} is no variant; known: {', '.join(VARIANTS)}, and custom:<file>; "
            f"{hint}"
        )
    release, _, file = rest.partition("@")
    if release and release not in RELEASES and ("/" in rest or rest.endswith(_SUFFIXES)):
        release, file = "", rest
    if release and release not in RELEASES:
        near = difflib.get_close_matches(release, RELEASES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "or give the path of a file."
        raise EncoderError(
            f"encoder {spec!r}: {release!r} is no release of VLMo; known: {', '.join(RELEASES)}; {hint}"
        )
    if file:
        weights = Path(file).expanduser()
        if not weights.is_file():
            raise EncoderError(
                f"encoder {spec!r}: there is no weights file {file!r}; expected a .pt or .safetensors."
            )
    elif variant == _CUSTOM:
        raise EncoderError(f"encoder {spec!r} names no weights; type vlmo/custom:<file>.")
    else:
        name = f"vlmo_{variant}_patch16_{RELEASES[release or '224']}.pt"
        weights = fetch_file(RELEASES_URL + name, instead=f"vlmo/{variant}:{release or '224'}@<file>")
    label = f"vlmo-{variant}-{release}" if release else f"vlmo-{variant}"
    label += f"-{weights.stem}" if file and not release else ""
    label += "" if options.output == "embedding" else f"-{options.output}"
    return VlmoSource(spec, label, options, weights, _vocabulary(spec, options, weights), variant)


def _vocabulary(spec: str, options: VlmoOptions, weights: Path) -> Path:
    """The word pieces: where the option says, beside the weights, or BERT's from the hub."""
    if options.vocab:
        path = Path(options.vocab).expanduser()
        if not path.is_file():
            raise EncoderError(
                f"encoder {spec!r}: there is no vocabulary {options.vocab!r}; expected BERT's vocab.txt."
            )
        return path
    beside = weights.with_name(_VOCABULARY_FILE)
    if beside.is_file():
        return beside
    return fetch_from_hub(_VOCABULARY_REPOSITORY, [_VOCABULARY_FILE], instead=f"{spec}+vocab=<vocab.txt>")


def _configs(source: VlmoSource, weights: dict[str, Tensor]) -> tuple[VlmoConfig, VlmoConfig]:
    """Sizes of the checkpoint, and those asked for.

    Raises:
        EncoderError: They are another variant's, or cannot be.
    """
    stored = config_of_weights(weights)
    if source.variant != _CUSTOM:
        expected = VARIANTS[source.variant]
        if any(getattr(stored, size) != getattr(expected, size) for size in _SIZES):
            fits = [
                name
                for name, one in VARIANTS.items()
                if all(getattr(stored, s) == getattr(one, s) for s in _SIZES)
            ]
            sizes = ", ".join(f"{size} {getattr(stored, size)}" for size in _SIZES)
            raise EncoderError(
                f"encoder {source.spec!r}: {str(source.weights)!r} has {sizes}; it is "
                f"{f'vlmo/{fits[0]}' if fits else 'no released variant: type vlmo/custom:<file>'}."
            )
    changes = {
        "text_length": min(source.options.tokens, stored.text_length)
        if not stored.relative
        else source.options.tokens,
        "image_size_px": source.options.image_size or stored.image_size_px,
    }
    try:
        return stored, VlmoConfig.model_validate(stored.model_dump() | changes)
    except ValueError as error:
        reason = str(error).split("\n")[-2 if "\n" in str(error) else 0].strip().removeprefix("Value error, ")
        raise EncoderError(
            f"encoder {source.spec!r}: {reason.split(' [type')[0]}; choose another value."
        ) from error


def _info(
    source: VlmoSource, stored: VlmoConfig, config: VlmoConfig, heads: tuple[Head, ...], n_numbers: int
) -> EncoderInfo:
    needed: dict[str, Head] = {"embedding": "itc", "vl": "itc_vl"}
    single = needed.get(source.options.output)
    modalities: tuple[Modality, ...] = ("image", "text") if single is None or single in heads else ()
    if source.options.fused == "cls" or "pooler" in heads:
        modalities = (*modalities, "fused")
    if not modalities:
        raise EncoderError(
            f"encoder {source.spec!r}: {str(source.weights)!r} has none of the heads for output="
            f"{source.options.output} and fused=pooled; ask for +output=cls or +fused=cls."
        )
    reading: dict[str, JsonValue] = {
        "architecture": config.model_dump(mode="json"),
        "stored_image_size_px": stored.image_size_px,
        "output": source.options.output,
        "fused": source.options.fused,
        "pixels": pixel_config(config.image_size_px).model_dump(mode="json"),
        "decoder": {"pillow": PIL.__version__.split(".")[0], "version": IMAGE_DECODING_VERSION},
        "vocabulary": digest_file(source.vocabulary),
        "text_cleaning": TEXT_CLEANING_VERSION,
    }
    return EncoderInfo(
        spec=source.spec,
        name=source.name,
        family="vlmo",
        weights_sha256=digest_file(source.weights),
        preprocessing_sha256=digest_json(reading),
        modalities=modalities,
        dims=dict.fromkeys(modalities, config.width),
        image_size_px=config.image_size_px,
        context_length=config.text_length,
        n_parameters=n_numbers,
    )
