"""The worker as a process: ``python -m flows.server.worker``. It starts a process for each flow run it takes.

Prefect's own ``prefect worker start`` kills its flow processes when it is told to stop, which leaves their
runs "Running" for ever. This one lets them end first, so that the UI shows what happened.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.workers.process import ProcessWorker

from flows.server.places import is_healthy
from flows.server.pool import POOL, crash_orphans, crash_when_silent, other_workers, prepare_pool
from flows.server.processes import end_children

FLOW_GRACE_S = 10.0
"""How long a flow process may take to say that it was ended, before it is killed."""
log = logging.getLogger("prefect.tandem")


async def wait_for_api(timeout_s: float) -> None:
    """Wait until the server that ``PREFECT_API_URL`` names answers.

    Raises:
        SystemExit: It does not answer in time, or none is named.
    """
    api_url = os.environ.get("PREFECT_API_URL", "")
    if not api_url:
        raise SystemExit("PREFECT_API_URL is not set; give the address of the server, http://host:4200/api.")
    for _ in range(max(1, int(timeout_s / 0.25))):
        if await asyncio.to_thread(is_healthy, api_url):
            return
        await asyncio.sleep(0.25)
    raise SystemExit(f"{api_url} does not answer after {timeout_s:.0f} s; is the server up?")


async def run_worker(name: str, ready_file: Path | None, timeout_s: float) -> int:
    """Work on the pool's runs until SIGTERM, SIGINT or the server's end; returns the exit status."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await wait_for_api(timeout_s)
    async with get_client() as client:
        await prepare_pool(client)
        await crash_when_silent(client)
    await report_orphans(name, "The worker that ran this was killed.")
    worker = ProcessWorker(name=name, work_pool_name=POOL)
    working = asyncio.create_task(worker.start(printer=log.info))
    stopping = asyncio.create_task(stop.wait())
    if ready_file is not None:
        ready_file.touch()
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()  # raises what ended it
            return 1
        # It blocks the event loop on purpose: the worker must not take new runs meanwhile.
        end_children(FLOW_GRACE_S)
    finally:
        stopping.cancel()
        working.cancel()
        await asyncio.wait({working}, timeout=FLOW_GRACE_S)
    # A process that was ended while it was still starting up had no word to say of its run.
    with contextlib.suppress(Exception):  # the server may be gone, too: the next worker does this again
        await asyncio.wait_for(report_orphans(name, "The worker was stopped."), timeout=5)
    return 0


async def report_orphans(name: str, message: str) -> None:
    """Mark the pool's unfinished runs as crashed, unless another worker may be working on them."""
    async with get_client() as client:
        if await other_workers(client, name):
            return
        for run in await crash_orphans(client, message):
            log.warning("Run %r has no process any more; it is marked as crashed.", run)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and work."""
    parser = argparse.ArgumentParser(prog="python -m flows.server.worker", description=__doc__)
    parser.add_argument("--name", default=f"tandem-{socket.gethostname()}", help="name shown in the UI")
    parser.add_argument("--ready-file", type=Path, default=None, help="file to make once runs are taken")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds to wait for the server")
    options = parser.parse_args(arguments)
    # The command of a flow run says `python`: this one, also where the environment is not activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return asyncio.run(run_worker(options.name, options.ready_file, options.timeout))


if __name__ == "__main__":
    raise SystemExit(main())
