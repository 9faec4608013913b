"""What a person types after `sentence-transformers/` -> the library's modules, their settings and files.

Only JSON files are read here; nothing of the library is imported, as that takes seconds.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, PositiveInt

from features.encoders.hub import fetch_folder_from_hub, fetch_from_hub
from features.encoders.options import read_options
from features.errors import EncoderError
from features.texts import MAX_TEXT_CHARS

FAMILY = "sentence-transformers/"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
)
"""All that can change how texts become ids; a folder has some of them."""
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
"""All that can change how pictures become pixels."""

_TOWERS = ("Transformer", "CLIPModel")
_LATER = ("Pooling", "Normalize", "Dense", "LayerNorm", "Dropout")
_WITH_WEIGHTS = (*_TOWERS, "Dense", "LayerNorm")
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SETTINGS_FILES = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
"""Of the first module; older versions of the library named the file after the network."""
_OLD_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""How the library called its poolings before version 5.4, and what it calls them now."""
_HUB_PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors")
_SPECIAL_PREFIX = "local-dir:"
_NO_NAMES = ("model", "final", "best", "checkpoint")
"""Folders that say nothing of what is in them; the one above may."""


class SentenceOptions(BaseModel, frozen=True, extra="forbid"):
    """What may follow a specification, as `+name=value`."""

    prompt: str = ""
    max_tokens: PositiveInt | None = None


@dataclass(frozen=True)
class SentenceModule:
    """One line of modules.json."""

    kind: str
    """Name of the library's class."""
    path: str
    """Its folder below the model's; "" for the same."""
    settings: dict[str, Any]


@dataclass(frozen=True)
class SentenceSource:
    """Everything that a specification stands for."""

    spec: str
    name: str
    folder: Path
    modules: tuple[SentenceModule, ...]
    config: dict[str, Any]
    """The network's config.json."""
    weights: tuple[Path, ...]
    tokenizer_files: tuple[Path, ...]
    image_files: tuple[Path, ...]
    """Empty where pictures are not encoded."""
    max_tokens: int
    prompt: str
    """What stands before each text; "" for nothing."""
    truncate_dim: int
    """Numbers kept of a vector, where the folder says so; 0: all."""

    options: SentenceOptions
    """What followed the specification."""

    @property
    def tower_folder(self) -> Path:
        """Where the network and its tokenizer lie."""
        return self.folder / self.modules[0].path

    @property
    def dim(self) -> int:
        """Numbers in a vector."""
        dim = int(self.config.get("projection_dim") or self.config.get("hidden_size") or 0)
        for module in self.modules[1:]:
            if module.kind == "Pooling":
                width = (
                    module.settings.get("embedding_dimension") or module.settings["word_embedding_dimension"]
                )
                dim = int(width) * len(pooling_modes(module.settings))
            elif module.kind == "Dense":
                dim = int(module.settings["out_features"])
        return min(dim, self.truncate_dim) if self.truncate_dim else dim

    @property
    def pools_prompt(self) -> bool:
        """Whether a prompt's tokens are pooled with those of the text."""
        return all(module.settings.get("include_prompt", True) for module in self.modules)


def pooling_modes(settings: dict[str, Any]) -> tuple[str, ...]:
    """What a pooling module concatenates, under today's names or those before 5.4."""
    named = settings.get("pooling_mode")
    if named:
        return (named,) if isinstance(named, str) else tuple(named)
    return tuple(new for old, new in _OLD_POOLING.items() if settings.get(old)) or ("mean",)


