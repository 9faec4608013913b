"""What a store needs of the place it lies in, and what the local and the remote place share."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO, Protocol
from uuid import uuid4

from filelock import FileLock, Timeout

from pipeline.errors import StoreError
from pipeline.manifest import FileEntry, Kind, Manifest, safe_file_name

CHUNK_BYTES = 1 << 20
SCRATCH_SUFFIX = ".scratch"
SHARDS = ".shards"
"""Holds a folder for each draft that several workers prepare together."""
WORKER_MARK = "--"
"""Between a draft's name and a worker's in the name of the lock that the worker holds."""
HASHING_THREADS = 4
"""hashlib lets go of the interpreter; more threads than disks can feed bring nothing."""


@dataclass(frozen=True)
class Leftover:
    """Something in the store that belongs to no artefact: an abandoned draft, data that no manifest names."""

    address: str
    bytes: int
    since: datetime
    """When it was last written to."""


class Shelf(Protocol):
    """A place that holds artefacts whole. Nothing else in the project touches the files of a store."""

    url: str
    """Printable address, without a password."""
    drafts_at: Path
    """Local folder below which drafts are written: its disk is the one that fills up."""
    leftover_grace: timedelta
    """Leftovers younger than this may belong to a process that cannot be asked, and stay."""

    def create(self) -> None:
        """Make the place if it is not there."""
        ...

    def entries(self) -> list[str]:
        """Return the names of what lies at the top of the place; none where there is no place."""
        ...

    def folders(self, kind: Kind) -> list[str]:
        """Return the folders of a kind that claim to be artefacts, sorted."""
        ...

    def read_manifest(self, kind: Kind, folder: str) -> bytes | None:
        """Return the manifest's bytes; empty where a folder lacks its manifest, None where nothing is."""
        ...

    def address(self, kind: Kind, folder: str) -> str:
        """Return the printable address of an artefact's folder."""
        ...

    def fetch(self, manifest: Manifest, name: str) -> Path:
        """Return a local path of a file that the manifest lists."""
        ...

    def open_stored(self, manifest: Manifest, name: str) -> AbstractContextManager[BinaryIO]:
        """Open the stored bytes themselves, past any cache."""
        ...

    def stored_files(self, manifest: Manifest) -> dict[str, int]:
        """Return name and bytes of every file that lies in the artefact's folder, but the manifest."""
        ...

    def last_used(self, manifest: Manifest) -> datetime:
        """Return when the artefact was made or, where the place can tell, last asked for."""
        ...

    def mark_used(self, manifest: Manifest) -> None:
        """Note that the artefact was asked for; where that cannot be noted nothing happens."""
        ...

    def staging(self, draft_name: str) -> Path:
        """Return the local folder in which a draft is written; it need not exist."""
        ...

    def commit(self, manifest: Manifest, draft: Path) -> Manifest:
        """Make the draft the artefact of its key, in one step; return the final manifest."""
        ...

    def remove(self, kind: Kind, folder: str) -> None:
        """Take an artefact away: in one step for those who look, its files after that."""
        ...

    def lock(self, name: str, waiting: Callable[[], None]) -> AbstractContextManager[None]:
        """Hold a lock among processes; ``waiting`` is called once if another process holds it."""
        ...

    def try_lock(self, name: str) -> AbstractContextManager[bool]:
        """Hold a lock unless another process does; the value says whether it is held here."""
        ...

    def documents(self, folder: str) -> list[str]:
        """Return the names of the small files in a folder of the store's own, sorted."""
        ...

    def read_document(self, path: str) -> bytes | None:
        """Return a small file of the store's own; None where there is none."""
        ...

    def write_document(self, path: str, data: bytes) -> None:
        """Write a small file of the store's own, whole, in place of one that is there."""
        ...

    def delete_document(self, path: str) -> None:
        """Delete a small file of the store's own, if it is there."""
        ...

    def create_document(self, path: str, data: bytes) -> bytes:
        """Write a small file of the store's own unless there is one; return what is there then."""
        ...

    def shared_folder(self, draft_name: str) -> Path:
        """Return the local folder of what several workers make for one draft; it need not exist."""
        ...

    def shared_names(self, draft_name: str) -> list[str]:
        """Return the names of the files that the workers of all machines have published, sorted."""
        ...

    def publish_shared(self, draft_name: str, name: str) -> None:
        """Show a whole file of the local folder to the workers of other machines."""
        ...

    def fetch_shared(self, draft_name: str, name: str) -> None:
        """Bring a published file into the local folder, in place of one that is there."""
        ...

    def remove_shared(self, draft_name: str) -> None:
        """Take all of it away, here and where it is published."""
        ...

    def is_abandoned(self, draft_name: str) -> bool:
        """Say whether nobody makes a draft, or works for one, as far as this place can tell."""
        ...

    def leftovers(self) -> list[Leftover]:
        """Return what belongs to no artefact, drafts being written now left out."""
        ...

    def delete_leftover(self, leftover: Leftover) -> None:
        """Delete one of them, unless a process has taken it up again."""
        ...


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut, where the system can."""
    with suppress(OSError):  # some file systems refuse to sync folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def scratch_beside(draft: Path) -> Path:
    """Return the folder for what a draft's maker needs and the artefact does not."""
    return draft.with_name(draft.name + SCRATCH_SUFFIX)


