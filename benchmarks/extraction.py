"""How near a whole extraction comes to the encoder's forward pass alone.

A whole extraction reads, decodes and resizes pictures (or tokenizes texts), encodes, and writes the
parts. The ceiling is the same encoder's forward pass over batches of the same shapes that lie ready
in memory: pictures in full batches; texts tokenized, sorted and cut beforehand, as the extraction
does it. Both run in one process at one precision; the ceiling is measured in two halves, before and
after each extraction, so that a machine that slows down or speeds up does so for both. Goal: at
least 90% of the ceiling, with at most 1.5 GB of memory above what is resident once the model is
loaded.

Pictures and texts are those of the MovieLens posters where that folder is there, else rendered
ones. The weights are random, in a checkpoint file that is made first: speed does not depend on
their values.
"""

import argparse
import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import polars as pl
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.measure import PeakMemory, machine, report
from features.assembling import Plan
from features.catalogue import Catalogue, Modality, TextConfig
from features.encoders.base import Encoder
from features.encoders.registry import load_encoder
from features.encoding import EncodingRun, evaluating
from features.extraction import ExtractionConfig, extract
from features.images import open_image, read_picture
from features.parts import rows_per_part

MIN_RATIO, MAX_MEMORY_BYTES = 0.9, 1.5e9
POSTERS = Path(__file__).resolve().parents[2] / "shared" / "data" / "movielens-posters"
TEXT = TextConfig(fields=("description",))
WORDS = "a warm wool coat with two deep pockets and a hood for cold windy days by the sea".split()  # noqa: SIM905


@dataclass(frozen=True)
class Side:
    """Items a second of one extraction and of the ceiling around it."""

    extraction: float
    ceiling: float
    waiting_share: float
    peak_bytes: int


def posters(folder: Path, n_items: int) -> Catalogue:
    """The first items that have both a poster and a plot."""
    items = pl.read_parquet(folder / "items.parquet").drop_nulls(["image", "description"]).head(n_items)
    hashes = [_sha256((folder / path).read_bytes()) for path in items["image"]]
    return Catalogue(items.with_columns(image_hash=pl.Series(hashes)), str(folder))


def rendered(folder: Path, n_items: int) -> Catalogue:
    """Drawn pictures of a poster's size and texts of a plot's length."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(n_items):
        noise = rng.integers(0, 256, (35, 24, 3), np.uint8)
        picture = Image.fromarray(noise).resize((185, 278), Image.Resampling.BICUBIC)
        ImageDraw.Draw(picture).text((10, 10), str(number))
        picture.save(folder / f"{number}.jpg", quality=85)
        text = " ".join(rng.choice(WORDS, rng.integers(10, 90)))
        name = f"{number}.jpg"
        data = (folder / name).read_bytes()
        rows.append({"item_id": str(number), "image": name, "image_hash": _sha256(data), "description": text})
    return Catalogue(pl.DataFrame(rows), str(folder))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_checkpoint(architecture: str, path: Path) -> None:
    """Seeded random weights of an open_clip architecture."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**open_clip.get_model_config(architecture))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)


def ready_batches(encoder: Encoder, catalogue: Catalogue, modality: Modality) -> list[Tensor]:
    """The extraction's own batches; of pictures a few, which are then used again and again."""
    contents = catalogue.contents(modality, TEXT)
    plan = Plan.make(contents, rows_per_part(len(contents)), None)
    size = EncodingRun(encoder, modality, plan, ExtractionConfig()).batch_size
    batches: list[Tensor] = []
    for part in range(plan.n_parts):
        sources = [plan.source(content) for content in plan.to_encode(part)]
        if modality == "text":
            ids = sorted(encoder.token_ids([source.text for source in sources]), key=len)
            batches += [encoder.pad(ids[start : start + size]) for start in range(0, len(ids), size)]
            continue
        if not batches:
            some = [read_picture(catalogue.image_root, source.paths[0]) for source in sources[:size]]
            batches.append(torch.stack([encoder.image_transform(open_image(data)) for data in some]))
        batches += [batches[0][: min(size, len(sources) - start)] for start in range(0, len(sources), size)]
    return batches[1:] if modality == "image" else batches


def forward_seconds(encoder: Encoder, batches: list[Tensor], modality: Modality) -> float:
    """Wall time of the forward passes alone."""
    device = next(encoder.parameters()).device
    encode = encoder.encode_images if modality == "image" else encoder.encode_texts
    with evaluating(encoder), torch.inference_mode():
        start = time.perf_counter()
        for batch in batches:
            vectors = encode(batch.to(device))
        vectors.cpu()
        return time.perf_counter() - start


