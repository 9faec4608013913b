"""Artefacts on disk: asked for by key or name, made once, written whole."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

from pydantic import JsonValue

from pipeline import collection, naming
from pipeline.artefact import Artefact, Draft, Outcome
from pipeline.collection import Collected
from pipeline.errors import StoreError
from pipeline.faults import told_in_words
from pipeline.lineage import Lineage, trace
from pipeline.manifest import (
    KINDS,
    InputRef,
    Kind,
    Manifest,
    artefact_key,
    decode_manifest,
    plain_json,
    slugify,
)
from pipeline.naming import Pointer
from pipeline.opening import default_cache, default_url, open_shelf
from pipeline.production import Recipe, announce, make_artefact
from pipeline.references import folders_with_key, locate
from pipeline.sharing import SharedFolder
from pipeline.shelf import WORKER_MARK
from pipeline.verification import Problem, verify_folder

__all__ = [
    "Artefact",
    "Draft",
    "InputRef",
    "Kind",
    "Manifest",
    "Outcome",
    "Store",
    "artefact_key",
    "default_url",
]

WEEK = timedelta(days=7)
READERS = 8
GARBAGE = "Garbage is being collected, or the store's names are being changed"

_log = logging.getLogger(__name__)
_Artefacts = list[Artefact]  # inside the class, ``list`` is the method
_Names = list[str]
_Problems = list[Problem]


class Store:
    """Keeps artefacts under their keys, in a local folder or below any fsspec URL."""

    def __init__(
        self, url: str | Path = "", *, cache: str | Path = "", say: Callable[[str], None] = _log.warning
    ) -> None:
        """Open a store, made if there is none.

        Args:
            url: Local path or fsspec URL; "" for ``default_url()``.
            cache: Local folder for drafts and copies of a remote store; "" for ``default_cache()``.
            say: Told what a person should know meanwhile: a process is waited for, a folder is damaged.

        Raises:
            StoreError: The place is no store and not empty, or cannot be reached or made.
        """
        local = Path(cache).expanduser().absolute() if cache else default_cache()
        self._shelf = open_shelf(url or default_url(), local)
        self._say = say

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    @property
    def url(self) -> str:
        """Printable address of the store."""
        return self._shelf.url

    # -- asking ------------------------------------------------------------------------------------

    def find(self, kind: Kind, key: str) -> Artefact | None:
        """Return the whole artefact of this key, or None if there is none.

        Raises:
            StoreError: There is one, but its manifest is damaged; says which folder and what to do.
        """
        with told_in_words(self._shelf):
            artefact = self._find(kind, key)
            if artefact is not None:
                self._shelf.mark_used(artefact.manifest)
            return artefact

    def get(self, ref: str, kind: Kind | None = None) -> Artefact:
        """Return the artefact that a person means.

        Args:
            ref: A name, a folder ("tiny-image-0123456789ab"), a key or its first 6 or more digits, each as
                it is or after its kind ("features/clip-baby").
            kind: The kind that is wanted; None for any.

        Raises:
            StoreError: There is none, there are several, it is of another kind, or its manifest is damaged.
        """
        with told_in_words(self._shelf):
            artefact = self._resolve(ref, kind)
            self._shelf.mark_used(artefact.manifest)
            return artefact

    def list(self, kind: Kind | None = None) -> list[Artefact]:
        """Return all artefacts of a kind, or of every kind, newest last; says which folders are damaged."""
        whole, damaged = self.survey(kind)
        for message in damaged.values():
            self._say(message)
        return whole

    def survey(self, kind: Kind | None = None) -> tuple[_Artefacts, dict[str, str]]:
        """Read all manifests, nothing else.

        Returns:
            The artefacts by time of making, and for each folder whose manifest is damaged its reference and
            what is wrong.
        """

        def read(place: tuple[Kind, str]) -> Artefact | StoreError | None:
            try:
                return self._read(*place)
            except StoreError as error:
                return error

        with told_in_words(self._shelf), ThreadPoolExecutor(READERS) as pool:
            kinds = KINDS if kind is None else (kind,)
            places = [(each, folder) for each in kinds for folder in self._shelf.folders(each)]
            read_all = [*pool.map(read, places)]
        whole = [each for each in read_all if isinstance(each, Artefact)]
        damaged = {
            f"{place[0]}/{place[1]}": str(each)
            for place, each in zip(places, read_all, strict=True)
            if isinstance(each, StoreError)
        }
        return sorted(whole, key=lambda each: (each.manifest.created_at, each.key)), damaged

    def lineage(self, artefact: Artefact) -> Lineage:
        """Return what an artefact was made from, down to its first inputs."""
        with told_in_words(self._shelf):
            return trace(artefact.as_input(), lambda source: self._find(source.kind, source.key))

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

        Of several processes that ask for one key at once, one makes it and the others wait for that.

        Args:
            kind: What it is.
            slug: The readable part of its folder's name; any label.
            identity: All that can change the content; see ``artefact_key``.
            inputs: The artefacts it is made from. They are not part of the key unless ``identity`` says so.
            parameters: Settings worth showing in the manifest.
            make: Fills the draft. What it raises passes through, but for a full disk.
            resumable: What a failed or killed ``make`` has written is there when it is tried again.
            force: Make it even though it exists; the new one replaces the old one once it is whole.

        Raises:
            StoreError: The store is full, read-only, lacks an input, or holds a damaged artefact of this key.
        """
        recipe = Recipe(
            kind,
            artefact_key(kind, identity),
            slugify(slug),
            plain_json(identity, "The identity"),
            tuple(inputs),
            plain_json(parameters or {}, "The parameters"),
        )
        if not force and (found := self.find(kind, recipe.key)) is not None:
            return Outcome(found, reused=True)
        with ExitStack() as held:
            with told_in_words(self._shelf):
                held.enter_context(self._lock(recipe.draft_name, f"Another process is making {recipe.ref}"))
            if not force and (found := self.find(kind, recipe.key)) is not None:
                return Outcome(found, reused=True)
            with told_in_words(self._shelf):
                announce(self._shelf, recipe, self._has, self._lock(collection.LOCK, GARBAGE))
            manifest = make_artefact(self._shelf, recipe, make, resumable=resumable)
            return Outcome(Artefact(manifest, self._shelf), reused=False)

    @contextmanager
    def share(
        self,
        kind: Kind,
        *,
        slug: str,
        identity: Mapping[str, JsonValue],
        inputs: Sequence[InputRef] = (),
        worker: str,
    ) -> Iterator[SharedFolder]:
        """Open the folder in which several workers prepare an artefact that ``produce`` then puts together.

        What was written stays when a worker ends or is killed, and its inputs stay as those of a draft do.

        Args:
            kind: What the artefact will be.
            slug: As for ``produce``.
            identity: As for ``produce``.
            inputs: As for ``produce``.
            worker: Of two workers of this name the second waits, on one machine.

        Raises:
            StoreError: The store is full, read-only, or lacks an input.
        """
        recipe = Recipe(kind, artefact_key(kind, identity), slugify(slug), {}, tuple(inputs), {})
        lock = f"{recipe.draft_name}{WORKER_MARK}{slugify(worker)}"
        with ExitStack() as held:
            with told_in_words(self._shelf):
                held.enter_context(self._lock(lock, f"Another process works on {worker} of it"))
                announce(self._shelf, recipe, self._has, self._lock(collection.LOCK, GARBAGE))
            yield SharedFolder(self._shelf, recipe.draft_name)

    # -- small files that are no artefacts ---------------------------------------------------------

    def documents(self, folder: str) -> _Names:
        """Return the names of the small files that the store keeps in a folder of its own, sorted."""
        with told_in_words(self._shelf):
            return self._shelf.documents(folder)

    def read_document(self, path: str) -> bytes | None:
        """Return one of them, by folder and name; None where there is none."""
        with told_in_words(self._shelf):
            return self._shelf.read_document(path)

    def write_document(self, path: str, data: bytes) -> None:
        """Write one of them whole, in place of one that is there."""
        with told_in_words(self._shelf):
            self._shelf.write_document(path, data)

    def delete_document(self, path: str) -> None:
        """Delete one of them, if it is there."""
        with told_in_words(self._shelf):
            self._shelf.delete_document(path)

    # -- naming ------------------------------------------------------------------------------------

    def name(self, name: str, artefact: Artefact) -> None:
        """Point a name at an artefact, away from what it meant before; a named artefact is never collected.

        Raises:
            StoreError: The name is not allowed or belongs to another kind, or the artefact is gone.
        """
        with told_in_words(self._shelf), self._lock(collection.LOCK, GARBAGE):
            if self._find(artefact.kind, artefact.key) is None:
                raise StoreError(
                    f"{artefact.ref} is no longer in the store {self.url}, so it cannot be named."
                )
            naming.write_name(self._shelf, name, artefact.manifest)

    def names(self) -> dict[str, Pointer]:
        """Return all names, sorted, and what they stand for."""
        with told_in_words(self._shelf):
            return naming.read_names(self._shelf)

    def unname(self, name: str) -> None:
        """Take a name away; the artefact stays.

        Raises:
            StoreError: There is no such name.
        """
        with told_in_words(self._shelf):
            if f"{name}.json" not in self._shelf.documents(naming.FOLDER):
                known = ", ".join(self.names()) or "none"
                raise StoreError(f"The store {self.url} has no name {name!r}; known names: {known}.")
            naming.delete_name(self._shelf, name)

    # -- upkeep ------------------------------------------------------------------------------------

    def verify(self, artefact: Artefact | str) -> _Problems:
        """Compare every byte of an artefact with its manifest.

        Args:
            artefact: The artefact, or a reference; a folder with a damaged manifest can only be referred to.

        Returns:
            What is wrong; nothing for an artefact that is as it was written.
        """
        with told_in_words(self._shelf):
            if isinstance(artefact, Artefact):
                return verify_folder(self._shelf, artefact.kind, artefact.manifest.folder)
            place = locate(self._shelf, artefact, None)
            return verify_folder(self._shelf, place.kind, place.folder)

    def verify_all(self, progress: Callable[[int, int], None] | None = None) -> dict[str, _Problems]:
        """Verify every artefact and every name.

        Args:
            progress: Called with (done, total) after each artefact.

        Returns:
            Reference of each artefact, and "names/<name>" of each name that leads nowhere -> what is wrong.
        """
        with told_in_words(self._shelf):
            places = [(kind, folder) for kind in KINDS for folder in self._shelf.folders(kind)]
            found = {}
            for number, (kind, folder) in enumerate(places, start=1):
                if self._shelf.read_manifest(kind, folder) is not None:  # else it is no artefact (yet)
                    found[f"{kind}/{folder}"] = verify_folder(self._shelf, kind, folder)
                if progress is not None:
                    progress(number, len(places))
            for name, pointer in self.names().items():
                if not folders_with_key(self._shelf, pointer.kind, pointer.key):
                    what = f"it stands for {pointer.ref}, which is not in the store"
                    found[f"{naming.FOLDER}/{name}"] = [Problem(f"{naming.FOLDER}/{name}", "", what)]
            return found

    def collect_garbage(
        self, *, keep: Sequence[str] = (), older_than: timedelta = WEEK, dry_run: bool = True
    ) -> Collected:
        """Delete what nobody keeps and no kept artefact was made from, and leftovers of killed processes.

        Kept are artefacts that are named, in ``keep``, made or used within ``older_than``, or read by a draft
        in the course of being written, and all they were made from. A remote store knows no time of use,
        only of making; and it has no lock among machines, so a stage that another machine begins in the same
        second may find its old, unnamed inputs gone (it then says so, and making them again mends it).

        Args:
            keep: References of artefacts to keep.
            older_than: Age from which an artefact or a leftover may go.
            dry_run: Only say what would go.

        Raises:
            StoreError: A reference in ``keep`` means nothing, or a manifest is damaged, so that what it was
                made from is unknown.
        """
        with ExitStack() as held, told_in_words(self._shelf):
            asked = {(each.kind, each.key) for each in map(self._resolve, keep)}
            if not dry_run:
                held.enter_context(self._lock(collection.LOCK, GARBAGE))
            return collection.collect(
                self._shelf,
                self._all_or_error,
                named={(pointer.kind, pointer.key): name for name, pointer in self.names().items()},
                asked=asked,
                older_than=older_than,
                dry_run=dry_run,
            )

    # -- helpers -----------------------------------------------------------------------------------

    def _lock(self, name: str, why_wait: str) -> AbstractContextManager[None]:
        return self._shelf.lock(name, lambda: self._say(f"{why_wait}; waiting until that is done."))

    def _has(self, source: InputRef) -> bool:
        return self._find(source.kind, source.key) is not None

    def _all_or_error(self) -> _Artefacts:
        whole, damaged = self.survey()
        if damaged:
            raise StoreError(
                f"Nothing is collected: what {', '.join(damaged)} was made from cannot be read, so it is "
                f"unknown what must stay. {next(iter(damaged.values()))}"
            )
        return whole

    def _resolve(self, ref: str, kind: Kind | None = None) -> Artefact:
        place = locate(self._shelf, ref, kind)
        artefact = self._read(place.kind, place.folder)
        if artefact is None or not artefact.key.startswith(place.key_prefix):
            raise StoreError(f"{ref!r} is not in the store {self.url}; `tandem ls` lists what there is.")
        return artefact

    def _find(self, kind: Kind, key: str) -> Artefact | None:
        for folder in folders_with_key(self._shelf, kind, key):
            artefact = self._read(kind, folder)
            if artefact is not None and artefact.key == key:
                return artefact
        return None

    def _read(self, kind: Kind, folder: str) -> Artefact | None:
        data = self._shelf.read_manifest(kind, folder)
        if data is None:
            return None
        return Artefact(decode_manifest(data, self._shelf.address(kind, folder), kind, folder), self._shelf)
