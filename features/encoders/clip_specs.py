"""What a person types after `open_clip/` -> architecture, pixel scaling, tokenizer and weights file.

Nothing of open_clip is imported to find out, as that takes seconds; its tables of architectures and tags are
read where they lie.
"""

import difflib
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from features.encoders.hub import fetch_folder_from_hub, fetch_from_hub
from features.encoders.pixels import PixelConfig
from features.errors import EncoderError

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".bin", ".pth")
CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Names in a repository of open_clip's layout, the preferred one first."""

_FAMILY = "open_clip/"
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
"""Names of the one file that a tokenizer cannot do without, the preferred one first."""

_TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "*.model",
    "vocab*",
    "merges.txt",
    "config.json",
)


@dataclass(frozen=True)
class ClipSource:
    """Everything that a specification stands for."""

    spec: str
    name: str
    model: Mapping[str, Any]
    """open_clip's `model_cfg`, its activation (`quick_gelu`) decided."""
    pixels: PixelConfig
    weights: Path
    tokenizer: Path | None
    """Folder of the tokenizer's files; None where the tower reads CLIP's own byte pairs."""


def resolve_clip(spec: str) -> ClipSource:
    """Look up `open_clip/...`; weights that a tag or a hub name stands for are fetched unless cached.

    Raises:
        EncoderError: Unknown architecture or tag, no such file, or no network; the message says what to type.
    """
    rest = spec.removeprefix(_FAMILY)
    if rest.startswith("hf-hub:"):
        return _from_hub(spec, rest.removeprefix("hf-hub:"))
    if rest.startswith("local-dir:"):
        return _from_folder(spec, Path(rest.removeprefix("local-dir:")).expanduser())
    typed, _, weights = rest.partition(":")
    architecture = typed.replace("/", "-")  # open_clip takes ViT-B/32 for ViT-B-32, too
    if architecture not in architectures():
        raise EncoderError(
            f"encoder {spec!r}: open_clip has no architecture {typed!r}; "
            f"{_near(architecture, architectures(), 'type open_clip/<architecture>:<tag or file>')}"
        )
    tags = _tags(architecture)
    tag, _, file = weights.partition("@")
    tag = tag.lower().replace("-", "_")  # as open_clip normalises them
    if tag in tags:
        path = _weights_file(spec, file) if file else _fetch_tag(architecture, tag, tags[tag])
        return _with_tag(spec, architecture, tag, tags[tag], path)
    if "/" in weights or weights.endswith(WEIGHT_SUFFIXES):
        return _with_file(spec, architecture, tags, _weights_file(spec, weights))
    raise EncoderError(_unknown_tag(spec, architecture, weights, tags))


@cache
def architectures() -> tuple[str, ...]:
    """Names of open_clip's architectures, sorted."""
    return tuple(sorted(path.stem for path in (_package_folder() / "model_configs").glob("*.json")))


def architecture_config(architecture: str) -> dict[str, Any]:
    """open_clip's `model_cfg` of a known architecture."""
    path = _package_folder() / "model_configs" / f"{architecture}.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def _with_tag(spec: str, architecture: str, tag: str, facts: Mapping[str, Any], weights: Path) -> ClipSource:
    """The tag's word on the activation: open_clip only warns, and runs the architecture's."""
    model = architecture_config(architecture)
    quick = bool(facts.get("quick_gelu")) and not model.get("quick_gelu")
    if quick:
        model["quick_gelu"] = True
    name = f"{architecture}{'-quickgelu' if quick else ''}-{tag}"
    pixels = _pixel_config(model, facts, where=f"tag {tag!r}")
    return ClipSource(spec, name, model, pixels, weights, _tokenizer_folder(model))


def _with_file(
    spec: str, architecture: str, tags: Mapping[str, Mapping[str, Any]], weights: Path
) -> ClipSource:
    """The architecture's word on the activation; its tags' on the pixels where they agree (SigLIP's do)."""
    model = architecture_config(architecture)
    scalings = {_pixel_config(model, facts, where=f"tag {tag!r}") for tag, facts in tags.items()}
    pixels = scalings.pop() if len(scalings) == 1 else _pixel_config(model, {}, where=architecture)
    name = f"{architecture}-{weights.stem}"
    return ClipSource(spec, name, model, pixels, weights, _tokenizer_folder(model))


def _from_hub(spec: str, repository: str) -> ClipSource:
    instead = f"{_FAMILY}local-dir:<folder with {CONFIG_FILE} and {WEIGHT_FILES[0]}>"
    path = fetch_from_hub(repository, [CONFIG_FILE], instead=instead)
    weights = fetch_from_hub(repository, WEIGHT_FILES, instead=instead)
    model, pixels = _read_config(spec, path)
    return ClipSource(spec, repository.replace("/", "-"), model, pixels, weights, _tokenizer_folder(model))


def _from_folder(spec: str, folder: Path) -> ClipSource:
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    path = folder / CONFIG_FILE
    if weights is None or not path.is_file():
        missing = CONFIG_FILE if weights else " or ".join(WEIGHT_FILES)
        raise EncoderError(
            f"encoder {spec!r}: {str(folder)!r} has no {missing}; expected open_clip's layout."
        )
    model, pixels = _read_config(spec, path)
    own_tokenizer = bool(model["text_cfg"].get("hf_tokenizer_name"))
    if own_tokenizer and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise EncoderError(
            f"encoder {spec!r}: {str(folder)!r} has no tokenizer; expected one of "
            f"{', '.join(TOKENIZER_FILES)}."
        )
    return ClipSource(spec, folder.name, model, pixels, weights, folder if own_tokenizer else None)


