"""What several workers, on one machine or on many, prepare together for one artefact."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.faults import told_in_words
from pipeline.shelf import SHARDS, Shelf

TRANSFERS = 8


class SharedFolder:
    """A folder of a store that all workers for one artefact see; it lives until the artefact is whole.

    Workers write into ``folder``. Below a local store that is the shared folder itself; of a remote store it
    is this machine's copy, from which whole files are published and into which they are fetched.
    """

    def __init__(self, shelf: Shelf, draft_name: str) -> None:
        self._shelf = shelf
        self._draft_name = draft_name

    @property
    def folder(self) -> Path:
        """Where to write; local."""
        folder = self._shelf.shared_folder(self._draft_name)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def names(self) -> list[str]:
        """Return the names of the files that any worker has published, sorted."""
        with told_in_words(self._shelf):
            return self._shelf.shared_names(self._draft_name)

    def publish(self, name: str) -> None:
        """Show a whole file of ``folder`` to the other workers."""
        with told_in_words(self._shelf):
            self._shelf.publish_shared(self._draft_name, name)

    def fetch(self, names: Iterable[str]) -> None:
        """Bring published files into ``folder``."""
        with told_in_words(self._shelf), ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(lambda name: self._shelf.fetch_shared(self._draft_name, name), names))

    def read(self, name: str) -> bytes | None:
        """Return what ``settle`` gave to the first worker, None where none has asked yet."""
        with told_in_words(self._shelf):
            return self._shelf.read_document(self._path(name))

    def settle(self, name: str, find_out: Callable[[], bytes]) -> bytes:
        """Return what the first worker found out; every other worker gets the same."""
        found = self.read(name)
        if found is not None:
            return found
        data = find_out()
        with told_in_words(self._shelf):
            return self._shelf.create_document(self._path(name), data)

    def remove(self) -> None:
        """Take all of it away."""
        with told_in_words(self._shelf):
            self._shelf.remove_shared(self._draft_name)

    def _path(self, name: str) -> str:
        return f"{SHARDS}/{self._draft_name}/{name}"
