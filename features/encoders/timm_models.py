"""The family `timm`: any of its architectures, with its pretrained weights, a folder's or a file's."""

import difflib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import BaseModel, JsonValue, field_validator
from torch import Tensor, nn

from features.encoders.base import Encoder, EncoderInfo, digest_file, digest_json
from features.encoders.clip_weights import count_numbers, read_weights
from features.encoders.controls import blank_texts
from features.encoders.hub import fetch_from_hub
from features.encoders.options import read_options
from features.encoders.pixels import aspect_that_fits, keep_middle
from features.encoders.transformers_files import first_line
from features.errors import EncoderError
from features.images import IMAGE_DECODING_VERSION

_FAMILY = "timm/"
_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_CONFIG_FILE = "config.json"
_FACTS = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
"""What timm's pretrained configurations say of pictures."""


class TimmOptions(BaseModel, frozen=True, extra="forbid"):
    """What may follow the name of a model of timm."""

    pool: Literal["model", "cls", "mean"] = "model"
    """model: what the classifier reads; cls: the first token; mean: of the patches or of the map."""
    layer: int | None = None
    """Which block or stage, from 0, or from the end below 0; None (or penultimate): what comes out of "
    "the last."""

    @field_validator("layer", mode="before")
    @classmethod
    def _penultimate(cls, value: object) -> object:
        """The layer before the classifier is the default by another name."""
        return None if value == "penultimate" else value


@dataclass(frozen=True)
class TimmSource:
    """Everything that a specification stands for."""

    spec: str
    name: str
    architecture: str
    facts: Mapping[str, Any]
    """timm's `pretrained_cfg`."""
    arguments: Mapping[str, Any]
    """Of the architecture, where a folder states some."""
    weights: Path


@dataclass(frozen=True)
class TimmTransform:
    """timm's own transform of evaluation.

    Args:
        settings: JSON of what `timm.data.create_transform` is given.
        most_aspect: As for `keep_middle`.
    """

    settings: str
    most_aspect: int

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB picture of any size -> (3, H, W) float32."""
        pixels: Tensor = _transform(self.settings)(keep_middle(image.convert("RGB"), self.most_aspect))
        return pixels


class TimmEncoder(Encoder):
    """A vision model of timm without its classifier.

    Args:
        info: What this encoder is.
        model: timm's model.
        transform: Its image transform.
        options: How one vector is made of what it gives.
    """

    def __init__(
        self, info: EncoderInfo, model: nn.Module, transform: TimmTransform, options: TimmOptions
    ) -> None:
        super().__init__(info, transform, blank_texts)
        self.model = model
        self.options = options
        self.source: TimmSource | None = None
        """Where it came from, by which it can be saved."""

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D) float32."""
        return timm_vectors(self.model, pixels, self.options)


def timm_vectors(model: Any, pixels: Tensor, options: TimmOptions) -> Tensor:
    """(B, 3, H, W) -> (B, D) float32.

    Raises:
        ValueError: The model has no first token, or no such layer.
    """
    typed = pixels.to(next(model.parameters()).dtype)
    if options.layer is None and options.pool == "model":
        vectors: Tensor = model.forward_head(model.forward_features(typed), pre_logits=True)
        return vectors.flatten(1).float()
    n_prefix = int(getattr(model, "num_prefix_tokens", 0))
    if options.pool == "cls" and not n_prefix:
        raise ValueError("it has no first token that stands for the picture")
    if options.layer is None:
        states: Tensor = model.forward_features(typed)
        if options.pool == "cls":
            return states[:, 0].float()
        return _mean(model, states[:, n_prefix:] if states.ndim == 3 else states)
    return _layer(model, typed, options, n_prefix)


