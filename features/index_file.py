"""Index files: written whole, with a checksum, and refused when damaged."""

import os
import struct
import uuid
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING

from features.errors import IndexingError
from features.faiss_backend import faiss_backend, import_faiss

if TYPE_CHECKING:
    import faiss

_TRAILER = struct.Struct("<8sQI")
"""After FAISS's own bytes, which it reads without looking further: a mark, their number, their CRC-32."""
_MARK = b"TANDEMIX"
_CHUNK_BYTES = 2**22


def save_index(index: "faiss.Index", path: str | Path) -> None:
    """Write an index whole: under another name first, with a checksum, then moved.

    Raises:
        OSError: the file cannot be written, for one a full disk; nothing is left behind.
    """
    module = import_faiss()
    path = Path(path)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with aside.open("wb") as file:
            checked = _Checksum(file)
            # Not write_index(index, name): what closing its file reports, such as a full disk, FAISS only
            # prints.
            module.write_index(index, module.PyCallbackIOWriter(checked.write, _CHUNK_BYTES))
            file.write(_TRAILER.pack(_MARK, checked.n_bytes, checked.crc32))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def load_index(path: str | Path) -> "faiss.Index":
    """Read an index that :func:`save_index` wrote.

    The checksum is compared first: FAISS trusts the numbers in a file, and a damaged one can end the process.

    Raises:
        IndexingError: there is no such file, it was not written by ``save_index``, or it is damaged.
    """
    path = Path(path)
    advice = "Build the index again, or copy the file again."
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END) - _TRAILER.size
            if size < 0:
                raise IndexingError(f"{path} is damaged: it has only {size + _TRAILER.size} bytes. {advice}")
            file.seek(size)
            mark, n_bytes, crc32 = _TRAILER.unpack(file.read(_TRAILER.size))
            if mark != _MARK or n_bytes != size:
                raise IndexingError(
                    f"{path} is damaged or was not written here: it does not end as an index ends. {advice}"
                )
            file.seek(0)
            checked = _Checksum()
            while chunk := file.read(min(_CHUNK_BYTES, size - checked.n_bytes)):
                checked.write(chunk)
    except OSError as error:
        raise IndexingError(f"{path} cannot be read: {error.strerror or error}. {advice}") from error
    if checked.crc32 != crc32:
        raise IndexingError(f"{path} is damaged: its checksum is not the one it was written with. {advice}")
    try:
        index: faiss.Index = import_faiss().read_index(str(path))
    except RuntimeError as error:  # written whole, but by another version of FAISS
        raise IndexingError(
            f"{path} cannot be read by this FAISS ({faiss_backend().version}): {error}"
        ) from error
    return index


class _Checksum:
    """Counts and sums up what is written, and passes it on to a file if there is one."""

    def __init__(self, file: IO[bytes] | None = None) -> None:
        self.file, self.n_bytes, self.crc32 = file, 0, 0

    def write(self, data: bytes) -> int:
        self.n_bytes += len(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        return len(data) if self.file is None else self.file.write(data)
