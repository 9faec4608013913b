"""What an artefact says of itself: keys, inputs, files, and the manifest that holds them."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    Field,
    JsonValue,
    NonNegativeInt,
    ValidationError,
)

from pipeline.errors import StoreError
from pipeline.hardware import Hardware

__all__ = [
    "FORMAT_VERSIONS",
    "KINDS",
    "FileEntry",
    "InputRef",
    "JsonValue",
    "Kind",
    "Manifest",
    "artefact_key",
]

Kind = Literal["dataset", "encoder", "features", "states", "index", "graph", "search", "run", "comparison"]
KINDS: tuple[Kind, ...] = get_args(Kind)

FORMAT_VERSIONS: dict[Kind, int] = {
    "dataset": 1,
    "encoder": 1,
    "features": 1,
    "states": 1,
    "index": 1,
    "graph": 1,
    "search": 1,
    "run": 1,
    "comparison": 1,
}
"""Part of every key: raise one when the files of its kind change meaning, and nothing older is reused."""

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
SHORT_KEY_LENGTH = 12
"""Hex digits of a key in a folder's name: 48 bits, one clash expected among 20 million artefacts."""
MAX_SLUG_LENGTH = 60


def artefact_key(kind: Kind, identity: Mapping[str, JsonValue], *, version: int = 0) -> str:
    """Hash all that can change the content of an artefact.

    Args:
        kind: What is made.
        identity: Keys of the inputs and every parameter with an effect. Plain JSON with string keys; tuples
            count as lists. 1 and 1.0 are different identities, so pass values through a typed configuration.
        version: Version of the kind's format, hashed too; 0 for today's.

    Returns:
        64 hex digits, the SHA-256 of the canonical JSON (sorted keys, no white space, ASCII only).

    Raises:
        TypeError: A key is not a string, or a value is not JSON; two identities could collide.
        ValueError: A number is NaN or infinite.
    """
    if kind not in FORMAT_VERSIONS:
        raise StoreError(f"An artefact's kind is {kind!r}; known kinds: {', '.join(KINDS)}.")
    return _sha256({"kind": kind, "format": version or FORMAT_VERSIONS[kind], "identity": identity})


def plain_json(value: Mapping[str, JsonValue], what: str) -> dict[str, JsonValue]:
    """Return the value as JSON reads it back: tuples become lists.

    Raises:
        TypeError: It holds something else than JSON, such as a NumPy number.
        ValueError: It holds NaN or an infinite number.
    """
    try:
        plain: dict[str, JsonValue] = json.loads(canonical_json(value))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{what} is not JSON: {error}") from error
    return plain


