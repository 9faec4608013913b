"""Seconds an epoch, seconds a validation, and peak memory of every recommender, side by side.

Each model trains in a process of its own, on the Amazon Baby split where that folder is there, else on random
pairs of its size, with random features of 512 (image) and 384 (text) numbers: speed does not depend on their
values. Batches of 2,048, embeddings of 64 numbers, two threads. One epoch warms up, the fastest of the next
ones counts. The bound is what an epoch must move through memory whatever the code does, at the bandwidth
measured in the same process: Adam reads a parameter, its gradient and two moments and writes three of them, a
step; and a graph layer gathers one embedding an edge, forward and backward.

Examples: python -m benchmarks.training
          python -m benchmarks.training --models lightgcn freedom --epochs 5
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import PeakMemory, machine, report
from recommenders.evaluation import EvaluationConfig, evaluate
from recommenders.feature_input import FeatureTable
from recommenders.interactions import Interactions
from recommenders.models.registry import MODELS, build_model
from recommenders.training import TrainingConfig, train

BABY = Path(__file__).resolve().parents[2] / "shared" / "data" / "amazon-baby" / "5-core"
N_USERS, N_ITEMS, N_PAIRS = 19_445, 7_050, 118_551
WIDTHS = {"image": 512, "text": 384}
DIM, BATCH_SIZE = 64, 2048
_FLOAT_BYTES = 4
_ADAM_TRANSFERS = 7
TOOLKIT_S = {
    "bpr": 0.9,
    "vbpr": 2.0,
    "lightgcn": 4.5,
    "freedom": 5.0,
    "bm3": 6.5,
    "mgcn": 12.5,
    "lattice": 23.0,
    "slmrec": 21.0,
    "mmgcn": 84.0,
}
"""Seconds an epoch that a well-known toolkit took on such a machine, for orientation."""


def baby(part: str) -> Interactions:
    """One part of the split, or random pairs of its size."""
    path = BABY / f"{part}.json"
    if not path.exists():
        rng = np.random.default_rng({"train": 0, "val": 1, "test": 2}[part])
        n_pairs = N_PAIRS if part == "train" else N_PAIRS // 6
        return Interactions(
            rng.integers(0, N_USERS, n_pairs), rng.integers(0, N_ITEMS, n_pairs), N_USERS, N_ITEMS
        )
    lists = json.loads(path.read_text(encoding="utf-8"))
    pairs = np.array([(int(user), item) for user, items in lists.items() for item in items], np.int64)
    return Interactions(pairs[:, 0], pairs[:, 1], N_USERS, N_ITEMS)


def bandwidth() -> float:
    """Bytes a second that both threads read and write, copying 400 MB."""
    source, target = torch.rand(100_000_000), torch.empty(100_000_000)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * _FLOAT_BYTES / best


def measure_one(name: str, epochs: int) -> dict[str, object]:
    """One model in this process."""
    torch.set_num_threads(2)
    speed = bandwidth()
    pairs, valid = baby("train"), baby("val")
    entry = MODELS[name]
    rng = np.random.default_rng(0)
    vectors = {
        modality: torch.from_numpy(rng.standard_normal((N_ITEMS, width), np.float32))
        for modality, width in WIDTHS.items()
    }
    present = {modality: torch.ones(N_ITEMS, dtype=torch.bool) for modality in WIDTHS}
    features = FeatureTable(vectors, present) if entry.model.needs_features else FeatureTable()
    settings = {"dim": DIM} if "dim" in entry.config.model_fields else {}
    with PeakMemory(interval_s=0.02) as memory:
        start = time.perf_counter()
        model = build_model(name, settings, pairs, features, np.random.default_rng(0))
        built = time.perf_counter() - start
        config = TrainingConfig(epochs=epochs + 1, batch_size=BATCH_SIZE, eval_every=10_000, patience=0)
        evaluation = EvaluationConfig(ks=(20,))
        trained = train(
            model, pairs, valid, features, config, evaluation=evaluation, rng=np.random.default_rng(1)
        )
        seconds = [row["seconds"] for row in trained.history][1:]
        model.eval()
        with torch.no_grad():
            start = time.perf_counter()
            evaluate(model.scorer(features), valid, pairs, evaluation)
            evaluated = time.perf_counter() - start
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    steps = -(-len(pairs.user_rows) // BATCH_SIZE)
    layers = getattr(getattr(model, "config", None), "n_layers", 0)
    moved = steps * n_parameters * _FLOAT_BYTES * _ADAM_TRANSFERS
    moved += steps * 2 * layers * 2 * len(pairs.user_rows) * DIM * _FLOAT_BYTES
    return {
        "model": name,
        "epoch_s": round(min(seconds), 3) if seconds else None,
        "bound_s": round(moved / speed, 3) if seconds else None,
        "evaluation_s": round(evaluated, 3),
        "build_s": round(built, 3),
        "memory_mb": round(memory.peak / 1e6),
        "parameters": n_parameters,
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="default: all"
    )
    parser.add_argument(
        "--epochs", type=int, default=2, help="measured epochs; the fastest counts (default: 2)"
    )
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--save", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_one(options.models[0], options.epochs)))
        return 0
    rows = []
    for name in options.models:
        command = [sys.executable, "-m", "benchmarks.training", "--one", "--models", name]
        done = subprocess.run(
            [*command, "--epochs", str(options.epochs)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(f"{name} failed:\n{done.stderr}", file=sys.stderr)
            return 1
        rows.append(json.loads(done.stdout))
        print(_line(rows[-1]), file=sys.stderr)
    text = "\n".join(
        ["| model | epoch | of the bound | faster than the toolkit | validation | build | peak memory |"]
        + ["|---|---|---|---|---|---|---|"]
        + [_line(row) for row in rows]
    )
    report({"rows": rows, "machine": machine()}, as_json=options.json, save=options.save, text=text)
    return 0


def _line(row: dict[str, object]) -> str:
    epoch, bound = row["epoch_s"], row["bound_s"]
    cells = [str(row["model"]), "", "", ""]
    if isinstance(epoch, float) and isinstance(bound, float):
        toolkit = TOOLKIT_S.get(str(row["model"]))
        cells[1:] = [f"{epoch:.2f} s", f"{bound / epoch:.0%}", f"{toolkit / epoch:.1f}x" if toolkit else ""]
    cells += [f"{row['evaluation_s']:.2f} s", f"{row['build_s']:.2f} s", f"{row['memory_mb']} MB"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
