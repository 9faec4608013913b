"""A full disk, a read-only store, a store out of reach: told in words instead of a stack trace."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import StoreError
from pipeline.shelf import Shelf

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
READ_ONLY = frozenset({errno.EROFS})
DENIED = frozenset({errno.EACCES, errno.EPERM})
FULL_WORDS = ("no space left on device", "disk quota exceeded")
"""What libraries that lose the error number still say; they use the system's English messages."""
REMOTE_LIBRARIES = frozenset(
    {"aiohttp", "azure", "botocore", "gcsfs", "google", "paramiko", "requests", "s3fs"}
)
"""They raise errors of their own kinds for wrong credentials and for servers that do not answer."""
READ_ONLY_WORDS = ("read-only file system",)


@contextmanager
def told_in_words(shelf: Shelf) -> Iterator[None]:
    """Turn what the system says while the store's own files are handled into a ``StoreError``."""
    try:
        yield
    except OSError as error:
        raise _explained(error, shelf) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in REMOTE_LIBRARIES:
            raise
        raise _explained(OSError(str(error)), shelf) from error


@contextmanager
def full_disk_told_in_words(shelf: Shelf, *, parts_stay: bool) -> Iterator[None]:
    """Do so for a maker's errors too, where they are about the store's disk; the others pass unchanged.

    Args:
        shelf: Where the draft is written.
        parts_stay: The maker can go on from what it has written.
    """
    try:
        yield
    except Exception as error:
        cause = _about_the_disk(error, shelf.drafts_at)
        if cause is None:
            raise
        raise _explained(cause, shelf, parts_stay=parts_stay) from error


def _explained(error: OSError, shelf: Shelf, *, parts_stay: bool = False) -> StoreError:
    detail = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    kept = "What was whole is kept" + (", and so are the finished parts" if parts_stay else "")
    if error.errno in FULL:
        return StoreError(
            f"No space is left in {shelf.drafts_at}, where the store {shelf.url} writes "
            f"({_free(shelf.drafts_at)} free; {detail}). {kept}. Free some space (`tandem gc` lists what "
            "can go) or choose another --store, then run the same command again."
        )
    if error.errno in READ_ONLY | DENIED:
        return StoreError(
            f"The store {shelf.url} cannot be written to ({detail}; {_free(shelf.drafts_at)} free). {kept} "
            "and can be read. Make the folder writable for you, or choose another --store."
        )
    return StoreError(
        f"The store {shelf.url} does not answer as it should ({type(error).__name__}: {detail}). {kept}. "
        "Check that its disk or server can be reached, then run the same command again."
    )


def _about_the_disk(error: BaseException, folder: Path) -> OSError | None:
    """Return the system's error, if anything in the chain says that the store's disk is full or read-only."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno in FULL | READ_ONLY:
            return current
        if isinstance(current, OSError) and current.errno in DENIED and _is_below(current.filename, folder):
            return current
        words = str(current).lower()
        if any(known in words for known in FULL_WORDS):
            return OSError(errno.ENOSPC, str(current))
        if any(known in words for known in READ_ONLY_WORDS):
            return OSError(errno.EROFS, str(current))
        current = current.__cause__ or current.__context__
    return None


def _is_below(path: object, folder: Path) -> bool:
    return isinstance(path, str) and Path(path).is_relative_to(folder)


def _free(folder: Path) -> str:
    for existing in (folder, *folder.parents):
        with suppress(OSError):
            return f"{shutil.disk_usage(existing).free / 1e6:,.1f} MB"
    return "unknown space"
