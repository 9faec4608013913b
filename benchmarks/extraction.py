"""How near a whole extraction comes to the encoder's forward pass alone, and how far past a plain loop.

A whole extraction reads, decodes and resizes pictures (or tokenizes texts), encodes, and writes the
parts. The ceiling is the same encoder's forward pass, in the same precision, over batches of the same
shapes that lie ready in memory: pictures in full batches; texts tokenized, sorted and cut beforehand,
as the extraction does it. Both run in one process; the ceiling is measured in two halves, before and
after each extraction, so that a machine that slows down or speeds up does so for both. Goals: at
least 95% of the ceiling, and at most 1.5 GB of memory above what is resident once the model is loaded.

With --plain the same items also go through a plain float32 loop (see benchmarks.plain_loop), and a
reduced precision is compared with float32: lowest cosine, and the share of ten nearest neighbours kept.

Pictures and texts are those of the MovieLens posters where that folder is there, else rendered
ones. The weights are random, in a checkpoint file that is made first: speed does not depend on
their values. Example: python -m benchmarks.extraction --precisions float32 bfloat16 --plain
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
from torch.nn.functional import cosine_similarity

from benchmarks.measure import PeakMemory, give_back_memory, machine, report, resident_bytes
from benchmarks.plain_loop import plain_items_per_s
from features.assembling import Plan
from features.catalogue import Catalogue, Modality, TextConfig
from features.encoders.base import Encoder
from features.encoders.registry import load_encoder
from features.encoders.vlmo.config import VARIANTS
from features.encoders.vlmo.model import Vlmo
from features.encoders.word_pieces import SPECIAL_TOKENS
from features.encoding import EncodingRun, evaluating
from features.extraction import ExtractionConfig, extract
from features.feature_table import FeatureSet
from features.images import open_image, read_picture
from features.parts import rows_per_part
from features.precision import in_precision, neighbour_overlap

MIN_RATIO, MAX_MEMORY_BYTES = 0.95, 1.5e9
POSTERS = Path(__file__).resolve().parents[2] / "shared" / "data" / "movielens-posters"
KINDS: dict[str, tuple[Modality, TextConfig]] = {
    "images": ("image", TextConfig()),
    "titles": ("text", TextConfig(fields=("title",))),
    "plots": ("text", TextConfig(fields=("description",))),
    "pairs": ("fused", TextConfig(fields=("title",))),
}
"""What is encoded."""
VLMO = "vlmo-base"
WORDS = "a warm wool coat with two deep pockets and a hood for cold windy days by the sea".split()  # noqa: SIM905


@dataclass(frozen=True)
class Side:
    """Items a second of one extraction and of the ceiling around it."""

    extraction: float
    ceiling: float
    vectors: Tensor
    waiting_share: float
    memory_bytes: int
    """Above what was resident with the model loaded and nothing else."""


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
        row = {"item_id": str(number), "image": name, "image_hash": _sha256(data), "description": text}
        rows.append(row | {"title": f"{text[:20]} {number}"})
    return Catalogue(pl.DataFrame(rows), str(folder))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_checkpoint(model: str, folder: Path) -> str:
    """Seeded random weights of an architecture, and the specification that loads them."""
    torch.manual_seed(0)
    path = folder / f"{model}.safetensors"
    if model == VLMO:
        network = Vlmo(VARIANTS["base"])
        network.reset(torch.Generator().manual_seed(0))
        positions = {"text_embeddings.position_embeddings.weight": torch.zeros(40, 768)}
        save_file({**network.state_dict(), **positions}, path)
        words = [*SPECIAL_TOKENS, *"abcdefghijklmnopqrstuvwxyz0123456789", *sorted(set(WORDS))]
        words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
        (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
        return f"vlmo/base:{path}"
    tower = open_clip.CLIP(**open_clip.get_model_config(model))
    save_file({name: tensor.contiguous() for name, tensor in tower.state_dict().items()}, path)
    return f"open_clip/{model}:{path}"


def ready_batches(encoder: Encoder, catalogue: Catalogue, kind: str) -> list[tuple[Tensor, ...]]:
    """The extraction's own batches; of pictures a few, which are then used again and again."""
    modality, text = KINDS[kind]
    contents = catalogue.contents(modality, text)
    plan = Plan.make(contents, rows_per_part(len(contents)), None)
    size = EncodingRun(encoder, modality, plan, ExtractionConfig()).batch_size
    batches: list[tuple[Tensor, ...]] = []
    pixels = torch.empty(0)
    for part in range(plan.n_parts):
        sources = [plan.source(content) for content in plan.to_encode(part)]
        if modality == "text":
            ids = sorted(encoder.token_ids([source.text for source in sources]), key=len)
            batches += [(encoder.pad(ids[start : start + size]),) for start in range(0, len(ids), size)]
            continue
        if not len(pixels):
            some = [read_picture(catalogue.image_root, source.paths[0]) for source in sources[:size]]
            pixels = torch.stack([encoder.image_transform(open_image(data)) for data in some])
        for start in range(0, len(sources), size):
            rows = sources[start : start + size]
            tokens = (encoder.tokenize([source.text for source in rows]),) if modality == "fused" else ()
            batches.append((pixels[: len(rows)], *tokens))
    return batches


