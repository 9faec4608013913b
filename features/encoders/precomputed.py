"""`precomputed/<format>:<path>`: vectors that another tool made; described here, and never encoded."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from features.encoders.base import Encoder, EncoderInfo, digest_files, digest_json
from features.encoders.options import read_options
from features.errors import EncoderError, FeatureError
from features.precomputed import FORMATS, ReadingOptions, VectorFiles

FAMILY = "precomputed/"
READING_VERSION = 1
"""Part of the digest: raise it when a reader gives other vectors or other ids."""


class _NpyOptions(BaseModel, frozen=True, extra="forbid"):
    ids: str = ""


class _IdOptions(BaseModel, frozen=True, extra="forbid"):
    id: str = ""


class _ColumnOptions(_IdOptions, frozen=True, extra="forbid"):
    vector: str = ""


class _NoOptions(BaseModel, frozen=True, extra="forbid"):
    pass


_OPTIONS: dict[str, type[BaseModel]] = {
    "npy": _NpyOptions,
    "parquet": _ColumnOptions,
    "ducho": _NoOptions,
    "clip-retrieval": _IdOptions,
    "amazon": _NoOptions,
}


@dataclass(frozen=True)
class PrecomputedSpec:
    """`precomputed/<format>:<path>` with its options, parsed."""

    format: str
    path: Path
    options: ReadingOptions


def parse_precomputed(spec: str) -> PrecomputedSpec:
    """Read `precomputed/<format>:<path>+<option>=<value>`.

    Raises:
        EncoderError: An unknown format or option, or no path.
    """
    format_, colon, rest = spec.removeprefix(FAMILY).partition(":")
    if not spec.startswith(FAMILY) or format_ not in FORMATS or not colon or not rest:
        near = difflib.get_close_matches(format_, FORMATS, n=1)
        hint = f"did you mean {FAMILY}{near[0]}:<path>?" if near and near[0] != format_ else ""
        known = ", ".join(FORMATS)
        raise EncoderError(
            f"encoder {spec!r}: expected {FAMILY}<format>:<path> with a format of {known}; "
            + (hint or f"for example {FAMILY}npy:features.npy+ids=ids.txt.")
        )
    base, options = read_options(spec, _OPTIONS[format_])
    path = Path(base.removeprefix(f"{FAMILY}{format_}:")).expanduser()
    return PrecomputedSpec(format_, path, ReadingOptions(**options.model_dump()))


def open_precomputed(spec: str) -> VectorFiles:
    """The files of a specification, opened: their headers are read.

    Raises:
        EncoderError: Not such a specification, no such file, or files of another kind.
    """
    parsed = parse_precomputed(spec)
    if not parsed.path.exists():
        raise EncoderError(f"encoder {spec!r}: there is no {str(parsed.path)!r}; check the path.")
    try:
        return FORMATS[parsed.format](parsed.path, parsed.options)
    except FeatureError as error:
        raise EncoderError(f"encoder {spec!r}: {error}") from error


def describe_precomputed(spec: str) -> EncoderInfo:
    """Info of `precomputed/...`: the files are hashed."""
    parsed, source = parse_precomputed(spec), open_precomputed(spec)
    names = [path.name for path in source.files]
    return EncoderInfo(
        spec=spec,
        name=f"precomputed-{parsed.path.stem}",
        family="precomputed",
        weights_sha256=digest_files(source.files),
        preprocessing_sha256=digest_json(
            {
                "format": parsed.format,
                "id": parsed.options.id,
                "vector": parsed.options.vector,
                "names": digest_json({"names": list(names)}) if parsed.format == "ducho" else "",
                "version": READING_VERSION,
            }
        ),
        modalities=tuple(source.dims),
        dims=dict(source.dims),
        image_size_px=0,
        context_length=0,
        n_parameters=0,
    )


def load_precomputed(spec: str) -> Encoder:
    """Refuse: there is nothing to encode with.

    Raises:
        EncoderError: Always.
    """
    parse_precomputed(spec)
    raise EncoderError(
        f"encoder {spec!r} stands for vectors that another tool made and encodes nothing; run "
        f"`tandem extract <dataset> --encoder {spec}` to join them to a catalogue, and ask by --item."
    )
