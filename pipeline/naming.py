"""Names that people give to artefacts: each points at one, and can be moved to another in one step."""

import re
from contextlib import suppress
from datetime import UTC, datetime

from pydantic import AwareDatetime, BaseModel, ValidationError

from pipeline.errors import StoreError
from pipeline.manifest import SHORT_KEY_LENGTH, Kind, Manifest, Sha256, Slug, folder_name
from pipeline.shelf import Shelf

FOLDER = "names"
MAX_NAME_LENGTH = 64
MIN_PREFIX_LENGTH = 6
"""Shortest part of a key that counts as a reference: 24 bits tell thousands of artefacts apart."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_KEY_PREFIX = re.compile(rf"[0-9a-f]{{{MIN_PREFIX_LENGTH},64}}")
_FOLDER_NAME = re.compile(rf".+-[0-9a-f]{{{SHORT_KEY_LENGTH}}}")


class Pointer(BaseModel, frozen=True, extra="forbid"):
    """What a name stands for."""

    kind: Kind
    key: Sha256
    slug: Slug
    named_at: AwareDatetime

    @property
    def ref(self) -> str:
        """The artefact's reference: "features/tiny-image-0123456789ab"."""
        return f"{self.kind}/{folder_name(self.slug, self.key)}"


def check_name(name: str) -> str:
    """Return ``name`` if an artefact can be called so.

    Raises:
        StoreError: It is empty, too long, has other characters, or could be read as a key or a folder.
    """
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME_LENGTH or name.endswith((".", ".json", ".tmp")):
        raise StoreError(
            f"An artefact cannot be named {name!r}; a name has 1 to {MAX_NAME_LENGTH} lower-case letters, "
            "digits, dots, dashes or underscores, begins with a letter or a digit, and does not end in a "
            "dot, .json or .tmp."
        )
    if _KEY_PREFIX.fullmatch(name) or _FOLDER_NAME.fullmatch(name):
        raise StoreError(f"The name {name!r} could be read as an artefact's key or folder; choose another.")
    return name


def write_name(shelf: Shelf, name: str, manifest: Manifest) -> None:
    """Point a name at an artefact, away from what it meant before.

    Raises:
        StoreError: The name is not allowed, or belongs to an artefact of another kind.
    """
    path = _path(check_name(name))
    before = None
    with suppress(StoreError):  # a damaged name is replaced like any other
        before = read_name(shelf, name)
    if before is not None and before.kind != manifest.kind:
        raise StoreError(
            f"The name {name!r} belongs to {before.ref}, so it cannot name {manifest.kind}/{manifest.folder}"
            "; choose another name, or take this one away first."
        )
    pointer = Pointer(kind=manifest.kind, key=manifest.key, slug=manifest.slug, named_at=datetime.now(UTC))
    shelf.write_document(path, (pointer.model_dump_json(indent=2) + "\n").encode())


def read_name(shelf: Shelf, name: str) -> Pointer | None:
    """Return what a name stands for; None where there is no such name.

    Raises:
        StoreError: The name's file is damaged.
    """
    if not _NAME.fullmatch(name):
        return None
    data = shelf.read_document(_path(name))
    if data is None:
        return None
    try:
        return Pointer.model_validate_json(data)
    except ValidationError as error:
        raise StoreError(
            f"{shelf.url}/{_path(name)} is damaged ({error.errors()[0]['msg']}); name the artefact again."
        ) from error


def read_names(shelf: Shelf) -> dict[str, Pointer]:
    """Return all names, sorted.

    Raises:
        StoreError: A name's file is damaged.
    """
    found = {}
    for file in shelf.documents(FOLDER):
        name = file.removesuffix(".json")
        pointer = read_name(shelf, name) if file.endswith(".json") else None
        if pointer is not None:
            found[name] = pointer
    return found


def delete_name(shelf: Shelf, name: str) -> None:
    """Take a name away; the artefact stays."""
    shelf.delete_document(_path(check_name(name)))


def _path(name: str) -> str:
    return f"{FOLDER}/{name}.json"