def forward_seconds(encoder: Encoder, batches: list[tuple[Tensor, ...]], kind: str) -> float:
    """Wall time of the forward passes alone."""
    weights = next(encoder.parameters())
    names = {"image": encoder.encode_images, "text": encoder.encode_texts, "fused": encoder.encode_pairs}
    encode = names[KINDS[kind][0]]
    with evaluating(encoder), torch.inference_mode():
        start = time.perf_counter()
        vectors = torch.empty(0)
        for batch in batches:
            given = [tensor.to(weights.device) for tensor in batch]
            vectors = encode(
                *(tensor.to(weights.dtype) if tensor.is_floating_point() else tensor for tensor in given)
            )
        vectors.cpu()
        return time.perf_counter() - start


def measure(
    encoder: Encoder, catalogue: Catalogue, kind: str, config: ExtractionConfig, folder: Path
) -> Side:
    """One extraction between two halves of the ceiling."""
    modality, text = KINDS[kind]
    batches = ready_batches(encoder, catalogue, kind)
    give_back_memory()
    resident = resident_bytes()
    bare = in_precision(encoder, config.precision)
    forward_seconds(bare, batches[:1], kind)  # first calls allocate
    seconds = forward_seconds(bare, batches[::2], kind)
    with PeakMemory() as memory:
        start = time.perf_counter()
        done = extract(encoder, catalogue, modality, folder, config, text=text)
        taken = time.perf_counter() - start
    seconds += forward_seconds(bare, batches[1::2], kind)
    n_encoded = sum(len(batch[0]) for batch in batches)
    assert done.encoded == n_encoded, (done.encoded, n_encoded)
    vectors = FeatureSet.read(sorted(folder.glob("part-*.parquet"))).vectors.float()
    return Side(
        done.encoded / taken, n_encoded / seconds, vectors, done.waiting_share, memory.peak - resident
    )


def rounds(
    encoder: Encoder, catalogue: Catalogue, kind: str, config: ExtractionConfig, n_rounds: int
) -> Iterator[Side]:
    """Several measurements, each into a folder of its own."""
    for _ in range(n_rounds):
        with tempfile.TemporaryDirectory() as folder:
            yield measure(encoder, catalogue, kind, config, Path(folder))


