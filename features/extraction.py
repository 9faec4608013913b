"""Encode a catalogue into parts; go on where a killed run stopped; never encode a content twice."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from features.assembling import Assembler, PartWriter, Plan, whole_part
from features.catalogue import Catalogue, Modality, TextConfig
from features.encoders.base import Encoder, EncoderInfo, digest_json
from features.encoding import EncodingRun, ExtractionConfig
from features.errors import EncoderError
from features.known import KnownVectors
from features.parts import part_name, rows_per_part
from features.precision import PrecisionReport, has_bfloat16, judge, spread

__all__ = [
    "ExtractionConfig",
    "ExtractionReport",
    "Progress",
    "check_modality",
    "extract",
    "part_metadata",
    "recipe_digest",
    "settle_precision",
    "take_stock",
]

Progress = Callable[[int, int], None]
"""Takes rows done and rows in all."""


@dataclass(frozen=True)
class ExtractionReport:
    """What an extraction did; the rows are of the whole feature set, the rest of this run."""

    rows: int
    n_ok: int
    n_missing: int
    n_unreadable: int
    encoded: int
    """Contents that went through the encoder."""
    reused: int
    """Contents whose vectors an earlier artefact had."""
    duplicates: int
    """Rows whose content another row before them has."""
    kept_rows: int
    """Rows in whole parts that an earlier, killed run left."""
    parts: int
    dim: int
    dtype: str
    device: str
    batch_size: int
    precision: str
    """What the encoder computed in."""
    workers: str
    seconds: float
    items_per_s: float
    """Contents encoded a second."""
    waiting_share: float
    """Share of the time in which the encoder had no data to work on."""
    reasons: dict[str, int]
    """Why rows are missing or unreadable, and how many."""
    notes: tuple[str, ...]
    """What a person should know: parts that were thrown away."""


def recipe_digest(info: EncoderInfo, modality: Modality, config: ExtractionConfig) -> str:
    """SHA-256 of what makes vectors of equal contents interchangeable; each part carries it."""
    return digest_json(
        {
            "weights": info.weights_sha256,
            "preprocessing": info.preprocessing_sha256,
            "modality": modality,
            "dtype": config.dtype,
            "precision": config.precision,
            "draft_jpeg": config.draft_jpeg and modality != "text",
        }
    )


def part_metadata(info: EncoderInfo, plan: Plan, config: ExtractionConfig, batch_size: int) -> dict[str, str]:
    """What each part says of how it was made; equal where parts of one feature set belong together."""
    contents = plan.contents
    settings = config.identity() | {
        "batch_size": batch_size,
        "rows_per_part": plan.rows_per_part,
        "catalogue": contents.fingerprint(),
    }
    return {"recipe": recipe_digest(info, contents.modality, config), "settings": digest_json(settings)}


def settle_precision(
    encoder: Encoder,
    catalogue: Catalogue,
    modality: Modality,
    config: ExtractionConfig,
    *,
    text: TextConfig | None = None,
) -> tuple[ExtractionConfig, PrecisionReport]:
    """Turn precision `auto` into the one to take; any other stays.

    Returns:
        The configuration with the precision that is computed in, and why.
    """
    if config.precision != "auto":
        return config, PrecisionReport(config.precision, f"{config.precision}, as asked for")
    device = next((tensor.device for tensor in encoder.parameters()), torch.device("cpu"))
    if not encoder.info.n_parameters:
        report = PrecisionReport("float32", "float32, as this encoder has no weights")
    elif not has_bfloat16(device):
        report = PrecisionReport("float32", f"float32, as this {device.type} has no bfloat16 instructions")
    else:
        report = judge(*_probe(encoder, catalogue, modality, config, text))
    return config.model_copy(update={"precision": report.taken}), report


def _probe(
    encoder: Encoder,
    catalogue: Catalogue,
    modality: Modality,
    config: ExtractionConfig,
    text: TextConfig | None,
) -> tuple[Tensor, Tensor]:
    """(N, D) vectors of some of the catalogue's contents in float32 and in bfloat16."""
    plan = Plan.make(catalogue.contents(modality, text), 1, None)
    sources = [plan.source(content) for content in spread(range(plan.first_content[-1]))]
    vectors = []
    for precision in ("float32", "bfloat16"):
        run = EncodingRun(encoder, modality, plan, config.model_copy(update={"precision": precision}))
        vectors.append(run.encode_once(run.loader(catalogue.image_root)(sources)))
    return vectors[0], vectors[1]


