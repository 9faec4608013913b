from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.server.processes import Child, is_alive, kill, process_tree, terminate

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
print("inner", inner.pid, flush=True)
time.sleep(300)
"""
WILLING = "import time; print('here', flush=True); time.sleep(300)"


@pytest.fixture
def start(tmp_path: Path) -> object:
    """Start a script as a child, and wait for its first line."""

    def make(script: str, name: str = "part") -> Child:
        (tmp_path / f"{name}_script.py").write_text(script)
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        child = Child(name, [f"{name}_script"], environment, tmp_path / f"{name}.log")
        until = time.monotonic() + 20
        while not child.log_tail() and child.exit_code is None and time.monotonic() < until:
            time.sleep(0.02)
        return child

    return make


def test_a_willing_child_ends_at_once(start) -> None:  # type: ignore[no-untyped-def]  # a fixture's function
    child = start(WILLING)
    began = time.monotonic()
    child.stop(grace_s=20)
    assert child.exit_code == -15
    assert time.monotonic() - began < 5


def test_a_stubborn_child_is_killed_with_all_it_started(start) -> None:  # type: ignore[no-untyped-def]
    child = start(STUBBORN)
    inner = psutil.Process(int(child.log_tail().split()[1]))
    assert inner in process_tree(child.pid)
    child.stop(grace_s=0.3)
    assert child.exit_code == -9
    assert not is_alive(inner)


def test_hurry_cuts_the_grace_short(start) -> None:  # type: ignore[no-untyped-def]
    child = start(STUBBORN)
    began = time.monotonic()
    child.stop(grace_s=60, hurry=lambda: True)
    assert child.exit_code == -9
    assert time.monotonic() - began < 5


def test_a_child_is_out_of_reach_of_ctrl_c_in_the_terminal(start) -> None:  # type: ignore[no-untyped-def]
    child = start(WILLING)
    assert os.getpgid(child.pid) != os.getpgid(0)
    child.stop(grace_s=5)


def test_the_end_of_the_log_is_kept_when_a_child_fails(start) -> None:  # type: ignore[no-untyped-def]
    child = start("print('line one'); raise SystemExit('no such database')")
    child.process.wait()
    assert child.exit_code == 1
    assert child.log_tail(1) == "no such database"
    child.stop(grace_s=1)  # it has ended: nothing to do
    assert child.exit_code == 1


def test_terminate_tells_who_stayed_and_takes_the_unreaped_for_ended() -> None:
    willing = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    stubborn = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE)
    assert stubborn.stdout is not None
    stubborn.stdout.readline()
    both = [psutil.Process(willing.pid), psutil.Process(stubborn.pid)]
    below = process_tree(stubborn.pid)
    assert terminate(both, grace_s=0.5) == [both[1]]
    assert both[0].status() == psutil.STATUS_ZOMBIE  # we have not waited for it
    kill([*both, *below])
    willing.wait()
    stubborn.wait()
    stubborn.stdout.close()
    assert not any(is_alive(process) for process in [*both, *below])


def test_children_are_asked_to_end_before_they_are_killed() -> None:
    ending = f"""
import os, subprocess, sys
from flows.server.processes import end_children, process_tree
willing = subprocess.Popen([sys.executable, "-c", {WILLING!r}], stdout=-1, start_new_session=True)
stubborn = subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], stdout=subprocess.PIPE)
willing.stdout.readline(), stubborn.stdout.readline()
end_children(grace_s=0.5)
assert (willing.wait(), stubborn.wait()) == (-15, -9)
assert not process_tree(os.getpid())
"""
    done = subprocess.run([sys.executable, "-c", ending], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
