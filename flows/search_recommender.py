"""Flow ``search-recommender``: settings of one recommender tried, the best on validation chosen."""

from __future__ import annotations

from typing import Any

from prefect import State, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.settings import temporary_settings
from prefect.states import Completed
from prefect.task_runners import ProcessPoolTaskRunner
from pydantic import PositiveInt

from flows.reporting import NextStep, PrefectReporter
from flows.tasks import failed, run_stage, store_address, value_of
from pipeline.errors import USER_ERRORS
from pipeline.progress import Reporter
from pipeline.selecting import listed
from pipeline.settings import inputs_of, read_settings, stage_config
from pipeline.stages.result import StageResult
from pipeline.stages.search_recommender import SearchSettings, find_search, search_recommender, try_settings
from pipeline.stages.train_recommender import RunSettings
from pipeline.store import Store

NAME = "search-recommender"


@task(name="trials", task_run_name="{worker}", cache_policy=NO_CACHE, persist_result=False)
def trials_task(worker: str, *, store: str, **what: Any) -> int:
    """Try settings until none is left; what a killed worker left is taken over by the next."""
    reporter = PrefectReporter(f"search-{worker}")
    return try_settings(Store(store, say=reporter.say), worker=worker, reporter=reporter, **what)


@flow(name="search-trials", flow_run_name="{workers} workers", persist_result=False)
def trials_flow(workers: int, *, what: dict[str, Any]) -> State[list[int]]:
    """Let several processes of this machine try settings beside each other.

    Args:
        workers: How many.
        what: The arguments of ``try_settings``.
    """
    futures = [trials_task.submit(f"worker {number}", **what) for number in range(workers)]
    for future in futures:
        future.wait()
    for future in futures:
        if future.state.is_failed():
            error = future.state.result(raise_on_failure=False)
            if isinstance(error, USER_ERRORS):
                return failed(error)
    return Completed(data=[value_of(future.state) for future in futures])


@flow(name=NAME, flow_run_name="{model}", persist_result=False)
def search_recommender_flow(
    dataset: str,
    *,
    features: str = "",
    model: str = "vbpr",
    trials: int = 20,
    workers: PositiveInt = 1,
    name: str = "",
    settings: str = "",
    force: bool = False,
    store: str = "",
) -> State[str]:
    """Try settings of one recommender and choose those that do best on validation; test is never read."""
    read = listed(features)
    try:
        deeper = read_settings(settings)
        search = {"n_trials": trials, **deeper.pop("search", {})}
        config = stage_config(SearchSettings, deeper, model=model, search=search)
        if workers > 1:
            _try_in_parallel(workers, store, dataset=dataset, features=read, config=config, force=force)
    except USER_ERRORS as error:
        return failed(error)

    def following(result: StageResult) -> list[NextStep]:
        found = {"dataset": dataset, "features": features, "search": result.artefact.ref, "store": store}
        return [
            NextStep("Train with these settings", "train-recommender", {**found, **run_inputs(config.run())})
        ]

    def work(opened: Store, reporter: Reporter) -> StageResult:
        return search_recommender(opened, dataset, read, config, reporter=reporter, force=force)

    return run_stage(NAME, store, work, name=name, following=following)


def run_inputs(config: RunSettings) -> dict[str, Any]:
    """Return the form of train-recommender for these settings."""
    return inputs_of(config, "model", "seed")


def _try_in_parallel(workers: int, store: str, **what: Any) -> None:
    """Try the settings in several processes, unless the store has the search; choosing is left to the stage.

    Raises:
        Exception: What a worker failed with.
    """
    address = store_address(store)
    asked = {name: value for name, value in what.items() if name != "force"}
    if not what["force"] and find_search(Store(address), **asked) is not None:
        return
    runner: Any = ProcessPoolTaskRunner(max_workers=workers)  # Prefect types its futures too narrowly
    parallel = trials_flow.with_options(task_runner=runner)
    with temporary_settings(updates={"flows.heartbeat_frequency": None}):  # the parent's speaks for it
        value_of(parallel(workers, what={**what, "store": address}, return_state=True))