def canonical_json(value: object) -> str:
    """Return the one JSON text of ``value``: sorted keys, no white space, ASCII only.

    Raises:
        TypeError: A mapping's key is not a string, or a value is not JSON.
        ValueError: A number is NaN or infinite.
    """
    _refuse_unclear_keys(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def slugify(text: str) -> str:
    """Turn any label into the readable part of a folder's name: lower-case ASCII letters, digits and dashes.

    Raises:
        StoreError: Nothing readable is left.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:MAX_SLUG_LENGTH].strip("-")
    if not slug:
        raise StoreError(f"An artefact's slug is {text!r}; it needs at least one ASCII letter or digit.")
    return slug


def safe_file_name(name: str) -> str:
    """Return ``name`` if it is a plain relative path that stays inside its folder.

    Raises:
        ValueError: It is absolute, climbs with "..", hides with a leading dot, or is not in shortest form.
    """
    parts = name.split("/")
    hidden_or_empty = any(not part or part.startswith(".") for part in parts)  # "/x", "a//b", "..", ".x"
    if hidden_or_empty or any(character in name for character in "\\\0:"):
        raise ValueError(f"{name!r} is not a plain file name inside the artefact's folder")
    return name


FileName = Annotated[str, AfterValidator(safe_file_name)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=MAX_SLUG_LENGTH)]


class InputRef(BaseModel, frozen=True, extra="forbid"):
    """One artefact that another was made from."""

    kind: Kind
    key: Sha256
    role: str = ""
    """What it was used as, where one artefact can have several inputs of one kind: "image features"."""


class FileEntry(BaseModel, frozen=True, extra="forbid"):
    """One file of an artefact."""

    sha256: Sha256
    bytes: NonNegativeInt


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """All that is known of an artefact but its files' content; on disk as ``manifest.json``."""

    kind: Kind
    key: Sha256
    slug: Slug
    format: int
    inputs: tuple[InputRef, ...] = ()
    identity: dict[str, JsonValue]
    """What was hashed into the key."""
    parameters: dict[str, JsonValue] = Field(default_factory=dict)
    """Settings worth showing, whether they are part of the identity or not."""
    facts: dict[str, JsonValue] = Field(default_factory=dict)
    """What the stage measured while it worked."""
    versions: dict[str, str] = Field(default_factory=dict)
    hardware: Hardware
    seconds: float
    """Wall time of the stage; of its last try where it was resumed."""
    bytes: NonNegativeInt
    files: dict[FileName, FileEntry]
    data_folder: Annotated[str, Field(pattern=r"^(data-[0-9A-Za-z-]+)?$")] = ""
    """Where the files lie below the artefact's folder; "" where they lie beside the manifest."""
    created_at: AwareDatetime

    @property
    def folder(self) -> str:
        """Name of the artefact's folder, below the folder of its kind."""
        return folder_name(self.slug, self.key)


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the text of ``manifest.json``, with a checksum over itself."""
    fields = {"manifest_version": MANIFEST_VERSION, **manifest.model_dump(mode="json")}
    document = {**fields, "manifest_sha256": _sha256(fields)}
    return (json.dumps(document, indent=2, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")


def decode_manifest(data: bytes, address: str, kind: Kind, folder: str) -> Manifest:
    """Read a manifest and check that it is whole, our own, and that of this folder.

    Args:
        data: Content of ``manifest.json``; empty where there is none.
        address: The folder it was found in, for the message.
        kind: The kind whose folder it was found in.
        folder: Name of the folder it was found in.

    Raises:
        StoreError: It is damaged, belongs to another folder, or was written by a newer Tandem.
    """
    document = _parse(data, address)
    version = document.pop("manifest_version", None)
    if isinstance(version, int) and version > MANIFEST_VERSION:
        raise StoreError(
            f"{address} has manifest version {version}, this Tandem reads {MANIFEST_VERSION}; "
            "it was written by a newer Tandem: upgrade, or use another --store."
        )
    checksum = document.pop("manifest_sha256", None)
    if version != MANIFEST_VERSION or checksum != _sha256({"manifest_version": version, **document}):
        raise damaged(address, "its checksum does not match its content")
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise damaged(address, f"{field}: {first['msg']}") from error
    if (manifest.kind, manifest.folder) != (kind, folder):
        raise damaged(address, f"it describes {manifest.kind}/{manifest.folder}")
    return manifest


def folder_name(slug: str, key: str) -> str:
    """Return the name of an artefact's folder: "tiny-image-0123456789ab"."""
    return f"{slug}-{key[:SHORT_KEY_LENGTH]}"


def damaged(address: str, why: str) -> StoreError:
    """Return the error for an artefact whose manifest cannot be trusted."""
    return StoreError(
        f"The manifest of {address} is damaged: {why}. Nothing in this folder is used; make the artefact "
        "again with --force, which replaces the folder, or delete the folder."
    )


def _parse(data: bytes, address: str) -> dict[str, JsonValue]:
    if not data:
        raise damaged(address, "it is missing or empty")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged(address, f"not JSON ({error})") from error
    if not isinstance(document, dict):
        raise damaged(address, "not a JSON object")
    return document


def _sha256(value: object) -> str:
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


def _refuse_unclear_keys(value: object) -> None:
    """``json`` writes the keys 1, True and "1" alike or nearly so; an identity must not."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"an identity's keys are strings, not {key!r}")
            _refuse_unclear_keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _refuse_unclear_keys(inner)
