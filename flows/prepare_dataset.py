"""Flow ``prepare-dataset``: files of items and interactions in, one dataset artefact out."""

from __future__ import annotations

from typing import Any

from prefect import State, flow

from flows.reporting import NextStep
from flows.tasks import run_stage
from pipeline.config import parse_config
from pipeline.datasets.config import DatasetConfig
from pipeline.errors import ConfigError
from pipeline.progress import Reporter
from pipeline.settings import merged, read_settings
from pipeline.stages.prepare_dataset import prepare_dataset
from pipeline.stages.result import StageResult
from pipeline.store import Store

NAME = "prepare-dataset"


@flow(name=NAME, flow_run_name="{importer}", persist_result=False)
def prepare_dataset_flow(
    *,
    importer: str = "auto",
    items: str = "",
    interactions: str = "",
    item_id: str = "",
    user_id: str = "",
    pictures: str = "",
    name: str = "",
    settings: str = "",
    force: bool = False,
    store: str = "",
) -> State[str]:
    """Import, filter and split a dataset."""

    def work(opened: Store, reporter: Reporter) -> StageResult:
        chosen = {"item_id": item_id, "user_id": user_id, "image_folder": pictures}
        source = dataset_source(items, interactions, importer=importer, columns=chosen)
        config = parse_config(merged(read_settings(settings), source), DatasetConfig, "settings")
        return prepare_dataset(opened, config, reporter=reporter, force=force)

    def following(result: StageResult) -> list[NextStep]:
        given = {"dataset": result.artefact.ref, "store": store}
        return [NextStep("Extract features of this dataset", "extract-features", given)]

    return run_stage(NAME, store, work, name=name, following=following)


def dataset_source(
    items: str, interactions: str, *, importer: str = "auto", columns: dict[str, str] | None = None
) -> dict[str, Any]:
    """Return the part of a dataset's configuration that a form's inputs describe; empty where none is given.

    Raises:
        ConfigError: The inputs are not those of the importer.
    """
    named = {"items": items, "interactions": interactions, **(columns or {})}
    filled = {key: value for key, value in named.items() if value}
    if importer == "auto":
        return {"importer": "tables", "tables": filled} if filled else {}
    if importer == "tables":
        return {"importer": importer, "tables": filled}
    if importer in ("mmrec", "lattice"):
        if others := sorted(set(filled) - {"items"}):
            raise ConfigError(
                f"{importer} reads a folder and no tables; leave {', '.join(others)} empty and give the "
                "folder as the table of items."
            )
        return {"importer": importer, **({importer: {"folder": items}} if items else {})}
    if filled:
        raise ConfigError(
            f"{', '.join(sorted(filled))} is filled in, but the kind of source is {importer!r}, which reads "
            "no files; choose tables."
        )
    return {"importer": importer}
