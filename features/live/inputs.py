"""Pixels and tokens of any items of a catalogue, by row, as an encoder takes them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from features.catalogue import Catalogue, Contents, Modality, TextConfig
from features.encoders.base import Encoder
from features.errors import FeatureError
from features.images import ImageLimits
from features.loading import Loaded, Loader, Source

_PICTURES_PER_TASK = 8
Rows = npt.NDArray[np.int64]


class RowInputs:
    """The input of one modality: pictures decoded when they are first asked for, texts tokenized at once.

    Decoded pictures are kept in a file, as float16 (an eighth of the smallest step of an 8-bit picture off at
    most), as long as all of them would fit; else each is decoded whenever it is asked for.

    Args:
        catalogue: All items.
        encoder: Whose transform and tokenizer prepare them.
        modality: image or text.
        text: Which text of an item.
        cache_file: Where decoded pictures are kept; it is made anew.
        cache_mb: Most that they may take on disk; 0 keeps none.
        limits: Of pictures.
        n_workers: Threads that decode; 0: two.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        encoder: Encoder,
        modality: Modality,
        text: TextConfig,
        *,
        cache_file: Path,
        cache_mb: int,
        limits: ImageLimits,
        n_workers: int = 0,
    ) -> None:
        self.contents: Contents = catalogue.contents(modality, text)
        self.modality = modality
        self._encoder = encoder
        reads_pictures = modality == "image"
        self._loader = Loader(
            catalogue.image_root,
            limits,
            encoder.image_transform if reads_pictures else None,
            None if reads_pictures else encoder.tokenizer,
        )
        self._pool = ThreadPoolExecutor(n_workers or 2, thread_name_prefix="live-loader")
        self._ids: list[list[int]] = []
        if not reads_pictures:
            self._ids = encoder.token_ids([value or "" for value in self.contents.texts])
        self._cache_file, self._cache_bytes = cache_file, cache_mb * 2**20
        self._kept: np.memmap[tuple[int, ...], np.dtype[np.float16]] | None = None
        self._is_kept = np.zeros(len(self.contents), dtype=bool)

    def __call__(self, rows: Tensor, device: torch.device) -> Tensor:
        """(R,) item rows -> (R, 3, H, W) float32 pixels, or (R, L) int64 tokens, on a device.

        Raises:
            FeatureError: A picture can no longer be read.
        """
        wanted = rows.cpu().numpy()
        if self.modality == "text":
            return self._encoder.pad([self._ids[row] for row in wanted]).to(device)
        return self._pixels(wanted).to(device)

    def readable(self, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None, dict[int, str]]:
        """Give the input of those rows that can be read; decoded pictures are not kept.

        Args:
            rows: (R,) item rows.
            device: Where the input goes.

        Returns:
            (N,) rows that could be read, in their order; their input as of a call, None where N is 0; and
            item row -> why it could not.
        """
        if self.modality == "text":
            return rows, self(rows, device), {}
        wanted = rows.cpu().numpy()
        pixels: list[Tensor] = []
        reasons: dict[int, str] = {}
        for some, loaded in self._load(wanted):
            reasons |= {int(some[position]): reason for position, reason in loaded.failures.items()}
            if loaded.pixels is not None:
                pixels.append(loaded.pixels)
        kept = torch.tensor([row for row in wanted.tolist() if row not in reasons], dtype=torch.int64)
        return kept, torch.cat(pixels).to(device) if pixels else None, reasons

    def first(self) -> int:
        """An item row that has the modality.

        Raises:
            FeatureError: No item has it.
        """
        for row, content in enumerate(self.contents.hashes):
            if content is not None:
                return row
        raise FeatureError(f"no item has {'a picture' if self.modality == 'image' else 'a text'}.")

    def length(self, row: int) -> int:
        """Tokens of an item's text; 0 for pictures."""
        return len(self._ids[row]) if self._ids else 0

    def close(self) -> None:
        """Stop the threads and remove what was kept."""
        self._pool.shutdown(cancel_futures=True)
        self._kept = None
        self._cache_file.unlink(missing_ok=True)

    def _pixels(self, rows: Rows) -> Tensor:
        missing = rows[~self._is_kept[rows]]
        decoded = self._decode(missing)
        if self._kept is None and len(decoded):
            self._start_keeping(tuple(decoded.shape[1:]))
        if self._kept is None:
            return decoded  # nothing is kept, so that all rows were missing
        if len(missing):
            self._kept[missing] = decoded.half().numpy()
            self._is_kept[missing] = True
        return torch.from_numpy(np.asarray(self._kept[rows])).float()

    def _start_keeping(self, shape: tuple[int, ...]) -> None:
        n_bytes = 2 * len(self.contents) * int(np.prod(shape))
        if n_bytes <= self._cache_bytes:
            self._cache_file.parent.mkdir(parents=True, exist_ok=True)
            whole = (len(self.contents), *shape)
            self._kept = np.memmap(self._cache_file, np.float16, "w+", shape=whole)

    def _decode(self, rows: Rows) -> Tensor:
        if not len(rows):
            return torch.empty(0)
        found = self._load(rows)
        for some, loaded in found:
            for position, reason in loaded.failures.items():
                raise FeatureError(
                    f"the picture of item {self.contents.item_ids[some[position]]!r} cannot be read any more "
                    f"({reason}), though its features could be extracted; put the file back, or import the "
                    "dataset again."
                )
        return torch.cat([loaded.pixels for _, loaded in found if loaded.pixels is not None])

    def _load(self, rows: Rows) -> list[tuple[Rows, Loaded]]:
        """What the threads load, with the item rows it belongs to."""
        tasks = [
            rows[start : start + _PICTURES_PER_TASK] for start in range(0, len(rows), _PICTURES_PER_TASK)
        ]
        loaded = self._pool.map(lambda some: self._loader([self._source(row) for row in some]), tasks)
        return list(zip(tasks, loaded, strict=True))

    def _source(self, row: int) -> Source:
        image = self.contents.images[row]
        return Source((image,) if image else (), self.contents.image_hashes[row] or "", "")
