"""The family `saved`: encoders that were trained here, each in a folder that needs nothing beside it.

| file | holds |
|---|---|
| `encoder.json` | format, family, what is needed to build it, what it was made from, digests of the others |
| `model.safetensors` | its weights; a folder of sentence-transformers has some more, beside its modules |
| the rest | tokenizer, word list, image processor, as its family reads them |

An encoder with side networks has `inner`, a folder of the same kind for the frozen encoder, and what
`features.encoders.saved_side` says.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import PIL
from pydantic import BaseModel, Field, JsonValue, ValidationError

from features.encoders import saved_layouts, saved_side
from features.encoders.base import Encoder, EncoderInfo, digest_file, digest_files, digest_json
from features.encoders.clip_weights import count_numbers
from features.encoders.side import SideEncoder
from features.encoders.unit_length import UnitLengthEncoder, unit_length_info
from features.errors import EncoderError
from features.images import IMAGE_DECODING_VERSION
from features.texts import TEXT_CLEANING_VERSION

FORMAT = 1
ENCODER_FILE = "encoder.json"
INNER_FOLDER = "inner"
_WEIGHTS_SUFFIX = ".safetensors"
_FAMILY = "saved:"
_Settings = dict[str, JsonValue]


class SavedEncoder(BaseModel, frozen=True, extra="forbid"):
    """What `encoder.json` holds."""

    format: int
    name: str = Field(min_length=1, description="Short and fit for a file name.")
    layout: saved_layouts.LayoutName | Literal["side"]
    settings: dict[str, JsonValue] = Field(description="From which the layout builds it.")
    unit_length: bool = Field(description="Whether its vectors are divided by their length.")
    base: EncoderInfo = Field(description="Of the encoder that was saved.")
    provenance: dict[str, JsonValue] = Field(description="What its maker says of how it came to be.")
    files: dict[str, str] = Field(description="Name -> SHA-256 in hex, of every other file.")


def save_encoder(
    encoder: Encoder,
    folder: Path,
    *,
    name: str = "",
    provenance: Mapping[str, JsonValue] | None = None,
) -> SavedEncoder:
    """Write an encoder into a folder, so that `saved:<folder>` is the same one wherever the folder goes.

    Args:
        encoder: In plain form: `Tuned.finish` first. Equal encoders give equal bytes.
        folder: Made if there is none; empty otherwise.
        name: What it is to be called; left out: the encoder's own name and "saved".
        provenance: Kept as it is: data, settings, measures.

    Raises:
        EncoderError: Its family cannot be saved.
        FileExistsError: The folder holds something already.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{str(folder)!r} is not empty; an encoder is saved into a folder of its own.")
    inner = encoder.inner if isinstance(encoder, UnitLengthEncoder) else encoder
    folder.mkdir(parents=True, exist_ok=True)
    layout, settings = _write(inner, folder)
    files = {
        path.relative_to(folder).as_posix(): digest_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    saved = SavedEncoder(
        format=FORMAT,
        name=name or f"{inner.info.name.removesuffix('-saved')}-saved",
        layout=layout,
        settings=settings,
        unit_length=inner is not encoder,
        base=inner.info.model_copy(update={"spec": encoder.info.spec}),
        provenance=dict(provenance or {}),
        files=files,
    )
    (folder / ENCODER_FILE).write_text(saved.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return saved


def describe_saved(spec: str) -> EncoderInfo:
    """Info of `saved:<folder>`: its files are hashed, nothing is built.

    Raises:
        EncoderError: No such folder, or a file is missing or not as it was written.
    """
    folder, saved = read_saved(spec)
    weights = [folder / name for name in saved.files if name.endswith(_WEIGHTS_SUFFIX)]
    info = saved.base.model_copy(
        update={
            "spec": spec,
            "name": saved.name,
            "family": "saved",
            "weights_sha256": digest_files(weights),
            "preprocessing_sha256": digest_json(_all_but_weights(folder, saved)),
            "n_parameters": sum(map(count_numbers, weights)),
        }
    )
    if not saved.unit_length:
        return info
    return unit_length_info(spec, info).model_copy(update={"name": saved.name})


def load_saved(spec: str) -> Encoder:
    """The encoder of `saved:<folder>`.

    Raises:
        EncoderError: No such folder, or a file is missing, not as it was written, or does not fit.
    """
    info = describe_saved(spec)
    folder, saved = read_saved(spec)
    encoder = _read(folder, saved)
    encoder.info = info
    if saved.unit_length:
        encoder = UnitLengthEncoder(spec, encoder)
        encoder.info = info
    return encoder


def read_saved(spec: str) -> tuple[Path, SavedEncoder]:
    """The folder of a specification, all files in it whole, and what its `encoder.json` says.

    Raises:
        EncoderError: It is not so; the message says which file.
    """
    typed = spec.removeprefix(_FAMILY)
    if not typed or typed == spec:
        raise EncoderError(f"encoder {spec!r} is not known; expected saved:<folder>.")
    folder = Path(typed).expanduser()
    path = folder / ENCODER_FILE
    if not path.is_file():
        raise EncoderError(
            f"encoder {spec!r}: {str(folder)!r} has no {ENCODER_FILE}; expected a folder of `save_encoder`."
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(document, dict) and document.get("format", 0) > FORMAT:
            raise EncoderError(
                f"encoder {spec!r}: {str(path)!r} has format {document['format']}, this Tandem reads "
                f"{FORMAT}; upgrade."
            )
        saved = SavedEncoder.model_validate(document)
    except (ValueError, TypeError, ValidationError) as error:
        raise EncoderError(
            f"encoder {spec!r}: {str(path)!r} is damaged ({str(error).splitlines()[0]}); copy the folder "
            "again."
        ) from error
    for name, digest in saved.files.items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
            raise EncoderError(
                f"encoder {spec!r}: {name!r} is not in {str(folder)!r}; copy the folder again."
            )
        if digest_file(file) != digest:
            raise EncoderError(
                f"encoder {spec!r}: {str(file)!r} is not as it was written; copy the folder again."
            )
    return folder, saved


def copy_saved(source: Path, folder: Path) -> None:
    """Copy a saved encoder's files into another folder, as they are."""
    _, saved = read_saved(f"{_FAMILY}{source}")
    for name in (ENCODER_FILE, *saved.files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def _write(encoder: Encoder, folder: Path) -> tuple[saved_layouts.LayoutName | Literal["side"], _Settings]:
    if not isinstance(encoder, SideEncoder):
        return saved_layouts.write(encoder, folder)
    save_encoder(encoder.inner, folder / INNER_FOLDER)
    saved_side.write_sides(encoder, folder)
    return "side", {}


def _read(folder: Path, saved: SavedEncoder) -> Encoder:
    if saved.layout != "side":
        return saved_layouts.read(saved.layout, folder, saved.settings, saved.base)
    return saved_side.read_sides(load_saved(f"{_FAMILY}{folder / INNER_FOLDER}"), folder)


def _all_but_weights(folder: Path, saved: SavedEncoder) -> _Settings:
    """What changes vectors beside the weights; what the encoder was made from and is called does not."""
    if saved.layout == "side":
        within, inner = read_saved(f"{_FAMILY}{folder / INNER_FOLDER}")
        return {
            "layout": saved.layout,
            "inner": _all_but_weights(within, inner),
            "inner_of_unit_length": inner.unit_length,
            "side": saved.files[saved_side.SIDE_FILE],
        }
    return {
        "layout": saved.layout,
        "library": saved_layouts.library(saved.layout),
        "settings": saved.settings,
        "files": {name: digest for name, digest in saved.files.items() if not name.endswith(_WEIGHTS_SUFFIX)},
        "decoder": {"pillow": PIL.__version__.split(".")[0], "version": IMAGE_DECODING_VERSION},
        "text_cleaning": TEXT_CLEANING_VERSION,
    }
