"""A store in a local folder: an artefact is there from the moment its folder is renamed into place.

<root>/<kind>/<slug>-<key12>/manifest.json and files
<root>/names/<name>.json              names that point at artefacts
<root>/.drafts/<kind>-<key>/          what is being written; <kind>-<key>.json beside it says from what
<root>/.shards/<kind>-<key>/          what several workers prepare together for one draft
<root>/.locks/<kind>-<key>.lock       held while a key is written; <kind>-<key>--<worker>.lock by a worker
<root>/.replaced/<kind>--<folder>     the old version during a replacement
<root>/.trash/                        on its way out
"""

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from pipeline.errors import StoreError
from pipeline.manifest import MANIFEST_NAME, Kind, Manifest, encode_manifest
from pipeline.shelf import (
    SCRATCH_SUFFIX,
    SHARDS,
    Leftover,
    abandoned_folders,
    bytes_below,
    delete_path,
    modified_at,
    nobody_holds,
    process_lock,
    sync_folder,
    try_process_lock,
    write_whole,
)

DRAFTS, LOCKS, REPLACED, TRASH = ".drafts", ".locks", ".replaced", ".trash"
SWAP_LOCK = "swap"
"""Held for the two renames of a replacement, and by whoever repairs one that was killed between them."""
USE_RESOLUTION = timedelta(hours=1)
"""A use is noted again after this time: garbage collection counts in days, and a note is a disk write."""


