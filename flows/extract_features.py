"""Flow ``extract-features``: a dataset's pictures or texts through one encoder, cached as features."""

from __future__ import annotations

from prefect import State, flow

from flows.reporting import NextStep
from flows.shards import Sharing, encode_shards
from flows.tasks import failed, run_stage, value_of
from pipeline.errors import USER_ERRORS
from pipeline.progress import Reporter
from pipeline.settings import read_settings, stage_config
from pipeline.stages.extract_features import FeaturesConfig, extract_features
from pipeline.stages.extract_shards import assemble_shards
from pipeline.stages.result import StageResult
from pipeline.store import Store

NAME = "extract-features"


@flow(name=NAME, flow_run_name="{encoder} {modality}", persist_result=False)
def extract_features_flow(
    dataset: str,
    *,
    encoder: str = "tiny",
    modality: str = "image",
    name: str = "",
    retry_failed: bool = False,
    settings: str = "",
    force: bool = False,
    store: str = "",
) -> State[str]:
    """Encode a dataset's pictures or texts once; only what no feature artefact holds yet is computed."""
    again = {"force": force, "retry_failed": retry_failed}
    try:
        deeper = read_settings(settings)
        sharing = stage_config(Sharing, deeper.pop("sharing", {}))
        config = stage_config(FeaturesConfig, deeper, encoder=encoder, modality=modality)
        shards = encode_shards(dataset, config, sharing, store=store, again=again)
        if shards is not None:
            value_of(shards)  # raises what went wrong
    except USER_ERRORS as error:
        return failed(error)

    def following(result: StageResult) -> list[NextStep]:
        ref = result.artefact.ref
        train = {"dataset": dataset, "features": ref, "store": store}
        return [
            NextStep("Train a recommender on these features", "train-recommender", train),
            NextStep("Build an index of these features", "build-index", {"source": ref, "store": store}),
        ]

    def work(opened: Store, reporter: Reporter) -> StageResult:
        if shards is None:
            return extract_features(opened, dataset, config, reporter=reporter, **again)
        return assemble_shards(opened, dataset, config, sharing.n_shards, reporter=reporter, **again)

    return run_stage(NAME, store, work, name=name, following=following)