def resolve_sentence(spec: str) -> SentenceSource:
    """Look up `sentence-transformers/...`; what a hub name stands for is fetched unless cached.

    Raises:
        EncoderError: No such folder, no network, not the library's layout, or a model that needs code of its
            own; the message says what to type.
    """
    base, options = read_options(spec, SentenceOptions)
    folder, name = _folder(spec, base.removeprefix(FAMILY))
    modules = _modules(spec, folder)
    tower = folder / modules[0].path
    config = _read_json(spec, tower / "config.json")
    facts = _read_json(spec, folder / "config_sentence_transformers.json", default={})
    tokenizer_files = tuple(tower / file for file in TOKENIZER_FILES if (tower / file).is_file())
    if not tokenizer_files or (tower / "adapter_config.json").is_file():
        what = "has an adapter, not a whole model" if tokenizer_files else "has no tokenizer"
        raise EncoderError(
            f"encoder {spec!r}: {str(tower)!r} {what}; expected config.json, model.safetensors and "
            "tokenizer.json; save the whole model with the library's save_pretrained."
        )
    most = _max_tokens(spec, modules[0], config, tower)
    if options.max_tokens is not None and options.max_tokens > most:
        raise EncoderError(
            f"encoder {spec!r}: option max_tokens is {options.max_tokens}, but it reads at most {most} "
            "tokens; leave the option out, or take less."
        )
    suffixes = [options.prompt] if options.prompt else []
    suffixes += [f"{options.max_tokens}-tokens"] if options.max_tokens else []
    return SentenceSource(
        spec=spec,
        name="-".join([name, *suffixes]),
        folder=folder,
        modules=modules,
        config=config,
        weights=_weights(spec, folder, modules),
        tokenizer_files=tokenizer_files,
        image_files=_image_files(modules[0], tower),
        max_tokens=options.max_tokens or most,
        prompt=_prompt(spec, options.prompt, facts),
        truncate_dim=int(facts.get("truncate_dim") or 0),
        options=options,
    )


def _folder(spec: str, rest: str) -> tuple[Path, str]:
    """Where the files are, and a short name."""
    if rest.startswith(_SPECIAL_PREFIX):
        folder = Path(rest.removeprefix(_SPECIAL_PREFIX)).expanduser().absolute()
        if not folder.is_dir():
            raise EncoderError(f"encoder {spec!r}: there is no folder {str(folder)!r}; check the path.")
        named = folder.name if folder.name not in _NO_NAMES else f"{folder.parent.name}-{folder.name}"
        return folder, named
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", rest):
        raise EncoderError(
            f"encoder {spec!r}: {rest!r} is no name on the hub; type {FAMILY}<owner>/<name>, "
            f"{FAMILY}all-MiniLM-L6-v2 or {FAMILY}{_SPECIAL_PREFIX}<folder>."
        )
    repository = rest if "/" in rest else f"sentence-transformers/{rest}"
    instead = f"{FAMILY}{_SPECIAL_PREFIX}<folder>"
    folder = fetch_folder_from_hub(repository, _HUB_PATTERNS, needed=["modules.json"], instead=instead)
    for module in _modules(spec, folder):
        if module.kind in _WITH_WEIGHTS and _weight_file(folder / module.path) is None:
            names = [
                f"{module.path}/{name}".lstrip("/") for name in ("model.safetensors", "pytorch_model.bin")
            ]
            fetch_from_hub(repository, names, instead=instead)
    return folder, repository.rpartition("/")[2]


def _modules(spec: str, folder: Path) -> tuple[SentenceModule, ...]:
    path = folder / "modules.json"
    if not path.is_file():
        raise EncoderError(
            f"encoder {spec!r}: {str(folder)!r} has no modules.json; expected the layout of the library "
            "sentence-transformers; save the model with its save_pretrained."
        )
    lines = _read_json(spec, path)
    try:
        modules = tuple(_module(spec, folder, str(line["type"]), str(line.get("path", ""))) for line in lines)
    except (KeyError, TypeError, AttributeError) as error:
        raise EncoderError(
            f"encoder {spec!r}: {str(path)!r} lists no modules with type and path; fetch the folder again."
        ) from error
    kinds = [module.kind for module in modules]
    if not kinds or kinds[0] not in _TOWERS or not _gives_vectors(modules):
        raise EncoderError(
            f"encoder {spec!r}: its modules are {', '.join(kinds) or 'none'}; expected Transformer or "
            "CLIPModel first, and Pooling behind a Transformer."
        )
    return modules


def _gives_vectors(modules: Sequence[SentenceModule]) -> bool:
    """Whether what comes out is a vector a text, not one a token."""
    pooled = any(module.kind in ("CLIPModel", "Pooling") for module in modules)
    return pooled or modules[0].settings.get("module_output_name") == "sentence_embedding"


