"""A store below an fsspec URL: an artefact is there from the moment its manifest is written.

Object stores cannot rename, but they show a written object whole or not at all. So the files go below a
fresh folder first, and the manifest that names this folder goes last:

<root>/<kind>/<slug>-<key12>/data-<time>-<random>/files
<root>/<kind>/<slug>-<key12>/manifest.json
<root>/names/<name>.json, <root>/.drafts/<kind>-<key>.json
<root>/.shards/<kind>-<key>/          what workers of several machines prepare for one draft

Drafts, locks and fetched files lie in a local folder. Locks bind the processes of one machine; two machines
that make one key at once each write a data folder, and the manifest that is written last decides.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast
from uuid import uuid4

from pipeline.errors import StoreError
from pipeline.manifest import KINDS, MANIFEST_NAME, Kind, Manifest, decode_manifest, encode_manifest
from pipeline.shelf import (
    CHUNK_BYTES,
    SCRATCH_SUFFIX,
    SHARDS,
    Leftover,
    abandoned_folders,
    bytes_below,
    delete_path,
    modified_at,
    nobody_holds,
    process_lock,
    try_process_lock,
)

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

TRANSFERS = 8
"""Files on their way at once: object stores answer slowly but many at a time."""
STAMP = "%Y%m%dT%H%M%S"
GRACE = timedelta(days=1)
"""A data folder younger than this may be an upload of another machine that is still going on."""


class RemoteShelf:
    """An fsspec file system and a folder in it."""

    def __init__(self, filesystem: "AbstractFileSystem", root: str, url: str, cache: Path) -> None:
        """Keep what is needed to reach the store.

        Args:
            filesystem: An fsspec file system.
            root: The store's folder in it.
            url: Printable address.
            cache: Local folder for drafts, locks and fetched files of all remote stores.
        """
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        self.url = url
        self.cache = cache / hashlib.sha256(url.encode()).hexdigest()[:16]
        self.drafts_at = self.cache
        self.leftover_grace = GRACE

    def create(self) -> None:
        """Make the folder, where folders exist."""
        with suppress(FileExistsError, NotImplementedError):
            self.filesystem.makedirs(self.root, exist_ok=True)

    # -- reading -----------------------------------------------------------------------------------

    def entries(self) -> list[str]:
        """Return the names of what lies in the store's folder."""
        return self._names_in(self.root)

    def folders(self, kind: Kind) -> list[str]:
        """Return the folders of a kind; one without a manifest is an upload that goes on or was given up."""
        return [name for name in self._names_in(f"{self.root}/{kind}") if not name.startswith(".")]

    def read_manifest(self, kind: Kind, folder: str) -> bytes | None:
        """Return the manifest's bytes, None where there is none."""
        return self.read_document(f"{kind}/{folder}/{MANIFEST_NAME}")

    def address(self, kind: Kind, folder: str) -> str:
        """Return the URL of an artefact's folder."""
        return f"{self.url}/{kind}/{folder}"

    def fetch(self, manifest: Manifest, name: str) -> Path:
        """Return a local copy of a file, fetched at the first call and checked against the manifest."""
        path = self._copies(manifest) / name
        entry = manifest.files[name]
        if not (path.is_file() and path.stat().st_size == entry.bytes):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
            try:
                if self._download(manifest, name, temporary) != entry.sha256:
                    raise self._bad_file(manifest, name, "arrived with another checksum than it left with")
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        return path

    def _download(self, manifest: Manifest, name: str, target: Path) -> str:
        """Copy a file here; return the SHA-256 of what arrived."""
        digest = hashlib.sha256()
        try:
            with self.open_stored(manifest, name) as source, target.open("xb") as copy:
                while chunk := source.read(CHUNK_BYTES):
                    digest.update(chunk)
                    copy.write(chunk)
                copy.flush()
                os.fsync(copy.fileno())
        except FileNotFoundError as error:
            raise self._bad_file(manifest, name, "is missing") from error
        return digest.hexdigest()

    def open_stored(self, manifest: Manifest, name: str) -> AbstractContextManager[BinaryIO]:
        """Open the remote file itself."""
        path = f"{self._place(manifest)}/{manifest.data_folder}/{name}"
        return cast("AbstractContextManager[BinaryIO]", self.filesystem.open(path, "rb"))

    def stored_files(self, manifest: Manifest) -> dict[str, int]:
        """Return name and bytes of every file; data folders that the manifest does not name are leftovers."""
        found = {}
        for name, size in self._files_below(self._place(manifest)).items():
            top, _, rest = name.partition("/")
            if top == manifest.data_folder:
                found[rest] = size
            elif name != MANIFEST_NAME and not _stamp(top):
                found[name] = size
        return found

    def last_used(self, manifest: Manifest) -> datetime:
        """Return when the artefact was made: an object keeps no time of use."""
        return manifest.created_at

    def mark_used(self, manifest: Manifest) -> None:
        """Do nothing: an object keeps no time of use."""

    # -- writing -----------------------------------------------------------------------------------

    def staging(self, draft_name: str) -> Path:
        """Return the local folder of a draft."""
        return self.cache / "drafts" / draft_name

    def commit(self, manifest: Manifest, draft: Path) -> Manifest:
        """Upload the files below a fresh folder, then the manifest that names it."""
        data_folder = f"data-{datetime.now(UTC).strftime(STAMP)}-{uuid4().hex[:12]}"
        final = manifest.model_copy(update={"data_folder": data_folder})
        target = f"{self._place(final)}/{data_folder}"

        def upload(name: str) -> None:
            remote = f"{target}/{name}"
            self.filesystem.makedirs(remote.rpartition("/")[0], exist_ok=True)
            self.filesystem.put_file(str(draft / name), remote)

        try:
            with ThreadPoolExecutor(TRANSFERS) as pool:
                list(pool.map(upload, final.files))
        except BaseException:
            with suppress(Exception):  # the first error matters; the rest is a leftover
                self.filesystem.rm(target, recursive=True)
            raise
        self.write_document(f"{final.kind}/{final.folder}/{MANIFEST_NAME}", encode_manifest(final))
        copies = self._copies(final)
        with suppress(OSError):  # what was just uploaded need not be fetched again, but can be
            copies.parent.mkdir(parents=True, exist_ok=True)
            draft.rename(copies)
        return final

    def remove(self, kind: Kind, folder: str) -> None:
        """Delete the manifest, which makes the artefact disappear, then the files."""
        place = f"{self.root}/{kind}/{folder}"
        self.delete_document(f"{kind}/{folder}/{MANIFEST_NAME}")
        with suppress(FileNotFoundError):
            self.filesystem.rm(place, recursive=True)
        shutil.rmtree(self.cache / "copies" / kind / folder, ignore_errors=True)

    def lock(self, name: str, waiting: Callable[[], None]) -> AbstractContextManager[None]:
        """Hold a lock among the processes of this machine."""
        return process_lock(self.cache / "locks" / f"{name}.lock", waiting)

    def try_lock(self, name: str) -> AbstractContextManager[bool]:
        """Hold it unless another process of this machine does."""
        return try_process_lock(self.cache / "locks" / f"{name}.lock")

    # -- the store's own small files ---------------------------------------------------------------

    def documents(self, folder: str) -> list[str]:
        """Return the names of the small files in a folder of the store's own, sorted."""
        return self._names_in(f"{self.root}/{folder}")

    def read_document(self, path: str) -> bytes | None:
        """Return a small file of the store's own."""
        try:
            return bytes(self.filesystem.cat_file(f"{self.root}/{path}"))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write_document(self, path: str, data: bytes) -> None:
        """Write a small object; object stores show it whole or not at all."""
        target = f"{self.root}/{path}"
        self.filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
        self.filesystem.pipe_file(target, data)

    def delete_document(self, path: str) -> None:
        """Delete a small object, if it is there."""
        with suppress(FileNotFoundError):
            self.filesystem.rm_file(f"{self.root}/{path}")

    def create_document(self, path: str, data: bytes) -> bytes:
        """Write a small object unless there is one; many stores can tell who of two was first."""
        found = self.read_document(path)
        if found is None:
            target = f"{self.root}/{path}"
            self.filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
            with suppress(FileExistsError):
                self.filesystem.pipe_file(target, data, mode="create")
            found = self.read_document(path)
        return data if found is None else found

    # -- what several workers prepare together -----------------------------------------------------

    def shared_folder(self, draft_name: str) -> Path:
        """Return this machine's copy of the shared folder."""
        return self.cache / "shards" / draft_name

    def shared_names(self, draft_name: str) -> list[str]:
        """Return the names of the objects in the shared folder, sorted."""
        return self._names_in(f"{self.root}/{SHARDS}/{draft_name}")

    def publish_shared(self, draft_name: str, name: str) -> None:
        """Upload a file."""
        target = f"{self.root}/{SHARDS}/{draft_name}"
        self.filesystem.makedirs(target, exist_ok=True)
        self.filesystem.put_file(str(self.shared_folder(draft_name) / name), f"{target}/{name}")

    def fetch_shared(self, draft_name: str, name: str) -> None:
        """Download a file under another name, then move it."""
        path = self.shared_folder(draft_name) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{name}.{uuid4().hex}.tmp")
        try:
            self.filesystem.get_file(f"{self.root}/{SHARDS}/{draft_name}/{name}", str(temporary))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def remove_shared(self, draft_name: str) -> None:
        """Delete the objects, then this machine's copies."""
        with suppress(FileNotFoundError):
            self.filesystem.rm(f"{self.root}/{SHARDS}/{draft_name}", recursive=True)
        shutil.rmtree(self.shared_folder(draft_name), ignore_errors=True)

    def is_abandoned(self, draft_name: str) -> bool:
        """Ask the locks of this machine; of other machines nobody knows."""
        return nobody_holds(self.cache / "locks", draft_name)

    # -- leftovers ---------------------------------------------------------------------------------

    def leftovers(self) -> list[Leftover]:
        """Return data that no manifest names, here and remotely, and abandoned drafts of this machine."""
        found = []
        for kind in KINDS:
            for folder in self.folders(kind):
                found += self._orphans(kind, folder)
        found += self._abandoned_shards()
        here = abandoned_folders(self.cache / "drafts", self.is_abandoned) + self._stale_copies()
        here += abandoned_folders(self.cache / "shards", self.is_abandoned)
        return found + [Leftover(str(path), bytes_below(path), modified_at(path)) for path in here]

    def delete_leftover(self, leftover: Leftover) -> None:
        """Delete one of them."""
        path = Path(leftover.address)
        if path.parent == self.cache / "drafts":
            with self.try_lock(path.name.removesuffix(SCRATCH_SUFFIX)) as abandoned:
                if abandoned:
                    delete_path(path)
        elif path.parent == self.cache / "shards":
            if self.is_abandoned(path.name):
                delete_path(path)
        elif path.is_relative_to(self.cache):
            delete_path(path)
        else:
            with suppress(FileNotFoundError):
                self.filesystem.rm(self.root + leftover.address.removeprefix(self.url), recursive=True)

    def _orphans(self, kind: Kind, folder: str) -> list[Leftover]:
        named = self._named_data(kind, folder)
        sizes: dict[str, int] = {}
        for name, size in self._files_below(f"{self.root}/{kind}/{folder}").items():
            top = name.partition("/")[0]
            if _stamp(top) and top != named:
                sizes[top] = sizes.get(top, 0) + size
        found = []
        for top, size in sorted(sizes.items()):
            written = _stamp(top)
            if written is not None:
                found.append(Leftover(f"{self.address(kind, folder)}/{top}", size, written))
        return found

    def _abandoned_shards(self) -> list[Leftover]:
        """Return what nobody on this machine works on; its age says whether others may."""
        found = []
        for name in self._names_in(f"{self.root}/{SHARDS}"):
            folder = f"{self.root}/{SHARDS}/{name}"
            files = self._files_below(folder)
            if files and self.is_abandoned(name):
                since = max(self._modified(f"{folder}/{file}") for file in files)
                found.append(Leftover(f"{self.url}/{SHARDS}/{name}", sum(files.values()), since))
        return found

    def _modified(self, path: str) -> datetime:
        """Return when an object was written; now, so that it stays, where the store does not tell."""
        try:
            written = cast("datetime", self.filesystem.modified(path))
        except (NotImplementedError, FileNotFoundError):
            return datetime.now(UTC)
        return written if written.tzinfo else written.replace(tzinfo=UTC)

    def _stale_copies(self) -> list[Path]:
        """Return fetched files of artefacts that are gone or were replaced."""
        stale = []
        for copy in sorted((self.cache / "copies").glob("*/*/data-*")):
            folder = copy.parent.name
            kind = next((each for each in KINDS if each == copy.parent.parent.name), None)
            if kind is None or copy.name != self._named_data(kind, folder):
                stale.append(copy)
        return stale

    def _named_data(self, kind: Kind, folder: str) -> str:
        data = self.read_manifest(kind, folder)
        return decode_manifest(data, self.address(kind, folder), kind, folder).data_folder if data else ""

    # -- paths -------------------------------------------------------------------------------------

    def _place(self, manifest: Manifest) -> str:
        return f"{self.root}/{manifest.kind}/{manifest.folder}"

    def _bad_file(self, manifest: Manifest, name: str, what: str) -> StoreError:
        address = self.address(manifest.kind, manifest.folder)
        return StoreError(
            f"{address}/{manifest.data_folder}/{name} {what}: the artefact is damaged or was deleted. "
            f"`tandem verify {manifest.kind}/{manifest.folder}` lists what is wrong; --force makes it again."
        )

    def _copies(self, manifest: Manifest) -> Path:
        return self.cache / "copies" / manifest.kind / manifest.folder / manifest.data_folder

    def _names_in(self, folder: str) -> list[str]:
        self.filesystem.invalidate_cache(folder)
        try:
            listed = self.filesystem.ls(folder, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        paths = (str(path).strip("/") for path in listed)
        # Some object stores list a folder among what is in it.
        return sorted(path.rpartition("/")[2] for path in paths if path != folder.strip("/"))

    def _files_below(self, folder: str) -> dict[str, int]:
        """Return name (relative to the folder) and bytes of every file below a folder."""
        self.filesystem.invalidate_cache(folder)
        base = str(self.filesystem._strip_protocol(folder)).strip("/")
        listed = self.filesystem.find(folder, detail=True)
        sizes = {str(path).strip("/"): int(info["size"]) for path, info in listed.items()}
        return {path.removeprefix(f"{base}/"): size for path, size in sizes.items()}


def _stamp(folder: str) -> datetime | None:
    """Return when a data folder was begun; None if the name is not one of a data folder."""
    match = re.fullmatch(r"data-(\d{8}T\d{6})-[0-9a-f]{12}", folder)
    return datetime.strptime(match[1], STAMP).replace(tzinfo=UTC) if match else None
