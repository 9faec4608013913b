"""Which items train, which choose the epoch, and how their pictures and texts come in."""

import hashlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.catalogue import Catalogue, Contents, Modality, TextConfig
from features.encoders.base import Encoder
from features.encoding import PICTURES_PER_REQUEST
from features.errors import FeatureError
from features.finetuning.augment import Augmented
from features.finetuning.config import AugmentConfig, FinetuningConfig
from features.loading import Loader, Source, choose_workers, prefetched

Int64Array = NDArray[np.int64]


class Pairing(Protocol):
    """What draws pairs of items, as `CoPurchases` does."""

    def draw(self, n_pairs: int, rng: np.random.Generator) -> Int64Array:
        """(n_pairs, 2) item rows."""
        ...


@dataclass(frozen=True)
class Step:
    """What one batch is made of."""

    rows: Int64Array
    """(M,) different item rows to load; those of the epoch's own order first."""
    n_own: int
    """How many are of the epoch's own order; the others are there for the pairs."""
    pairs: Int64Array
    """(P, 2) item rows of `rows`; (0, 2) where nothing is learnt from pairs."""


@dataclass(frozen=True)
class Batch:
    """What could be read of a step's items: R rows."""

    rows: Int64Array
    """(R,) item rows."""
    n_own: int
    """How many of them, in front, are of the epoch's own order."""
    pairs: Int64Array
    """(P, 2) positions in `rows`, of the pairs of which both could be read."""
    pixels: Tensor | None
    """(R, 3, H, W) float32; None where pictures are not asked for."""
    tokens: Tensor | None
    """(R, L) int64, or None."""


@dataclass
class Skipped:
    """Items that could not be read while training, each counted once."""

    reasons: dict[int, str] = field(default_factory=dict)
    """Item row -> why."""


