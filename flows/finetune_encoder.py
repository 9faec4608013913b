"""Flow ``finetune-encoder``: an encoder trained on a dataset's items, its epoch chosen on held-out ones."""

from __future__ import annotations

from prefect import State, flow

from flows.history import show_history
from flows.reporting import NextStep
from flows.tasks import run_stage
from pipeline.encoder_specs import stored_spec
from pipeline.progress import Reporter
from pipeline.settings import settings_text, stage_config
from pipeline.stages.finetune_encoder import FinetuneSettings, finetune_encoder
from pipeline.stages.result import StageResult
from pipeline.store import Store

NAME = "finetune-encoder"


@flow(name=NAME, flow_run_name="{encoder} seed {seed}", persist_result=False)
def finetune_encoder_flow(
    dataset: str,
    *,
    encoder: str = "tiny",
    seed: int = 0,
    name: str = "",
    settings: str = "",
    force: bool = False,
    store: str = "",
) -> State[str]:
    """Fine-tune an encoder on a dataset's pictures and texts, and keep its best epoch as an encoder."""
    texts = ""

    def work(opened: Store, reporter: Reporter) -> StageResult:
        nonlocal texts
        config = stage_config(FinetuneSettings, settings, encoder=encoder, seed=seed)
        texts = settings_text(config, without=set(type(config).model_fields) - {"text"})
        return finetune_encoder(opened, dataset, config, reporter=reporter, force=force)

    def following(result: StageResult) -> list[NextStep]:

        show_history(NAME, result)
        given = {
            "dataset": dataset,
            "encoder": stored_spec(result.artefact),
            "settings": texts,
            "store": store,
        }
        return [NextStep("Encode the dataset with it", "extract-features", given)]

    return run_stage(NAME, store, work, name=name, following=following)
