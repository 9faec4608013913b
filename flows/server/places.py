"""Where the server of a store keeps its state, and how another command finds a server that is up."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import psutil
from pydantic import BaseModel, Field, ValidationError

DEFAULT_STORE = ".tandem"
"""The store of a command that was not told one, relative to where it runs."""


class ProcessId(BaseModel, frozen=True, extra="forbid"):
    """A process that cannot be mistaken for a later one with the same number."""

    pid: int
    created: float = Field(description="When it started, in seconds since 1970, as psutil tells it.")

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """Take down a running process; None where there is none (any more)."""
        try:
            return cls(pid=pid, created=psutil.Process(pid).create_time())
        except psutil.Error:
            return None

    def find(self) -> psutil.Process | None:
        """The process, if it is still the same one and has not ended."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < 1.0
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.Error:
            return None


class ServerRecord(BaseModel, frozen=True, extra="forbid"):
    """What a running ``tandem up`` leaves in its state folder for other commands."""

    store: str
    api_url: str
    ui_url: str
    launcher: ProcessId
    children: tuple[ProcessId, ...] = ()

    def write(self, home: Path) -> None:
        """Write the record whole, so that a reader never sees half of it."""
        with tempfile.NamedTemporaryFile("w", dir=home, delete=False, encoding="utf-8") as file:
            file.write(self.model_dump_json(indent=2))
        Path(file.name).replace(_record_path(home))

    @classmethod
    def read(cls, home: Path) -> ServerRecord | None:
        """The record of the last server that did not stop cleanly or is still up."""
        try:
            return cls.model_validate(json.loads(_record_path(home).read_text(encoding="utf-8")))
        except (OSError, ValueError, ValidationError):
            return None

    @staticmethod
    def remove(home: Path) -> None:
        """Forget the server, once it has stopped."""
        _record_path(home).unlink(missing_ok=True)


def _record_path(home: Path) -> Path:
    return home / "server.json"


def absolute_store(store: str) -> str:
    """A store's address that means the same from every folder: flows run elsewhere than the user types."""
    return store if "://" in store else str(Path(store).expanduser().resolve())


def default_store() -> str:
    """The store that flows use unless told otherwise: the one ``tandem up`` was started with."""
    return absolute_store(os.environ.get("TANDEM_STORE") or DEFAULT_STORE)


def state_home(store: str) -> Path:
    """The folder with Prefect's database, logs and settings for one store.

    It lies in the user's state folder rather than in the store: a store may be remote, read-only or on a
    network disk, none of which can hold a SQLite database. ``TANDEM_HOME`` names another parent folder.
    """
    address = absolute_store(store)
    base = os.environ.get("TANDEM_HOME")
    if not base:
        base = str(Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "tandem")
    parts = [re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in address.split("/")[-2:]]
    slug = "-".join(part for part in parts if part) or "store"
    return Path(base).expanduser().resolve() / f"{slug}-{hashlib.sha256(address.encode()).hexdigest()[:8]}"


def is_healthy(api_url: str, timeout_s: float = 2.0) -> bool:
    """Whether a Prefect API answers at this address; its health page is open even where a login is set."""
    if not api_url.startswith(("http://", "https://")):
        return False
    try:
        with urllib.request.urlopen(f"{api_url.rstrip('/')}/health", timeout=timeout_s) as answer:  # noqa: S310 - http(s) only, checked above
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError, ValueError):
        return False


def running_server(store: str) -> str:
    """The API address of ``PREFECT_API_URL`` or of this store's ``tandem up``, if it answers; else ""."""
    named = os.environ.get("PREFECT_API_URL", "")
    if named:
        return named if is_healthy(named) else ""
    record = ServerRecord.read(state_home(store))
    if record is None or record.launcher.find() is None or not is_healthy(record.api_url):
        return ""
    return record.api_url
