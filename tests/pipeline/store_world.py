"""Small artefacts whose content follows from their number, and an object store made of local files."""

import os
import tempfile
from pathlib import Path
from typing import Any
from uuid import uuid4

from fsspec import register_implementation
from fsspec.implementations.local import LocalFileSystem

from pipeline.store import Artefact, Draft, Kind, Outcome, Store


class ObjectFileSystem(LocalFileSystem):
    """Behaves like an object store: objects appear whole, nothing can be renamed."""

    protocol = "objects"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(str(path).removeprefix("objects://"))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        temporary = (
            Path(tempfile.gettempdir()) / uuid4().hex
        )  # where tests keep their folders, outside the bucket
        temporary.write_bytes(value)
        os.replace(temporary, path)  # noqa: PTH105 - the file system's own path is a string

    def put_file(
        self, lpath: str, rpath: str, callback: Any = None, mode: str = "overwrite", **kwargs: Any
    ) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        raise NotImplementedError("an object cannot be renamed")

    mv_file = rename = move = mv


register_implementation("objects", ObjectFileSystem, clobber=True)


def content(number: int, file: int) -> bytes:
    """Return what file ``file`` of artefact ``number`` holds: a few hundred kilobytes, no two alike."""
    return f"{number}/{file} ".encode() * (20_000 * (file + 1))


def fill(number: int, n_files: int = 3) -> Any:
    """Return a maker of artefact ``number``."""

    def make(draft: Draft) -> None:
        for file in range(n_files):
            draft.path(f"part-{file:05d}.bin").write_bytes(content(number, file))
        draft.record(number=number)

    return make


def is_right(artefact: Artefact) -> bool:
    """Say whether an artefact made by ``fill`` holds exactly what it should."""
    number = artefact.manifest.facts["number"]
    assert isinstance(number, int)
    found = [path.read_bytes() for path in artefact.paths("part-*.bin")]
    return found == [content(number, file) for file in range(len(found))] and len(found) > 0


def produce(store: Store, number: int, kind: Kind = "features", **settings: Any) -> Outcome:
    """Ask for artefact ``number``."""
    return store.produce(
        kind,
        slug=f"number {number}",
        identity={"number": number},
        **{"make": fill(number), **settings},
    )


def small(
    store: Store, label: str, kind: Kind = "features", made_from: list[Artefact] | None = None
) -> Artefact:
    """Make an artefact of one tiny file."""

    def make(draft: Draft) -> None:
        draft.path("note.txt").write_text(label)

    inputs = [each.as_input(f"input {number}") for number, each in enumerate(made_from or [])]
    identity = {"label": label}
    return store.produce(kind, slug=label, identity=identity, inputs=inputs, make=make).artefact
