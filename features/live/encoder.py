"""An encoder of a catalogue's items by row, whose gradients are made in chunks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from features.encoders.base import Encoder
from features.encoders.side import SideEncoder
from features.errors import EncoderError
from features.gradient_cache import Chunked, backward_through, chunked_forward
from features.live.sources import VectorSource
from features.tuning.towers import towers_of


class TunedEncoder(Protocol):
    """An encoder that knows what of it is trained, such as `features.tuning.modes.Tuned`."""

    @property
    def encoder(self) -> Encoder:
        """The encoder, changed while it is trained."""
        ...

    @property
    def trainable(self) -> Mapping[str, nn.Parameter]:
        """Name -> parameter that is trained, in an order that stays."""
        ...

    def train(self) -> None:
        """Switch on dropout where something is trained."""
        ...

    def eval(self) -> None:
        """Behave as in use."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Copies of all that training changes."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        ...


class CatalogueEncoder:
    """Encodes rows, and takes gradients of their vectors to what is trained.

    Rows of like lengths are put into one chunk. With one chunk the graph is kept; of several those that fit
    the room there is, and ``backward`` runs each other chunk again, with the same random numbers: memory is
    the room and that of a chunk, whatever a batch is.

    Args:
        tuned: What is trained.
        sources: Modality -> its vectors.
        chunk: Items encoded at a time.
        room: Bytes of activations that may be kept from `encode` to `backward`, of all modalities together.
        device: Of the parameters.
        autocast: Type of mixed precision; None: float32.
    """

    def __init__(
        self,
        tuned: TunedEncoder,
        sources: Mapping[str, VectorSource],
        *,
        chunk: int,
        room: int = 0,
        device: torch.device,
        autocast: torch.dtype | None,
    ) -> None:
        self.tuned, self.sources = tuned, dict(sources)
        self._room = room
        self._chunk, self._device, self._autocast = chunk, device, autocast
        self._waiting: dict[str, tuple[Chunked, Tensor] | None] = {}

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities whose rows can be live."""
        return tuple(self.sources)

    def parameters(self) -> Iterator[Tensor]:
        """What is trained."""
        yield from self.tuned.trainable.values()

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return dict(self.tuned.trainable)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """What is trained, by the tower it belongs to: ``image``, ``text``, ``shared``; else ``encoder``.

        Shared is what both towers use, or neither, such as a temperature. An encoder that does not show a
        tower for each of its modalities is one part, ``encoder``.
        """
        owners = _owners(self.tuned.encoder)
        if not owners:
            return {"encoder": list(self.tuned.trainable.values())}
        found: dict[str, list[nn.Parameter]] = {}
        for parameter in self.tuned.trainable.values():
            names = [modality for modality, own in owners.items() if id(parameter) in own]
            part = names[0] if len(names) == 1 else "shared"
            found.setdefault(part, []).append(parameter)
        return found

    def state(self) -> dict[str, Tensor]:
        """Copies of all that training changes, on the CPU."""
        return self.tuned.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        self.tuned.load_state(state)

    def encode(self, modality: str, rows: Tensor) -> Tensor:
        """(R,) item rows -> (R, E) float32, detached; what `backward` needs is remembered."""
        if not len(rows):
            self._waiting[modality] = None
            return self._width_of_nothing(modality)
        self.tuned.train()
        order, passes = self._passes(modality, rows)
        self._waiting.pop(modality, None)
        held = sum(waiting[0].kept_bytes for waiting in self._waiting.values() if waiting is not None)
        chunked = chunked_forward(
            passes, self._device, room=self._room - held, weights=self.tuned.encoder.parameters()
        )
        self._waiting[modality] = (chunked, order)
        vectors = torch.empty_like(chunked.outputs)
        vectors[order] = chunked.outputs.detach()
        return vectors

    def backward(self, modality: str, gradient: Tensor) -> None:
        """Take (R, E) of the last `encode` of a modality to the parameters, where it is added.

        Raises:
            RuntimeError: Nothing was encoded since the last call.
        """
        if modality not in self._waiting:
            raise RuntimeError(f"no {modality} rows were encoded that a gradient could belong to.")
        waiting = self._waiting.pop(modality)
        if waiting is not None:
            chunked, order = waiting
            backward_through(chunked, gradient[order])

    @torch.no_grad()
    def encode_all(self, modality: str, rows: Tensor) -> Tensor:
        """(R,) item rows -> (R, E) float32, as the encoder is in use, chunk by chunk."""
        if not len(rows):
            return self._width_of_nothing(modality)
        self.tuned.eval()
        order, passes = self._passes(modality, rows)
        vectors: Tensor | None = None
        for places, run in zip(order.split(self._chunk), passes, strict=True):  # type: ignore[no-untyped-call]
            part = run()
            vectors = part.new_empty(len(rows), part.shape[1]) if vectors is None else vectors
            vectors[places] = part
        assert vectors is not None  # noqa: S101 - there are rows
        return vectors

    def _passes(self, modality: str, rows: Tensor) -> tuple[Tensor, list[Callable[[], Tensor]]]:
        """(R,) positions in the order they are encoded, and a pass a chunk of them."""
        source = self.sources[modality]
        lengths = [source.length(row) for row in rows.tolist()]
        order = torch.tensor(sorted(range(len(rows)), key=lengths.__getitem__), device=rows.device)

        def run(some: Tensor) -> Tensor:
            with self.mixed():
                return source.vectors(some).float()

        chunks: Sequence[Tensor] = rows[order].split(self._chunk)  # type: ignore[no-untyped-call]
        return order, [lambda some=some: run(some) for some in chunks]  # type: ignore[misc]

    def mixed(self) -> AbstractContextManager[object]:
        """The context in which a forward pass has the precision asked for."""
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._autocast)

    def _width_of_nothing(self, modality: str) -> Tensor:
        """(0, E): the width is that of any row."""
        with torch.no_grad():
            source = self.sources[modality]
            return source.vectors(torch.tensor([source.first()])).float()[:0]


def _owners(encoder: Encoder) -> dict[str, set[int]]:
    """Modality -> ids of the parameters that its vectors depend on; nothing where no towers are shown."""
    if isinstance(encoder, SideEncoder):
        return {modality: set(map(id, side.parameters())) for modality, side in encoder.sides.items()}
    try:
        towers = towers_of(encoder)
    except EncoderError:
        return {}
    return {modality: set(map(id, tower.parameters().values())) for modality, tower in towers.items()}
