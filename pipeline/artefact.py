"""An artefact as its readers see it, and the draft that its maker fills."""

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import BinaryIO

from pydantic import JsonValue

from pipeline.errors import StoreError
from pipeline.manifest import MANIFEST_NAME, InputRef, Kind, Manifest, plain_json, safe_file_name
from pipeline.shelf import Shelf, scratch_beside


@dataclass(frozen=True)
class Artefact:
    """One whole artefact of a store. Equal artefacts have equal manifests."""

    manifest: Manifest
    shelf: Shelf = field(repr=False, compare=False)

    @property
    def kind(self) -> Kind:
        """What it is."""
        return self.manifest.kind

    @property
    def key(self) -> str:
        """64 hex digits, the hash of all that could change its content."""
        return self.manifest.key

    @property
    def slug(self) -> str:
        """The readable part of its folder's name."""
        return self.manifest.slug

    @property
    def ref(self) -> str:
        """What a person types and reads: "features/tiny-image-0123456789ab"."""
        return f"{self.kind}/{self.manifest.folder}"

    @property
    def folder_url(self) -> str:
        """Printable address of its folder."""
        return self.shelf.address(self.kind, self.manifest.folder)

    def as_input(self, role: str = "") -> InputRef:
        """Return the reference that an artefact made from this one keeps."""
        return InputRef(kind=self.kind, key=self.key, role=role)

    def path(self, name: str) -> Path:
        """Return a local path of one of its files; from a remote store it is fetched once and checked.

        Raises:
            StoreError: It has no such file, or the file is gone, cut short, or arrived damaged.
        """
        if name not in self.manifest.files:
            near = get_close_matches(name, self.manifest.files, n=3) or sorted(self.manifest.files)[:5]
            raise StoreError(f"{self.ref} has no file {name!r}; it has {', '.join(near) or 'no files'}.")
        return self.shelf.fetch(self.manifest, name)

    def paths(self, pattern: str = "*") -> list[Path]:
        """Return local paths of its files whose names match ``pattern``, sorted by name."""
        names = sorted(name for name in self.manifest.files if fnmatch.fnmatchcase(name, pattern))
        return [self.path(name) for name in names]

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Open one of its files for reading bytes."""
        with self.path(name).open("rb") as file:
            yield file


@dataclass(frozen=True)
class Outcome:
    """What asking for an artefact gave."""

    artefact: Artefact
    reused: bool
    """It existed: nothing was made."""


class Draft:
    """A folder to fill: it becomes an artefact when its maker returns.

    Files whose names begin with a dot or end in ".tmp" are deleted then: what a killed writer left.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """Where to write; local. Empty, unless the stage is resumable and an earlier try was killed."""
        self.facts: dict[str, JsonValue] = {}

    @property
    def scratch(self) -> Path:
        """A folder for checkpoints and the like: kept as the draft is, and gone once there is an artefact."""
        folder = scratch_beside(self.folder)
        folder.mkdir(exist_ok=True)
        return folder

    def record(self, **facts: JsonValue) -> None:
        """Keep measured figures for the manifest; a later value replaces an earlier one.

        Raises:
            TypeError: A figure is not JSON, such as a NumPy integer; found now, not after hours of work.
            ValueError: A figure is NaN or infinite.
        """
        for name, value in facts.items():
            self.facts.update(plain_json({name: value}, f"The fact {name!r}"))

    def path(self, name: str) -> Path:
        """Return where to write the file ``name``; folders above it are made.

        Raises:
            StoreError: The name would leave the artefact's folder, hide, or replace the manifest.
        """
        try:
            safe_file_name(name)
        except ValueError as error:
            raise StoreError(f"An artefact cannot hold this file: {error}.") from error
        if name == MANIFEST_NAME:
            raise StoreError(f"{MANIFEST_NAME} is written by the store; give the file another name.")
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
