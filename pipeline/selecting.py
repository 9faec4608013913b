"""What a person means who names several artefacts in one field: ``one, shop-*``, or a dataset's runs."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.store import Store


def listed(text: str) -> list[str]:
    """Return the entries of a text that lists some with commas or line breaks."""
    return [entry for entry in (part.strip() for part in text.replace("\n", ",").split(",")) if entry]


def runs_meant(store: Store, entries: list[str]) -> list[str]:
    """Return the runs that names, references, patterns and datasets mean, each once, in order.

    Args:
        store: Where they lie.
        entries: A run's name, reference or key; a pattern such as ``shop-*`` over names and references; or a
            dataset, which means all runs made from it.

    Raises:
        ConfigError: Nothing is listed, or a pattern or a dataset means no run.
        StoreError: An entry is not in the store.
    """
    if not entries:
        raise ConfigError("No run is named; give names or references, shop-*, or a dataset for all its runs.")
    found: dict[str, None] = {}
    for entry in entries:
        meant = _runs(store, entry)
        if not meant:
            raise ConfigError(f"{entry!r} means no run in {store.url}; `tandem ls run` lists them.")
        found.update(dict.fromkeys(meant))
    return list(found)


def _runs(store: Store, entry: str) -> list[str]:
    if any(sign in entry for sign in "*?["):
        named = {name: pointer.ref for name, pointer in store.names().items() if pointer.kind == "run"}
        by_name = [ref for name, ref in named.items() if fnmatchcase(name, entry)]
        every = [artefact.ref for artefact in store.list("run")]
        return [*by_name, *(ref for ref in every if fnmatchcase(ref.partition("/")[2], entry))]
    artefact = store.get(entry)
    if artefact.kind != "dataset":
        return [store.get(entry, "run").ref]
    return [
        run.ref
        for run in store.list("run")
        if any(source.kind == "dataset" and source.key == artefact.key for source in run.manifest.inputs)
    ]
