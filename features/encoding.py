"""The loop that joins loader workers, encoder and assembler."""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, Field, JsonValue, NonNegativeInt
from torch import Tensor

from features.assembling import Plan
from features.batch_size import activation_bytes, fitting_batch_size
from features.catalogue import Modality
from features.encoders.base import Encoder
from features.errors import EncoderError
from features.images import ImageLimits
from features.loading import Loaded, Loader, Source, choose_workers, prefetched
from features.parts import StoredDtype, Vectors, check_finite
from features.precision import PrecisionChoice, compute_dtype, in_precision

_BLANK_PX = 64
_LONG_TEXT = 512
"""Tokens from which on a batch has fewer rows instead of more memory."""

PICTURES_PER_REQUEST = 16
"""What a loader worker loads at a time: little enough that a first batch is there soon."""


class ExtractionConfig(BaseModel, frozen=True, extra="forbid"):
    """How a catalogue is encoded."""

    batch_size: NonNegativeInt = Field(
        0, description="Items encoded at a time; 0: as many as `memory_mb` holds, 64 on a CPU, 1024 on a GPU."
    )
    memory_mb: NonNegativeInt = Field(
        0, description="Memory for what a batch makes on its way; 0: 1,024 on a CPU, 8,192 on a GPU."
    )
    dtype: StoredDtype = Field("float16", description="Type of the stored numbers.")
    precision: PrecisionChoice = Field(
        "float32",
        description="What the encoder computes in, its weights too. auto: bfloat16 where the device is made "
        "for it and a probe stays close to float32.",
    )
    compile: bool = Field(
        False, description="Have torch compile the encoder first: a minute, won back on large catalogues."
    )
    draft_jpeg: bool = Field(
        False,
        description="Decode large JPEGs at 1/2, 1/4 or 1/8, never below twice the encoder's size: faster, "
        "and not exact.",
    )
    rows_per_part: NonNegativeInt = Field(
        0,
        description="Rows of a file, and the most that a kill can cost; 0: 1/64 of all, from 512 to 16,384.",
    )
    workers: Literal["auto", "threads", "processes"] = Field(
        "auto",
        description="What loads pictures and texts; auto: threads, in turns with the model on a CPU, and "
        "processes for many pictures on a GPU.",
    )
    n_workers: NonNegativeInt = Field(0, description="How many of them; 0 chooses by cores and device.")
    limits: ImageLimits = Field(ImageLimits(), description="Larger pictures count as unreadable.")

    def identity(self) -> dict[str, JsonValue]:
        """The settings that can change a vector, be it by its last bit: what belongs into a key."""
        changing = {"batch_size", "memory_mb", "dtype", "precision", "compile", "rows_per_part", "limits"}
        changing |= {"draft_jpeg"}
        identity: dict[str, JsonValue] = self.model_dump(mode="json", include=changing)
        return identity


@dataclass(frozen=True)
class _Batch:
    """Encoder input of some contents of one part."""

    part: int
    contents: list[int]
    pixels: Tensor | None
    tokens: Tensor | None


@dataclass(frozen=True)
class _Request:
    """What a loader worker loads at a time, and whether the encoder then has a batch."""

    part: int
    contents: list[int]
    ends_batch: bool


@dataclass(frozen=True)
class _InFlight:
    """Vectors on their way from the device."""

    batch: _Batch
    host: Tensor
    """(B, D) of the stored type, in main memory."""
    done: torch.cuda.Event | None
    """Has passed when `host` is filled; None where it is at once."""

    def is_busy(self) -> bool:
        """Whether the device still works on it."""
        return self.done is not None and not self.done.query()  # type: ignore[no-untyped-call]  # torch has no types here


class Collector(Protocol):
    """Takes what comes out of the loop, in whatever order."""

    def add(self, part: int, contents: Sequence[int], vectors: Vectors) -> None:
        """Take over what was encoded, (N, D)."""
        ...

    def fail(self, part: int, failures: Mapping[int, str]) -> None:
        """Note contents that could not be read, and why."""
        ...

    def finish(self) -> None:
        """Hand on what is whole."""
        ...