def run(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """All that is asked for, as one result."""
    pictures = folder / "pictures"
    pictures.mkdir()
    real = (options.posters / "items.parquet").exists()
    catalogue = posters(options.posters, options.items) if real else rendered(pictures, options.items)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for model in options.models:
        encoder = load_encoder(make_checkpoint(model, folder), device=device)
        for kind in options.kinds:
            if KINDS[kind][0] not in encoder.info.modalities:
                continue
            plain = _plain(options, model, folder, catalogue, kind)
            reference: Tensor | None = None
            for precision in options.precisions:
                config = ExtractionConfig(
                    workers=options.workers, n_workers=options.n_workers, precision=precision
                )
                sides = list(rounds(encoder, catalogue, kind, config, options.rounds))
                middle = sorted(sides, key=lambda side: side.extraction / side.ceiling)[len(sides) // 2]
                reference = middle.vectors if reference is None else reference
                rows.append(
                    {
                        "model": model,
                        "kind": kind,
                        "precision": precision,
                        "extraction_items_per_s": round(middle.extraction, 2),
                        "ceiling_items_per_s": round(middle.ceiling, 2),
                        "ratio": round(middle.extraction / middle.ceiling, 3),
                        "ratios": [round(side.extraction / side.ceiling, 3) for side in sides],
                        "plain_items_per_s": plain and round(plain, 2),
                        "times_plain": plain and round(middle.extraction / plain, 2),
                        "cosine": round(float(cosine_similarity(reference, middle.vectors).min()), 6),
                        "overlap": round(neighbour_overlap(reference, middle.vectors), 4),
                        "waiting_share": round(statistics.median(side.waiting_share for side in sides), 4),
                        "memory_mb": round(max(side.memory_bytes for side in sides) / 1e6),
                    }
                )
        del encoder
    return {
        "items": len(catalogue),
        "pictures": "MovieLens posters" if real else "rendered",
        "device": device,
        "workers": f"{options.workers} {options.n_workers or ''}".strip(),
        "machine": machine(),
        "rows": rows,
    }


def _plain(
    options: argparse.Namespace, model: str, folder: Path, catalogue: Catalogue, kind: str
) -> float | None:
    """Items a second of the plain loop, where it is asked for and there is one."""
    modality, text = KINDS[kind]
    if not options.plain or model == VLMO or modality == "fused":
        return None
    root = Path(catalogue.image_root)
    paths = [root / path for path in catalogue.items["image"]] if modality == "image" else []
    return plain_items_per_s(model, folder / f"{model}.safetensors", paths, catalogue.texts(text))


def in_words(result: dict[str, object]) -> tuple[str, bool]:
    """A line for each measurement, and whether every goal is reached."""
    lines, reached = [], True
    rows = result["rows"]
    assert isinstance(rows, list)
    for row in rows:
        line = (
            f"{row['model']} {row['kind']} {row['precision']}: extraction {row['extraction_items_per_s']} "
            f"items/s, forward pass alone {row['ceiling_items_per_s']} items/s, ratio {row['ratio']} (goal "
            f"{MIN_RATIO}); waiting for data {row['waiting_share']:.1%} of the time; memory "
            f"{row['memory_mb']} MB above the model (goal {MAX_MEMORY_BYTES / 1e6:.0f})"
        )
        if row["times_plain"]:
            line += f"; {row['times_plain']} times the plain loop's {row['plain_items_per_s']} items/s"
        if row["precision"] != "float32":
            line += f"; lowest cosine {row['cosine']}, {row['overlap']:.1%} of neighbours kept"
        lines.append(line)
        reached &= row["ratio"] >= MIN_RATIO and row["memory_mb"] <= MAX_MEMORY_BYTES / 1e6
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
        "--models",
        nargs="+",
        default=["ViT-B-32"],
        help=f"open_clip architectures, or {VLMO} (default: ViT-B-32)",
    )
    parser.add_argument("--posters", type=Path, default=POSTERS, help="folder of the MovieLens posters")
    parser.add_argument(
        "--kinds", nargs="+", choices=list(KINDS), default=["images", "plots"], help="default: images plots"
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=["float32", "bfloat16", "float16"],
        default=["float32"],
        help="the first one is what the others are compared with (default: float32)",
    )
    parser.add_argument("--plain", action="store_true", help="also run a plain loop, and compare with it")
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
    text, reached = in_words(result)
    report(result, as_json=options.json, save=options.save, text=text)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
