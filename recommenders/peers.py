"""Several processes that train as one: each encodes a share of a step's rows, all hold the same recommender.

The rows of a step are dealt out, encoded, and gathered, so that every process computes the loss of the whole
batch from the same numbers; each then takes the gradient of its own rows to its copy of the encoder, and the
copies' gradients are added up. That is the gradient of one process with the whole batch, not an average of
smaller batches', and contrastive terms see all rows. Recommenders are small beside encoders, so nothing is
won by dealing them out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
