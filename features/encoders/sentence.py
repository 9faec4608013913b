"""Text encoders (and CLIP) of the library sentence-transformers, by way of its own modules."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import PIL
import torch
from PIL import Image
from pydantic import JsonValue
from torch import Tensor, nn

from features.catalogue import Modality
from features.encoders.base import (
    Encoder,
    EncoderInfo,
    ImageTransform,
    digest_file,
    digest_files,
    digest_json,
)
from features.encoders.clip_weights import count_numbers
from features.encoders.controls import blank_picture
from features.encoders.sentence_files import SentenceSource, resolve_sentence
from features.errors import EncoderError
from features.images import IMAGE_DECODING_VERSION
from features.texts import MAX_TEXT_CHARS, TEXT_CLEANING_VERSION

_NOT_IDENTITY = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures")
"""Entries of config.json that change no vector."""
_UNUSED = ("pooler.",)
"""Tensors that a folder may lack where vectors are pooled from tokens."""


@dataclass(frozen=True)
class SentenceTokenizer:
    """The library's tokenization, without its padding.

    Args:
        folder: Holds the tokenizer's files.
        max_tokens: Most ids of a text, special ones and the prompt's included.
        prompt: Stands before each text.
        lower: Whether texts are folded to lower case first, whatever the tokenizer does.
    """

    folder: str
    max_tokens: int
    prompt: str = ""
    lower: bool = False

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; one padding id for a text that has none, as a network wants something to read."""
        if not texts:
            return []
        tokenizer = _tokenizer(self.folder, self.lower)
        rows: list[list[int]] = tokenizer(
            [self.prompt + text[:MAX_TEXT_CHARS] for text in texts],
            truncation="longest_first",
            max_length=self.max_tokens,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        return [row or [self.pad_id] for row in rows]

    @property
    def pad_id(self) -> int:
        """What the network gets where a batch has no token."""
        return _tokenizer(self.folder, self.lower).pad_token_id or 0

    def prompt_length(self) -> int:
        """Tokens of the prompt, without the special one behind a text's end."""
        tokenizer = _tokenizer(self.folder, self.lower)
        ids: list[int] = tokenizer(self.prompt)["input_ids"]
        return len(ids) - (ids[-1] in tokenizer.all_special_ids if ids else 0)

    def has_segments(self) -> bool:
        """Whether token types other than 0 belong to a single text, which are not handed on."""
        kinds: list[int] = _tokenizer(self.folder, self.lower)("a").get("token_type_ids", [])
        return any(kinds)


@lru_cache(maxsize=4)
def _tokenizer(folder: str, lower: bool) -> Any:
    from tokenizers.normalizers import Lowercase  # noqa: PLC0415 - seconds of imports
    from tokenizers.normalizers import Sequence as Normalizers  # noqa: PLC0415 - seconds of imports
    from transformers import AutoTokenizer  # noqa: PLC0415 - seconds of imports

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if lower:
        inner = tokenizer.backend_tokenizer.normalizer
        if inner is None or inner.normalize_str("A") != "a":
            tokenizer.backend_tokenizer.normalizer = Normalizers([Lowercase(), *([inner] if inner else [])])
    return tokenizer


@dataclass(frozen=True)
class ProcessorTransform:
    """Pictures as the folder's own image processor prepares them."""

    folder: str

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB picture of any size -> (3, H, W) float32."""
        made = _image_processor(self.folder)(images=[image.convert("RGB")], return_tensors="pt")
        pixels: Tensor = made["pixel_values"]
        if set(made) != {"pixel_values"} or pixels.ndim != 4:
            raise EncoderError(
                f"the image processor of {self.folder!r} gives {', '.join(sorted(made))}, not one square of "
                "pixels a picture, which is not supported; encode with the library itself and read the "
                "vectors as precomputed/npy:<file>."
            )
        return pixels[0]


@lru_cache(maxsize=4)
def _image_processor(folder: str) -> Callable[..., Any]:
    from transformers import AutoProcessor  # noqa: PLC0415 - seconds of imports

    kind: Any = AutoProcessor
    processor = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    prepare: Callable[..., Any] = getattr(processor, "image_processor", processor)
    return prepare


class SentenceEncoder(Encoder):
    """The library's modules one after the other, on batches padded to their longest text.

    Padding stands at the end, whatever side the tokenizer prefers: attention masks it out, and so do all
    poolings, that of the last token too. Where positions are counted from the left, this is what the library
    gives for a text alone.

    Args:
        info: What this encoder is.
        modules: The library's, in order.
        tokenizer: Texts -> ids.
        image_transform: Pictures -> pixels.
        prompt_length: Tokens at the start of each text that are not pooled.
        dim: Numbers kept of a vector.
    """

    def __init__(
        self,
        info: EncoderInfo,
        modules: Sequence[nn.Module],
        tokenizer: SentenceTokenizer,
        image_transform: ImageTransform,
        *,
        prompt_length: int,
        dim: int,
    ) -> None:
        super().__init__(info, image_transform, tokenizer, pad_id=-1)
        self.steps = nn.ModuleList(modules)
        self.prompt_length = prompt_length
        self.dim = dim
        self.source: SentenceSource | None = None
        """Where it came from, by which it can be saved."""
        self.filler = tokenizer.pad_id

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """(B, L), negative where there is no token -> (B, D) float32."""
        mask = (tokens >= 0).long()
        features: dict[str, Any] = {
            "input_ids": tokens.masked_fill(tokens < 0, self.filler),
            "attention_mask": mask,
            "modality": "text",
        }
        if self.prompt_length:
            features["prompt_length"] = self.prompt_length
        return self._run(features)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D) float32."""
        if "image" not in self.info.modalities:
            raise self._lacks("image")
        own = next((p.dtype for p in self.parameters() if p.is_floating_point()), pixels.dtype)
        return self._run({"pixel_values": pixels.to(own), "modality": "image"})

    def pool_tokens(self, states: Tensor, mask: Tensor) -> Tensor:
        """The network's (B, L, W) states of a text's tokens and their (B, L) mask -> (B, D) float32."""
        features: dict[str, Any] = {"token_embeddings": states, "attention_mask": mask, "modality": "text"}
        if self.prompt_length:
            features["prompt_length"] = self.prompt_length
        return self._run(features, first=1)

    def _run(self, features: dict[str, Any], first: int = 0) -> Tensor:
        for step in list(self.steps)[first:]:
            features = step(features)
        vectors: Tensor = features["sentence_embedding"]
        return vectors[:, : self.dim].float()


def describe_sentence(spec: str) -> EncoderInfo:
    """Info of `sentence-transformers/...`: the weights are fetched and hashed, nothing is built."""
    return _describe(resolve_sentence(spec))


def load_sentence(spec: str) -> Encoder:
    """The encoder of `sentence-transformers/...`, in float32.

    Raises:
        EncoderError: It cannot be had, lacks tensors, or would need code of its own.
    """
    source = resolve_sentence(spec)
    info = _describe(source)
    tower = source.modules[0].settings
    tokenizer = SentenceTokenizer(
        str(source.tower_folder), source.max_tokens, source.prompt, bool(tower.get("do_lower_case"))
    )
    try:
        segments = tokenizer.has_segments()
        prompt_length = 0 if source.pools_prompt or not source.prompt else tokenizer.prompt_length()
        modules = _load_modules(source)
    except EncoderError:
        raise
    except Exception as error:  # the library and transformers raise many kinds for what does not fit
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own, which is never run here"
        raise EncoderError(
            f"encoder {spec!r} cannot be built from {str(source.folder)!r} ({reason}); fetch the folder "
            "again, or encode with the library itself and read the vectors as precomputed/npy:<file>."
        ) from error
    if segments:
        raise EncoderError(
            f"encoder {spec!r}: its tokenizer gives single texts token types, which is not supported; encode "
            "with the library itself and read the vectors as precomputed/npy:<file>."
        )
    transform = ProcessorTransform(str(source.tower_folder)) if source.image_files else blank_picture
    encoder = SentenceEncoder(
        info, modules, tokenizer, transform, prompt_length=prompt_length, dim=info.dims["text"]
    )
    encoder.source = source
    return encoder


def _load_modules(source: SentenceSource) -> list[nn.Module]:
    from sentence_transformers.sentence_transformer import modules as library  # noqa: PLC0415 - seconds of imports
    from transformers.utils import logging  # noqa: PLC0415 - seconds of imports

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers has no types here
    kinds: dict[str, Any] = {
        "Transformer": _checked(library.Transformer, source),
        "CLIPModel": _checked(library.CLIPModel, source),
        "Pooling": library.Pooling,
        "Normalize": library.Normalize,
        "Dense": library.Dense,
        "LayerNorm": library.LayerNorm,
        "Dropout": library.Dropout,
    }
    return [
        kinds[module.kind].load(
            str(source.folder),
            subfolder=module.path,
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"dtype": torch.float32},
        )
        for module in source.modules
    ]


