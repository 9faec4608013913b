"""Artefacts on disk: asked for by key, made once, written whole."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import JsonValue

from pipeline.artefact import Artefact, Draft, Outcome
from pipeline.errors import StoreError
from pipeline.hardware import describe_hardware, library_versions
from pipeline.local_shelf import LocalShelf
from pipeline.manifest import (
    FORMAT_VERSIONS,
    KINDS,
    MANIFEST_NAME,
    SHORT_KEY_LENGTH,
    InputRef,
    Kind,
    Manifest,
    artefact_key,
    canonical_json,
    damaged,
    decode_manifest,
    folder_name,
    slugify,
)
from pipeline.shelf import Shelf, checksum_files, drop_scratch, files_below

__all__ = ["Artefact", "Draft", "InputRef", "Kind", "Manifest", "Outcome", "Store", "artefact_key"]

DEFAULT_URL = ".tandem"
URL_VARIABLE = "TANDEM_STORE"
MARKER = "tandem-store.json"

_log = logging.getLogger(__name__)


def default_url() -> str:
    """Return the store that is meant when none is named: the variable TANDEM_STORE, else ``.tandem`` here."""
    return os.environ.get(URL_VARIABLE, "") or DEFAULT_URL


@dataclass(frozen=True)
class _Recipe:
    """All that is known of an artefact before it is made."""

    kind: Kind
    key: str
    slug: str
    identity: Mapping[str, JsonValue]
    inputs: tuple[InputRef, ...]
    parameters: Mapping[str, JsonValue]

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.key}"

    @property
    def ref(self) -> str:
        return f"{self.kind}/{folder_name(self.slug, self.key)}"


class Store:
    """Keeps artefacts under their keys, in a local folder or below any fsspec URL."""

    def __init__(self, url: str | Path = "", *, say: Callable[[str], None] = _log.info) -> None:
        """Open a store, made if there is none.

        Args:
            url: Local path or fsspec URL; "" for ``default_url()``.
            say: Told what a person should know while a call takes long: that another process is waited for.

        Raises:
            StoreError: The folder holds other things, or cannot be made.
        """
        self._shelf: Shelf = LocalShelf(Path(url or default_url()).expanduser().absolute())
        Path(self._shelf.url).mkdir(parents=True, exist_ok=True)
        self._say = say

    @property
    def url(self) -> str:
        """Printable address of the store."""
        return self._shelf.url

    # -- asking ------------------------------------------------------------------------------------

    def find(self, kind: Kind, key: str) -> Artefact | None:
        """Return the whole artefact of this key, or None if there is none.

        Raises:
            StoreError: There is one, but its manifest is damaged; it says which folder and what to do.
        """
        suffix = f"-{key[:SHORT_KEY_LENGTH]}"
        for folder in self._shelf.folders(kind):
            if folder.endswith(suffix):
                artefact = self._read(kind, folder)
                if artefact is not None and artefact.key == key:
                    self._shelf.mark_used(artefact.manifest)
                    return artefact
        return None

    def get(self, ref: str, kind: Kind | None = None) -> Artefact:
        """Return the artefact that a person means."""
        prefix, _, name = ref.rpartition("/")
        for artefact in self.list(kind):
            if prefix in ("", artefact.kind) and (
                artefact.manifest.folder == name or (len(name) >= 6 and artefact.key.startswith(name))
            ):
                return artefact
        raise StoreError(f"{ref!r} is not in the store {self.url}.")

    def list(self, kind: Kind | None = None) -> list[Artefact]:
        """Return all artefacts of a kind, or of every kind."""
        found = [
            self._read(each, folder)
            for each in (KINDS if kind is None else (kind,))
            for folder in self._shelf.folders(each)
        ]
        return [artefact for artefact in found if artefact is not None]

    def _read(self, kind: Kind, folder: str) -> Artefact | None:
        data = self._shelf.read_manifest(kind, folder)
        if data is None:
            return None
        where = self._shelf.manifest_url(kind, folder)
        if not data:
            raise damaged(where, "it is missing")
        return Artefact(decode_manifest(data, where, kind, folder), self._shelf)

    # -- making ------------------------------------------------------------------------------------

    def produce(
        self,
        kind: Kind,
        *,
        slug: str,
        identity: Mapping[str, JsonValue],
        inputs: Sequence[InputRef] = (),
        parameters: Mapping[str, JsonValue] | None = None,
        make: Callable[[Draft], None],
        resumable: bool = False,
        force: bool = False,
    ) -> Outcome:
        """Return the artefact of this identity, made now if it is not there.

        Args:
            kind: What it is.
            slug: The readable part of its folder's name; any label.
            identity: All that can change the content; see ``artefact_key``.
            inputs: The artefacts it is made from.
            parameters: Settings worth showing in the manifest.
            make: Fills the draft. What it raises passes through, and nothing is kept.
            resumable: What a failed or killed ``make`` has written is there when it is tried again.
            force: Make it even though it exists; the new one replaces the old one once it is whole.

        Raises:
            StoreError: The store is full, read-only, or holds a damaged artefact of this key.
        """
        key = artefact_key(kind, identity)
        plain = json.loads(canonical_json(identity))  # tuples become lists
        recipe = _Recipe(kind, key, slugify(slug), plain, tuple(inputs), parameters or {})
        if not force and (found := self.find(kind, key)) is not None:
            return Outcome(found, reused=True)
        waiting = f"{recipe.ref}: another process makes it; waiting for that."
        with self._shelf.lock(recipe.name, lambda: self._say(waiting)):
            if not force and (found := self.find(kind, key)) is not None:
                return Outcome(found, reused=True)
            return Outcome(self._make(recipe, make, resumable), reused=False)

    def _make(self, recipe: _Recipe, make: Callable[[Draft], None], resumable: bool) -> Artefact:
        folder = self._shelf.staging(recipe.kind, recipe.key)
        if folder.exists() and not resumable:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        draft = Draft(folder, resumed=any(folder.iterdir()))
        started = time.perf_counter()
        try:
            make(draft)
            drop_scratch(folder)
            files = checksum_files(folder, files_below(folder))
            manifest = Manifest(
                kind=recipe.kind,
                key=recipe.key,
                slug=recipe.slug,
                format=FORMAT_VERSIONS[recipe.kind],
                inputs=recipe.inputs,
                identity=dict(recipe.identity),
                parameters=dict(recipe.parameters),
                facts=draft.facts,
                versions=library_versions(),
                hardware=describe_hardware(),
                seconds=time.perf_counter() - started,
                bytes=sum(entry.bytes for entry in files.values()),
                files=files,
                created_at=datetime.now(UTC),
            )
            return Artefact(self._shelf.commit(manifest, folder), self._shelf)
        except BaseException:
            if not resumable:
                shutil.rmtree(folder, ignore_errors=True)
            raise