def _module(spec: str, folder: Path, type_: str, path: str) -> SentenceModule:
    kind = type_.rpartition(".")[2]
    if not type_.startswith("sentence_transformers."):
        raise EncoderError(
            f"encoder {spec!r} needs code of its own ({type_}), which is never run here; encode with the "
            "library itself and read the vectors as precomputed/npy:<file>."
        )
    if kind not in (*_TOWERS, *_LATER):
        known = ", ".join((*_TOWERS, *_LATER))
        raise EncoderError(
            f"encoder {spec!r} has a module {kind}, which is not supported; supported are {known}; encode "
            "with the library itself and read the vectors as precomputed/npy:<file>."
        )
    place = folder / path
    if folder.resolve() not in (place.resolve(), *place.resolve().parents):
        raise EncoderError(f"encoder {spec!r}: the module {path!r} lies outside {str(folder)!r}.")
    names = _SETTINGS_FILES if kind in _TOWERS else ("config.json",)
    found = next((place / name for name in names if (place / name).is_file()), None)
    settings = {} if found is None else _read_json(spec, found)
    activation = str(settings.get("activation_function") or "torch.")
    unread = [name for name in ("processing_kwargs", "query_expansion") if settings.get(name)]
    if "message" in settings.get("modality_config", {}):
        unread.append("a chat template")
    if settings.get("transformer_task", "feature-extraction") != "feature-extraction":
        unread.append(str(settings["transformer_task"]))
    if not activation.startswith("torch."):
        unread.append(activation)
    if unread:
        raise EncoderError(
            f"encoder {spec!r}: its {kind} uses {', '.join(unread)}, which is not supported; encode with the "
            "library itself and read the vectors as precomputed/npy:<file>."
        )
    return SentenceModule(kind, path, settings)


def _max_tokens(spec: str, tower: SentenceModule, config: dict[str, Any], folder: Path) -> int:
    """As the library decides it: the first module's word, else the least of tokenizer and network."""
    stated = tower.settings.get("max_seq_length")
    processor = tower.settings.get("processor_kwargs") or tower.settings.get("tokenizer_args") or {}
    stated = processor.get("model_max_length") or stated
    if stated is None:
        tokenizer = _read_json(spec, folder / "tokenizer_config.json", default={})
        positions = config.get("max_position_embeddings", -1)
        limits = [tokenizer.get("model_max_length"), None if positions == -1 else positions]
        stated = min((limit for limit in limits if limit), default=MAX_TEXT_CHARS)
    return min(int(stated), MAX_TEXT_CHARS)


def _prompt(spec: str, name: str, facts: dict[str, Any]) -> str:
    """The prompt's text; without a name the folder's default one, if it has one."""
    prompts: dict[str, str | None] = facts.get("prompts") or {}
    wanted = name or str(facts.get("default_prompt_name") or "")
    if not wanted:
        return ""
    if wanted not in prompts:
        known = f"its prompts are {', '.join(prompts)}" if prompts else "it has none"
        raise EncoderError(f"encoder {spec!r} has no prompt {wanted!r}; {known}.")
    return prompts[wanted] or ""


def _weights(spec: str, folder: Path, modules: Sequence[SentenceModule]) -> tuple[Path, ...]:
    """The weights files of all modules that have any, shards included."""
    files: list[Path] = []
    for module in modules:
        if module.kind not in _WITH_WEIGHTS:
            continue
        place = folder / module.path
        file = _weight_file(place)
        if file is None:
            raise EncoderError(
                f"encoder {spec!r}: {str(place)!r} has no weights; expected model.safetensors or "
                "pytorch_model.bin; fetch the folder again."
            )
        if file.suffix == ".json":
            shards = set(_read_json(spec, file)["weight_map"].values())
            files += [place / shard for shard in sorted(shards)]
        else:
            files.append(file)
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise EncoderError(f"encoder {spec!r}: {str(missing[0])!r} is not there; fetch the folder again.")
    return tuple(files)


def _weight_file(place: Path) -> Path | None:
    return next((place / name for name in _WEIGHT_FILES if (place / name).is_file()), None)


def _image_files(tower: SentenceModule, folder: Path) -> tuple[Path, ...]:
    """Where the library would encode pictures: an old CLIPModel, or a tower that says so."""
    if tower.kind != "CLIPModel" and "image" not in tower.settings.get("modality_config", {}):
        return ()
    return tuple(folder / name for name in IMAGE_FILES if (folder / name).is_file())


def _read_json(spec: str, path: Path, *, default: Any = None) -> Any:
    if default is not None and not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise EncoderError(f"encoder {spec!r}: {str(path)!r} {reason}; fetch the folder again.") from error
