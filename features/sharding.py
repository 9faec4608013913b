"""One extraction by several workers: each encodes the blocks of its shard; whoever finds all assembles them.

A part's block holds the contents that the part is the first to have, known vectors and failures included, so
that the parts follow from the blocks alone. Which contents those are, and in which batches they are encoded,
depends on the catalogue, never on the worker: the assembled parts are those of one process, bit for bit.
"""

import hashlib
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from uuid import uuid4

import numpy as np
from pydantic import BaseModel

from features.assembling import Assembler, BackgroundWriter, PartWriter, Plan
from features.catalogue import Catalogue, Contents, Modality, TextConfig
from features.encoders.base import Encoder, EncoderInfo
from features.encoding import EncodingRun, ExtractionConfig
from features.errors import FeatureError, FeatureFileError
from features.extraction import (
    ExtractionReport,
    Progress,
    check_modality,
    part_metadata,
    settle_precision,
    take_stock,
)
from features.known import KnownVectors
from features.parts import PartFile, PartRows, Status, Vectors, part_name, rows_per_part, write_part
from features.precision import Precision, PrecisionReport


@dataclass(frozen=True)
class Shard:
    """One of several workers' shares: number `index`, counted from 0, of `count`.

    Raises:
        FeatureError: There is no such share.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise _no_shard(str(self))

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read `0/4`, the first of four.

        Raises:
            FeatureError: It is not of this form.
        """
        match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
        if match is None:
            raise _no_shard(text)
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def parts(self, n_parts: int) -> list[int]:
        """The parts of a feature set whose blocks this shard encodes, in order."""
        return [part for part in range(n_parts) if shard_of(part, n_parts, self.count) == self.index]


def _no_shard(text: str) -> FeatureError:
    return FeatureError(
        f"there is no shard {text!r}; expected a number from 0 and their count, such as 0/2 and 1/2."
    )


def shard_of(part: int, n_parts: int, n_shards: int) -> int:
    """The shard that encodes a part: parts are dealt out in the order of the hashes of their names.

    By a hash alone shares would be uneven; dealt out, four workers of 64 parts get 16 each. The hash still
    mixes early parts with later ones, which have more repeats and so less to encode.
    """
    return _dealing_order(n_parts)[part] % n_shards


@lru_cache(maxsize=8)
def _dealing_order(n_parts: int) -> list[int]:
    """Place of each part when parts are sorted by the hash of their names."""
    by_hash = sorted(range(n_parts), key=lambda part: hashlib.sha256(part_name(part).encode()).digest())
    places = [0] * n_parts
    for place, part in enumerate(by_hash):
        places[part] = place
    return places


def block_name(part: int) -> str:
    """File name of a part's block."""
    return f"block-{part:05d}.parquet"


