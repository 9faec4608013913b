"""How an artefact comes to be: a draft is announced, filled, checksummed and put in place whole."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import JsonValue

from pipeline import collection
from pipeline.artefact import Draft
from pipeline.errors import StoreError
from pipeline.faults import full_disk_told_in_words, told_in_words
from pipeline.hardware import describe_hardware, library_versions
from pipeline.manifest import (
    FORMAT_VERSIONS,
    MANIFEST_NAME,
    SHORT_KEY_LENGTH,
    InputRef,
    Kind,
    Manifest,
    decode_manifest,
    folder_name,
)
from pipeline.references import folders_with_key
from pipeline.shelf import (
    Shelf,
    checksum_files,
    delete_path,
    drop_temporary_files,
    files_below,
    scratch_beside,
)


@dataclass(frozen=True)
class Recipe:
    """All that is known of an artefact before it is made."""

    kind: Kind
    key: str
    slug: str
    identity: dict[str, JsonValue]
    inputs: tuple[InputRef, ...]
    parameters: dict[str, JsonValue]

    @property
    def draft_name(self) -> str:
        """What its draft, the draft's lock and the draft's note are called."""
        return collection.draft_name(self.kind, self.key)

    @property
    def ref(self) -> str:
        """The reference it will have."""
        return f"{self.kind}/{folder_name(self.slug, self.key)}"


def announce(
    shelf: Shelf, recipe: Recipe, exists: Callable[[InputRef], bool], lock: AbstractContextManager[None]
) -> None:
    """Protect the inputs from garbage collection while they are read.

    Args:
        shelf: The store's place.
        recipe: What is going to be made.
        exists: Says whether the store has an input.
        lock: That of garbage collection, not yet held.

    Raises:
        StoreError: The store does not have an input.
    """
    with lock:
        missing = [source for source in recipe.inputs if not exists(source)]
        if not missing:
            collection.write_note(shelf, recipe.kind, recipe.key, recipe.inputs)
            return
    named = ", ".join(f"{source.kind} {source.key[:SHORT_KEY_LENGTH]}" for source in missing)
    raise StoreError(
        f"{recipe.ref} is to be made from {named}, which is not in the store {shelf.url}; make that first."
    )


def make_artefact(
    shelf: Shelf, recipe: Recipe, make: Callable[[Draft], None], *, resumable: bool
) -> Manifest:
    """Fill a draft and put it in place; called with the lock of its key held, after ``announce``."""
    folder = shelf.staging(recipe.draft_name)
    done = False
    try:
        with told_in_words(shelf):
            draft = _open_draft(folder, resumable=resumable)
        started = time.perf_counter()
        with full_disk_told_in_words(shelf, parts_stay=resumable):
            make(draft)
        seconds = time.perf_counter() - started
        with told_in_words(shelf):
            drop_temporary_files(folder)
            manifest = shelf.commit(_describe(shelf, recipe, draft, seconds), folder)
        done = True
        return manifest
    finally:
        if done or not resumable:
            with suppress(Exception):  # an error that is under way matters more
                delete_path(folder)
                delete_path(scratch_beside(folder))
                collection.delete_note(shelf, recipe.draft_name)


def _open_draft(folder: Path, *, resumable: bool) -> Draft:
    if not resumable:  # what a killed maker left
        delete_path(folder)
        delete_path(scratch_beside(folder))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST_NAME).unlink(missing_ok=True)  # killed just before the last step
    return Draft(folder)


def _describe(shelf: Shelf, recipe: Recipe, draft: Draft, seconds: float) -> Manifest:
    names = files_below(draft.folder)
    if MANIFEST_NAME in names:
        raise StoreError(
            f"{MANIFEST_NAME} is written by the store; give the file of {recipe.ref} another name."
        )
    files = checksum_files(draft.folder, names)
    return Manifest(
        kind=recipe.kind,
        key=recipe.key,
        slug=_slug(shelf, recipe),
        format=FORMAT_VERSIONS[recipe.kind],
        inputs=recipe.inputs,
        identity=recipe.identity,
        parameters=recipe.parameters,
        facts=draft.facts,
        versions=library_versions(),
        hardware=describe_hardware(),
        seconds=seconds,
        bytes=sum(entry.bytes for entry in files.values()),
        files=files,
        created_at=datetime.now(UTC),
    )


def _slug(shelf: Shelf, recipe: Recipe) -> str:
    """A key has one folder: made again under another label, an artefact keeps the first.

    Raises:
        StoreError: The folder belongs to another key with the same first digits.
    """
    for folder in folders_with_key(shelf, recipe.kind, recipe.key):
        data = shelf.read_manifest(recipe.kind, folder)
        if data is None:  # an upload that was given up
            continue
        slug = folder[: -SHORT_KEY_LENGTH - 1]
        try:
            key = decode_manifest(data, shelf.address(recipe.kind, folder), recipe.kind, folder).key
        except StoreError:
            return slug  # damaged: replaced
        if key == recipe.key:
            return slug
        if slug == recipe.slug:
            raise StoreError(
                f"{recipe.ref} exists with another key ({key[:24]}..., not {recipe.key[:24]}...); make this "
                "one under another label."
            )
    return recipe.slug
