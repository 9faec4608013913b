"""Live rows: a feature table whose rows of a batch are freshly encoded and carry gradient to the encoder.

A step encodes the distinct items of its batch, once each; all other rows keep their last value. The gradient
of the loss is taken with respect to the encoded vectors, and handed to the encoder, which may then make its
own gradient in pieces: the recommender's batch does not set the encoder's memory (Gao et al., "Scaling deep
contrastive learning batch size under memory limited setup", RepL4NLP 2021, sec. 3; Wu et al., "Training
large-scale news recommenders with pretrained language models in the loop", KDD 2022, encode each item of a
batch once).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from recommenders.feature_input import FeatureTable

RowMap = Callable[[str, Tensor], Tensor]
"""Modality and (R, E) vectors of the encoder -> (R, F) rows of the table, each by itself, differentiable."""


class RowEncoder(Protocol):
    """What live rows need of an encoder of a catalogue's items, addressed by their rows."""

    @property
    def modalities(self) -> Sequence[str]:
        """Modalities whose rows can be live."""
        ...

    def encode(self, modality: str, rows: Tensor) -> Tensor:
        """Return (R, E) vectors of (R,) item rows, detached, and remember what ``backward`` will need."""
        ...

    def backward(self, modality: str, gradient: Tensor) -> None:
        """Add to the parameters' gradients what (R, E) of the last ``encode`` of a modality gives."""
        ...

    def encode_all(self, modality: str, rows: Tensor) -> Tensor:
        """Return (R, E) vectors of any number of rows, as they are when the encoder is evaluated."""
        ...

    def parameters(self) -> Iterable[Tensor]:
        """Return the parameters that ``backward`` gives gradients."""
        ...


class Peers(Protocol):
    """Processes that train one model together, each encoding a share of the rows."""

    @property
    def n_processes(self) -> int:
        """How many there are."""
        ...

    def own(self, n_rows: int) -> slice:
        """Return which of n rows this process encodes."""
        ...

    def gather(self, own: Tensor, n_rows: int) -> Tensor:
        """Return all (n, E) rows from the own ones of each process."""
        ...

    def add_up_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace each parameter's gradient by its sum over the processes; None where none has one."""
        ...

    def agree(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite dense tensors with those of the first process, once all processes are here."""
        ...

    def randomness(self, step: int, place: int, device: torch.device) -> AbstractContextManager[None]:
        """Give what a process draws for its rows a stream of its own; the one all share stays as it was."""
        ...


class Alone:
    """One process, which encodes all rows."""

    n_processes = 1

    def own(self, n_rows: int) -> slice:
        """Return all of them."""
        return slice(0, n_rows)

    def gather(self, own: Tensor, n_rows: int) -> Tensor:  # noqa: ARG002 - as Peers has it
        """Return the rows."""
        return own

    def add_up_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Leave them as they are."""

    def agree(self, tensors: Sequence[Tensor]) -> None:
        """Leave them as they are."""

    def randomness(self, step: int, place: int, device: torch.device) -> AbstractContextManager[None]:  # noqa: ARG002 - as Peers has it
        """Leave the stream as it is."""
        return nullcontext()


@dataclass(frozen=True, eq=False)
class LiveRows:
    """What of one modality is live in a step."""

    rows: Tensor
    """(R,) item rows, ascending."""
    vectors: Tensor
    """(R, F) as they stand in the table, with gradient."""


class LiveTable:
    """A feature table that keeps up with its encoder.

    Args:
        features: The table to start from, on the recommender's device; its tensors are copied.
        encoder: Encodes rows of the modalities it has; the others stay as they are.
        finish: What reading does to an encoder's vectors, such as unit length.
        peers: The processes that share the encoding.
    """

    def __init__(
        self, features: FeatureTable, encoder: RowEncoder, finish: RowMap, peers: Peers | None = None
    ) -> None:
        self._vectors = {name: table.clone() for name, table in features.vectors.items()}
        self._present = features.present
        self._live = [name for name in features.modalities if name in encoder.modalities]
        self._encoder, self._finish = encoder, finish
        self.peers = peers or Alone()
        """The processes that share the encoding."""

    def table(self) -> FeatureTable:
        """Return every row as it was encoded last, without gradient."""
        return FeatureTable(dict(self._vectors), self._present)

    def state(self) -> dict[str, Tensor]:
        """Return the modalities' tables, for a checkpoint."""
        return dict(self._vectors)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over the tables of ``state()``."""
        for name, table in self._vectors.items():
            table.copy_(state[name])

    def step(
        self,
        items: Tensor,
        loss_of: Callable[[FeatureTable, Mapping[str, LiveRows]], Tensor],
        number: int = 0,
    ) -> Tensor:
        """Give all parameters, the encoder's too, the gradients of a loss; nothing is set to zero before.

        Args:
            items: (R,) distinct item rows that are to be live; those without a modality are not, in it.
            loss_of: The table with live rows, and those rows by modality -> the loss, a scalar.
            number: Of the step; what each of several processes draws for its rows follows from it.

        Returns:
            The loss, detached.
        """
        rows, raw, live = {}, {}, {}
        vectors = dict(self._vectors)
        for place, name in enumerate(self._live):
            rows[name] = items[self._present[name][items]]
            own = self.peers.own(len(rows[name]))
            with self.peers.randomness(number, place, items.device):
                encoded = self._encoder.encode(name, rows[name][own])
            raw[name] = self.peers.gather(encoded, len(rows[name])).requires_grad_()
            live[name] = LiveRows(rows[name], self._finish(name, raw[name]))
            vectors[name] = vectors[name].index_copy(0, rows[name], live[name].vectors)
        loss = loss_of(FeatureTable(vectors, self._present), live)
        loss.backward()  # type: ignore[no-untyped-call] # torch leaves it without types
        for name in self._live:
            gradient = raw[name].grad
            if gradient is not None:  # no row of it reached the loss
                self._encoder.backward(name, gradient[self.peers.own(len(gradient))])
            with torch.no_grad():
                self._vectors[name][rows[name]] = live[name].vectors.detach()
        self.peers.add_up_gradients(list(self._encoder.parameters()))
        return loss.detach()

    @torch.no_grad()
    def refresh(self) -> None:
        """Encode every present row anew, as the encoder is now."""
        for name in self._live:
            rows = self._present[name].nonzero().squeeze(1)
            own = self.peers.own(len(rows))
            encoded = self._encoder.encode_all(name, rows[own])
            gathered = self.peers.gather(encoded, len(rows))
            self._vectors[name][rows] = self._finish(name, gathered).to(self._vectors[name].dtype)
