"""Flow ``paradigms``: the study of specific, pre-trained, fine-tuned and jointly trained encoders."""

from __future__ import annotations

from dataclasses import dataclass

from prefect import State, flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.states import Completed

from features.encoders.base import EncoderInfo
from flows.finetune_encoder import finetune_encoder_flow
from flows.joint_training import SubflowJointStages
from flows.reporting import TERMINAL, Cell, artifact_key, name_run
from flows.shards import ALONE, Sharing
from flows.subflows import run_subflow
from flows.tasks import CACHED, failed, store_address
from flows.two_stage import SubflowStages
from pipeline.encoder_specs import resolve_encoder
from pipeline.errors import USER_ERRORS
from pipeline.paradigms.config import ParadigmsConfig
from pipeline.paradigms.render import to_markdown
from pipeline.paradigms.table import ParadigmsTable, Row, make_table, measure
from pipeline.paradigms.way import ParadigmsResult, run_paradigms
from pipeline.stages.finetune_encoder import FinetuneSettings
from pipeline.stages.result import StageResult
from pipeline.store import Store

NAME = "paradigms"
DEFAULTS = ParadigmsConfig()


@flow(name=NAME, flow_run_name="{config.name}", persist_result=False)
def paradigms_flow(
    config: ParadigmsConfig = DEFAULTS, *, store: str = "", force: bool = False, sharing: Sharing = ALONE
) -> State[ParadigmsResult]:
    """Compare specific, pre-trained, fine-tuned and jointly trained encoders under the same recommenders.

    Args:
        config: The dataset, the encoders, the recommenders, and how encoders are trained.
        store: Folder or address of the store; empty for the one that `tandem up` was started with.
        force: Make every artefact again although the store has it.
        sharing: In how many shares, and by how many workers, pictures and texts are encoded.
    """
    try:
        opened = Store(store_address(store))
        stages = SubflowParadigmStages(opened, store_address(store), force=force, sharing=sharing)
        result = run_paradigms(config, stages, lambda stage: TERMINAL.get().say(stage.line()))
        if result.comparison is not None:
            opened.name(config.name, result.comparison.artefact)
        metric = config.comparison.metric
        table = make_table([measure(one, metric) for one in result.contenders], config.comparison)
    except USER_ERRORS as error:
        return failed(error)
    show_study(config.name, table)
    n_reused = sum(stage.reused for stage in result.stages)
    message = f"{len(result.stages)} stages, {n_reused} reused"
    if n_reused == len(result.stages):
        name_run(config.name, reused=True)
        return Completed(name=CACHED, message=message, data=result)
    return Completed(message=message, data=result)


@dataclass(frozen=True)
class SubflowParadigmStages(SubflowStages, SubflowJointStages):
    """The stages of ``pipeline.paradigms.way.ParadigmStages``, each a subflow."""

    def describe(self, encoder: str) -> EncoderInfo:
        """Say what an encoder is."""
        return resolve_encoder(self.store, encoder).describe()

    def finetune(self, dataset: str, config: FinetuneSettings) -> StageResult:
        """Fine-tune an encoder on the items."""
        what = {"dataset": dataset, "config": config, "store": self.address, "force": self.force}
        return run_subflow(self.store, finetune_encoder_flow, **what)


def show_study(name: str, table: ParadigmsTable) -> None:
    """Leave the table with its answers as a page, and its rows as a table."""
    headline = " ".join(
        f"{answer.question} {answer.verdict.capitalize()}."
        for answer in table.answers
        if answer.result is not None
    )
    create_markdown_artifact(to_markdown(table), key=artifact_key(NAME, name), description=headline)
    rows = [shown(row) for row in table.rows]
    create_table_artifact(rows, key=artifact_key(NAME, name, "rows"), description=headline)


def shown(row: Row) -> dict[str, Cell]:
    """One row with figures that a person can read; what there is not is left empty."""
    measured, result = row.measured, row.result
    return {
        "recommender": measured.recommender,
        "encoder": measured.encoder,
        "paradigm": measured.kind,
        "valid": round(sum(measured.valid) / len(measured.valid), 6),
        "test": round(sum(measured.test) / len(measured.test), 6),
        "difference": round(result.difference.mean, 6) if result else None,
        "p_holm": round(row.p_holm, 4) if result else None,
        "seconds": round(measured.costs.seconds, 1),
    }
