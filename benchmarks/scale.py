"""Growth from 10,000 to 1,000,000 items: item graph, an epoch of LightGCN and of FREEDOM, an evaluation.

Synthetic catalogues: I items with clustered vectors of 512 numbers, I / 2 users, 10 I interactions whose
items are drawn by a power law. An epoch has 50 steps whatever the size (each step walks the whole graph, so
that steps of a fixed size would make an epoch quadratic). Each size runs in a process of its own. The slope
is that of log time over log items, by least squares: 1 is linear.

Examples: python -m benchmarks.scale
          python -m benchmarks.scale --items 10000 100000
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
from recommenders.models.registry import build_model
from recommenders.training import TrainingConfig, train

SIZES = (10_000, 100_000, 1_000_000)
WIDTH, DIM = 512, 64
STEPS, EVALUATED_USERS = 50, 10_000
PHASES = ("graph", "lightgcn epoch", "freedom epoch", "evaluation")


def interactions(n_items: int, rng: np.random.Generator) -> tuple[Interactions, Interactions]:
    """About 10 I distinct training pairs, and one pair of 10,000 users to be found."""
    n_users, n_pairs = n_items // 2, 10 * n_items
    popular = (rng.pareto(1.2, n_items) + 0.05) ** 0.75
    bounds = np.cumsum(popular / popular.sum())
    users = rng.integers(0, n_users, n_pairs)
    items = np.searchsorted(bounds, rng.random(n_pairs)).clip(max=n_items - 1)
    keys = np.unique(users * np.int64(n_items) + items)
    training = Interactions(keys // n_items, keys % n_items, n_users, n_items)
    held_users = np.unique(training.user_rows)[:EVALUATED_USERS]
    held = Interactions(held_users, rng.integers(0, n_items, len(held_users)), n_users, n_items)
    return training, held


def measure_one(n_items: int) -> dict[str, object]:
    """One size in this process."""
    torch.set_num_threads(2)
    rng = np.random.default_rng(0)
    training, held = interactions(n_items, rng)
    centres = torch.from_numpy(rng.standard_normal((max(n_items // 50, 1), WIDTH), np.float32))
    vectors = torch.from_numpy(rng.standard_normal((n_items, WIDTH), np.float32))
    vectors += centres[torch.arange(n_items) % len(centres)]
    present = torch.ones(n_items, dtype=torch.bool)
    features = FeatureTable({"image": vectors}, {"image": present})
    batch_size = -(-len(training.user_rows) // STEPS)
    config = TrainingConfig(epochs=1, batch_size=batch_size, eval_every=10_000, patience=0)
    evaluation = EvaluationConfig(ks=(20,))
    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}
    with PeakMemory(interval_s=0.2) as memory:
        for name in ("lightgcn", "freedom"):
            table = features if name == "freedom" else FeatureTable()
            memory.peak = 0
            started = time.perf_counter()
            model = build_model(name, {"dim": DIM, "n_layers": 2}, training, table, np.random.default_rng(0))
            if name == "freedom":  # nearly all of it is the search for neighbours
                seconds["graph"], peaks["graph"] = time.perf_counter() - started, memory.peak
                _tell(n_items, "graph", seconds)
            memory.peak = 0
            # One pair is validated after the only epoch, which costs nothing beside it.
            one = Interactions(held.user_rows[:1], held.item_rows[:1], held.n_users, held.n_items)
            trained = train(
                model, training, one, table, config, evaluation=evaluation, rng=np.random.default_rng(1)
            )
            seconds[f"{name} epoch"] = sum(
                trained.seconds[phase] for phase in ("sampling", "forward", "backward")
            )
            peaks[f"{name} epoch"] = memory.peak
            _tell(n_items, f"{name} epoch", seconds)
        memory.peak = 0
        model.eval()
        started = time.perf_counter()
        with torch.no_grad():
            evaluate(model.scorer(features), held, training, evaluation)
        seconds["evaluation"], peaks["evaluation"] = time.perf_counter() - started, memory.peak
    return {
        "items": n_items,
        "users": training.n_users,
        "pairs": len(training.user_rows),
        "batch_size": batch_size,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_gb": {name: round(value / 1e9, 2) for name, value in peaks.items()},
    }


def _tell(n_items: int, phase: str, seconds: dict[str, float]) -> None:
    """Say how far it is, as a million items take a while."""
    print(f"{n_items:,} items: {phase} {seconds[phase]:.1f} s", file=sys.stderr, flush=True)


def slopes(rows: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    """Slope of log seconds over log items, by phase."""
    sizes = np.log([float(str(row["items"])) for row in rows])
    return {
        phase: round(float(np.polyfit(sizes, np.log([row["seconds"][phase] for row in rows]), 1)[0]), 2)
        for phase in PHASES
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--items", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--save", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_one(options.items[0])))
        return 0
    rows = []
    for n_items in options.items:
        command = [sys.executable, "-m", "benchmarks.scale", "--one", "--items", str(n_items)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(f"{n_items:,} items failed; the reason is above.", file=sys.stderr)
            return 1
        rows.append(json.loads(done.stdout))
        print(_line(rows[-1]), file=sys.stderr)
    head = ["items", "interactions", "batch", *(f"{phase}" for phase in PHASES), "peak memory"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *map(_line, rows)]
    result: dict[str, object] = {"rows": rows, "machine": machine()}
    if len(rows) > 1:
        result["slopes"] = found = slopes(rows)
        lines.append(f"| slope |  |  | {' | '.join(str(found[phase]) for phase in PHASES)} |  |")
    report(result, as_json=options.json, save=options.save, text="\n".join(lines))
    return 0


def _line(row: dict[str, dict[str, float]]) -> str:
    peak = max(row["peak_gb"].values())
    cells = [f"{row['items']:,}", f"{row['pairs']:,}", f"{row['batch_size']:,}"]
    cells += [f"{row['seconds'][phase]} s" for phase in PHASES]
    return f"| {' | '.join([*cells, f'{peak} GB'])} |"


if __name__ == "__main__":
    sys.exit(main())
