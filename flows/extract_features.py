"""Flow ``extract-features``: a dataset's pictures or texts through one encoder, cached as features."""

from __future__ import annotations

from prefect import State, flow

from flows.reporting import NextStep
from flows.shards import ALONE, Sharing, encode_shards
from flows.tasks import failed, run_stage, value_of
from pipeline.errors import USER_ERRORS
from pipeline.progress import Reporter
from pipeline.stages.extract_features import FeaturesConfig, extract_features
from pipeline.stages.extract_shards import assemble_shards
from pipeline.stages.result import StageResult
from pipeline.store import Store

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
    sharing: Sharing = ALONE,
) -> State[str]:
    """Encode a dataset's pictures or texts once; only what no feature artefact holds yet is computed.

    Args:
        dataset: Name, reference or key of a dataset artefact; a run of prepare-dataset shows them.
        config: Which encoder over which modality, and how it reads and writes.
        name: Name to keep the features under, for other stages to ask for; empty for none.
        store: Folder or address of the store; empty for the one that `tandem up` was started with.
        force: Make it again although the store has it.
        retry_failed: Encode the rows that failed before again; the others keep their vectors.
        sharing: In how many shares, and by how many workers.
    """
    again = {"force": force, "retry_failed": retry_failed}
    try:
        shards = encode_shards(dataset, config, sharing, store=store, again=again)
        if shards is not None:
            value_of(shards)  # raises what went wrong
    except USER_ERRORS as error:
        return failed(error)

    def following(result: StageResult) -> list[NextStep]:
        ref = result.artefact.ref
        train = {"dataset": dataset, "features": [ref], "store": store}
        return [
            NextStep("Train a recommender on these features", "train-recommender", train),
            NextStep("Build an index of these features", "build-index", {"source": ref, "store": store}),
        ]

    def work(opened: Store, reporter: Reporter) -> StageResult:
        if shards is None:
            return extract_features(opened, dataset, config, reporter=reporter, **again)
        return assemble_shards(opened, dataset, config, sharing.n_shards, reporter=reporter, **again)

    return run_stage(
        NAME,
        store,
        work,
        name=name,
        following=following,
    )
