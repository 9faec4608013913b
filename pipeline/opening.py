"""From a store's address to the place it means, which is made if it is not there."""

import json
import os
import re
from pathlib import Path

from pipeline.errors import StoreError
from pipeline.faults import told_in_words
from pipeline.local_shelf import LocalShelf
from pipeline.remote_shelf import RemoteShelf
from pipeline.shelf import Shelf

DEFAULT_URL = ".tandem"
URL_VARIABLE = "TANDEM_STORE"
CACHE_VARIABLE = "TANDEM_CACHE"
MARKER = "tandem-store.json"
LAYOUT_VERSION = 1


def default_url() -> str:
    """Return the store that is meant when none is named: the variable TANDEM_STORE, else ``.tandem`` here."""
    return os.environ.get(URL_VARIABLE, "") or DEFAULT_URL


def default_cache() -> Path:
    """Return where drafts and copies of remote stores lie: TANDEM_CACHE, else the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE, "")
    if named:
        return Path(named).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "tandem"


def open_shelf(url: str | Path, cache: Path) -> Shelf:
    """Reach a store's place and make sure that it is one.

    Args:
        url: Local path or fsspec URL.
        cache: Local folder for drafts and copies, used by remote stores only.

    Raises:
        StoreError: The place holds other things, needs a newer Tandem, or cannot be reached or made.
    """
    shelf = _shelf(url, cache)
    with told_in_words(shelf):
        marker = shelf.read_document(MARKER)
        if marker is None:
            others = [name for name in shelf.entries() if not name.startswith(f".{MARKER}.")]
            marker = shelf.read_document(MARKER)  # made by another process since?
            if marker is None and others:
                raise StoreError(
                    f"{shelf.url} is not a Tandem store and not empty (it holds {', '.join(others[:3])}"
                    f"{', ...' if len(others) > 3 else ''}); --store needs a store, or a new or empty folder."
                )
        if marker is None:
            shelf.create()
            shelf.write_document(MARKER, _marker())
        else:
            _check_marker(marker, shelf.url)
    return shelf


def printable(url: str) -> str:
    """Return a URL without the password that it may carry, and without a slash at its end."""
    return re.sub(r"(?<=://)([^/@:]*):[^/@]*@", r"\1:***@", url).rstrip("/")


def _shelf(url: str | Path, cache: Path) -> Shelf:
    scheme, separator, rest = str(url).partition("://")
    if not separator:
        return LocalShelf(Path(url).expanduser().absolute())
    if scheme in ("file", "local"):
        return LocalShelf(Path(rest).expanduser().absolute())
    from fsspec.core import url_to_fs  # noqa: PLC0415 - a local store does not pay for it

    try:
        filesystem, root = url_to_fs(str(url))
    except (ImportError, ValueError) as error:  # no such protocol, or its package is missing
        raise StoreError(
            f"The store {printable(str(url))} cannot be reached: {error}. Install what it names "
            "(for s3:// and gs:// the extras `s3` and `gcs` of this package), or choose another --store."
        ) from error
    return RemoteShelf(filesystem, root, printable(str(url)), cache)


def _marker() -> bytes:
    return (json.dumps({"format": "tandem-store", "layout": LAYOUT_VERSION}) + "\n").encode()


def _check_marker(data: bytes, url: str) -> None:
    try:
        marker = json.loads(data)
        layout = int(marker["layout"]) if marker["format"] == "tandem-store" else 0
    except (ValueError, TypeError, KeyError):
        layout = 0
    if layout < 1:
        raise StoreError(
            f"{url}/{MARKER} is damaged; if this folder is a Tandem store, write "
            f"{_marker().decode().strip()} into that file."
        )
    if layout > LAYOUT_VERSION:
        raise StoreError(
            f"The store {url} has layout {layout}, this Tandem knows {LAYOUT_VERSION}; upgrade Tandem, or "
            "use another --store."
        )