def _layer(model: Any, pixels: Tensor, options: TimmOptions, n_prefix: int) -> Tensor:
    """Of a block or stage in between: its first token, or the mean of its map."""
    if not hasattr(model, "forward_intermediates"):
        raise ValueError("its layers cannot be asked for")
    given = (
        model.forward_intermediates(
            pixels, indices=None, intermediates_only=True, return_prefix_tokens=bool(n_prefix), norm=False
        )
        if n_prefix
        else model.forward_intermediates(pixels, indices=None, intermediates_only=True)
    )
    n_layers = len(given)
    layer = options.layer or 0
    if not -n_layers <= layer < n_layers:
        raise ValueError(f"it has {n_layers} layers, so expected {-n_layers} to {n_layers - 1}")
    state = given[layer]
    if n_prefix:
        patches, prefix = state
        pooled: Tensor = (
            prefix[:, 0] if options.pool in ("cls", "model") else patches.float().mean(dim=(2, 3))
        )
        return pooled.float()
    vectors: Tensor = state.float().mean(dim=(2, 3))
    return vectors


def _mean(model: Any, states: Tensor) -> Tensor:
    """Over all places of tokens (B, L, D), or of a map with channels first or last."""
    if states.ndim == 3:
        return states.float().mean(dim=1)
    last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    return states.float().mean(dim=(1, 2) if last else (2, 3))


def describe_timm(spec: str) -> EncoderInfo:
    """Info of `timm/...`: the weights are fetched and hashed; nothing with memory is built."""
    source, options = _resolve(spec)
    return _describe(source, options)


def load_timm(spec: str) -> Encoder:
    """The encoder of `timm/...`.

    Raises:
        EncoderError: It cannot be had, or the weights do not fit the architecture.
    """
    source, options = _resolve(spec)
    info = _describe(source, options)
    model, notes = _load(source)
    encoder = TimmEncoder(info, model, _image_transform(source.facts), options)
    encoder.notes, encoder.source = notes, source
    return encoder.eval()


def _resolve(spec: str) -> tuple[TimmSource, TimmOptions]:
    base, options = read_options(spec, TimmOptions)
    rest = base.removeprefix(_FAMILY)
    if rest.startswith("local-dir:"):
        return _from_folder(spec, Path(rest.removeprefix("local-dir:")).expanduser()), options
    name, _, file = rest.partition(":")
    facts = _facts(spec, name)
    architecture = name.partition(".")[0]
    if file:
        weights = _weights_file(spec, Path(file).expanduser())
        stem = name if "." in name else f"{name}-{weights.stem}"
        return TimmSource(spec, stem, architecture, facts, {}, weights), options
    return TimmSource(spec, _full_name(facts), architecture, facts, {}, _fetch(spec, facts)), options


def _facts(spec: str, name: str) -> Mapping[str, Any]:
    """Timm's pretrained configuration of a name; without a tag the architecture's default one.

    Raises:
        EncoderError: No such architecture or tag; the near matches are named.
    """
    import timm  # noqa: PLC0415 - seconds of imports

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"type {_FAMILY}<architecture>[.<tag>]."
        raise EncoderError(f"encoder {spec!r}: timm has no architecture {architecture!r}; {hint}")
    if not _has_tag(architecture, tag):
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        near = difflib.get_close_matches(tag, tags, n=3) or tags
        hint = f"did you mean {' or '.join(near)}?" if near else "it has none; name a weights file."
        raise EncoderError(f"encoder {spec!r}: {architecture} has no tag {tag!r}; {hint}")
    facts: Any = timm.get_pretrained_cfg(name, allow_unregistered=False)
    return {**(facts.to_dict() if facts else {}), "architecture": architecture}


def _has_tag(architecture: str, tag: str) -> bool:
    import timm  # noqa: PLC0415 - seconds of imports

    return not tag or f"{architecture}.{tag}" in timm.list_pretrained(f"{architecture}.*")


def _full_name(facts: Mapping[str, Any]) -> str:
    tag = facts.get("tag")
    return f"{facts['architecture']}.{tag}" if tag else str(facts["architecture"])


