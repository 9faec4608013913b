"""Flow ``paradigms``: the study of specific, pre-trained, fine-tuned and jointly trained encoders."""

from __future__ import annotations

from dataclasses import dataclass

from prefect import State, flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.states import Completed
from pydantic import NonNegativeInt

from features.encoders.base import EncoderInfo
from flows.finetune_encoder import finetune_encoder_flow
from flows.joint_training import SubflowJointStages
from flows.reporting import TERMINAL, Cell, artifact_key, name_run
from flows.studies import StudyForm, keep_study, study_run_name
from flows.subflows import run_subflow
from flows.tasks import CACHED, failed, store_address
from flows.two_stage import SubflowStages
from pipeline.config import parse_config
from pipeline.encoder_specs import resolve_encoder
from pipeline.errors import USER_ERRORS
from pipeline.kept import Study
from pipeline.paradigms.config import ParadigmsConfig
from pipeline.paradigms.render import to_markdown
from pipeline.paradigms.table import ParadigmsTable, Row, make_table, measure
from pipeline.paradigms.way import ParadigmsResult, run_paradigms
from pipeline.settings import inputs_of
from pipeline.stages.finetune_encoder import FinetuneSettings
from pipeline.stages.result import StageResult
from pipeline.store import Store

NAME: Study = "paradigms"


@flow(name=NAME, flow_run_name=study_run_name, persist_result=False)
def paradigms_flow(
    *,
    configuration: str = "",
    name: str = "",
    items: str = "",
    interactions: str = "",
    pictures: str = "",
    encoders: str = "",
    recommenders: str = "",
    seeds: NonNegativeInt = 0,
    keep_as: str = "",
    settings: str = "",
    force: bool = False,
    store: str = "",
) -> State[ParadigmsResult]:
    """Compare specific, pre-trained, fine-tuned and jointly trained encoders under the same recommenders."""
    form = StudyForm(
        configuration=configuration,
        name=name,
        items=items,
        interactions=interactions,
        pictures=pictures,
        encoders=encoders,
        recommenders=recommenders,
        seeds=seeds,
        settings=settings,
    )
    try:
        opened = Store(store_address(store))
        raw, sharing = form.raw(opened, NAME)
        config = parse_config(raw, ParadigmsConfig, "settings")
        name_run(config.name, reused=False)
        if keep_as:
            keep_study(opened, keep_as, NAME, raw, sharing)
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
        what = {"dataset": dataset, "store": self.address, "force": self.force}
        return run_subflow(self.store, finetune_encoder_flow, **what, **inputs_of(config, "encoder", "seed"))


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
