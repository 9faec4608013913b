"""Flow ``prepare-dataset``: files of items and interactions in, one dataset artefact out."""

from __future__ import annotations

from prefect import State, flow

from flows.reporting import NextStep
from flows.tasks import run_stage
from pipeline.datasets.config import DatasetConfig
from pipeline.stages.prepare_dataset import prepare_dataset
from pipeline.stages.result import StageResult

NAME = "prepare-dataset"
DEFAULTS = DatasetConfig()


@flow(name=NAME, flow_run_name="{config.importer}", persist_result=False)
def prepare_dataset_flow(
    config: DatasetConfig = DEFAULTS, *, name: str = "", store: str = "", force: bool = False
) -> State[str]:
    """Import, filter and split a dataset.

    Args:
        config: Where items and interactions come from, what of them is kept, and how they are split.
        name: Name to keep the dataset under, for other stages to ask for; empty for none.
        store: Folder or address of the store; empty for the one that `tandem up` was started with.
        force: Make it again although the store has it.
    """

    def following(result: StageResult) -> list[NextStep]:
        return [
            NextStep(
                "Extract features of this dataset",
                "extract-features",
                {"dataset": result.artefact.ref, "store": store},
            )
        ]

    return run_stage(
        NAME,
        store,
        lambda opened, reporter: prepare_dataset(opened, config, reporter=reporter, force=force),
        name=name,
        following=following,
    )