def _checked(kind: Any, source: SentenceSource) -> Any:
    """The library's class, with an error where it would fill missing tensors with random numbers."""

    class Checked(kind):  # type: ignore[misc]  # the library's class is handed in
        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            model, report = super()._load_model(*args, **kwargs, output_loading_info=True)
            missing = sorted(name for name in report["missing_keys"] if not name.startswith(_UNUSED))
            if missing:
                raise EncoderError(
                    f"encoder {source.spec!r}: its weights lack {len(missing)} tensors, first "
                    f"{missing[0]!r}; fetch the folder again."
                )
            return model

    return Checked


def _describe(source: SentenceSource) -> EncoderInfo:
    modalities: tuple[Modality, ...] = ("image", "text") if source.image_files else ("text",)
    vision = source.config.get("vision_config") or {}
    return EncoderInfo(
        spec=source.spec,
        name=source.name,
        family="sentence-transformers",
        weights_sha256=digest_files(source.weights),
        preprocessing_sha256=_preprocessing_digest(source),
        modalities=modalities,
        dims=dict.fromkeys(modalities, source.dim),
        image_size_px=int(vision.get("image_size", 224)) if source.image_files else 0,
        context_length=source.max_tokens,
        n_parameters=sum(count_numbers(path) for path in source.weights),
    )


def _preprocessing_digest(source: SentenceSource) -> str:
    identity: dict[str, JsonValue] = {
        "modules": [{"kind": module.kind, **module.settings} for module in source.modules],
        "config": {name: value for name, value in source.config.items() if name not in _NOT_IDENTITY},
        "tokenizer": {path.name: digest_file(path) for path in source.tokenizer_files},
        "max_tokens": source.max_tokens,
        "prompt": source.prompt,
        "truncate_dim": source.truncate_dim,
        "text_cleaning": TEXT_CLEANING_VERSION,
    }
    if source.image_files:
        identity["images"] = {path.name: digest_file(path) for path in source.image_files}
        identity["decoder"] = {"pillow": PIL.__version__.split(".")[0], "version": IMAGE_DECODING_VERSION}
    return digest_json(identity)
