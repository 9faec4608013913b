"""Loader workers: they read, decode, transform and tokenize while the model encodes."""

import hashlib
import itertools
import multiprocessing
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from PIL import Image
from torch import Tensor

from features.encoders.base import ImageTransform, Tokenizer
from features.errors import FeatureError
from features.images import ImageLimits, UnreadableImage, open_image, read_picture

CHANGED = "changed since import"

_WORTH_PROCESSES = 4096
"""Pictures from which on the seconds that processes need to start are earned back on a GPU."""


@dataclass(frozen=True)
class Source:
    """Where one content comes from."""

    paths: tuple[str, ...] = ()
    """Pictures that all had `image_sha256` at import; the first that still has it is used."""
    image_sha256: str = ""
    text: str = ""


@dataclass(frozen=True)
class Loaded:
    """What a loader worker hands over for some sources."""

    readable: list[int]
    """Positions of the sources that could be read, in their order; the rows of what follows."""
    pixels: Tensor | None
    """(R, 3, H, W) float32; None where no pictures were asked for or none could be read."""
    token_ids: list[list[int]]
    """Ids of R texts; empty where no texts were asked for."""
    failures: dict[int, str]
    """Why the sources at the other positions could not be read."""


@dataclass(frozen=True)
class Loader:
    """Turns sources into an encoder's input. Picklable, so that it runs in threads and in processes alike.

    Args:
        image_root: Folder or fsspec URL of the pictures.
        limits: What picture is too large.
        transform: None where no pictures are wanted.
        tokenizer: None where no texts are wanted.
        draft_px: JPEGs may be decoded smaller, down to this side; 0: all are decoded exactly.
    """

    image_root: str
    limits: ImageLimits
    transform: ImageTransform | None
    tokenizer: Tokenizer | None
    draft_px: int = 0

    def __call__(self, sources: Sequence[Source]) -> Loaded:
        """Load what can be loaded; a picture that cannot be read costs its own row only."""
        return self.prepare(sources, self.read(sources))

    def read(self, sources: Sequence[Source]) -> list[bytes | UnreadableImage]:
        """The files of the sources' pictures, or why there is none; nothing where no pictures are wanted."""
        return [] if self.transform is None else [self._picture(source) for source in sources]

    def prepare(self, sources: Sequence[Source], files: Sequence[bytes | UnreadableImage]) -> Loaded:
        """Decode and transform what `read` gave, and tokenize."""
        pixels, readable, failures = [], [], {}
        for position in range(len(sources)):
            try:
                if self.transform is not None:
                    pixels.append(self.transform(self._open(files[position])))
                readable.append(position)
            except UnreadableImage as error:
                failures[position] = error.reason
        texts = [sources[position].text for position in readable]
        token_ids = self.tokenizer(texts) if self.tokenizer is not None and texts else []
        return Loaded(readable, torch.stack(pixels) if pixels else None, token_ids, failures)

    def _open(self, file: bytes | UnreadableImage) -> Image.Image:
        if isinstance(file, UnreadableImage):
            raise file
        return open_image(file, self.limits, draft_px=self.draft_px)

    def _picture(self, source: Source) -> bytes | UnreadableImage:
        """The bytes that were there at import, from whichever file still has them."""
        reason = ""
        for path in source.paths:
            try:
                data = read_picture(self.image_root, path, self.limits)
            except UnreadableImage as error:
                reason = reason or error.reason
                continue
            if hashlib.sha256(data).hexdigest() == source.image_sha256:
                return data
            reason = reason or CHANGED
        return UnreadableImage(reason)


@dataclass(frozen=True)
class Workers:
    """How many loader workers of which kind."""

    kind: Literal["threads", "processes", "turns"]
    """turns: threads that decode while the model waits, and only read files while it runs."""
    count: int


