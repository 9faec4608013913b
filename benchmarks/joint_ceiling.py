"""How near a joint training step comes to the forward and backward pass of its items alone.

A ViT-B/32 of CLIP with random weights and FREEDOM, on a catalogue as large as Amazon Baby's: its training
pairs where the split is beside this checkout, else random ones; random pictures, texts of random words and of
lengths as titles with descriptions have. A step is all of it: reading pixels and tokens, both towers, the
recommender's loss, the gradients, both optimisers. The ceiling runs the same chunks of the same pixels and
tokens, on the device already, forwards and backwards, and nothing else; both take turns. The chunk is as
large as the device's memory lets it be: in smaller ones a step runs its items forwards twice.

Examples: python -m benchmarks.joint_ceiling
          python -m benchmarks.joint_ceiling --items 200 --batch 64 --chunk 128 --precision float32
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl
import torch
from PIL import Image
from torch.nn.functional import normalize

from benchmarks.joint import encoder, items_of
from benchmarks.measure import machine, report
from benchmarks.training import BABY, N_ITEMS, N_PAIRS, baby
from features.catalogue import Catalogue, Modality, TextConfig
from features.images import ImageLimits
from features.live.building import LiveConfig, live_encoder
from features.live.encoder import CatalogueEncoder
from features.live.inputs import RowInputs
from features.tuning.modes import TuningConfig, prepare_tuning
from features.tuning.towers import tower_of
from recommenders.feature_input import FeatureTable
from recommenders.interactions import Interactions
from recommenders.live import LiveTable
from recommenders.models.registry import build_model
from recommenders.pooled import PooledPairs
from recommenders.sampling import Batch

GOAL = 0.7
MODALITIES: tuple[Modality, ...] = ("image", "text")
N_PICTURES, SIDE_PX = 64, 256
TEXT = TextConfig(fields=("title",))
_WORDS = ["soft", "blue", "cotton", "baby", "bottle", "set", "with", "for", "the", "stroller", "large", "mat"]


def catalogue_in(folder: Path, n_items: int) -> Catalogue:
    """Items with a picture of noise each, 64 different ones, and a text of 4 to 70 words."""
    rng = np.random.default_rng(0)
    hashes = []
    for number in range(N_PICTURES):
        noise = rng.integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
        picture = folder / f"{number}.jpg"
        Image.fromarray(noise).save(picture)
        hashes.append(hashlib.sha256(picture.read_bytes()).hexdigest())
    n_words = np.clip(rng.lognormal(2.8, 0.8, n_items), 4, 70).astype(int)
    return Catalogue(
        pl.DataFrame(
            {
                "item_id": [str(row) for row in range(n_items)],
                "image": [f"{row % N_PICTURES}.jpg" for row in range(n_items)],
                "image_hash": [hashes[row % N_PICTURES] for row in range(n_items)],
                "title": [" ".join(rng.choice(_WORDS, n)) for n in n_words],
            }
        ),
        str(folder),
    )


def pairs_of(n_items: int) -> Interactions:
    """Amazon Baby's training pairs, or random ones: 17 an item."""
    if n_items == N_ITEMS and BABY.exists():
        return baby("train")
    rng = np.random.default_rng(0)
    n_pairs = N_PAIRS * n_items // N_ITEMS
    n_users = max(n_pairs // 6, 2)
    return Interactions(
        rng.integers(0, n_users, n_pairs), rng.integers(0, n_items, n_pairs), n_users, n_items
    )


def alone(
    rows: CatalogueEncoder, inputs: dict[Modality, RowInputs], items: torch.Tensor, chunk: int
) -> Callable[[], None]:
    """The forward and backward pass of items whose pixels and tokens are on the device already."""
    device = next(rows.tuned.encoder.parameters()).device
    loaded = []
    for modality, of in inputs.items():
        order = sorted(items.tolist(), key=of.length)
        chunks = torch.tensor(order).split(chunk)
        loaded += [(modality, of(some, device)) for some in chunks]

    def run() -> None:
        for modality, tensor in loaded:
            with rows.mixed():
                vectors = tower_of(rows.tuned.encoder, modality).vectors(tensor).float()
            vectors.sum().backward()  # type: ignore[no-untyped-call] # torch leaves it without types

    return run


def seconds_of(run: Callable[[], None], device: torch.device) -> float:
    """Time until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def measure(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Steps and ceilings in turns."""
    device = torch.device(options.device)
    train = pairs_of(options.items)
    catalogue = catalogue_in(folder, options.items)
    tuned = prepare_tuning(encoder().to(device), TuningConfig(mode="full"))
    present = {name: torch.ones(options.items, dtype=torch.bool, device=device) for name in MODALITIES}
    vectors = {name: normalize(torch.randn(options.items, 512, device=device), dim=1) for name in MODALITIES}
    table = FeatureTable(dict(vectors), dict(present))
    recommender = build_model("freedom", {}, train, table, np.random.default_rng(0)).to(device).train()
    recommender.start_epoch(table)
    config = LiveConfig.model_validate({"chunk": options.chunk, "precision": options.precision})
    inputs = {
        name: RowInputs(
            catalogue,
            tuned.encoder,
            name,
            TEXT,
            cache_file=folder / f"pixels-{name}.f16",
            cache_mb=16_384,
            limits=ImageLimits(),
        )
        for name in MODALITIES
    }
    drawn = PooledPairs(train, options.pool, device)
    batches = list(
        islice(drawn.epoch(options.batch, 1, torch.Generator(device).manual_seed(0)), options.steps + 1)
    )
    steps, ceilings, counts = [], [], []
    with live_encoder(
        tuned, catalogue, MODALITIES, table.present, config, folder=folder / "live", text=TEXT
    ) as rows:
        live = LiveTable(table, rows, lambda _, raw: normalize(raw, dim=1))
        optimizers = [
            torch.optim.AdamW(parameters, lr=1e-5, fused=device.type == "cuda")
            for parameters in (list(rows.parameters()), list(recommender.parameters()))
        ]

        def step(batch: Batch, items: torch.Tensor) -> None:
            for optimizer in optimizers:
                optimizer.zero_grad()
            live.step(items, lambda live_table, _: recommender.loss(batch, live_table))
            for optimizer in optimizers:
                optimizer.step()

        for batch in batches:
            items = items_of(batch)
            for name in MODALITIES:  # decoded pictures are kept from the first epoch on
                rows.encode_all(name, items)
            steps.append(seconds_of(partial(step, batch, items), device))
            rows.tuned.train()
            ceilings.append(seconds_of(alone(rows, inputs, items, options.chunk), device))
            counts.append(len(items))
    for of in inputs.values():
        of.close()
    step_s, ceiling_s = sum(steps[1:]), sum(ceilings[1:])  # the first of each warms up
    return {
        "items": options.items,
        "batch": options.batch,
        "chunk": options.chunk,
        "precision": options.precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "items_a_step": round(float(np.mean(counts[1:]))),
        "items_per_s": round(sum(counts[1:]) / step_s, 1),
        "ceiling_items_per_s": round(sum(counts[1:]) / ceiling_s, 1),
        "share": round(ceiling_s / step_s, 3),
        "epoch_s": round(step_s / (len(steps) - 1) * -(-len(train.user_rows) // options.batch), 1),
        "gpu_peak_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 1)
        if device.type == "cuda"
        else None,
    }


def main() -> int:
    """Measure and print; 1 where the share of the ceiling is below the goal."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.joint_ceiling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu", help="cuda where there is one")
    parser.add_argument("--items", type=int, default=N_ITEMS)
    parser.add_argument("--batch", type=int, default=2048, help="pairs of a step (default: 2048)")
    parser.add_argument("--pool", type=int, default=256, help="items negatives are drawn from (default: 256)")
    parser.add_argument("--chunk", type=int, default=4096, help="items encoded at a time (default: 4096)")
    parser.add_argument("--steps", type=int, default=10, help="steps timed, after one more (default: 10)")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--save", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    text = json.dumps(found, indent=2)
    report({**found, "goal": GOAL, "machine": machine()}, as_json=options.json, save=options.save, text=text)
    return 0 if float(str(found["share"])) >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
