"""What an epoch of joint training costs: a ViT-B/32 on real posters, six ways, each in its own process.

- naive: every item of the batch, repeated ones too, decoded and run through the encoder, one graph of all.
- full: each distinct item once, negatives from a pool, gradients by chunks.
- whole: as full, the chunk as large as the batch: more memory, but nothing runs twice.
- lora, last-2: low-rank updates; the last two blocks, above kept states.
- side: networks beside the blocks, on kept states (IISAN).

Weights are random, as speed does not depend on them. A few steps are timed, and an epoch is the fastest times
its steps (the first also waits for memory that no step had before). The naive way is timed on a quarter of
the batch, as the whole does not fit, and its time and memory are four times that. Keeping the states is timed
apart, as it is done once.

Examples: python -m benchmarks.joint --data ../shared/data/movielens-posters
          python -m benchmarks.joint --ways full last-2 side --batch 512 2048
          python -m benchmarks.joint --ways naive full --precision float32 bfloat16
          python -m benchmarks.joint --ways naive full --activations-mb 12288 --rounds 2
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch.nn.functional import normalize

from benchmarks.measure import PeakMemory, machine, report
from benchmarks.movielens_posters import DEFAULT_DATA
from features.catalogue import Catalogue
from features.encoders.base import Encoder, EncoderInfo
from features.encoders.clip import ClipEncoder, build_clip
from features.encoders.clip_tokens import ClipTokenizer
from features.encoders.pixels import PixelConfig
from features.live.building import LiveConfig, live_encoder
from features.live.encoder import CatalogueEncoder
from features.tuning.modes import Tuned, TuningConfig, prepare_tuning
from features.tuning.side import SideConfig
from features.tuning.side_mode import SideTuned, prepare_side
from pipeline.config import parse_config
from pipeline.datasets.config import DatasetConfig
from pipeline.reading import ChoosingData, read_catalogue, read_for_choosing
from pipeline.stages.prepare_dataset import prepare_dataset
from pipeline.store import Store
from recommenders.feature_input import FeatureTable
from recommenders.live import LiveTable
from recommenders.models.base import Recommender
from recommenders.models.registry import build_model
from recommenders.pooled import PooledPairs
from recommenders.sampling import Batch, TrainingPairs

WAYS = ("naive", "full", "whole", "lora", "last-2", "side")
VIT_B_32 = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}
_MODES = {"naive": "full", "full": "full", "whole": "full", "lora": "lora", "last-2": "last-n"}
_NAIVE_SHARE = 4
"""The naive way runs this part of a batch."""


@dataclass(frozen=True)
class World:
    """The posters as a recommender and an encoder take them."""

    pairs: ChoosingData
    catalogue: Catalogue
    present: torch.Tensor
    table: FeatureTable


def encoder() -> Encoder:
    """A ViT-B/32 of CLIP with random weights."""
    torch.manual_seed(0)
    info = EncoderInfo(
        spec="vit-b-32",
        name="vit-b-32",
        family="open_clip",
        weights_sha256="",
        preprocessing_sha256="",
        modalities=("image", "text"),
        dims={"image": 512, "text": 512},
        image_size_px=224,
        context_length=77,
        n_parameters=0,
    )
    return ClipEncoder(info, build_clip(VIT_B_32), PixelConfig(size_px=224), ClipTokenizer(77)).eval()


def tuned_for(way: str, model: Encoder) -> Tuned | SideTuned:
    """The encoder as a way trains it."""
    if way == "side":
        return prepare_side(model, SideConfig(towers=("image",)))
    return prepare_tuning(model, TuningConfig.model_validate({"mode": _MODES[way], "last_n": 2}))


def world(data: Path, folder: Path) -> World:
    """Import the posters; their features are random, as an encoder without training makes no better ones."""
    tables = {
        "items": str(data / "items.parquet"),
        "interactions": str(data / "interactions.parquet"),
        "image_folder": str(data),
    }
    raw = {
        "importer": "tables",
        "tables": tables,
        "filters": {"min_rating": 4, "k_core": 5, "keep_unused_items": False},
        "split": {"rule": "ratio_mmrec", "seed": 0},
    }
    dataset = prepare_dataset(Store(folder / "store"), parse_config(raw, DatasetConfig)).artefact
    pairs, catalogue = read_for_choosing(dataset), read_catalogue(dataset)
    has_picture = catalogue.items["image_hash"].is_not_null().cast(pl.Int8).to_numpy().astype(bool)
    present = torch.from_numpy(has_picture)
    vectors = normalize(torch.randn(len(pairs.item_ids), 512), dim=1)
    return World(pairs, catalogue, present, FeatureTable({"image": vectors}, {"image": present}))


def measure_one(
    way: str,
    batch_size: int,
    *,
    data: Path,
    precision: str,
    chunk: int,
    activations_mb: int,
    pool: int,
    n_steps: int,
) -> dict[str, object]:
    """One way in this process: seconds of a step, of an epoch, and the most memory of a step."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        on = world(data, Path(folder))
        train = on.pairs.train
        tuned = tuned_for(way, encoder())
        recommender = build_model("freedom", {}, train, on.table, np.random.default_rng(0)).train()
        recommender.start_epoch(on.table)
        naive = way == "naive"
        config = LiveConfig.model_validate(
            {
                "chunk": 2 * batch_size if way == "whole" else chunk,
                "activations_mb": activations_mb,
                "precision": precision,
                "pixel_cache_mb": 0 if naive else 16_384,
            }
        )
        drawn = TrainingPairs(train) if naive else PooledPairs(train, pool)
        size = batch_size // _NAIVE_SHARE if naive else batch_size
        batches = list(
            islice(drawn.epoch(size, 1, torch.Generator().manual_seed(0)), 1 if naive else n_steps)
        )
        started = time.perf_counter()
        with live_encoder(
            tuned, on.catalogue, ("image",), on.table.present, config, folder=Path(folder) / "live"
        ) as rows:
            states_s = time.perf_counter() - started
            step = naive_step(rows, recommender, on) if naive else our_step(rows, recommender, on)
            for batch in batches:  # so that nothing is loaded or, but for the naive way, decoded below
                items = items_of(batch)
                rows.encode_all("image", items[on.present[items]][: 8 if naive else None])
            optimizer = torch.optim.AdamW(list(rows.parameters()), lr=1e-5)
            seconds, counts = [], []
            with PeakMemory(interval_s=0.05) as memory:
                for batch in batches:
                    started = time.perf_counter()
                    optimizer.zero_grad()
                    counts.append(step(batch))
                    optimizer.step()
                    seconds.append(time.perf_counter() - started)
    factor = _NAIVE_SHARE if naive else 1
    step_s = factor * min(seconds)
    return {
        "way": way,
        "batch": batch_size,
        "precision": precision,
        "items_a_step": factor * int(np.mean(counts)),
        "step_s": round(step_s, 3),
        "epoch_s": round(step_s * -(-len(train.user_rows) // batch_size), 1),
        "states_s": round(states_s, 1) if way in {"last-2", "side"} else 0.0,
        "memory_mb": round(factor * memory.growth / 1e6),
    }


def items_of(batch: Batch) -> torch.Tensor:
    """Distinct items of a batch."""
    return torch.unique(torch.cat([batch.positives, batch.negatives.flatten()]))


def our_step(rows: CatalogueEncoder, recommender: Recommender, on: World) -> Callable[[Batch], int]:
    """What joint training does with a batch; returns how many pictures it encoded."""
    live = LiveTable(on.table, rows, lambda _, raw: normalize(raw, dim=1))

    def step(batch: Batch) -> int:
        items = items_of(batch)
        live.step(items, lambda table, _: recommender.loss(batch, table))
        return int(on.present[items].sum())

    return step


def naive_step(rows: CatalogueEncoder, recommender: Recommender, on: World) -> Callable[[Batch], int]:
    """Decode and encode every place of the batch with its graph, and let autograd do all of it."""
    source = rows.sources["image"]

    def step(batch: Batch) -> int:
        items = torch.cat([batch.positives, batch.negatives.flatten()])
        items = items[on.present[items]]
        with rows.mixed():
            vectors = normalize(source.vectors(items).float(), dim=1)
        # Repeated items: the last of them stands in the table, as all are equal.
        live = on.table.vectors["image"].index_copy(0, items, vectors)
        recommender.loss(batch, FeatureTable({"image": live}, on.table.present)).backward()
        return len(items)

    return step


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.joint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of items.parquet and images/")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--batch", nargs="+", type=int, default=[512])
    parser.add_argument("--precision", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--chunk", type=int, default=64, help="items encoded at a time (default: 64)")
    parser.add_argument(
        "--activations-mb", type=int, default=0, help="MiB of activations that are kept (default: 0)"
    )
    parser.add_argument("--pool", type=int, default=64, help="items negatives are drawn from (default: 64)")
    parser.add_argument("--steps", type=int, default=2, help="steps timed (default: 2)")
    parser.add_argument(
        "--rounds", type=int, default=1, help="turns that ways take, of which the fastest counts (default: 1)"
    )
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--save", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    if options.one:
        measured = measure_one(
            options.ways[0],
            options.batch[0],
            data=options.data,
            precision=options.precision[0],
            chunk=options.chunk,
            activations_mb=options.activations_mb,
            pool=options.pool,
            n_steps=options.steps,
        )
        print(json.dumps(measured))
        return 0
    best: dict[tuple[object, ...], dict[str, Any]] = {}
    turns = list(product(options.ways, options.precision, options.batch)) * options.rounds
    for way, precision, batch in turns:
        command = [sys.executable, "-m", "benchmarks.joint", "--one", "--ways", way, "--batch", str(batch)]
        command += ["--data", str(options.data), "--precision", precision, "--chunk", str(options.chunk)]
        command += ["--pool", str(options.pool), "--steps", str(options.steps)]
        command += ["--activations-mb", str(options.activations_mb)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{way} failed:\n{done.stderr}", file=sys.stderr)
            return 1
        row = json.loads(done.stdout)
        print(_line(row), file=sys.stderr)
        key = (way, precision, batch)
        if key not in best or row["step_s"] < best[key]["step_s"]:
            best[key] = row
    rows = list(best.values())
    head = ["way", "batch", "precision", "items a step", "step", "epoch", "states, once", "memory of a step"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *map(_line, rows)]
    report(
        {"rows": rows, "machine": machine()}, as_json=options.json, save=options.save, text="\n".join(lines)
    )
    return 0


def _line(row: dict[str, object]) -> str:
    cells = [row["way"], row["batch"], row["precision"], row["items_a_step"], f"{row['step_s']} s"]
    cells += [f"{row['epoch_s']} s", f"{row['states_s']} s", f"{row['memory_mb']} MB"]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    sys.exit(main())
