"""How each family's encoders are written into a folder, and built again from it.

open_clip (`tiny` too) and VLMo: our own weights file and their settings. transformers, sentence-transformers
and timm: their own layouts, which their families read.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import JsonValue
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from features.encoders.base import Encoder, EncoderInfo, Tokenizer
from features.encoders.clip import ClipEncoder, build_clip
from features.encoders.clip_tokens import ClipTokenizer, FolderTokenizer
from features.encoders.options import join_options
from features.encoders.pixels import PixelConfig
from features.encoders.sentence import SentenceEncoder, load_sentence
from features.encoders.timm_models import TimmEncoder, load_timm
from features.encoders.tiny import TinyTokenizer
from features.encoders.transformers_dual import DualEncoder
from features.encoders.transformers_files import PROCESSOR_FILES
from features.encoders.transformers_models import load_transformers
from features.encoders.transformers_text import TextModelEncoder
from features.encoders.transformers_vision import VisionModelEncoder
from features.encoders.vlmo.config import VlmoConfig
from features.encoders.vlmo.encoder import VlmoEncoder, VlmoOptions
from features.encoders.vlmo.model import Vlmo
from features.encoders.word_pieces import WordPieceTokenizer
from features.errors import EncoderError

LayoutName = Literal["open_clip", "vlmo", "transformers", "sentence-transformers", "timm"]
Settings = dict[str, JsonValue]

WEIGHTS_FILE = "model.safetensors"
_TOKENIZER_FOLDER, _TOKENIZER_FILE, _WORDS_FILE = "tokenizer", "tokenizer.json", "vocab.txt"
_TEXT_MODEL_FOLDER = "text_model"
_DESCRIPTIONS = ("encoder.json", "manifest.json")
_ONE_FILE = "1000GB"
"""transformers splits weights above a size; never here."""


@dataclass(frozen=True)
class Layout:
    """One way of keeping an encoder in a folder."""

    write: Callable[[Any, Path], Settings]
    read: Callable[[Path, Settings, EncoderInfo], Encoder]
    package: str
    """Whose first version number can change vectors; "" for none beside torch."""


def write(encoder: Encoder, folder: Path) -> tuple[LayoutName, Settings]:
    """Write all files but `encoder.json`; what `read` needs beside them.

    Raises:
        EncoderError: The family cannot be saved, or this encoder was made by hand.
    """
    for kind, name in _LAYOUT_OF.items():
        if isinstance(encoder, kind):
            return name, LAYOUTS[name].write(encoder, folder)
    raise EncoderError(
        f"encoder {encoder.info.spec!r} cannot be saved: its family is {encoder.info.family!r}; encoders of "
        f"{', '.join(LAYOUTS)} can."
    )


def read(name: LayoutName, folder: Path, settings: Settings, base: EncoderInfo) -> Encoder:
    """Build an encoder from its folder.

    Raises:
        EncoderError: The files do not fit the settings.
    """
    try:
        return LAYOUTS[name].read(folder, settings, base)
    except (KeyError, TypeError, ValueError) as error:
        raise EncoderError(
            f"the encoder in {str(folder)!r} cannot be built from its settings ({error!r}); copy it again."
        ) from error


def library(name: LayoutName) -> str:
    """The package that computes vectors, with its first version number."""
    package = LAYOUTS[name].package
    return f"{package} {version(package).split('.', maxsplit=1)[0]}" if package else ""


def _write_clip(encoder: ClipEncoder, folder: Path) -> Settings:
    if encoder.model_cfg is None:
        raise EncoderError(
            f"encoder {encoder.info.spec!r} cannot be saved: it was built without open_clip's settings."
        )
    model = json.loads(json.dumps(encoder.model_cfg))
    text_model = str(model["text_cfg"].get("hf_model_name") or "")
    if text_model:
        from features.encoders.clip import text_model_folder  # noqa: PLC0415 - beside its use

        _copy([text_model_folder(text_model) / "config.json"], folder / _TEXT_MODEL_FOLDER)
        model["text_cfg"]["hf_model_name"] = _TEXT_MODEL_FOLDER
    transform = cast("Any", encoder.image_transform)
    _save_weights(encoder.model, folder)
    return {
        "model": model,
        "pixels": transform.config.model_dump(mode="json"),
        "tokenizer": _write_tokenizer(encoder, folder),
    }


def _write_tokenizer(encoder: ClipEncoder, folder: Path) -> Settings:
    tokenizer = encoder.tokenizer
    if isinstance(tokenizer, TinyTokenizer):
        (folder / _TOKENIZER_FILE).write_text(tokenizer.json, encoding="utf-8")
        return {"kind": "tiny", "context_length": tokenizer.context_length}
    if isinstance(tokenizer, ClipTokenizer):
        return {"kind": "clip", "context_length": tokenizer.context_length, "clean": tokenizer.clean}
    if isinstance(tokenizer, FolderTokenizer):
        _copy(_small_files(Path(tokenizer.folder)), folder / _TOKENIZER_FOLDER)
        length, settings = tokenizer.context_length, tokenizer.settings
        return {"kind": "folder", "context_length": length, "settings": settings}
    raise EncoderError(
        f"encoder {encoder.info.spec!r} cannot be saved: its tokenizer is a {type(tokenizer).__name__}."
    )


def _read_clip(folder: Path, settings: Settings, base: EncoderInfo) -> Encoder:
    config: dict[str, Any] = json.loads(json.dumps(settings["model"]))
    if config["text_cfg"].get("hf_model_name"):
        config["text_cfg"]["hf_model_name"] = str(folder / _TEXT_MODEL_FOLDER)
    with torch.random.fork_rng(devices=[]):
        model = build_clip(config)
    _load_weights(model, folder)
    stated = cast("dict[str, Any]", settings["tokenizer"])
    length = int(stated["context_length"])
    tokenizer: Tokenizer
    if stated["kind"] == "tiny":
        text = (folder / _TOKENIZER_FILE).read_text(encoding="utf-8")
        tokenizer = TinyTokenizer(text, length)
    elif stated["kind"] == "clip":
        tokenizer = ClipTokenizer(length, stated["clean"])
    else:
        tokenizer = FolderTokenizer(str(folder / _TOKENIZER_FOLDER), length, stated["settings"])
    pixels = PixelConfig.model_validate(settings["pixels"])
    return ClipEncoder(base, model, pixels, tokenizer, model_cfg=config)


def _write_vlmo(encoder: VlmoEncoder, folder: Path) -> Settings:
    tokenizer = cast("WordPieceTokenizer", encoder.tokenizer)
    shutil.copyfile(tokenizer.vocabulary, folder / _WORDS_FILE)
    _save_weights(encoder.model, folder)
    return {
        "model": encoder.model.config.model_dump(mode="json"),
        "heads": list(encoder.model.heads),
        "options": encoder.options.model_dump(mode="json", exclude={"vocab"}),
    }


def _read_vlmo(folder: Path, settings: Settings, base: EncoderInfo) -> Encoder:
    config = VlmoConfig.model_validate(settings["model"])
    model = Vlmo(config, tuple(cast("list[Any]", settings["heads"])))
    _load_weights(model, folder)
    tokenizer = WordPieceTokenizer(str(folder / _WORDS_FILE), config.text_length)
    return VlmoEncoder(base, model, VlmoOptions.model_validate(settings["options"]), tokenizer)


def _write_transformers(
    encoder: DualEncoder | VisionModelEncoder | TextModelEncoder, folder: Path
) -> Settings:
    files = encoder.files
    if files is None:
        raise EncoderError(f"encoder {encoder.info.spec!r} cannot be saved: it was built without its files.")
    _save_pretrained(encoder.model, folder)
    if encoder.info.image_size_px:
        _copy([files.need(PROCESSOR_FILES, "image processor")], folder)
    if encoder.info.context_length:
        _copy(files.tokenizer_files(), folder)
    if isinstance(encoder, DualEncoder):
        pool = "cls" if encoder.first_query else None
        layer = None
    else:
        pool, layer = encoder.pool, encoder.layer
    options = {name: value for name, value in (("pool", pool), ("layer", layer)) if value is not None}
    return {"options": cast("JsonValue", {name: str(value) for name, value in options.items()})}


def _read_transformers(folder: Path, settings: Settings, base: EncoderInfo) -> Encoder:  # noqa: ARG001 - one shape for all
    return load_transformers(_local_spec("transformers", folder, settings))


def _write_sentence(encoder: SentenceEncoder, folder: Path) -> Settings:
    source = encoder.source
    if source is None:
        raise EncoderError(f"encoder {encoder.info.spec!r} cannot be saved: it was built without its files.")
    for path in _small_files(source.folder):
        _copy([path], folder)
    for module, step in zip(source.modules, encoder.steps, strict=True):
        place = folder / module.path
        _copy(_small_files(source.folder / module.path), place)
        network = getattr(step, "model", None)
        if network is not None:
            _save_pretrained(network, place)
        elif step.state_dict():
            save_file(_plain(step), place / WEIGHTS_FILE)
    chosen = source.options.model_dump(mode="json", exclude_defaults=True)
    return {"options": {name: str(value) for name, value in chosen.items()}}


def _read_sentence(folder: Path, settings: Settings, base: EncoderInfo) -> Encoder:  # noqa: ARG001 - one shape for all
    return load_sentence(_local_spec("sentence-transformers", folder, settings))


def _write_timm(encoder: TimmEncoder, folder: Path) -> Settings:
    source = encoder.source
    if source is None:
        raise EncoderError(f"encoder {encoder.info.spec!r} cannot be saved: it was built without its files.")
    elsewhere = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "custom_load")
    facts = {name: value for name, value in source.facts.items() if name not in elsewhere}
    config = {
        "architecture": source.architecture,
        "num_classes": 0,
        "model_args": dict(source.arguments),
        "pretrained_cfg": {**facts, "num_classes": 0},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _save_weights(encoder.model, folder)
    chosen = encoder.options.model_dump(mode="json", exclude_none=True)
    return {"options": {name: str(value) for name, value in chosen.items()}}


def _read_timm(folder: Path, settings: Settings, base: EncoderInfo) -> Encoder:  # noqa: ARG001 - one shape for all
    return load_timm(_local_spec("timm", folder, settings))


LAYOUTS: dict[LayoutName, Layout] = {
    "open_clip": Layout(_write_clip, _read_clip, "open_clip_torch"),
    "vlmo": Layout(_write_vlmo, _read_vlmo, ""),
    "transformers": Layout(_write_transformers, _read_transformers, "transformers"),
    "sentence-transformers": Layout(_write_sentence, _read_sentence, "sentence-transformers"),
    "timm": Layout(_write_timm, _read_timm, "timm"),
}

_LAYOUT_OF: Mapping[type[Encoder], LayoutName] = {
    ClipEncoder: "open_clip",
    VlmoEncoder: "vlmo",
    DualEncoder: "transformers",
    VisionModelEncoder: "transformers",
    TextModelEncoder: "transformers",
    SentenceEncoder: "sentence-transformers",
    TimmEncoder: "timm",
}


def _save_pretrained(model: Any, folder: Path) -> None:
    """In transformers' layout, without the path or name that the model was read from."""
    model.save_pretrained(folder, max_shard_size=_ONE_FILE)
    path = folder / "config.json"
    config = _without_places(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _without_places(value: JsonValue) -> JsonValue:
    if isinstance(value, dict):
        return {name: _without_places(inner) for name, inner in value.items() if name != "_name_or_path"}
    return value


def _local_spec(family: str, folder: Path, settings: Settings) -> str:
    options = {name: str(value) for name, value in cast("Settings", settings["options"]).items()}
    return join_options(f"{family}/local-dir:{folder}", options)


def _small_files(folder: Path) -> list[Path]:
    """Files of a folder that hold no weights and no code, and are no description of the folder."""
    kinds = (".json", ".txt", ".model", ".jinja")
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in kinds
        if not path.name.endswith(".index.json") and path.name not in _DESCRIPTIONS
    ]


def _copy(paths: Iterable[Path], folder: Path) -> None:
    """Copy files under their names; one that is there already stays."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def _plain(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors, on the CPU; each has memory of its own, as the file format asks."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in module.state_dict().items()}


def _save_weights(module: nn.Module, folder: Path) -> None:
    save_file(_plain(module), folder / WEIGHTS_FILE)


def _load_weights(module: nn.Module, folder: Path) -> None:
    """Every tensor in its place.

    Raises:
        EncoderError: The file is damaged, or of another architecture.
    """
    path = folder / WEIGHTS_FILE
    try:
        module.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise EncoderError(
            f"the weights in {str(path)!r} do not fit ({reason}); copy the folder again."
        ) from error
    module.eval()
