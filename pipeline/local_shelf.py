"""A store in a local folder: an artefact is there from the moment its folder is renamed into place.

<root>/<kind>/<slug>-<key12>/manifest.json and files
<root>/names/<name>.json              names that point at artefacts
<root>/.drafts/<kind>-<key>/          what is being written; <kind>-<key>.json beside it says for what
<root>/.locks/<kind>-<key>.lock       held while a key is written
<root>/.replaced/<kind>--<folder>     the old version during a replacement
<root>/.trash/                        on its way out
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from pipeline.errors import StoreError
from pipeline.manifest import MANIFEST_NAME, Kind, Manifest, encode_manifest
from pipeline.shelf import (
    Leftover,
    bytes_below,
    modified_at,
    process_lock,
    process_lock_is_held,
    sync_folder,
    write_whole,
)

DRAFTS, LOCKS, REPLACED, TRASH = ".drafts", ".locks", ".replaced", ".trash"
USE_RESOLUTION = timedelta(hours=1)
"""A use is noted again after this time: garbage collection counts in days, and a note is a disk write."""


class LocalShelf:
    """A folder of this machine, or of a network file system with rename and locks."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    # -- reading -----------------------------------------------------------------------------------

    def folders(self, kind: Kind) -> list[str]:
        """Return the folders of a kind, sorted."""
        self._restore_replaced()
        try:
            entries = list((self.root / kind).iterdir())
        except FileNotFoundError:
            return []
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())

    def read_manifest(self, kind: Kind, folder: str) -> bytes | None:
        """Return the manifest's bytes; empty where the folder lacks it, None where there is no folder."""
        place = self.root / kind / folder
        try:
            return (place / MANIFEST_NAME).read_bytes()
        except FileNotFoundError:
            return b"" if place.is_dir() else None

    def manifest_url(self, kind: Kind, folder: str) -> str:
        """Return the path of a manifest."""
        return str(self.root / kind / folder / MANIFEST_NAME)

    def folder_url(self, manifest: Manifest) -> str:
        """Return the path of the artefact's folder."""
        return str(self._place(manifest))

    def fetch(self, manifest: Manifest, name: str) -> Path:
        """Return the path of a file; its presence and size are checked, its content by ``verify``."""
        path = self._place(manifest) / name
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            size = -1
        expected = manifest.files[name].bytes
        if size != expected:
            found = "is missing" if size < 0 else f"has {size:,} bytes instead of {expected:,}"
            raise StoreError(
                f"{path} {found}: the artefact is damaged. `tandem verify {manifest.kind}/{manifest.folder}` "
                "lists all that is wrong; --force makes it again."
            )
        return path

    def open_stored(self, manifest: Manifest, name: str) -> AbstractContextManager[BinaryIO]:
        """Open the file itself."""
        return (self._place(manifest) / name).open("rb")

    def stored_files(self, manifest: Manifest) -> dict[str, int]:
        """Return name and bytes of every file in the folder but the manifest; links count as 0 bytes."""
        place = self._place(manifest)
        found = {}
        for path in place.rglob("*"):
            if path.is_symlink() or not path.is_dir():
                size = 0 if path.is_symlink() else path.stat().st_size
                found[path.relative_to(place).as_posix()] = size
        found.pop(MANIFEST_NAME, None)
        return found

    def last_used(self, manifest: Manifest) -> datetime:
        """Return when the manifest was last touched: by its making, or by a later use."""
        return datetime.fromtimestamp((self._place(manifest) / MANIFEST_NAME).stat().st_mtime, UTC)

    def mark_used(self, manifest: Manifest) -> None:
        """Touch the manifest, at most once an hour; a read-only store is left as it is."""
        with suppress(OSError):
            if datetime.now(UTC) - self.last_used(manifest) > USE_RESOLUTION:
                (self._place(manifest) / MANIFEST_NAME).touch()

    # -- writing -----------------------------------------------------------------------------------

    def staging(self, kind: Kind, key: str) -> Path:
        """Return the folder of a draft."""
        return self.root / DRAFTS / f"{kind}-{key}"

    def commit(self, manifest: Manifest, draft: Path) -> Manifest:
        """Rename the draft into place; called with the key's lock held."""
        write_whole(draft / MANIFEST_NAME, encode_manifest(manifest))
        for folder in {path.parent for path in draft.rglob("*")}:
            sync_folder(folder)
        place = self._place(manifest)
        place.parent.mkdir(exist_ok=True)
        if place.exists():
            self._replace(place, draft, manifest)
        else:
            draft.rename(place)
        sync_folder(place.parent)
        return manifest

    def remove(self, kind: Kind, folder: str) -> None:
        """Move the folder to the trash in one step, then delete it there."""
        trash = self._trash()
        with suppress(FileNotFoundError):
            (self.root / kind / folder).rename(trash)
            shutil.rmtree(trash)

    def _replace(self, place: Path, draft: Path, manifest: Manifest) -> None:
        """Swap a folder; killed between the two renames, the old one is restored by the next look-up."""
        aside = self._aside(manifest.kind, manifest.folder)
        aside.parent.mkdir(exist_ok=True)
        if aside.exists():  # an earlier replacement was killed after its second rename
            aside.rename(self._trash())
        place.rename(aside)
        draft.rename(place)
        trash = self._trash()
        aside.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)  # the artefact is whole; garbage collection takes the rest

    def _restore_replaced(self) -> None:
        """Put back what a killed replacement had set aside."""
        try:
            asides = list((self.root / REPLACED).iterdir())
        except FileNotFoundError:
            return
        for aside in asides:
            kind, _, folder = aside.name.partition("--")
            place = self.root / kind / folder
            # The lock of the key is not known here; the folder's own name serves, the swap takes it as well.
            if not place.exists():
                with suppress(OSError):
                    aside.rename(place)

    def _aside(self, kind: Kind, folder: str) -> Path:
        return self.root / REPLACED / f"{kind}--{folder}"

    def _place(self, manifest: Manifest) -> Path:
        return self.root / manifest.kind / manifest.folder

    def _trash(self) -> Path:
        trash = self.root / TRASH
        trash.mkdir(exist_ok=True)
        return trash / uuid4().hex

    # -- locks and the store's own small files -----------------------------------------------------

    @contextmanager
    def lock(self, name: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold a lock file among the processes of all machines that share the folder."""
        with process_lock(self.root / LOCKS / f"{name}.lock", waiting):
            yield

    def is_locked(self, name: str) -> bool:
        """Say whether a process holds that lock now."""
        return process_lock_is_held(self.root / LOCKS / f"{name}.lock")

    def documents(self, folder: str) -> list[str]:
        """Return the names of the small files in a folder of the store's own, sorted."""
        try:
            entries = list((self.root / folder).iterdir())
        except FileNotFoundError:
            return []
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file())

    def read_document(self, path: str) -> bytes | None:
        """Return a small file of the store's own."""
        try:
            return (self.root / path).read_bytes()
        except FileNotFoundError:
            return None

    def write_document(self, path: str, data: bytes) -> None:
        """Write a small file of the store's own, whole."""
        target = self.root / path
        target.parent.mkdir(exist_ok=True)
        write_whole(target, data)

    def delete_document(self, path: str) -> None:
        """Delete a small file of the store's own, if it is there."""
        (self.root / path).unlink(missing_ok=True)

    # -- leftovers ---------------------------------------------------------------------------------

    def leftovers(self) -> list[Leftover]:
        """Return abandoned drafts and what an interrupted removal left in the trash."""
        paths = []
        for folder in (DRAFTS, TRASH):
            with suppress(FileNotFoundError):
                paths += list((self.root / folder).iterdir())
        drafts = [path for path in paths if not self.is_locked(path.name.removesuffix(".json"))]
        return [Leftover(str(path), bytes_below(path), modified_at(path)) for path in sorted(drafts)]

    def delete_leftover(self, leftover: Leftover) -> None:
        """Delete one of them."""
        path = Path(leftover.address)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def free_bytes(self) -> int:
        """Return the free space of the file system."""
        return shutil.disk_usage(self.root).free
