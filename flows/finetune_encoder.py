"""Flow ``finetune-encoder``: an encoder trained on a dataset's items, its epoch chosen on held-out ones."""

from __future__ import annotations

from prefect import State, flow

from flows.history import show_history
from flows.reporting import NextStep
from flows.tasks import run_stage
from pipeline.encoder_specs import stored_spec
from pipeline.stages.finetune_encoder import FinetuneSettings, finetune_encoder
from pipeline.stages.result import StageResult

NAME = "finetune-encoder"
DEFAULTS = FinetuneSettings()


@flow(name=NAME, flow_run_name="{config.encoder} seed {config.seed}", persist_result=False)
def finetune_encoder_flow(
    dataset: str,
    *,
    config: FinetuneSettings = DEFAULTS,
    name: str = "",
    store: str = "",
    force: bool = False,
) -> State[str]:
    """Fine-tune an encoder on a dataset's pictures and texts, and keep its best epoch as an encoder.

    Args:
        dataset: Name, reference or key of a dataset artefact.
        config: The encoder, which may be store/<encoder artefact>, and how it is trained for what.
        name: Name to keep the encoder under, for extract-features to ask for as store/<name>; empty for none.
        store: Folder or address of the store; empty for the one that `tandem up` was started with.
        force: Make it again although the store has it.
    """

    def following(result: StageResult) -> list[NextStep]:
        show_history(NAME, result)
        settings = {"encoder": stored_spec(result.artefact), "text": config.text.model_dump(mode="json")}
        given = {"dataset": dataset, "config": settings, "store": store}
        return [NextStep("Encode the dataset with it", "extract-features", given)]

    return run_stage(
        NAME,
        store,
        lambda opened, reporter: finetune_encoder(opened, dataset, config, reporter=reporter, force=force),
        name=name,
        following=following,
    )