class EncodingRun:
    """The loop that joins loading, encoding and assembling, and what it measures.

    Args:
        encoder: On its device.
        modality: What of an item is encoded.
        plan: Which contents each part encodes.
        config: How.
    """

    def __init__(self, encoder: Encoder, modality: Modality, plan: Plan, config: ExtractionConfig) -> None:
        if config.precision == "auto":
            raise ValueError("precision 'auto' has to be settled first, by `settle_precision`")
        self.encoder = in_precision(encoder, config.precision)
        self.modality = modality
        self.plan = plan
        self.config = config
        self.device = next((tensor.device for tensor in encoder.parameters()), torch.device("cpu"))
        self.batch_size = config.batch_size or self._fitting()
        self._dtype = compute_dtype(self.encoder)
        self._forward = torch.compile(self._encode, dynamic=True) if config.compile else self._encode
        self.empty: Vectors = np.empty((0, encoder.info.dims[modality]), config.dtype)
        n_pictures = 0 if modality == "text" else int((plan.known < 0).sum())
        self.workers = choose_workers(config.workers, config.n_workers, n_pictures, self.device)
        self.n_encoded = 0
        self.seconds = 0.0
        self.waiting_s = 0.0
        self._in_flight: deque[_InFlight] = deque()

    def loader(self, image_root: str) -> Loader:
        """What runs in the loader workers."""
        return Loader(
            image_root,
            self.config.limits,
            None if self.modality == "text" else self.encoder.image_transform,
            None if self.modality == "image" else self.encoder.tokenizer,
            2 * self.encoder.info.image_size_px if self.config.draft_jpeg else 0,
        )

    def _fitting(self) -> int:
        """The batch size that the memory setting allows."""
        pixels = tokens = None
        if self.modality != "text":
            blank = self.encoder.image_transform(Image.new("RGB", (_BLANK_PX, _BLANK_PX)))
            pixels = blank[None].to(self.device, compute_dtype(self.encoder))
        if self.modality != "image":
            words = "a " * min(self.encoder.info.context_length, _LONG_TEXT)
            tokens = self.encoder.tokenize([words])[:, :_LONG_TEXT].to(self.device)
        with evaluating(self.encoder):
            item_bytes = activation_bytes(self.encoder, pixels, tokens)
        return fitting_batch_size(item_bytes, self.device, self.config.memory_mb)

    def encode(self, parts: Sequence[int], loader: Loader, assembler: Collector) -> None:
        """Encode what the parts need, batch by batch."""
        if not any(self.plan.to_encode(part) for part in parts):
            return
        started = time.perf_counter()
        with (
            prefetched(
                loader, self._requests(parts), self.workers, lambda request: request.ends_batch
            ) as loaded,
            evaluating(self.encoder),
            torch.inference_mode(),
        ):
            for batch in self._batches(self._timed(loaded), assembler):
                self._in_flight.append(self._launch(batch))
                if len(self._in_flight) > (self.device.type != "cpu"):
                    self._land(assembler)
            while self._in_flight:
                self._land(assembler)
            assembler.finish()
        self.seconds = time.perf_counter() - started

    def encode_once(self, loaded: Loaded) -> Tensor:
        """(R, D) float32 of a few contents, batch by batch, in the order in which they were loaded."""
        rows = []
        with evaluating(self.encoder), torch.inference_mode():
            for start in range(0, len(loaded.readable), self.batch_size):
                some = slice(start, start + self.batch_size)
                pixels = None if loaded.pixels is None else loaded.pixels[some]
                tokens = self.encoder.pad(loaded.token_ids[some]) if loaded.token_ids else None
                rows.append(self._vectors(pixels, tokens).cpu())
        return torch.cat(rows) if rows else torch.zeros(0, self.empty.shape[1])

    def _requests(self, parts: Sequence[int]) -> Iterator[tuple[_Request, list[Source]]]:
        """What the loader workers load: a whole part's texts, to be sorted, or a few pictures."""
        for part in parts:
            todo = self.plan.to_encode(part)
            n_batch, n_request = self.batch_size, PICTURES_PER_REQUEST
            if self.modality == "text":
                n_batch = n_request = max(len(todo), 1)
            for start in range(0, len(todo), n_batch):
                batch = todo[start : start + n_batch]
                for at in range(0, len(batch), n_request):
                    some = batch[at : at + n_request]
                    request = _Request(part, some, ends_batch=at + n_request >= len(batch))
                    yield request, [self.plan.source(content) for content in some]

    def _timed(self, loaded: Iterator[tuple[_Request, Loaded]]) -> Iterator[tuple[_Request, Loaded]]:
        """Count the time spent waiting for data while the encoder has nothing to do."""
        while True:
            before = time.perf_counter()
            item = next(loaded, None)
            if not (self._in_flight and self._in_flight[-1].is_busy()):
                self.waiting_s += time.perf_counter() - before
            if item is None:
                return
            yield item

    def _batches(self, loaded: Iterator[tuple[_Request, Loaded]], assembler: Collector) -> Iterator[_Batch]:
        """Put what was loaded together as the encoder wants it."""
        contents: list[int] = []
        pixels: list[Tensor] = []
        token_ids: list[list[int]] = []
        for request, data in loaded:
            assembler.fail(request.part, {request.contents[at]: why for at, why in data.failures.items()})
            contents += [request.contents[at] for at in data.readable]
            pixels += [] if data.pixels is None else [data.pixels]
            token_ids += data.token_ids
            if not request.ends_batch:
                continue
            if self.modality == "text":
                yield from self._text_batches(request.part, contents, token_ids)
            elif contents:
                tokens = self.encoder.pad(token_ids) if self.modality == "fused" else None
                yield _Batch(request.part, contents, torch.cat(pixels), tokens)
            contents, pixels, token_ids = [], [], []

    def _text_batches(self, part: int, contents: list[int], token_ids: list[list[int]]) -> Iterator[_Batch]:
        """Texts of like length together, so that little of a batch is padding."""
        order = sorted(range(len(contents)), key=lambda at: len(token_ids[at]))
        while order:
            n_rows = self.batch_size
            longest = len(token_ids[order[min(n_rows, len(order)) - 1]])
            if longest > _LONG_TEXT:  # as many tokens as a batch of long texts has, in fewer rows
                n_rows = max(1, n_rows * _LONG_TEXT // longest)
            some, order = order[:n_rows], order[n_rows:]
            tokens = self.encoder.pad([token_ids[at] for at in some])
            yield _Batch(part, [contents[at] for at in some], None, tokens)

    def _launch(self, batch: _Batch) -> _InFlight:
        """Hand a batch to the encoder; on a GPU this returns before it is done."""
        vectors = self._vectors(batch.pixels, batch.tokens)
        if vectors.shape != (len(batch.contents), self.empty.shape[1]):
            raise EncoderError(
                f"encoder {self.encoder.info.spec!r} gave {self.modality} vectors of shape "
                f"{tuple(vectors.shape)}, expected {(len(batch.contents), self.empty.shape[1])} as its info "
                "says; correct `dims` in its info."
            )
        stored = vectors.to(getattr(torch, self.config.dtype))
        if self.device.type != "cuda":
            return _InFlight(batch, stored.cpu(), None)
        host = torch.empty(stored.shape, dtype=stored.dtype, pin_memory=True)
        host.copy_(stored, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types here
        done.record(torch.cuda.current_stream(self.device))
        return _InFlight(batch, host, done)

    def _vectors(self, pixels: Tensor | None, tokens: Tensor | None) -> Tensor:
        """(B, D) float32 on the device."""
        pixels = _move(pixels, self.device)
        if pixels is not None:
            pixels = pixels.to(self._dtype)
            if self.device.type == "cuda":
                pixels = pixels.to(memory_format=torch.channels_last)
        return self._forward(pixels, _move(tokens, self.device)).float()

    def _encode(self, pixels: Tensor | None, tokens: Tensor | None) -> Tensor:
        if tokens is None and pixels is not None:
            return self.encoder.encode_images(pixels)
        if pixels is None and tokens is not None:
            return self.encoder.encode_texts(tokens)
        if pixels is None or tokens is None:
            raise ValueError("a batch has neither pictures nor texts")
        return self.encoder.encode_pairs(pixels, tokens)

    def _land(self, assembler: Collector) -> None:
        """Take over the oldest batch that was launched."""
        flight = self._in_flight.popleft()
        if flight.done is not None:
            flight.done.synchronize()
        vectors: Vectors = flight.host.numpy()
        batch = flight.batch
        rows = self.plan.rows_of_content
        check_finite([self.plan.contents.item_ids[rows[content][0]] for content in batch.contents], vectors)
        self.n_encoded += len(batch.contents)
        assembler.add(batch.part, batch.contents, vectors)


def _move(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """To the encoder's device; to a GPU by way of pinned memory, so that the copy runs beside the model."""
    if tensor is None or device.type != "cuda":
        return tensor if tensor is None else tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def evaluating(encoder: Encoder) -> Iterator[None]:
    """Have an encoder in evaluation mode for a while (no dropout), then each of its modules as it was."""
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
