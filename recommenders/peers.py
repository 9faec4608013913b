"""Several processes that train as one: each encodes a share of a step's rows, all hold the same recommender.

The rows of a step are dealt out, encoded, and gathered, so that every process computes the loss of the whole
batch from the same numbers; each then takes the gradient of its own rows to its copy of the encoder, and the
copies' gradients are added up. That is the gradient of one process with the whole batch, not an average of
smaller batches', and contrastive terms see all rows. Recommenders are small beside encoders, so nothing is
won by dealing them out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PATIENCE = timedelta(days=7)
"""How long a process waits for the others in a collective call: one of them may be writing to a slow disk.
Whoever started them sees when one dies, and stops the rest."""


def join_peers(rank: int, n_processes: int, meeting: Path, *, cpu: bool) -> AcceleratePeers:
    """Meet the other processes of this machine; to be called once, before anything else of the kind.

    Args:
        rank: Number of this process, from 0. On GPUs it has the GPU of this number.
        n_processes: How many meet.
        meeting: A file that does not exist, the same for all: unlike a port, nobody else can take it.
        cpu: Meet over gloo on the CPU; false: over nccl.
    """
    os.environ |= {  # accelerate reads them
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n_processes),
        "LOCAL_WORLD_SIZE": str(n_processes),
    }
    if cpu and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nothing leaves this machine
    if not cpu:
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "gloo" if cpu else "nccl",
        store=torch.distributed.FileStore(str(meeting), n_processes),  # type: ignore[attr-defined] # it is there
        rank=rank,
        world_size=n_processes,
        timeout=PATIENCE,
    )
    return AcceleratePeers(cpu=cpu)


class AcceleratePeers:
    """The processes that ``accelerate launch`` or ``torchrun`` started, or one.

    Args:
        cpu: Stay on the CPU (gloo) though there is a GPU.
    """

    def __init__(self, *, cpu: bool) -> None:
        from accelerate import PartialState  # noqa: PLC0415 - half a second of imports

        self._state = PartialState(cpu=cpu)

    @property
    def rank(self) -> int:
        """Number of this process; 0 writes files."""
        return int(self._state.process_index)

    @property
    def n_processes(self) -> int:
        """How many there are."""
        return int(self._state.num_processes)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device = self._state.device
        assert isinstance(device, torch.device)  # noqa: S101 - accelerate has no types
        return device

    def own(self, n_rows: int) -> slice:
        """Return which of n rows this process encodes: a run of at most n / processes, rounded up."""
        share = -(-n_rows // self.n_processes)
        return slice(min(self.rank * share, n_rows), min((self.rank + 1) * share, n_rows))

    def gather(self, own: Tensor, n_rows: int) -> Tensor:
        """Return all (n, E) rows, (R, E) of which are this process's."""
        if self.n_processes == 1:
            return own
        from accelerate.utils import gather  # noqa: PLC0415

        share = -(-n_rows // self.n_processes)
        padded = own.new_zeros(share, own.shape[1])
        padded[: len(own)] = own
        every = gather(padded)
        assert isinstance(every, Tensor)  # noqa: S101 - as it was given
        return every[:n_rows].clone()

    def add_up_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace each parameter's gradient by its sum over the processes; None where none has one."""
        if self.n_processes == 1 or not parameters:
            return
        from accelerate.utils import reduce  # noqa: PLC0415

        device = parameters[0].device
        has = torch.tensor([float(p.grad is not None) for p in parameters], device=device)
        n_having = reduce(has, reduction="sum")
        wanted = [p for p, n in zip(parameters, n_having.tolist(), strict=True) if n]
        if not wanted:
            return
        # One message: many small ones would each wait for the slowest process.
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).float() for p in wanted]
        )
        summed = reduce(flat, reduction="sum")
        start = 0
        for parameter in wanted:
            part = summed[start : start + parameter.numel()].reshape(parameter.shape).to(parameter.dtype)
            parameter.grad = part.clone()
            start += parameter.numel()

    def agree(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite dense tensors with those of process 0, once all processes are here."""
        if self.n_processes == 1:
            return
        for tensor in tensors:
            whole = tensor.detach()  # shares its memory with what is to be overwritten
            if whole.is_contiguous():
                torch.distributed.broadcast(whole, src=0)
            else:
                copy = whole.contiguous()
                torch.distributed.broadcast(copy, src=0)
                whole.copy_(copy)
        self._state.wait_for_everyone()  # who sends does not wait for those who receive

    @contextmanager
    def randomness(self, step: int, place: int, device: torch.device) -> Iterator[None]:
        """Give what this process draws for its rows a stream of its own; the one all share stays as it was.

        Shares are of unequal size: drawn from the common stream, dropout in the encoder would leave each
        process at another place of it, and their recommenders would differ from then on.

        Args:
            step: Number of the step; a step that is done again draws the same.
            place: Number of what is drawn for within a step.
            device: On which there is randomness, too.
        """
        if self.n_processes == 1:
            yield
            return
        what = [torch.initial_seed(), step, place, self.rank]
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(np.random.SeedSequence(what).generate_state(1, np.uint64)[0]))
            yield
