"""A thin task around any stage: retries where they can help, a badge for reuse, one message for a mistake."""

from __future__ import annotations

import errno
import logging
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

from prefect import State, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed
from prefect.tasks import Task, exponential_backoff

from flows.reporting import NextStep, PrefectReporter, name_run, show_result
from flows.server.places import absolute_store, default_store
from pipeline.errors import USER_ERRORS, StoreError
from pipeline.progress import Reporter
from pipeline.stages.result import StageResult
from pipeline.store import Store

CACHED = "Cached"
"""Name of a completed state in which nothing was computed; the UI shows it as the badge."""
TRANSIENT = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.EINTR,
        errno.EIO,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EPIPE,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
"""Troubles of networks and network disks that pass by themselves; a full disk or a missing file does not."""
BUSY = frozenset({408, 429})
"""HTTP: request timeout, too many requests."""
NETWORK_LIBRARIES = frozenset(
    {"aiohttp", "botocore", "gcsfs", "httpcore", "httpx", "requests", "urllib", "urllib3"}
)

T = TypeVar("T")
Work = Callable[[Store, Reporter], StageResult]
"""A stage with all but its store and its reporter filled in."""
Following = Callable[[StageResult], Sequence[NextStep]]


def may_pass(error: BaseException) -> bool:
    """Whether trying again can help: the network or a network disk failed, not a person's input.

    Of the mistakes a user can fix only the store's count, and only where the network is behind them.
    """
    if isinstance(error, USER_ERRORS) and not isinstance(error, StoreError):
        return False
    return any(_is_transient(cause) for cause in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__


def _is_transient(error: BaseException) -> bool:
    status = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):  # the server answered: only "too busy" and its own failures pass
        return status in BUSY or status >= 500
    if isinstance(error, ConnectionError | TimeoutError | socket.gaierror):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in TRANSIENT
    return type(error).__module__.split(".")[0] in NETWORK_LIBRARIES and bool(
        isinstance(error, OSError) or re.search("timeout|connect", type(error).__name__, re.IGNORECASE)
    )


def retry_helps(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:  # noqa: ARG001 - Prefect's signature
    """Prefect's question after a failed attempt."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, BaseException) and may_pass(error)


@task(
    name="stage",
    task_run_name="{stage}",
    cache_policy=NO_CACHE,  # the store is the cache; Prefect only shows it
    persist_result=False,
    retries=3,
    retry_delay_seconds=exponential_backoff(2),
    retry_jitter_factor=0.5,
    retry_condition_fn=retry_helps,
)
def stage_task(stage: str, store: str, work: Work, name: str) -> State[StageResult]:
    """Do a stage's work; its state says whether anything was computed, or what a person got wrong."""
    try:
        reporter = PrefectReporter(stage)
        opened = Store(store_address(store), say=reporter.say)
        result = work(opened, reporter)
        if name:
            opened.name(name, result.artefact)
    except USER_ERRORS as error:
        return Failed(message=str(error), data=error)
    return _state_of(result, result)


def run_stage(
    stage: str, store: str, work: Work, *, name: str = "", following: Following | None = None
) -> State[str]:
    """The body of every stage's flow: run the task, show the result, and say how it went.

    Args:
        stage: The flow's name.
        store: Address of the store; "" for the one ``tandem up`` was started with.
        work: What the stage does.
        name: Name to give to the artefact; "" for none.
        following: The stages that can go on from the result.

    Returns:
        The state of the flow run; its data is the artefact's reference, or the error that a person can fix.
    """
    state = stage_task(stage, store, work, name, return_state=True)
    if state.is_failed():
        error = state.result(raise_on_failure=False)
        if isinstance(error, USER_ERRORS):
            return failed(error)
    result = value_of(state)  # raises what else went wrong
    show_result(stage, result, following(result) if following else ())
    name_run(result.artefact.slug, reused=result.reused)
    return _state_of(result, result.artefact.ref)


class _ToldAlready(logging.Filter):
    """Drops the stack trace of a mistake that a person can fix; its one line is in the log already."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to keep a record."""
        return not (record.exc_info and isinstance(record.exc_info[1], USER_ERRORS))


for _logger in ("prefect.flow_runs", "prefect.engine"):  # both tell of a failed run's exception once more
    logging.getLogger(_logger).addFilter(_ToldAlready())


def value_of(state: State[State[T]]) -> T:
    """What a flow or a task handed back; Prefect unpacks the state that its function returned.

    Raises:
        Exception: Whatever it failed with.
    """
    return cast("T", state.result())


def failed(error: Exception) -> State[Any]:
    """How a run ends that a person has to do something about: one message, in the log and as the state."""
    get_run_logger().error(str(error))
    return Failed(message=str(error), data=error)


def _state_of(result: StageResult, data: Any) -> State[Any]:
    if result.reused:
        return Completed(name=CACHED, message=f"{result.artefact.ref}: the store had it", data=data)
    return Completed(message=result.artefact.ref, data=data)


def store_address(url: str) -> str:
    """The store that a flow's ``store`` parameter means."""
    return absolute_store(url) if url else default_store()
