"""Flow ``train-recommender``: a dataset and cached features in, one trained and measured recommender out."""

from __future__ import annotations

from prefect import State, flow

from flows.reporting import NextStep
from flows.tasks import run_stage
from pipeline.stages.result import StageResult
from pipeline.stages.train_recommender import RunSettings, train_recommender

NAME = "train-recommender"
DEFAULTS = RunSettings()


@flow(name=NAME, flow_run_name="{config.model} seed {config.seed}", persist_result=False)
def train_recommender_flow(
    dataset: str,
    *,
    features: list[str] = [],  # noqa: B006 - never changed; the form wants a list
    config: RunSettings = DEFAULTS,
    search: str = "",
    name: str = "",
    store: str = "",
    force: bool = False,
) -> State[str]:
    """Train one recommender with one seed, choose its epoch on validation and measure it on test once.

    Args:
        dataset: Name, reference or key of a dataset artefact.
        features: Feature artefacts to read, several of a modality if wanted; none where the model reads none.
        config: The recommender, its settings, how it is trained and measured.
        search: Search artefact whose choice is put into the settings; they must be those it was given.
        name: Name to keep the run under; empty for none.
        store: Folder or address of the store; empty for the one that `tandem up` was started with.
        force: Make it again although the store has it.
    """

    def following(result: StageResult) -> list[NextStep]:
        ref = result.artefact.ref
        return [
            NextStep("Compare this run with others", "compare-features", {"runs": [ref], "store": store}),
            NextStep("Build an index of its items", "build-index", {"source": ref, "store": store}),
        ]

    return run_stage(
        NAME,
        store,
        lambda opened, reporter: train_recommender(
            opened, dataset, features, config, search=search, reporter=reporter, force=force
        ),
        name=name,
        following=following,
    )
