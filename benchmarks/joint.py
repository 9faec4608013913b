"""What an epoch of joint training costs: a ViT-B/32 on real posters, five ways, each in its own process.

- naive: every item of the batch, repeated ones too, through the whole encoder, with its graph kept.
- full: each distinct item once, negatives from a pool, gradients by chunks.
- lora, last-2: the same with low-rank updates, or with the last two blocks above kept states.
- side: adapters on kept states, where this installation has them.

Weights are random, as speed does not depend on them. A few steps are timed, and an epoch is their median
times its steps; the naive way is timed on a quarter of the batch, as the whole does not fit, and its time and
memory are four times that. Keeping the states is timed apart, as it is done once.

Examples: python -m benchmarks.joint --data ../shared/data/movielens-posters
          python -m benchmarks.joint --ways full last-2 --batch 512 2048
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch.nn.functional import normalize

from benchmarks.measure import PeakMemory, machine, report
from benchmarks.movielens_posters import DEFAULT_DATA
from features.encoders.base import Encoder, EncoderInfo
from features.encoders.clip import ClipEncoder, build_clip
from features.encoders.clip_tokens import ClipTokenizer
from features.encoders.pixels import PixelConfig
from features.live.building import LiveConfig, live_encoder
from features.tuning.modes import Tuned, TuningConfig, prepare_tuning
from pipeline.config import parse_config
from pipeline.datasets.config import DatasetConfig
from pipeline.reading import read_catalogue, read_for_choosing
from pipeline.stages.prepare_dataset import prepare_dataset
from pipeline.store import Store
from recommenders.feature_input import FeatureTable
from recommenders.live import LiveTable
from recommenders.models.registry import build_model
from recommenders.pooled import PooledPairs
from recommenders.sampling import Batch, TrainingPairs

WAYS = ("naive", "full", "lora", "last-2")
POOL, STEPS = 64, 3
VIT_B_32 = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}


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


def tuned_for(way: str, model: Encoder) -> Tuned:
    """The encoder as a way trains it."""
    modes = {"naive": "full", "full": "full", "lora": "lora", "last-2": "last-n"}
    return prepare_tuning(model, TuningConfig.model_validate({"mode": modes[way], "last_n": 2}))


def measure_one(way: str, batch_size: int, data: Path, precision: str, chunk: int) -> dict[str, object]:
    """One way in this process: seconds of a step, of an epoch, and the most memory of a step."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
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
        dataset = prepare_dataset(store, parse_config(raw, DatasetConfig)).artefact
        pairs, catalogue = read_for_choosing(dataset), read_catalogue(dataset)
        n_items = len(pairs.item_ids)
        model = encoder()
        tuned = tuned_for(way, model)
        present = torch.from_numpy(
            catalogue.items["image_hash"].is_not_null().cast(pl.Int8).to_numpy().astype(bool)
        )
        vectors = normalize(torch.randn(n_items, 512), dim=1)
        table = FeatureTable({"image": vectors}, {"image": present})
        recommender = build_model("freedom", {}, pairs.train, table, np.random.default_rng(0)).train()
        recommender.start_epoch(table)
        config = LiveConfig.model_validate({"chunk": chunk, "precision": precision})
        started = time.perf_counter()
        with live_encoder(
            tuned, catalogue, ("image",), table.present, config, folder=Path(folder) / "live"
        ) as rows:
            states = time.perf_counter() - started
            live = LiveTable(table, rows, lambda _, raw_vectors: normalize(raw_vectors, dim=1))
            source = rows.sources["image"]
            source.vectors(torch.nonzero(present).squeeze(1)[:2])  # the first call loads libraries
            drawn = PooledPairs(pairs.train, POOL) if way != "naive" else TrainingPairs(pairs.train)
            size = batch_size // 4 if way == "naive" else batch_size
            batches = iter(drawn.epoch(size, 1, torch.Generator().manual_seed(0)))
            optimizer = torch.optim.AdamW(list(rows.parameters()), lr=1e-5)
            seconds, counts = [], []
            warm = [next(batches) for _ in range(1 if way == "naive" else STEPS)]
            for batch in warm:  # decoded pictures are kept, so that decoding is not timed below
                live_items = items_of(batch)
                if way != "naive":
                    rows.encode_all("image", live_items[present[live_items]])
            with PeakMemory(interval_s=0.05) as memory:
                before = memory.peak
                for batch in warm:
                    started = time.perf_counter()
                    optimizer.zero_grad()
                    if way == "naive":
                        count = naive_step(rows.sources["image"], recommender, table, batch, present)
                    else:
                        items = items_of(batch)
                        live.step(items, lambda live_table, _, b=batch: recommender.loss(b, live_table))
                        count = int(present[items].sum())
                    optimizer.step()
                    seconds.append(time.perf_counter() - started)
                    counts.append(count)
                peak = memory.peak - before
        factor = 4 if way == "naive" else 1
        step = factor * float(np.median(seconds))
        n_steps = -(-len(pairs.train.user_rows) // batch_size)
    return {
        "way": way,
        "batch": batch_size,
        "precision": precision,
        "items_a_step": factor * int(np.mean(counts)),
        "step_s": round(step, 2),
        "epoch_s": round(step * n_steps, 1),
        "states_s": round(states, 1) if way in {"last-2", "side"} else 0.0,
        "memory_mb": round(factor * peak / 1e6),
    }


def items_of(batch: Batch) -> torch.Tensor:
    """Distinct items of a batch."""
    return torch.unique(torch.cat([batch.positives, batch.negatives.flatten()]))


def naive_step(
    source: object, recommender: torch.nn.Module, table: FeatureTable, batch: Batch, present: torch.Tensor
) -> int:
    """Encode every place of the batch with its graph, and let autograd do all of it."""
    items = torch.cat([batch.positives, batch.negatives.flatten()])
    items = items[present[items]]
    vectors = normalize(source.vectors(items), dim=1)  # type: ignore[attr-defined]
    # Repeated items: the last of them stands in the table, as all are equal.
    live = table.vectors["image"].index_copy(0, items, vectors)
    recommender.loss(batch, FeatureTable({"image": live}, table.present)).backward()
    return len(items)


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
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--chunk", type=int, default=64, help="items encoded at a time")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--save", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    if options.one:
        measured = measure_one(
            options.ways[0], options.batch[0], options.data, options.precision, options.chunk
        )
        print(json.dumps(measured))
        return 0
    rows = []
    for way in options.ways:
        for batch in options.batch:
            command = [
                sys.executable,
                "-m",
                "benchmarks.joint",
                "--one",
                "--ways",
                way,
                "--batch",
                str(batch),
            ]
            command += ["--data", str(options.data), "--precision", options.precision]
            command += ["--chunk", str(options.chunk)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{way} failed:\n{done.stderr}", file=sys.stderr)
                return 1
            rows.append(json.loads(done.stdout))
            print(_line(rows[-1]), file=sys.stderr)
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