def _read_config(spec: str, path: Path) -> tuple[Mapping[str, Any], PixelConfig]:
    """A repository in open_clip's layout says all of itself; its word on the activation holds."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        model = settings["model_cfg"]
        return model, _pixel_config(model, settings.get("preprocess_cfg", {}), where=str(path))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EncoderError(
            f"encoder {spec!r}: {str(path)!r} is no open_clip configuration ({error!r}); expected "
            "`model_cfg` and `preprocess_cfg`."
        ) from error


def _tokenizer_folder(model: Mapping[str, Any]) -> Path | None:
    """Where the files of a tower's own tokenizer are, fetched if need be."""
    repository = model["text_cfg"].get("hf_tokenizer_name")
    if not repository:
        return None
    return fetch_folder_from_hub(
        repository,
        _TOKENIZER_PATTERNS,
        needed=TOKENIZER_FILES,
        instead=f"{_FAMILY}local-dir:<folder with {CONFIG_FILE}, {WEIGHT_FILES[0]} and tokenizer files>",
    )


def _pixel_config(model: Mapping[str, Any], facts: Mapping[str, Any], *, where: str) -> PixelConfig:
    """The side from the vision tower; mean, std, filter and way of resizing from a tag or a file."""
    size = model["vision_cfg"].get("image_size", 224)
    if not isinstance(size, int):
        if len(set(size)) != 1:
            raise EncoderError(f"{where}: its vision tower takes {size} pixels; only squares are supported.")
        size = size[0]
    names = ("mean", "std", "interpolation", "resize_mode", "fill_color")
    given = {name: facts[name] for name in names if facts.get(name) is not None}
    if given.get("interpolation") == "random":
        given["interpolation"] = "bicubic"  # random is for training; open_clip then encodes with bicubic
    try:
        return PixelConfig(size_px=size, **given)
    except ValidationError as error:
        fields = ", ".join(str(problem["loc"][0]) for problem in error.errors())
        raise EncoderError(f"{where}: pixels cannot be prepared as {given} ({fields}).") from error


def _fetch_tag(architecture: str, tag: str, facts: Mapping[str, Any]) -> Path:
    owner, _, filename = str(facts["hf_hub"]).rpartition("/")
    names = [f"{filename.rpartition('.')[0]}.safetensors", filename] if filename else WEIGHT_FILES
    instead = f"{_FAMILY}{architecture}:{tag}@<path of the file>"
    return fetch_from_hub(owner, names, instead=instead)


def _weights_file(spec: str, typed: str) -> Path:
    """The typed path if it is a file of a kind that holds weights."""
    path = Path(typed).expanduser()
    if path.is_dir():
        raise EncoderError(
            f"encoder {spec!r}: {typed!r} is a folder; name the weights file in it, or type "
            f"{_FAMILY}local-dir:{typed} if it holds {CONFIG_FILE}."
        )
    if not path.is_file():
        near: list[str] = []
        if path.parent.is_dir():
            siblings = [entry.name for entry in path.parent.iterdir() if entry.suffix in WEIGHT_SUFFIXES]
            near = difflib.get_close_matches(path.name, siblings, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "check the path."
        raise EncoderError(f"encoder {spec!r}: there is no weights file {typed!r}; {hint}")
    if path.suffix not in WEIGHT_SUFFIXES:
        raise EncoderError(
            f"encoder {spec!r}: {typed!r} ends in {path.suffix!r}; expected one of "
            f"{', '.join(WEIGHT_SUFFIXES)}."
        )
    return path


def _unknown_tag(spec: str, architecture: str, typed: str, tags: Iterable[str]) -> str:
    if not typed:
        return (
            f"encoder {spec!r} names no weights; type {_FAMILY}{architecture}:<tag or file>. "
            f"Tags: {', '.join(tags) or 'none'}."
        )
    plain = architecture.removesuffix("-quickgelu")
    if plain != architecture and typed in _tags(plain):
        return (
            f"encoder {spec!r}: the weights {typed!r} were trained without QuickGELU; type "
            f"{_FAMILY}{plain}:{typed}."
        )
    file = f"for a file type its path, as in {_FAMILY}{architecture}:./weights.safetensors"
    return f"encoder {spec!r}: {architecture} has no tag {typed!r}; {_near(typed, tags, file)}"


def _near(typed: str, known: Iterable[str], otherwise: str) -> str:
    near = difflib.get_close_matches(typed, list(known), n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"{otherwise}."


def _tags(architecture: str) -> dict[str, Mapping[str, Any]]:
    """Pretrained weights of an architecture: tag -> where they are and how pixels are scaled for them."""
    table = _tag_table()
    return {
        tag: table.get_pretrained_cfg(architecture, tag)
        for tag in table.list_pretrained_tags_by_model(architecture)
    }


def _package_folder() -> Path:
    found = importlib.util.find_spec("open_clip")  # finds the package without running it
    if found is None or found.origin is None:
        raise EncoderError("the package open_clip_torch is not installed; run `make setup`.")
    return Path(found.origin).parent


@cache
def _tag_table() -> ModuleType:
    """open_clip's module of pretrained tags, loaded without the rest of open_clip."""
    shell = ModuleType("features_open_clip_tables")
    shell.__path__ = [str(_package_folder())]
    sys.modules[shell.__name__] = shell
    return importlib.import_module(f"{shell.__name__}.pretrained")