def abandoned_folders(parent: Path, is_abandoned: Callable[[str], bool]) -> list[Path]:
    """Return the drafts below a folder, and the scratch folders beside them, that no process is writing."""
    return [
        folder
        for folder in (sorted(parent.iterdir()) if parent.is_dir() else [])
        if folder.is_dir() and is_abandoned(folder.name.removesuffix(SCRATCH_SUFFIX))
    ]


def nobody_holds(locks: Path, draft_name: str) -> bool:
    """Say whether no process of this machine holds a draft's lock or that of a worker for it."""
    for path in [locks / f"{draft_name}.lock", *locks.glob(f"{draft_name}{WORKER_MARK}*.lock")]:
        with try_process_lock(path) as is_free:
            if not is_free:
                return False
    return True


def drop_temporary_files(folder: Path) -> None:
    """Delete what a draft may hold and an artefact may not: hidden and temporary files, empty folders."""
    for path in sorted(folder.rglob("*"), reverse=True):  # children before their folder
        is_folder = path.is_dir() and not path.is_symlink()
        if path.name.startswith(".") or path.name.endswith(".tmp"):
            if is_folder:
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        elif is_folder and not any(path.iterdir()):
            path.rmdir()


def files_below(folder: Path) -> list[str]:
    """Return the names of all files below a folder, relative to it, sorted.

    Raises:
        StoreError: One is a link or has a name that an artefact cannot hold.
    """
    names = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise StoreError(f"An artefact cannot hold the link {name!r}; write the file itself.")
        if path.is_file():
            try:
                names.append(safe_file_name(name))
            except ValueError as error:
                raise StoreError(f"An artefact cannot hold this file: {error}.") from error
    return names


def checksum_files(folder: Path, names: list[str]) -> dict[str, FileEntry]:
    """Hash each file once and make it durable."""

    def entry(name: str) -> FileEntry:
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            os.fsync(file.fileno())
            return FileEntry(sha256=digest.hexdigest(), bytes=file.tell())

    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return dict(zip(names, pool.map(entry, names), strict=True))


@contextmanager
def process_lock(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a lock that the system frees when its holder dies, however it dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waiting()
        lock.acquire(poll_interval=0.1)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def try_process_lock(path: Path) -> Iterator[bool]:
    """Hold that lock unless another process does; the value says whether it is held here."""
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except (Timeout, OSError):  # in a read-only store nobody can tell, so nothing is taken from anybody
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def bytes_below(path: Path) -> int:
    """Return the bytes of all files at or below a path."""
    return sum(inner.lstat().st_size for inner in _with_inner(path) if not inner.is_dir())


def modified_at(path: Path) -> datetime:
    """Return when a path, or anything below it, was last changed."""
    return datetime.fromtimestamp(max((p.lstat().st_mtime for p in _with_inner(path)), default=0), UTC)


def delete_path(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _with_inner(path: Path) -> list[Path]:
    """Return a path and all below it, but for what goes away meanwhile."""
    return [inner for inner in [path, *path.rglob("*")] if os.path.lexists(inner)]