def choose_workers(
    kind: Literal["auto", "threads", "processes"], count: int, n_pictures: int, device: torch.device
) -> Workers:
    """Threads, except for many pictures on a GPU: there Python's lock holds threads back.

    Pillow decodes and resizes without the lock, so that threads cost nothing to start and share the tensors.
    Beside a model on the same cores they take turns with it: its threads wait for the slowest of them at each
    layer, so that a core lent to a decoder for a moment stands idle in all others.

    Args:
        kind: What the settings ask for.
        count: How many they ask for; 0 chooses.
        n_pictures: Pictures to load; 0 where only texts are encoded.
        device: The encoder's.
    """
    n_cores = _usable_cores()
    if kind == "auto":
        if device.type == "cpu" and n_pictures:
            return Workers("turns", count or n_cores)
        fast_enough = device.type == "cpu" or n_pictures < _WORTH_PROCESSES
        kind = "threads" if fast_enough or n_cores < 4 or not _has_shared_memory() else "processes"
    if count == 0 and n_pictures == 0:
        count = 1  # tokenizers hold Python's lock; a second thread would gain nothing
    elif count == 0:
        count = max(1, min(n_cores // 2 if device.type == "cpu" else n_cores - 1, 12))
    return Workers(kind, count)


def _usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _has_shared_memory(least: int = 2**30) -> bool:
    """Whether worker processes can hand tensors over; a container's default of 64 MB ends in a bus error."""
    folder = Path("/dev/shm")  # noqa: S108 - looked at, not written
    return not folder.exists() or shutil.disk_usage(folder).free >= least


Request = TypeVar("Request")


@contextmanager
def prefetched(
    load: Loader,
    requests: Iterable[tuple[Request, Sequence[Source]]],
    workers: Workers,
    ends_turn: Callable[[Request], bool] = lambda _: True,
) -> Iterator[Iterator[tuple[Request, Loaded]]]:
    """Load requests ahead of the one that is asked for, in their order.

    Args:
        load: Runs in the workers.
        requests: Taken one by one, a few ahead of each worker, which bounds the memory.
        workers: Started on entry, stopped on exit; what is not needed any more is not loaded.
        ends_turn: Whether the model runs after a request; where workers take turns, requests up to there are
            decoded at once.

    Raises:
        FeatureError: A worker process died.
    """
    pool = _pool(load, workers)
    try:
        if workers.kind == "turns":
            with ThreadPoolExecutor(_READERS, thread_name_prefix="reader") as readers:
                try:
                    yield _in_turns(readers, pool, load, iter(requests), ends_turn)
                finally:
                    readers.shutdown(cancel_futures=True)
        else:
            run: Callable[[Sequence[Source]], Loaded] = (
                load if workers.kind == "threads" else _load_in_process
            )
            yield _in_order(pool, run, iter(requests), ahead=2 * workers.count + 1)
    except BrokenProcessPool as error:
        raise FeatureError(
            f"one of {workers.count} loader processes died, most likely for want of memory; expected them to "
            "live; set extraction.workers to threads or n_workers to fewer, and run the same again: whole "
            "parts are kept."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_READERS = 2
_READ_AHEAD = 6
"""Requests whose files are read ahead, at a picture's size each."""


def _in_turns(
    readers: Executor,
    decoders: Executor,
    load: Loader,
    requests: Iterator[tuple[Request, Sequence[Source]]],
    ends_turn: Callable[[Request], bool],
) -> Iterator[tuple[Request, Loaded]]:
    """Read files ahead; decode all requests of a turn when the first of them is asked for."""
    reading: deque[tuple[Request, Sequence[Source], Future[list[bytes | UnreadableImage]]]] = deque()

    def read_ahead() -> None:
        for request, sources in itertools.islice(requests, _READ_AHEAD - len(reading)):
            reading.append((request, sources, readers.submit(load.read, sources)))

    read_ahead()
    while reading:
        turn: list[tuple[Request, Future[Loaded]]] = []
        while reading:
            request, sources, files = reading.popleft()
            turn.append((request, decoders.submit(load.prepare, sources, files.result())))
            read_ahead()
            if ends_turn(request):
                break
        for request, loaded in turn:
            yield request, loaded.result()


def _in_order(
    pool: Executor,
    run: Callable[[Sequence[Source]], Loaded],
    requests: Iterator[tuple[Request, Sequence[Source]]],
    ahead: int,
) -> Iterator[tuple[Request, Loaded]]:
    waiting: deque[tuple[Request, Future[Loaded]]] = deque()
    for request, sources in itertools.islice(requests, ahead):
        waiting.append((request, pool.submit(run, sources)))
    while waiting:
        request, future = waiting.popleft()
        loaded = future.result()
        for following, sources in itertools.islice(requests, 1):
            waiting.append((following, pool.submit(run, sources)))
        yield request, loaded


def _pool(load: Loader, workers: Workers) -> Executor:
    if workers.kind != "processes":
        return ThreadPoolExecutor(workers.count, thread_name_prefix="loader")
    # Not forked from here: a fork would copy the locks of the model's threads in whatever state they are.
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    if os.name == "posix":
        context.set_forkserver_preload(["features.loading"])
    return ProcessPoolExecutor(workers.count, context, initializer=_start_process, initargs=(load,))


_loader_of_process: list[Loader] = []


def _start_process(load: Loader) -> None:
    """Prepare a loader process: its loader, one core, and an end when the main process ends."""
    torch.set_num_threads(1)
    _loader_of_process[:] = [load]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _load_in_process(sources: Sequence[Source]) -> Loaded:
    return _loader_of_process[0](sources)