def _fetch(spec: str, facts: Mapping[str, Any]) -> Path:
    repository, filename = facts.get("hf_hub_id"), facts.get("hf_hub_filename")
    name = _full_name(facts)
    if not repository or facts.get("custom_load") == "hf":  # True speaks of another address than the hub
        raise EncoderError(
            f"encoder {spec!r}: timm publishes no weights of {name} on the hub that can be read here; type "
            f"{_FAMILY}{name}:<weights file>."
        )
    if str(repository).endswith("/"):
        repository = f"{repository}{name}"
    names = [str(filename).rpartition(".")[0] + ".safetensors", str(filename)] if filename else _WEIGHT_FILES
    return fetch_from_hub(str(repository), names, instead=f"{_FAMILY}{name}:<path of the file>")


def _from_folder(spec: str, folder: Path) -> TimmSource:
    """A folder in the layout of timm's repositories on the hub.

    Raises:
        EncoderError: config.json or weights are missing, or it names no architecture of timm.
    """
    path = folder / _CONFIG_FILE
    weights = next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if weights is None or not path.is_file():
        missing = _CONFIG_FILE if weights else " or ".join(_WEIGHT_FILES)
        raise EncoderError(f"encoder {spec!r}: {str(folder)!r} has no {missing}; expected timm's layout.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        architecture = str(config["architecture"])
        facts = {"num_classes": config.get("num_classes"), **(config.get("pretrained_cfg") or config)}
        arguments = dict(config.get("model_args") or {})
        if config.get("global_pool"):
            arguments.setdefault("global_pool", config["global_pool"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EncoderError(
            f"encoder {spec!r}: {str(path)!r} is no configuration of timm ({error!r}); expected "
            "`architecture` and `pretrained_cfg`. A folder of transformers is typed "
            "transformers/local-dir:<folder>."
        ) from error
    known = _facts(spec, architecture)
    return TimmSource(spec, folder.resolve().name, architecture, {**known, **facts}, arguments, weights)


def _weights_file(spec: str, path: Path) -> Path:
    if not path.is_file():
        raise EncoderError(f"encoder {spec!r}: there is no weights file {str(path)!r}; check the path.")
    if path.suffix not in _WEIGHT_SUFFIXES:
        raise EncoderError(
            f"encoder {spec!r}: {str(path)!r} ends in {path.suffix!r}; expected one of "
            f"{', '.join(_WEIGHT_SUFFIXES)}."
        )
    return path


def _describe(source: TimmSource, options: TimmOptions) -> EncoderInfo:
    import PIL  # noqa: PLC0415 - beside the other library
    import timm  # noqa: PLC0415 - seconds of imports

    transform = _image_transform(source.facts)
    side = _side(source)
    settings: dict[str, JsonValue] = {
        "library": f"timm {timm.__version__.split('.', maxsplit=1)[0]}",
        "architecture": source.architecture,
        "arguments": json.loads(json.dumps(dict(source.arguments))),
        "vectors": options.model_dump(mode="json"),
        "pixels": transform.settings,
        "decoder": {"pillow": PIL.__version__.split(".")[0], "version": IMAGE_DECODING_VERSION},
    }
    return EncoderInfo(
        spec=source.spec,
        name=source.name,
        family="timm",
        weights_sha256=digest_file(source.weights),
        preprocessing_sha256=digest_json(settings),
        modalities=("image",),
        dims={"image": _dim(source, options, side)},
        image_size_px=side,
        context_length=0,
        n_parameters=count_numbers(source.weights),
    )


def _side(source: TimmSource) -> int:
    channels, height, width = source.facts.get("input_size") or (3, 224, 224)
    if channels != 3 or height != width:
        raise EncoderError(
            f"encoder {source.spec!r}: {source.architecture} takes {channels} channels of {height} x {width} "
            "pixels; only squares of three channels are supported."
        )
    return int(height)


def _dim(source: TimmSource, options: TimmOptions, side: int) -> int:
    """Length of a vector, asked of a model without memory for weights."""
    try:
        with torch.device("meta"):
            skeleton = _build(source, num_classes=0)
            return int(timm_vectors(skeleton.eval(), torch.empty(2, 3, side, side), options).shape[1])
    except Exception as error:  # ours, and what an architecture says to its arguments
        given = f"pool={options.pool}" + ("" if options.layer is None else f", layer={options.layer}")
        raise EncoderError(
            f"encoder {source.spec!r}: {source.architecture} gives no vectors with {given} "
            f"({first_line(error)}); choose another pool (model, cls or mean) or layer."
        ) from error


def _build(source: TimmSource, **arguments: Any) -> nn.Module:
    import timm  # noqa: PLC0415 - seconds of imports

    model: nn.Module = timm.create_model(
        source.architecture, pretrained_cfg=_own_facts(source), **{**source.arguments, **arguments}
    )
    return model


def _own_facts(source: TimmSource) -> dict[str, Any]:
    """What timm is told of the weights, without where else it could look for them."""
    from timm.models import PretrainedCfg  # noqa: PLC0415 - seconds of imports

    elsewhere = {"url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "custom_load"}
    known = {field.name for field in fields(PretrainedCfg)} - elsewhere
    facts = {name: value for name, value in source.facts.items() if name in known}
    return {**facts, "architecture": source.architecture}


def _load(source: TimmSource) -> tuple[nn.Module, tuple[str, ...]]:
    """The model with its weights, every tensor in its place, and then without its classifier; and notes.

    timm leaves random numbers where tensors are missing once the number of classes differs; so the model is
    first built with the classifier that the file has.

    Raises:
        EncoderError: The weights are of another architecture.
    """
    weights = read_weights(source.weights)
    n_classes = _n_classes(source, weights)
    facts = {**_own_facts(source), "num_classes": n_classes, "state_dict": weights, "label_offset": 0}
    import timm  # noqa: PLC0415 - seconds of imports

    with _loading_messages() as messages:
        try:
            model: Any = timm.create_model(
                source.architecture,
                pretrained=True,
                pretrained_cfg=facts,
                num_classes=n_classes,
                **source.arguments,
            )
        except Exception as error:  # torch, timm's own filters of checkpoints, and asserts
            raise _misfit(source, " ".join(str(error).split())[:500]) from error
    missing = [message for message in messages if message.startswith("Missing keys")]
    if missing:
        raise _misfit(source, missing[0])
    model.reset_classifier(0)
    for facts in (model.pretrained_cfg, model.default_cfg):
        facts.pop("state_dict", None)  # as large as the model
    return model, tuple(message for message in messages if message.startswith("Unexpected keys"))


def _misfit(source: TimmSource, reason: str) -> EncoderError:
    return EncoderError(
        f"the weights file {str(source.weights)!r} does not fit encoder {source.spec!r} ({reason}); name the "
        "architecture they belong to."
    )


@contextmanager
def _loading_messages() -> Iterator[list[str]]:
    """What timm says while it loads weights; where it is not strict, it only says what is missing."""
    logger = logging.getLogger("timm.models._builder")
    messages: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _n_classes(source: TimmSource, weights: Mapping[str, Tensor]) -> int:
    """Classes of the classifier that the file holds; of the configuration where its names are others."""
    named = source.facts.get("classifier") or ()
    for name in [named] if isinstance(named, str) else named:
        tensor = weights.get(f"{name}.weight")
        if tensor is not None:
            return int(tensor.shape[0])
    return int(source.facts.get("num_classes") or 0)


def _image_transform(facts: Mapping[str, Any]) -> TimmTransform:
    import timm.data  # noqa: PLC0415 - seconds of imports

    data: Any = timm.data
    config = data.resolve_data_config({}, pretrained_cfg=dict(facts))
    settings = {name: config[name] for name in _FACTS}
    enlarged = int(max(config["input_size"][1:]) / config["crop_pct"])
    aspects = {
        "center": aspect_that_fits(enlarged),
        "border": enlarged,
    }  # border would scale a strip to 0 pixels
    return TimmTransform(json.dumps(settings, sort_keys=True), aspects.get(config["crop_mode"], 0))


@lru_cache(maxsize=8)
def _transform(settings: str) -> Any:
    import timm.data  # noqa: PLC0415 - seconds of imports

    data: Any = timm.data

    given = json.loads(settings)
    lists = {name: tuple(given[name]) for name in ("input_size", "mean", "std")}
    return data.create_transform(**{**given, **lists}, is_training=False)