class TrainingItems:
    """The items of a catalogue that have what is needed, and how they are read.

    Args:
        catalogue: All items.
        encoder: Whose transform and tokenizer prepare them.
        modality: ``image``, ``text``, or ``fused`` where both are needed.
        text: Which text of an item.
        config: Held-out share, limits, workers.
        seed: Of the choice of held-out items.

    Raises:
        FeatureError: Not two training items, or no two held-out items.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        encoder: Encoder,
        modality: Modality,
        text: TextConfig,
        config: FinetuningConfig,
        *,
        seed: int,
    ) -> None:
        self.encoder, self.modality, self.config = encoder, modality, config
        self.contents: Contents = catalogue.contents(modality, text)
        self._image_root = catalogue.image_root
        self.device = next((each.device for each in encoder.parameters()), torch.device("cpu"))
        self.skipped = Skipped()
        present = np.flatnonzero([value is not None for value in self.contents.hashes])
        draws = np.array([_draw(seed, self.contents.item_ids[row]) for row in present])
        is_held_out = draws < config.held_out_share
        self.train: Int64Array = present[~is_held_out]
        """(T,) item rows that are trained on."""
        order = np.argsort(draws[is_held_out], kind="stable")
        self.held_out: Int64Array = np.sort(present[is_held_out][order[: config.held_out_most]])
        """(H,) item rows that choose the epoch; no loss ever sees them, nor those beyond `held_out_most`."""
        self.n_missing = len(self.contents) - len(present)
        self._picture = _groups(self.contents.image_hashes)
        self._text = _groups(self.contents.texts)
        if len(self.train) < 2 or len(self.held_out) < 2:
            raise FeatureError(
                f"of {len(self.contents)} items {len(self.train)} can be trained on and {len(self.held_out)} "
                f"held out, {self.n_missing} lack what is needed; expected two of each. Give more items, or "
                "another held_out_share."
            )

    def same_picture(self, rows: Int64Array) -> Tensor:
        """(R,) item rows -> (R, R) bool: which have the very same picture's bytes."""
        groups = torch.from_numpy(self._picture[rows])
        return torch.eq(groups[:, None], groups[None, :])

    def contents_of(self, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """(R,) item rows -> (R,) number of each one's picture and (R,) of its text; equal ones are equal."""
        return self._picture[rows], self._text[rows]

    def steps(self, n_items: int, n_pairs: int, pairing: Pairing | None, seed: Sequence[int]) -> list[Step]:
        """An epoch: every training item once, in an order drawn from ``seed``; the last batch may be smaller.

        A last batch of a single item, which has nothing to be told from, is left out.
        """
        order_rng, pairs_rng = np.random.default_rng(list(seed)).spawn(2)
        order = order_rng.permutation(self.train)
        steps = []
        for start in range(0, len(order), n_items):
            own = order[start : start + n_items]
            if len(own) < 2:
                continue
            pairs = np.zeros((0, 2), dtype=np.int64)
            if pairing is not None:
                pairs = pairing.draw(n_pairs, pairs_rng)
            more = np.setdiff1d(pairs.ravel(), own)
            steps.append(Step(np.concatenate([own, more]), len(own), pairs))
        return steps

    def load(
        self, steps: Sequence[Step], augment: AugmentConfig | None, seed: int = 0
    ) -> Generator[Batch, None, None]:
        """Read the steps' items ahead of the encoder, in order; what cannot be read is left out and counted.

        Args:
            steps: What to read.
            augment: None for the encoder's transform alone.
            seed: Of what is drawn for each picture.
        """
        transform = self.encoder.image_transform
        if augment is not None:
            transform = Augmented(transform, augment, seed)
        loader = Loader(
            self._image_root,
            self.config.limits,
            None if self.modality == "text" else transform,
            None if self.modality == "image" else self.encoder.tokenizer,
        )
        n_pictures = 0 if self.modality == "text" else sum(len(step.rows) for step in steps)
        workers = choose_workers("auto", self.config.n_workers, n_pictures, self.device)
        with prefetched(
            loader, _requests(steps, self._source), workers, lambda request: request[2]
        ) as loaded:
            read: list[int] = []
            pixels: list[Tensor] = []
            token_ids: list[list[int]] = []
            for (number, start, ends), data in loaded:
                step = steps[number]
                read += [start + at for at in data.readable]
                pixels += [] if data.pixels is None else [data.pixels]
                token_ids += data.token_ids
                for at, why in data.failures.items():
                    self.skipped.reasons[int(step.rows[start + at])] = why
                if ends:
                    yield self._batch(step, np.array(read, dtype=np.int64), pixels, token_ids)
                    read, pixels, token_ids = [], [], []

    def _source(self, row: int) -> Source:
        contents = self.contents
        image, text = contents.images[row], contents.texts[row]
        return Source((image,) if image else (), contents.image_hashes[row] or "", text or "")

    def _batch(self, step: Step, read: Int64Array, pixels: list[Tensor], token_ids: list[list[int]]) -> Batch:
        rows = step.rows[read]
        position = {int(row): at for at, row in enumerate(rows)}
        pairs = [
            (position[int(a)], position[int(b)]) for a, b in step.pairs if a in position and b in position
        ]
        return Batch(
            rows,
            int((read < step.n_own).sum()),
            np.array(pairs, dtype=np.int64).reshape(-1, 2),
            torch.cat(pixels) if pixels else None,
            self.encoder.pad(token_ids) if token_ids else None,
        )


def _requests(
    steps: Sequence[Step], source: "SourceOf"
) -> Iterator[tuple[tuple[int, int, bool], list[Source]]]:
    """What the loader workers load at a time: (step, first position, whether the step is then whole)."""
    for number, step in enumerate(steps):
        for start in range(0, len(step.rows), PICTURES_PER_REQUEST):
            some = step.rows[start : start + PICTURES_PER_REQUEST]
            ends = start + PICTURES_PER_REQUEST >= len(step.rows)
            yield (number, start, ends), [source(int(row)) for row in some]


class SourceOf(Protocol):
    """Where an item's content comes from."""

    def __call__(self, row: int) -> Source:
        """The source of an item row."""
        ...


def _groups(values: Sequence[str | None]) -> Int64Array:
    """(I,) a number for each different value."""
    names: dict[str | None, int] = {}
    return np.array([names.setdefault(value, len(names)) for value in values], dtype=np.int64)


def _draw(seed: int, item_id: str) -> float:
    """A number in 0..1 that an item keeps, whatever other items the catalogue has."""
    digest = hashlib.sha256(f"{seed}:{item_id}".encode()).digest()
    return float(int.from_bytes(digest[:8], "big") / 2**64)
