from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from recommenders.peers import AcceleratePeers

REPOSITORY = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def train_with(n_processes: int, folder: Path) -> list[dict[str, torch.Tensor]]:
    port = free_port()
    processes = []
    for rank in range(n_processes):
        launched = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": n_processes,
            "LOCAL_WORLD_SIZE": n_processes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "ACCELERATE_USE_CPU": "true",
        }
        environment = dict(os.environ) | {name: str(value) for name, value in launched.items()}
        if n_processes == 1:
            environment = dict(os.environ) | {"ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "-m", "tests.recommenders.joint_worker", str(folder)]
        processes.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE))
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()
    return [load_file(folder / f"{rank}-of-{n_processes}.safetensors") for rank in range(n_processes)]


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    (alone,) = train_with(1, tmp_path)
    both = train_with(2, tmp_path)
    counts = [int(state.pop("rows encoded")) for state in (alone, *both)]
    assert counts[0] == counts[1] + counts[2]
    assert max(counts[1:]) < 0.7 * counts[0]  # each encodes about half
    for state in both:
        for name, value in alone.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=name)


class Second(AcceleratePeers):
    """The second of two processes, without the first."""

    def __init__(self) -> None:
        pass

    rank = 1  # type: ignore[assignment] # a property where there is a first
    n_processes = 2  # type: ignore[assignment] # as above


def test_what_a_process_draws_for_its_rows_leaves_the_common_stream_as_it_was() -> None:
    def drawn(peers: AcceleratePeers, step: int, place: int = 0) -> torch.Tensor:
        with peers.randomness(step, place, torch.device("cpu")):
            return torch.rand(4)

    second = Second()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = torch.rand(4)
        torch.manual_seed(0)
        mine = drawn(second, 7)
        assert torch.equal(torch.rand(4), expected)
        assert torch.equal(drawn(second, 7), mine)  # a step that is done again
        assert not torch.equal(drawn(second, 8), mine)
        assert not torch.equal(drawn(second, 7, place=1), mine)
        second.rank = 0  # type: ignore[misc] # as above
        assert not torch.equal(drawn(second, 7), mine)