def extract(
    encoder: Encoder,
    catalogue: Catalogue,
    modality: Modality,
    folder: Path,
    config: ExtractionConfig | None = None,
    *,
    text: TextConfig | None = None,
    known: KnownVectors | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> ExtractionReport:
    """Encode every item of a catalogue into Parquet parts.

    Parts that an earlier run of the same extraction left whole are kept, so that a killed run goes on where
    it was, and what comes out is the same bit for bit. A content that several items share is encoded once.

    Args:
        encoder: On the device it should run on.
        catalogue: The items; a part's rows are in its order.
        modality: One of the encoder's.
        folder: Gets `part-00000.parquet`, ...
        config: How.
        text: Which text of an item; does not matter for pictures.
        known: Vectors of earlier artefacts, of the recipe `recipe_digest` gives.
        progress: Is told the rows done and the rows in all.
        say: Is told what a person should know at once.

    Raises:
        EncoderError: The encoder lacks the modality, or its vectors are not as its info says.
        FeatureError: An embedding is NaN or infinite, a text field is unknown, or a loader process died.
        OSError: The disk is full or must not be written. Whole parts stay.
    """
    started = time.perf_counter()
    config = config or ExtractionConfig()
    asked = config.precision
    config, precision = settle_precision(encoder, catalogue, modality, config, text=text)
    check_modality(encoder.info, modality)
    contents = catalogue.contents(modality, text)
    plan = Plan.make(contents, config.rows_per_part or rows_per_part(len(contents)), known)
    run = EncodingRun(encoder, modality, plan, config)
    metadata = part_metadata(encoder.info, plan, config, run.batch_size)
    with PartWriter(folder, metadata) as writer:
        assembler = Assembler(plan, run.empty, known, writer.write, progress)
        todo, notes = take_stock(folder, plan, metadata, assembler, say)
        assembler.finish()
        run.encode(todo, run.loader(catalogue.image_root), assembler)
    made = sum(len(plan.rows(part)) for part in todo)
    return ExtractionReport(
        rows=len(contents),
        n_ok=assembler.statuses["ok"],
        n_missing=assembler.statuses["missing"],
        n_unreadable=assembler.statuses["unreadable"],
        encoded=run.n_encoded,
        reused=sum(int(plan.known[content] >= 0) for part in todo for content in plan.contents_of(part)),
        duplicates=int((plan.content_of_row >= 0).sum()) - plan.first_content[-1],
        kept_rows=len(contents) - made,
        parts=plan.n_parts,
        dim=run.empty.shape[1],
        dtype=config.dtype,
        device=run.device.type,
        batch_size=run.batch_size,
        precision=config.precision,
        workers=f"{run.workers.count} {run.workers.kind}",
        seconds=time.perf_counter() - started,
        items_per_s=run.n_encoded / run.seconds if run.seconds else 0.0,
        waiting_share=run.waiting_s / run.seconds if run.seconds else 0.0,
        reasons=dict(assembler.reasons.most_common(10)),
        notes=(*encoder.notes, *([precision.reason] if asked == "auto" else []), *notes),
    )


def check_modality(info: EncoderInfo, modality: Modality) -> None:
    """Refuse a modality that an encoder lacks.

    Raises:
        EncoderError: It lists those that the encoder has.
    """
    if modality not in info.modalities:
        raise EncoderError(
            f"encoder {info.spec!r} has no modality {modality!r}; it has "
            f"{', '.join(info.modalities)}; choose one of these."
        )


def take_stock(
    folder: Path,
    plan: Plan,
    metadata: dict[str, str],
    assembler: Assembler,
    say: Callable[[str], None] | None,
) -> tuple[list[int], list[str]]:
    """Keep the whole parts in the folder, remove the rest.

    Returns:
        The parts to make, and what a person should know.
    """
    folder.mkdir(parents=True, exist_ok=True)
    notes = []
    expected = {part_name(part) for part in range(plan.n_parts)}
    for path in (*folder.glob("part-*.parquet"), *folder.glob(".part-*.partial")):
        if path.name not in expected:
            path.unlink()
    todo = []
    for part in range(plan.n_parts):
        path = folder / part_name(part)
        found = whole_part(path, plan, part, metadata)
        if isinstance(found, str):
            path.unlink(missing_ok=True)
            assembler.expect(part)
            todo.append(part)
            notes += [found] if found else []
        else:
            assembler.keep(part, found)
    if say is not None:
        for note in notes:
            say(note)
    return todo, notes
