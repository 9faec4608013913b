"""Models in the layout of transformers' `save_pretrained`: a folder, or a repository of the model hub."""

import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import nn

from features.catalogue import Modality
from features.encoders.base import Encoder, EncoderInfo, digest_files, digest_json
from features.encoders.clip_weights import count_numbers
from features.encoders.hub import fetch_folder_from_hub, fetch_from_hub
from features.errors import EncoderError
from features.images import IMAGE_DECODING_VERSION
from features.texts import TEXT_CLEANING_VERSION

FAMILY = "transformers/"
CONFIG_FILE = "config.json"
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
"""Names of files in a repository, the preferred one first; one of each kind is needed."""

_TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
_SMALL_FILES = (
    CONFIG_FILE,
    *PROCESSOR_FILES,
    *TOKENIZER_FILES,
    *_TOKENIZER_EXTRAS,
    "*.index.json",
)
_UNTOLD = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "auto_map")
"""Keys of config.json that change no vector."""

_LISTED = 3
"""Names shown of each kind of misfit."""


@dataclass(frozen=True)
class ModelFiles:
    """Where the files of one model are."""

    spec: str
    name: str
    folder: Path
    repository: str
    """`<owner>/<name>` on the hub; "" for a folder."""
    revision: str | None
    """The commit whose files these are."""
    config: Mapping[str, Any]
    """config.json as it stands."""

    @property
    def model_type(self) -> str:
        """What transformers calls the architecture."""
        return str(self.config.get("model_type", ""))

    def need(self, names: Sequence[str], what: str) -> Path:
        """The first of ``names`` that is there, fetched if need be.

        Raises:
            EncoderError: None of them is there; ``what`` says what they hold.
        """
        for name in names:
            if (self.folder / name).is_file():
                return self.folder / name
        if self.repository:
            try:
                folder = fetch_folder_from_hub(
                    self.repository,
                    _SMALL_FILES,
                    needed=names,
                    instead=_by_hand(self.repository),
                    revision=self.revision,
                )
            except EncoderError as error:
                raise EncoderError(f"encoder {self.spec!r} needs its {what}: {error}") from error
            return next(folder / name for name in names if (folder / name).is_file())
        raise EncoderError(
            f"encoder {self.spec!r}: {str(self.folder)!r} has no {what}; expected {' or '.join(names)}, as "
            "`save_pretrained` writes them."
        )

    def weights(self) -> list[Path]:
        """The weights file, or its parts in order.

        Raises:
            EncoderError: There are none that can be read without running code.
        """
        first = self._weights_file(WEIGHT_FILES)
        if not first.name.endswith(".index.json"):
            return [first]
        try:
            parts = sorted(set(json.loads(first.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EncoderError(
                f"encoder {self.spec!r}: {str(first)!r} lists no parts of the weights ({error!r}); fetch "
                "it again."
            ) from error
        return [self._weights_file([part]) for part in parts]

    def _weights_file(self, names: Sequence[str]) -> Path:
        if self.repository:
            instead = _by_hand(self.repository)
            return fetch_from_hub(self.repository, names, instead=instead, revision=self.revision)
        return self.need(names, "weights")

    def tokenizer_files(self) -> list[Path]:
        """What a tokenizer is made of: the files that decide its ids."""
        main = self.need(TOKENIZER_FILES, "tokenizer")
        others = [main.parent / name for name in ("spiece.model", *_TOKENIZER_EXTRAS)]
        return [main, *(path for path in others if path.is_file() and path != main)]


def find_model(spec: str, base: str, revision: str | None) -> ModelFiles:
    """The files of `transformers/<owner>/<name>` or `transformers/local-dir:<folder>`.

    Args:
        spec: As a person typed it.
        base: The same without its options.
        revision: A branch, tag or commit of a hub's repository.

    Raises:
        EncoderError: No such folder, no network, or no config.json; the message says what to do.
    """
    rest = base.removeprefix(FAMILY)
    if rest.startswith("local-dir:"):
        folder = Path(rest.removeprefix("local-dir:")).expanduser()
        if revision:
            raise EncoderError(f"encoder {spec!r}: a folder has no revisions; leave +revision out.")
        if not (folder / CONFIG_FILE).is_file():
            raise EncoderError(
                f"encoder {spec!r}: {str(folder)!r} has no {CONFIG_FILE}; expected a folder that "
                "`save_pretrained` wrote, or a copy of a hub's repository."
            )
        return ModelFiles(spec, folder.resolve().name, folder, "", None, _read_config(spec, folder))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", rest):
        raise EncoderError(
            f"encoder {spec!r} names no model; expected {FAMILY}<owner>/<name> or {FAMILY}local-dir:<folder>."
        )
    folder = fetch_folder_from_hub(
        rest, _SMALL_FILES, needed=[CONFIG_FILE], instead=_by_hand(rest), revision=revision
    )
    commit = folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else revision
    return ModelFiles(spec, rest.replace("/", "-"), folder, rest, commit, _read_config(spec, folder))


def _by_hand(repository: str) -> str:
    return f"{FAMILY}local-dir:<folder with all files of {repository}>"


def _read_config(spec: str, folder: Path) -> Mapping[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise EncoderError(
            f"encoder {spec!r}: {str(folder / CONFIG_FILE)!r} is no JSON ({error}); fetch it again."
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise EncoderError(
            f"encoder {spec!r}: {str(folder / CONFIG_FILE)!r} states no model_type; it is no "
            "configuration of transformers. A repository in timm's layout is typed timm/..., in open_clip's "
            "open_clip/hf-hub:..."
        )
    return config


@dataclass(frozen=True)
class Plan:
    """An encoder before it is built."""

    info: EncoderInfo
    build: Callable[[], Encoder]


def make_info(
    files: ModelFiles,
    *,
    vectors: Mapping[str, JsonValue],
    dims: Mapping[Modality, int],
    pixels: JsonValue = None,
    tokenizer: JsonValue = None,
    image_size_px: int = 0,
    context_length: int = 0,
) -> EncoderInfo:
    """What an encoder is.

    Args:
        files: Of the model; its weights are hashed.
        vectors: How a vector is taken from the model's output: pooling, layer.
        dims: Length of a vector, by modality.
        pixels: How pictures are prepared.
        tokenizer: How texts become ids.
        image_size_px: Side of the square it looks at.
        context_length: Most tokens that are read.
    """
    import PIL  # noqa: PLC0415 - beside the other library
    import transformers  # noqa: PLC0415 - seconds of imports

    architecture = {name: value for name, value in files.config.items() if name not in _UNTOLD}
    settings: dict[str, JsonValue] = {
        "library": f"transformers {transformers.__version__.split('.', maxsplit=1)[0]}",
        "architecture": json.loads(json.dumps(architecture, allow_nan=False)),
        "vectors": dict(vectors),
    }
    if pixels is not None:
        settings["pixels"] = pixels
        settings["decoder"] = {"pillow": PIL.__version__.split(".")[0], "version": IMAGE_DECODING_VERSION}
    if tokenizer is not None:
        settings["tokenizer"] = tokenizer
        settings["text_cleaning"] = TEXT_CLEANING_VERSION
    weights = files.weights()
    return EncoderInfo(
        spec=files.spec,
        name=files.name,
        family="transformers",
        weights_sha256=digest_files(weights),
        preprocessing_sha256=digest_json(settings),
        modalities=tuple(dims),
        dims=dict(dims),
        image_size_px=image_size_px,
        context_length=context_length,
        n_parameters=sum(count_numbers(path) for path in weights),
    )


def library_config(files: ModelFiles) -> Any:
    """Transformers' own configuration object, its defaults filled in.

    Raises:
        EncoderError: The file does not fit its model_type.
    """
    from transformers import AutoConfig  # noqa: PLC0415 - seconds of imports

    try:
        with quiet():
            return AutoConfig.from_pretrained(
                str(files.folder), trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # each configuration checks itself in its own way
        raise EncoderError(
            f"encoder {files.spec!r}: transformers cannot read {str(files.folder / CONFIG_FILE)!r} "
            f"({first_line(error)}); fetch it again, or update the package transformers."
        ) from error


def on_meta(model_class: Any, config: Any, spec: str, **arguments: Any) -> nn.Module:
    """A model without memory for its weights, to ask for shapes.

    Raises:
        EncoderError: transformers refuses the configuration.
    """
    try:
        with torch.device("meta"), quiet():
            model: nn.Module = model_class(config, **arguments)
    except Exception as error:  # each architecture checks itself in its own way
        raise EncoderError(
            f"encoder {spec!r}: transformers cannot build {model_class.__name__} ({first_line(error)}); "
            f"check {CONFIG_FILE}, or install what the message names."
        ) from error
    return model.eval()


def load_model(
    files: ModelFiles, model_class: Any, config: Any, arguments: Mapping[str, Any], *, idle: str = ""
) -> tuple[Any, tuple[str, ...]]:
    """The model with the weights of its files, as float32; and notes on what a person should know.

    transformers leaves random numbers where a file lacks a tensor; here that is an error.

    Args:
        files: Of the model.
        model_class: transformers' class.
        config: Its configuration.
        arguments: Of the class, beside the configuration.
        idle: Regular expression of the names that no vector depends on, and that may be missing.

    Raises:
        EncoderError: Damaged, or a tensor is missing or of another shape; it is named.
    """
    weights = files.weights()
    try:
        with quiet():
            model, report = model_class.from_pretrained(
                str(weights[0].parent),
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=weights[0].suffix == ".safetensors",
                weights_only=True,
                **arguments,
            )
    except Exception as error:  # safetensors, pickle and transformers each raise their own
        raise EncoderError(
            f"encoder {files.spec!r}: its weights cannot be read ({first_line(error)}); they are damaged, "
            "cut short, or hold more than tensors; fetch them again, best as .safetensors."
        ) from error
    missing = [name for name in sorted(report["missing_keys"]) if not (idle and re.search(idle, name))]
    reshaped = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    problems = [
        f"{len(names)} of its tensors {kind} ({_some(names)})"
        for names, kind in ((missing, "are missing"), (reshaped, "have another shape"))
        if names
    ]
    if problems:
        raise EncoderError(
            f"encoder {files.spec!r}: the weights in {str(files.folder)!r} do not fill "
            f"{model_class.__name__}: {' and '.join(problems)}; vectors would come from random numbers. "
            "Choose a checkpoint that was trained for this."
        )
    unused = sorted(report["unexpected_keys"])
    notes = (f"{len(unused)} tensors of the weights are not used: {_some(unused)}",) if unused else ()
    return model.eval(), notes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def floating_dtype(model: nn.Module) -> torch.dtype:
    """The type that a model computes in."""
    return next(value.dtype for value in model.parameters() if value.is_floating_point())


def square_px(size: int | Sequence[int] | Mapping[str, int] | None) -> int:
    """Side of the square a configuration states; 0 if it states none."""
    if isinstance(size, Mapping):
        return math.isqrt(math.prod(size.values())) if size else 0
    if isinstance(size, Sequence):
        return size[0] if len(set(size)) == 1 else 0
    return size or 0


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' reports and progress bars; what matters of them is raised or noted."""
    from transformers.utils import logging as untyped  # noqa: PLC0415 - seconds of imports

    library_logging: Any = untyped

    level = library_logging.get_verbosity()
    bars = library_logging.is_progress_bar_enabled()
    library_logging.set_verbosity(logging.CRITICAL)
    library_logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers are parallel already
    try:
        yield
    finally:
        library_logging.set_verbosity(level)
        if bars:
            library_logging.enable_progress_bar()
