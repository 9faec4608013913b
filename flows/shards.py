"""Shards of one extraction as tasks: one after the other in this process, or beside each other under Dask."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from prefect import State, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.settings import temporary_settings
from prefect.states import Completed
from prefect.task_runners import TaskRunner
from prefect.tasks import exponential_backoff
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt

from features.sharding import Shard
from flows.reporting import PrefectReporter
from flows.tasks import failed, retry_helps, store_address, value_of
from pipeline.errors import USER_ERRORS, ConfigError
from pipeline.stages.extract_features import FeaturesConfig
from pipeline.stages.extract_shards import can_shard, encode_one_shard, find_features
from pipeline.store import Store

NAME = "extract-shards"


class Sharing(BaseModel, frozen=True, extra="forbid"):
    """How one extraction is shared out."""

    shards: PositiveInt = Field(
        1, description="Shares in which the contents are encoded, a task each; at least one a worker."
    )
    workers: NonNegativeInt = Field(
        0,
        description="Dask worker processes on this machine, each with an encoder of its own; 0: the shards "
        "run one after the other in the flow's process. Needs the extra `distributed`.",
    )
    scheduler: str = Field(
        "", description="Address of a Dask scheduler that runs, such as tcp://10.0.0.1:8786, for its workers."
    )

    @property
    def n_shards(self) -> int:
        """How many there are."""
        return max(self.shards, self.workers)

    @property
    def is_wanted(self) -> bool:
        """Whether anything is shared out."""
        return self.n_shards > 1 or bool(self.scheduler)

    def task_runner(self) -> TaskRunner[Any] | None:
        """What runs the tasks; None for the flow's own process.

        Raises:
            ConfigError: Dask is wanted and not installed.
        """
        if not (self.workers or self.scheduler):
            return None
        try:
            from prefect_dask.task_runners import DaskTaskRunner  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise ConfigError(
                f"sharing.workers is {self.workers}, but prefect-dask is not installed; install the extra "
                "`distributed` (pip install 'tandem-recsys[distributed]'), or set sharing.workers to 0."
            ) from error
        if self.scheduler:
            return DaskTaskRunner(address=self.scheduler)
        cluster = {"n_workers": self.workers, "threads_per_worker": 1, "dashboard_address": None}
        return DaskTaskRunner(cluster_kwargs=cluster)


ALONE = Sharing()


@task(
    name="shard",
    task_run_name="shard {index} of {n_shards}",
    cache_policy=NO_CACHE,  # whole blocks in the store are the cache
    persist_result=False,
    retries=3,
    retry_delay_seconds=exponential_backoff(2),
    retry_jitter_factor=0.5,
    retry_condition_fn=retry_helps,
)
def shard_task(
    index: int, n_shards: int, *, dataset: str, config: FeaturesConfig, store: str, again: dict[str, bool]
) -> dict[str, Any]:
    """Encode one shard; what a killed worker left of it is kept."""
    reporter = PrefectReporter(f"shard-{index}")
    opened = Store(store, say=reporter.say)
    report = encode_one_shard(opened, dataset, config, Shard(index, n_shards), reporter=reporter, **again)
    if report is None:
        return {}
    reporter.say(
        f"shard {report.shard}: {report.encoded} encoded, {report.kept} of {report.blocks} blocks kept"
    )
    return asdict(report)


@flow(
    name=NAME, flow_run_name="{n_shards} shards of {config.encoder} {config.modality}", persist_result=False
)
def extract_shards_flow(
    dataset: str, *, config: FeaturesConfig, n_shards: int, store: str, again: dict[str, bool], submit: bool
) -> State[list[dict[str, Any]]]:
    """Encode all shards; its data is each shard's report, or the first mistake that a person can fix.

    Args:
        dataset: Name, reference or key of a dataset artefact.
        config: Which encoder over which modality, and how it reads and writes.
        n_shards: How many shares.
        store: Folder or address of the store.
        again: What of ``force`` and ``retry_failed`` is set.
        submit: Hand all shards to the task runner at once.
    """
    what: dict[str, Any] = {"dataset": dataset, "config": config, "store": store, "again": again}
    if submit:
        futures = [shard_task.submit(index, n_shards, **what) for index in range(n_shards)]
        for future in futures:
            future.wait()
        states = [future.state for future in futures]
    else:
        states = [shard_task(index, n_shards, **what, return_state=True) for index in range(n_shards)]
    for state in states:
        if state.is_failed() or state.is_crashed():
            error = state.result(raise_on_failure=False)
            if isinstance(error, USER_ERRORS):
                return failed(error)
    reports = [value_of(state) for state in states]  # raises what else went wrong
    n_encoded = sum(report.get("encoded", 0) for report in reports)
    return Completed(message=f"{n_shards} shards, {n_encoded} contents encoded", data=reports)


def encode_shards(
    dataset: str, config: FeaturesConfig, sharing: Sharing, *, store: str, again: dict[str, bool]
) -> State[Any] | None:
    """Encode all shards as a subflow, unless the store has the features or they cannot be shared out.

    Returns:
        How the subflow ended; None where there was nothing to do.

    Raises:
        ConfigError, EncoderError, StoreError: As ``extract_shard`` raises them.
    """
    if not sharing.is_wanted or not can_shard(config):
        return None
    address = store_address(store)
    if not any(again.values()) and find_features(Store(address), dataset, config) is not None:
        return None
    runner = sharing.task_runner()
    subflow = extract_shards_flow if runner is None else extract_shards_flow.with_options(task_runner=runner)
    with temporary_settings(updates={"flows.heartbeat_frequency": None}):  # the parent's speaks for it
        return subflow(
            dataset,
            config=config,
            n_shards=sharing.n_shards,
            store=address,
            again=again,
            submit=runner is not None,
            return_state=True,
        )
