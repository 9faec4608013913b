"""Flow ``extract-features``: a dataset's pictures or texts through one encoder, cached as features."""

from __future__ import annotations

from prefect import State, flow

from flows.reporting import NextStep
from flows.tasks import run_stage
from pipeline.stages.extract_features import FeaturesConfig, extract_features
from pipeline.stages.result import StageResult

NAME = "extract-features"
DEFAULTS = FeaturesConfig()


@flow(name=NAME, flow_run_name="{config.encoder} {config.modality}", persist_result=False)
def extract_features_flow(
    dataset: str,
    *,
    config: FeaturesConfig = DEFAULTS,
    name: str = "",
    store: str = "",
    force: bool = False,
    retry_failed: bool = False,
) -> State[str]:
    """Encode a dataset's pictures or texts once; only what no feature artefact holds yet is computed.

    Args:
        dataset: Name, reference or key of a dataset artefact; a run of prepare-dataset shows them.
        config: Which encoder over which modality, and how it reads and writes.
        name: Name to keep the features under, for other stages to ask for; empty for none.
        store: Folder or address of the store; empty for the one that `tandem up` was started with.
        force: Make it again although the store has it.
        retry_failed: Encode the rows that failed before again; the others keep their vectors.
    """

    def following(result: StageResult) -> list[NextStep]:
        ref = result.artefact.ref
        train = {"dataset": dataset, "features": [ref], "store": store}
        return [
            NextStep("Train a recommender on these features", "train-recommender", train),
            NextStep("Build an index of these features", "build-index", {"source": ref, "store": store}),
        ]

    return run_stage(
        NAME,
        store,
        lambda opened, reporter: extract_features(
            opened, dataset, config, reporter=reporter, force=force, retry_failed=retry_failed
        ),
        name=name,
        following=following,
    )
