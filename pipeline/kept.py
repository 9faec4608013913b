"""What a store keeps beside artefacts: configurations and deployments, each under a name a person gave."""

from __future__ import annotations

from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, Field, ValidationError

from pipeline.errors import ConfigError, StoreError
from pipeline.naming import check_name

if TYPE_CHECKING:
    from pipeline.store import Store

KeptT = TypeVar("KeptT", bound=BaseModel)
Study = Literal["two-stage", "paradigms"]
"""Flows whose whole configuration has a file."""


class KeptConfiguration(BaseModel, frozen=True, extra="forbid"):
    """The configuration of a study, kept under a name."""

    study: Study
    text: str = Field(description="YAML, as in a file; paths of the data are absolute.")
    kept_at: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))


class KeptDeployment(BaseModel, frozen=True, extra="forbid"):
    """A flow with all its inputs filled in, to be registered with every server of the store."""

    flow: str
    inputs: dict[str, str | int | float | bool] = Field(description="By name; the rest has its defaults.")
    folder: str = Field(description="Where relative paths start.")
    cron: str = Field("", description="Schedule it begins with: minute, hour, day, month, day of the week.")
    every_s: float = Field(0.0, ge=0, description="Or seconds from run to run; 0: none.")
    timezone: str = Field("UTC", description="Of the schedule.")
    overlap: Literal["wait", "skip"] = Field(
        "wait", description="What a run does while another of this deployment runs."
    )
    kept_at: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))


class Shelved:
    """The small files of one kind in a store, by name."""

    def __init__(self, store: Store, folder: str, what: str) -> None:
        self.store = store
        self.folder = folder
        self.what = what

    def names(self) -> list[str]:
        """Return the names that are kept, sorted."""
        files = self.store.documents(self.folder)
        return [name.removesuffix(".json") for name in files if name.endswith(".json")]

    def write(self, name: str, kept: BaseModel) -> None:
        """Keep it under a name, in place of what is there.

        Raises:
            StoreError: The name is not allowed.
        """
        self.store.write_document(self._path(name), (kept.model_dump_json(indent=2) + "\n").encode())

    def read(self, name: str, kind: type[KeptT]) -> KeptT:
        """Return what is kept under a name.

        Raises:
            ConfigError: There is no such name.
            StoreError: The name is not allowed, or the file is damaged.
        """
        data = self.store.read_document(self._path(name))
        if data is None:
            known = ", ".join(self.names()) or "none"
            raise ConfigError(
                f"There is no {self.what} {name!r} in {self.store.url}; there are: {known}. "
                "`tandem deploy FILE --name NAME` keeps one."
            )
        try:
            return kind.model_validate_json(data)
        except ValidationError as error:
            raise StoreError(
                f"{self.store.url}/{self._path(name)} is damaged ({error.errors()[0]['msg']}); "
                "deploy it again."
            ) from error

    def remove(self, name: str) -> bool:
        """Take it away; says whether there was one."""
        there = name in self.names()
        self.store.delete_document(self._path(name))
        return there

    def _path(self, name: str) -> str:
        return f"{self.folder}/{check_name(name)}.json"


def configurations(store: Store) -> Shelved:
    """The named configurations of a store."""
    return Shelved(store, "configurations", "configuration")


def deployments(store: Store) -> Shelved:
    """The named deployments of a store."""
    return Shelved(store, "deployments", "deployment")


PATHS = (
    ("tables", "items"),
    ("tables", "interactions"),
    ("tables", "image_folder"),
    ("mmrec", "folder"),
    ("lattice", "folder"),
)
"""Where a dataset's section holds a path."""


def with_absolute_paths(raw: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return a study's configuration that means the same from every folder."""
    result = deepcopy(raw)
    dataset = result.get("dataset")
    for section, key in PATHS:
        holder = dataset.get(section) if isinstance(dataset, dict) else None
        if not isinstance(holder, dict):
            continue
        path = holder.get(key)
        if isinstance(path, str) and path and "://" not in path:
            holder[key] = str(Path(folder, path).expanduser().absolute())
    return result