def measure(
    encoder: Encoder, catalogue: Catalogue, modality: Modality, config: ExtractionConfig, folder: Path
) -> Side:
    """One extraction between two halves of the ceiling."""
    batches = ready_batches(encoder, catalogue, modality)
    forward_seconds(encoder, batches[:1], modality)  # first calls allocate
    seconds = forward_seconds(encoder, batches[::2], modality)
    with PeakMemory() as memory:
        start = time.perf_counter()
        done = extract(encoder, catalogue, modality, folder, config, text=TEXT)
        taken = time.perf_counter() - start
    seconds += forward_seconds(encoder, batches[1::2], modality)
    n_encoded = sum(len(batch) for batch in batches)
    assert done.encoded == n_encoded, (done.encoded, n_encoded)
    return Side(done.encoded / taken, n_encoded / seconds, done.waiting_share, memory.peak)


def rounds(
    encoder: Encoder, catalogue: Catalogue, modality: Modality, config: ExtractionConfig, n_rounds: int
) -> Iterator[Side]:
    """Several measurements, each into a folder of its own."""
    for _ in range(n_rounds):
        with tempfile.TemporaryDirectory() as folder:
            yield measure(encoder, catalogue, modality, config, Path(folder))


def run(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """All that is asked for, as one result."""
    checkpoint = folder / "weights.safetensors"
    make_checkpoint(options.architecture, checkpoint)
    pictures = folder / "pictures"
    pictures.mkdir()
    real = (options.posters / "items.parquet").exists()
    catalogue = posters(options.posters, options.items) if real else rendered(pictures, options.items)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = load_encoder(f"open_clip/{options.architecture}:{checkpoint}", device=device)
    config = ExtractionConfig(workers=options.workers, n_workers=options.n_workers)
    with PeakMemory() as memory:
        pass
    result: dict[str, object] = {
        "architecture": options.architecture,
        "items": len(catalogue),
        "pictures": "MovieLens posters" if real else "rendered",
        "precision": config.precision,
        "device": device,
        "workers": f"{options.workers} {options.n_workers or ''}".strip(),
        "machine": machine(),
    }
    for modality in options.modalities:
        sides = list(rounds(encoder, catalogue, modality, config, options.rounds))
        middle = sorted(sides, key=lambda side: side.extraction / side.ceiling)[len(sides) // 2]
        result[modality] = {
            "extraction_items_per_s": round(middle.extraction, 2),
            "ceiling_items_per_s": round(middle.ceiling, 2),
            "ratio": round(middle.extraction / middle.ceiling, 3),
            "ratios": [round(side.extraction / side.ceiling, 3) for side in sides],
            "waiting_share": round(statistics.median(side.waiting_share for side in sides), 4),
            "memory_above_model_mb": round((max(side.peak_bytes for side in sides) - memory.before) / 1e6),
        }
    return result


def in_words(result: dict[str, object], modalities: list[str]) -> tuple[str, bool]:
    """A line a modality, and whether every goal is reached."""
    lines, reached = [], True
    for modality in modalities:
        side = result[modality]
        assert isinstance(side, dict)
        lines.append(
            f"{modality}: extraction {side['extraction_items_per_s']} items/s, forward pass alone "
            f"{side['ceiling_items_per_s']} items/s, ratio {side['ratio']} (goal {MIN_RATIO}); waiting for "
            f"data {side['waiting_share']:.1%} of the time; memory {side['memory_above_model_mb']} MB above "
            f"the model (goal {MAX_MEMORY_BYTES / 1e6:.0f})"
        )
        reached &= side["ratio"] >= MIN_RATIO and side["memory_above_model_mb"] <= MAX_MEMORY_BYTES / 1e6
    return "\n".join(lines), reached


def main() -> int:
    """Measure, print, and fail where a goal is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.extraction",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--items", type=int, default=1000, help="items to extract (default: %(default)s)")
    parser.add_argument(
        "--architecture", default="ViT-B-32", help="one of open_clip's (default: %(default)s)"
    )
    parser.add_argument("--posters", type=Path, default=POSTERS, help="folder of the MovieLens posters")
    parser.add_argument(
        "--modalities", nargs="+", choices=["image", "text"], default=["image", "text"], help="default: both"
    )
    parser.add_argument("--workers", choices=["auto", "threads", "processes"], default="auto", help="loaders")
    parser.add_argument("--n-workers", type=int, default=0, help="how many; 0 chooses (default)")
    parser.add_argument(
        "--rounds", type=int, default=1, help="measurements; the middle one counts (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--save", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(options, Path(folder))
    text, reached = in_words(result, options.modalities)
    report(result, as_json=options.json, save=options.save, text=text)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
