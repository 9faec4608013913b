"""Whether what lies in a store is what was written: files against the checksums of their manifest."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.errors import StoreError
from pipeline.manifest import Kind, Manifest, artefact_key, decode_manifest
from pipeline.shelf import CHUNK_BYTES, HASHING_THREADS, Shelf


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an artefact."""

    ref: str
    file: str
    """"" for the folder as a whole."""
    what: str

    def __str__(self) -> str:
        return f"{self.ref}{f'/{self.file}' if self.file else ''}: {self.what}"


def verify_folder(shelf: Shelf, kind: Kind, folder: str) -> list[Problem]:
    """Read every byte of an artefact again and compare; an empty list means it is as it was written."""
    ref = f"{kind}/{folder}"
    data = shelf.read_manifest(kind, folder)
    if data is None:
        return [Problem(ref, "", "it is not in the store")]
    try:
        manifest = decode_manifest(data, shelf.address(kind, folder), kind, folder)
    except StoreError as error:
        return [Problem(ref, "manifest.json", str(error))]
    problems = _check_totals(ref, manifest)
    stored = shelf.stored_files(manifest)
    problems += [
        Problem(ref, name, "the manifest does not list this file; move it away")
        for name in sorted(stored.keys() - manifest.files.keys())
    ]
    names = sorted(manifest.files)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        wrong = pool.map(lambda name: _check_file(shelf, manifest, name, stored.get(name)), names)
        return problems + [Problem(ref, name, what) for name, what in zip(names, wrong, strict=True) if what]


def _check_totals(ref: str, manifest: Manifest) -> list[Problem]:
    """What the manifest says of itself must agree, however it came about."""
    problems = []
    if sum(entry.bytes for entry in manifest.files.values()) != manifest.bytes:
        problems.append(Problem(ref, "manifest.json", "the bytes of its files do not add up to its total"))
    if artefact_key(manifest.kind, manifest.identity, version=manifest.format) != manifest.key:
        problems.append(Problem(ref, "manifest.json", "its key is not the hash of its identity"))
    return problems


def _check_file(shelf: Shelf, manifest: Manifest, name: str, size: int | None) -> str:
    """Say what is wrong with a file; "" if nothing is."""
    entry = manifest.files[name]
    if size is None:
        return "it is missing"
    if size != entry.bytes:
        return f"it has {size:,} bytes instead of {entry.bytes:,}"
    try:
        digest = hashlib.sha256()
        with shelf.open_stored(manifest, name) as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        return f"it cannot be read ({error})"
    if digest.hexdigest() != entry.sha256:
        return (
            f"its bytes have changed: SHA-256 {digest.hexdigest()[:12]}... instead of {entry.sha256[:12]}..."
        )
    return ""