class LocalShelf:
    """A folder of this machine, or of a network file system with rename and locks."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)
        self.drafts_at = root
        self.leftover_grace = timedelta(0)  # locks tell which drafts are alive

    def create(self) -> None:
        """Make the folder if it is not there."""
        self.root.mkdir(parents=True, exist_ok=True)

    def entries(self) -> list[str]:
        """Return the names of what lies in the folder; none where there is no folder."""
        try:
            return sorted(entry.name for entry in self.root.iterdir())
        except FileNotFoundError:
            return []

    # -- reading -----------------------------------------------------------------------------------

    def folders(self, kind: Kind) -> list[str]:
        """Return the folders of a kind, sorted."""
        self._restore_replaced()
        try:
            with os.scandir(self.root / kind) as entries:  # tells folders from files without asking for each
                return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())
        except FileNotFoundError:
            return []

    def read_manifest(self, kind: Kind, folder: str) -> bytes | None:
        """Return the manifest's bytes; empty where the folder lacks it, None where there is no folder."""
        place = self.root / kind / folder
        try:
            return (place / MANIFEST_NAME).read_bytes()
        except FileNotFoundError:
            return b"" if place.is_dir() else None

    def address(self, kind: Kind, folder: str) -> str:
        """Return the path of an artefact's folder."""
        return str(self.root / kind / folder)

    def fetch(self, manifest: Manifest, name: str) -> Path:
        """Return the path of a file; its presence and size are checked here, its content by ``verify``."""
        place = self._place(manifest)
        path = place / name
        size = _size(path)
        if size < 0:
            self._restore_replaced()  # waits for a replacement that is just between its two renames
            size = _size(path)
        expected = manifest.files[name].bytes
        leads_away = not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(place))
        if size != expected or leads_away:
            found = "is missing" if size < 0 else f"has {size:,} bytes instead of {expected:,}"
            found = "is a link that leaves the folder" if leads_away else found
            raise StoreError(
                f"{path} {found}: the artefact is damaged or was deleted. `tandem verify "
                f"{manifest.kind}/{manifest.folder}` lists all that is wrong; --force makes it again."
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

    def staging(self, draft_name: str) -> Path:
        """Return the folder of a draft."""
        return self.root / DRAFTS / draft_name

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
        self._discard(self.root / kind / folder)

    def _replace(self, place: Path, draft: Path, manifest: Manifest) -> None:
        """Swap a folder; killed between the two renames, the old one is restored by the next look-up."""
        aside = self.root / REPLACED / f"{manifest.kind}--{manifest.folder}"
        self._restore_replaced()
        with self.lock(SWAP_LOCK, lambda: None):
            aside.parent.mkdir(exist_ok=True)
            place.rename(aside)
            draft.rename(place)
        self._discard(aside)

    def _restore_replaced(self) -> None:
        """Put back what a killed replacement had set aside, or discard it if the new folder is there."""
        replaced = self.root / REPLACED
        if not replaced.is_dir() or not any(replaced.iterdir()):
            return
        with suppress(OSError), self.lock(SWAP_LOCK, lambda: None):  # a read-only store is left as it is
            for aside in replaced.iterdir():
                kind, _, folder = aside.name.partition("--")
                place = self.root / kind / folder
                if place.exists():
                    self._discard(aside)
                else:
                    aside.rename(place)

    def _discard(self, folder: Path) -> None:
        """Make a folder disappear in one step; what cannot be deleted then is a leftover in the trash."""
        trash = self.root / TRASH / uuid4().hex
        trash.parent.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # another process was faster
            folder.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)

    def _place(self, manifest: Manifest) -> Path:
        return self.root / manifest.kind / manifest.folder

    # -- locks and the store's own small files -----------------------------------------------------

    def lock(self, name: str, waiting: Callable[[], None]) -> AbstractContextManager[None]:
        """Hold a lock file among the processes of all machines that share the folder."""
        return process_lock(self.root / LOCKS / f"{name}.lock", waiting)

    def try_lock(self, name: str) -> AbstractContextManager[bool]:
        """Hold it unless another process does."""
        return try_process_lock(self.root / LOCKS / f"{name}.lock")

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
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, data)

    def delete_document(self, path: str) -> None:
        """Delete a small file of the store's own, if it is there."""
        (self.root / path).unlink(missing_ok=True)

    def create_document(self, path: str, data: bytes) -> bytes:
        """Link a whole file to its name, which of several processes only the first can."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid4().hex}.tmp")
        try:
            write_whole(temporary, data)
            try:
                os.link(temporary, target)
            except FileExistsError:
                pass
            except OSError:  # a file system without links: of two at the same moment the last counts
                if not target.exists():
                    temporary.replace(target)
            return target.read_bytes()
        finally:
            temporary.unlink(missing_ok=True)

    # -- what several workers prepare together -----------------------------------------------------

    def shared_folder(self, draft_name: str) -> Path:
        """Return the shared folder itself: all machines of the store see it."""
        return self.root / SHARDS / draft_name

    def shared_names(self, draft_name: str) -> list[str]:
        """Return the names of its files, sorted."""
        return self.documents(f"{SHARDS}/{draft_name}")

    def publish_shared(self, draft_name: str, name: str) -> None:
        """Do nothing: the file lies where all look."""

    def fetch_shared(self, draft_name: str, name: str) -> None:
        """Do nothing: the file lies where all look."""

    def remove_shared(self, draft_name: str) -> None:
        """Make the folder disappear in one step, then delete it."""
        self._discard(self.shared_folder(draft_name))

    def is_abandoned(self, draft_name: str) -> bool:
        """Ask the locks."""
        return nobody_holds(self.root / LOCKS, draft_name)

    # -- leftovers ---------------------------------------------------------------------------------

    def leftovers(self) -> list[Leftover]:
        """Return abandoned drafts, what workers prepared for them, and what an interrupted removal left."""
        trash = self.root / TRASH
        found = sorted(trash.iterdir()) if trash.is_dir() else []
        found += abandoned_folders(self.root / DRAFTS, self.is_abandoned)
        found += abandoned_folders(self.root / SHARDS, self.is_abandoned)
        return [Leftover(str(path), bytes_below(path), modified_at(path)) for path in found]

    def delete_leftover(self, leftover: Leftover) -> None:
        """Delete one of them, unless it is a draft that a process has taken up again."""
        path = Path(leftover.address)
        if path.parent.name == TRASH:
            delete_path(path)
            return
        if path.parent.name == SHARDS:
            if self.is_abandoned(path.name):
                self.remove_shared(path.name)
            return
        with self.try_lock(path.name.removesuffix(SCRATCH_SUFFIX)) as abandoned:
            if abandoned:
                delete_path(path)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return -1