def count_parts(contents: Contents, config: ExtractionConfig) -> int:
    """How many parts, and so how many blocks, an extraction has."""
    return max(1, -(-len(contents) // _rows_per_part(contents, config)))


def missing_parts(names: Collection[str], n_parts: int) -> list[int]:
    """Parts whose block is not among some files."""
    return [part for part in range(n_parts) if block_name(part) not in names]


def shards_of(parts: Collection[int], n_parts: int, n_shards: int) -> tuple[int, ...]:
    """The shards, of `n_shards`, that some parts belong to."""
    return tuple(sorted({shard_of(part, n_parts, n_shards) for part in parts}))


class BlocksMissingError(FeatureError):
    """Not all blocks are there and whole; `parts` lacks them, `shards` have to be run."""

    def __init__(self, message: str, parts: Sequence[int], shards: Sequence[int]) -> None:
        super().__init__(message)
        self.parts = tuple(parts)
        self.shards = tuple(shards)


class Settled(BaseModel, frozen=True, extra="forbid"):
    """What one worker finds out on its device and all others take over, as it changes vectors' last bits."""

    precision: Precision
    reason: str
    """Why this precision."""
    cosine: float | None = None
    overlap: float | None = None
    batch_size: int
    notes: tuple[str, ...] = ()
    """What the encoder has to say of itself."""

    @property
    def probed(self) -> PrecisionReport:
        """How the precision was chosen."""
        return PrecisionReport(self.precision, self.reason, self.cosine, self.overlap)

    def applied_to(self, config: ExtractionConfig) -> ExtractionConfig:
        """The configuration with nothing left to choose."""
        return config.model_copy(update={"precision": self.precision, "batch_size": self.batch_size})


def settle(
    encoder: Encoder,
    catalogue: Catalogue,
    modality: Modality,
    config: ExtractionConfig,
    *,
    text: TextConfig | None = None,
) -> Settled:
    """Choose the precision and the batch size that a configuration leaves open."""
    check_modality(encoder.info, modality)
    settled, report = settle_precision(encoder, catalogue, modality, config, text=text)
    plan = _plan(catalogue.contents(modality, text), config, None)
    return Settled(
        precision=report.taken,
        reason=report.reason,
        cosine=report.cosine,
        overlap=report.overlap,
        batch_size=EncodingRun(encoder, modality, plan, settled).batch_size,
        notes=tuple(encoder.notes),
    )


@dataclass(frozen=True)
class ShardReport:
    """What one worker did."""

    shard: str
    blocks: int
    """Blocks of the shard, all whole now."""
    kept: int
    """Blocks that an earlier, killed worker left."""
    encoded: int
    """Contents that went through the encoder."""
    reused: int
    """Contents whose vectors an earlier artefact had."""
    seconds: float
    items_per_s: float
    """Contents encoded a second."""
    notes: tuple[str, ...]
    """What a person should know: blocks that were thrown away."""


@dataclass(frozen=True)
class _Figures:
    """What a block says of its making, beside its rows."""

    encoded: int
    reused: int
    seconds: float
    waiting_s: float
    device: str
    workers: str

    def to_metadata(self) -> dict[str, str]:
        return {name: str(value) for name, value in vars(self).items()}

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> "_Figures":
        return cls(
            int(metadata["encoded"]),
            int(metadata["reused"]),
            float(metadata["seconds"]),
            float(metadata["waiting_s"]),
            metadata["device"],
            metadata["workers"],
        )


def encode_shard(
    encoder: Encoder,
    catalogue: Catalogue,
    modality: Modality,
    blocks: Path,
    *,
    config: ExtractionConfig,
    shard: Shard,
    text: TextConfig | None = None,
    known: KnownVectors | None = None,
    purpose: str = "",
    written: Callable[[str], None] | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> ShardReport:
    """Encode the contents of one shard into a file a part.

    Whole blocks of the same settings are kept, so that a killed worker, or another one in its place, goes on
    where it was. Workers may share the folder; two that make one block both leave it whole.

    Args:
        encoder: On the device it should run on.
        catalogue: The items, the same for all workers.
        modality: One of the encoder's.
        blocks: Gets `block-00000.parquet`, ...
        config: How, the same for all workers: `Settled.applied_to`.
        shard: Which share of the parts.
        text: Which text of an item; does not matter for pictures.
        known: Vectors of earlier artefacts, of the recipe `recipe_digest` gives.
        purpose: Blocks of another purpose are not kept.
        written: Is told the name of each block that is whole, from a thread of its own.
        progress: Is told the contents done and the contents in all, of this shard.
        say: Is told what a person should know at once.

    Raises:
        EncoderError: The encoder lacks the modality, or its vectors are not as its info says.
        FeatureError: An embedding is NaN or infinite, a text field is unknown, or a loader process died.
        OSError: The disk is full or must not be written. Whole blocks stay.
    """
    started = time.perf_counter()
    check_modality(encoder.info, modality)
    plan = _plan(catalogue.contents(modality, text), config, known)
    run = EncodingRun(encoder, modality, plan, config)
    metadata = _block_metadata(encoder.info, plan, config, run.batch_size, purpose)
    blocks.mkdir(parents=True, exist_ok=True)
    mine = shard.parts(plan.n_parts)
    todo, notes = [], []
    for part in mine:
        found = _whole_block(blocks / block_name(part), plan, part, metadata)
        if isinstance(found, str):
            todo.append(part)
            notes += [f"{found}; it is encoded again"] if found else []
    if say is not None:
        for note in notes:
            say(note)
    collector = _BlockCollector(plan, run, known, mine, todo, progress=progress)

    def write_one(part: int, rows: PartRows) -> None:
        name, aside = block_name(part), blocks / f".{uuid4().hex}-{block_name(part)}"
        write_part(aside, rows, metadata | collector.figures.pop(part).to_metadata())
        aside.replace(blocks / name)  # under a name of its own first, as another worker may make this block
        if written is not None:
            written(name)

    with BackgroundWriter(write_one) as writer:
        collector.write = writer.write
        collector.finish()
        run.encode(todo, run.loader(catalogue.image_root), collector)
    return ShardReport(
        shard=str(shard),
        blocks=len(mine),
        kept=len(mine) - len(todo),
        encoded=run.n_encoded,
        reused=sum(int(plan.known[content] >= 0) for part in todo for content in plan.contents_of(part)),
        seconds=time.perf_counter() - started,
        items_per_s=run.n_encoded / run.seconds if run.seconds else 0.0,
        notes=tuple(notes),
    )


def assemble(
    info: EncoderInfo,
    catalogue: Catalogue,
    modality: Modality,
    blocks: Path,
    folder: Path,
    *,
    config: ExtractionConfig,
    n_shards: int,
    text: TextConfig | None = None,
    purpose: str = "",
    settled: Settled | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> ExtractionReport:
    """Turn the blocks of all shards into the parts that one process would have written.

    Args:
        info: Of the encoder that made the blocks; it is not needed any more itself.
        catalogue: The items.
        modality: What was encoded.
        blocks: Holds the blocks.
        folder: Gets `part-00000.parquet`, ...; whole parts in it are kept.
        config: As given to `encode_shard`.
        n_shards: Number of shards, to say which of them are missing.
        text: As given to `encode_shard`.
        purpose: As given to `encode_shard`.
        settled: What `settle` gave, for the notes.
        progress: Is told the rows done and the rows in all.
        say: Is told what a person should know at once.

    Raises:
        BlocksMissingError: Blocks are missing, damaged, or were made with other settings; it names the shards
            that have to run.
    """
    started = time.perf_counter()
    if config.precision == "auto" or config.batch_size == 0:
        raise ValueError(
            f"precision {config.precision!r} and batch size {config.batch_size} are not settled; "
            "apply what `settle` gave."
        )
    plan = _plan(catalogue.contents(modality, text), config, None)
    metadata = part_metadata(info, plan, config, config.batch_size)
    expected = _block_metadata(info, plan, config, config.batch_size, purpose)
    _check_all(blocks, plan, expected, n_shards)
    figures = []
    with PartWriter(folder, metadata) as writer:
        empty: Vectors = np.empty((0, info.dims[modality]), config.dtype)
        assembler = Assembler(plan, empty, None, writer.write, progress)
        todo, notes = take_stock(folder, plan, metadata, assembler, say)
        assembler.finish()
        for part in range(plan.n_parts):
            found = _whole_block(blocks / block_name(part), plan, part, expected)
            if isinstance(found, str):
                raise _missing({part: found}, plan.n_parts, n_shards)
            figures.append(found.figures)
            if part in todo:
                _hand_over(assembler, plan, part, found.rows)
    seconds = sum(figure.seconds for figure in figures)
    encoded = sum(figure.encoded for figure in figures)
    return ExtractionReport(
        rows=len(catalogue),
        n_ok=assembler.statuses["ok"],
        n_missing=assembler.statuses["missing"],
        n_unreadable=assembler.statuses["unreadable"],
        encoded=encoded,
        reused=sum(figure.reused for figure in figures),
        duplicates=int((plan.content_of_row >= 0).sum()) - plan.first_content[-1],
        kept_rows=0,
        parts=plan.n_parts,
        dim=info.dims[modality],
        dtype=config.dtype,
        device=", ".join(sorted({figure.device for figure in figures})),
        batch_size=config.batch_size,
        precision=config.precision,
        workers=", ".join(sorted({figure.workers for figure in figures})),
        seconds=seconds + time.perf_counter() - started,
        items_per_s=encoded / seconds if seconds else 0.0,
        waiting_share=sum(figure.waiting_s for figure in figures) / seconds if seconds else 0.0,
        reasons=dict(assembler.reasons.most_common(10)),
        notes=(*(settled.notes if settled else ()), *notes),
    )


def _hand_over(assembler: Assembler, plan: Plan, part: int, rows: PartRows) -> None:
    """Give the assembler what a block holds."""
    contents = plan.contents_of(part)
    ok = [place for place, status in enumerate(rows.statuses) if status == "ok"]
    failed = {
        content: reason or ""
        for content, status, reason in zip(contents, rows.statuses, rows.reasons, strict=True)
        if status != "ok"
    }
    assembler.fail(part, failed)
    assembler.add(part, [contents[place] for place in ok], rows.vectors[ok])


@dataclass(frozen=True)
class _Block:
    rows: PartRows
    figures: _Figures


def _check_all(blocks: Path, plan: Plan, metadata: Mapping[str, str], n_shards: int) -> None:
    """Look at every block's presence and settings before anything is written; their bytes come later."""
    wrong = {}
    for part in range(plan.n_parts):
        path = blocks / block_name(part)
        try:
            with PartFile(path) as file:
                if not _belongs(file, metadata):
                    wrong[part] = f"{path.name} was made with other settings"
        except FeatureFileError:
            wrong[part] = f"{path.name} is damaged" if path.exists() else ""
    if wrong:
        raise _missing(wrong, plan.n_parts, n_shards)


def _missing(wrong: Mapping[int, str], n_parts: int, n_shards: int) -> BlocksMissingError:
    shards = shards_of(wrong, n_parts, n_shards)
    first, why = next(iter(wrong.items()))
    missing = why or f"{block_name(first)} is missing"
    them = ", ".join(f"{shard}/{n_shards}" for shard in shards)
    return BlocksMissingError(
        f"{len(wrong)} of {n_parts} blocks are not whole: {missing}{', ...' if len(wrong) > 1 else ''}; "
        f"expected all of one extraction; run the shards {them} again.",
        list(wrong),
        shards,
    )


def _whole_block(path: Path, plan: Plan, part: int, metadata: Mapping[str, str]) -> _Block | str:
    """A block, checked to its last bit, or what is wrong with it ("" if it is simply not there)."""
    if not path.exists():
        return ""
    try:
        with PartFile(path, verify=True) as file:
            if not _belongs(file, metadata):
                return f"{path.name} was made with other settings"
            block = _Block(file.rows(), _Figures.of(file.metadata))
    except (FeatureFileError, KeyError, ValueError):
        return f"{path.name} is damaged"
    if (list(block.rows.item_ids), list(block.rows.content_hashes)) != _block_columns(plan, part):
        return f"{path.name} holds other items"
    return block


def _belongs(file: PartFile, metadata: Mapping[str, str]) -> bool:
    return all(file.metadata.get(name) == value for name, value in metadata.items())


def _block_columns(plan: Plan, part: int) -> tuple[list[str], list[str | None]]:
    """For each content of a block the first item that has it, and its hash."""
    rows = [plan.rows_of_content[content][0] for content in plan.contents_of(part)]
    return [plan.contents.item_ids[row] for row in rows], [plan.contents.hashes[row] for row in rows]


def _block_metadata(
    info: EncoderInfo, plan: Plan, config: ExtractionConfig, batch_size: int, purpose: str
) -> dict[str, str]:
    return part_metadata(info, plan, config, batch_size) | {"block": purpose or "plain"}


def _rows_per_part(contents: Contents, config: ExtractionConfig) -> int:
    return config.rows_per_part or rows_per_part(len(contents))


def _plan(contents: Contents, config: ExtractionConfig, known: KnownVectors | None) -> Plan:
    return Plan.make(contents, _rows_per_part(contents, config), known)


class _BlockCollector:
    """Collects what the encoding loop gives until a block is whole, then hands it to the writer."""

    def __init__(
        self,
        plan: Plan,
        run: EncodingRun,
        known: KnownVectors | None,
        mine: Sequence[int],
        todo: Sequence[int],
        *,
        progress: Progress | None,
    ) -> None:
        self._plan = plan
        self._run = run
        self._known = known
        self._progress = progress
        self._outstanding = {part: len(plan.to_encode(part)) for part in todo}
        self._vectors: dict[int, Vectors] = {}
        self._failures: dict[int, str] = {}
        self._total = sum(len(plan.contents_of(part)) for part in mine)
        self._done = self._total - sum(self._outstanding.values())
        self._before = time.perf_counter()
        self._waited = 0.0
        self.figures: dict[int, _Figures] = {}
        """Of the blocks handed to the writer."""
        self.write: Callable[[int, PartRows], None]
        """Takes whole blocks; set before the first is."""

    def add(self, part: int, contents: Sequence[int], vectors: Vectors) -> None:
        """Take over what was encoded, (N, D)."""
        self._vectors.update(zip(contents, vectors, strict=True))
        self._count(part, len(contents))
        self.finish()

    def fail(self, part: int, failures: Mapping[int, str]) -> None:
        """Note contents that could not be read, and why."""
        self._failures.update(failures)
        self._count(part, len(failures))

    def _count(self, part: int, n_contents: int) -> None:
        self._outstanding[part] -= n_contents
        self._done += n_contents

    def finish(self) -> None:
        """Hand over the blocks that are whole."""
        for part in [part for part, missing in self._outstanding.items() if missing == 0]:
            del self._outstanding[part]
            self.figures[part] = self._measure(part)
            self.write(part, self._rows(part))
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _measure(self, part: int) -> _Figures:
        """The time since the last block goes to this one's account."""
        now, waited = time.perf_counter(), self._run.waiting_s
        seconds, self._before = now - self._before, now
        waiting_s, self._waited = waited - self._waited, waited
        n_failed = sum(content in self._failures for content in self._plan.contents_of(part))
        n_todo = len(self._plan.to_encode(part))
        return _Figures(
            n_todo - n_failed,
            len(self._plan.contents_of(part)) - n_todo,
            seconds if n_todo else 0.0,
            waiting_s,
            self._run.device.type,
            f"{self._run.workers.count} {self._run.workers.kind}",
        )

    def _rows(self, part: int) -> PartRows:
        plan = self._plan
        contents = plan.contents_of(part)
        vectors = np.zeros((len(contents), self._run.empty.shape[1]), self._run.empty.dtype)
        known = [place for place, content in enumerate(contents) if plan.known[content] >= 0]
        if known and self._known is not None:
            vectors[known] = self._known.take(plan.known[[contents[place] for place in known]])
        statuses: list[Status] = []
        reasons = [self._failures.pop(content, None) for content in contents]
        for place, content in enumerate(contents):
            if content in self._vectors:
                vectors[place] = self._vectors.pop(content)
            statuses.append("ok" if reasons[place] is None else "unreadable")
        return PartRows(*_block_columns(plan, part), statuses, reasons, vectors)
