"""Seconds an epoch, seconds a validation, and peak memory of every recommender, side by side.

Each model trains in a process of its own, on the Amazon Baby split where that folder is there, else on random
pairs of its size, with random features of 512 (image) and 384 (text) numbers: speed does not depend on their
values. Batches of 2,048, embeddings of 64 numbers, two threads. One epoch warms up, the fastest of the next
ones counts. The bound is what an epoch takes whatever the code does, at the speeds measured in the same
process. In bytes: Adam reads a parameter, its gradient and two moments and writes three of them, a step; and
a graph layer gathers one embedding an edge, forward and backward. In FLOPs: the dense products of one step
and of its backward pass, counted as they run.

With --beside, MMRec's own code takes its turn after each of ours that it has too, on the same pairs and
features, with the same batch, length of embeddings and layers, in the same run. With --rounds, both take
turns that often, a process each time, and of each time the least counts: a machine that is slow for some
minutes because of its neighbours is then so for both.

Examples: python -m benchmarks.training
          python -m benchmarks.training --models lightgcn freedom --epochs 5
          python -m benchmarks.training --beside MMRec --beside-python MMRec/.venv/bin/python --rounds 3
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import machine, report
from recommenders.evaluation import EvaluationConfig, evaluate
from recommenders.feature_input import FeatureTable
from recommenders.interactions import Interactions
from recommenders.models.base import Recommender
from recommenders.models.registry import MODELS, Setting, build_model
from recommenders.sampling import TrainingPairs
from recommenders.training import TrainingConfig, train

BABY = Path(__file__).resolve().parents[2] / "shared" / "data" / "amazon-baby" / "5-core"
N_USERS, N_ITEMS, N_PAIRS = 19_445, 7_050, 118_551
WIDTHS = {"image": 512, "text": 384}
DIM, BATCH_SIZE = 64, 2048
_FLOAT_BYTES = 4
_ADAM_TRANSFERS = 7


SAME: dict[str, dict[str, Setting]] = {"lightgcn": {"n_layers": 2}}
"""Settings beside the defaults, so that both sides do the same."""
BESIDE: dict[str, tuple[str, dict[str, object]]] = {
    "bpr": ("BPR", {}),
    "vbpr": ("VBPR", {}),
    "lightgcn": ("LightGCN", {"n_layers": 2}),
    "freedom": ("FREEDOM", {}),
    "bm3": ("BM3", {"n_layers": 1}),
    "mgcn": ("MGCN", {}),
    "lattice": ("LATTICE", {}),
    "slmrec": ("SLMRec", {}),
    "mmgcn": ("MMGCN", {"n_layers": 2}),
}
"""Our name -> the other side's, and its settings."""


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


def random_features() -> dict[str, NDArray[np.float32]]:
    """Vectors for all items, modality by modality."""
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((N_ITEMS, width), np.float32) for name, width in WIDTHS.items()}


def bandwidth() -> float:
    """Bytes a second that both threads read and write, copying 400 MB."""
    source, target = torch.rand(100_000_000), torch.empty(100_000_000)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * _FLOAT_BYTES / best


def arithmetic() -> float:
    """FLOPs a second of both threads in a large product of float32 matrices."""
    left, right = torch.rand(2048, 2048), torch.rand(2048, 2048)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def flops_of_step(model: Recommender, pairs: Interactions, features: FeatureTable) -> int:
    """FLOPs of the dense products of one batch's loss and its backward pass."""
    if not model.is_trainable:
        return 0
    model.train()
    model.start_epoch(features)
    batch = next(TrainingPairs(pairs).epoch(BATCH_SIZE, 1, torch.Generator().manual_seed(0)))
    with FlopCounterMode(display=False) as counter:
        model.loss(batch, features).backward()  # type: ignore[no-untyped-call] # torch leaves it without types
    return int(counter.get_total_flops())


def measure_one(name: str, epochs: int) -> dict[str, object]:
    """One model in this process."""
    torch.set_num_threads(2)
    pairs, valid = baby("train"), baby("val")
    entry = MODELS[name]
    vectors = {modality: torch.from_numpy(values) for modality, values in random_features().items()}
    present = {modality: torch.ones(N_ITEMS, dtype=torch.bool) for modality in WIDTHS}
    features = FeatureTable(vectors, present) if entry.model.needs_features else FeatureTable()
    settings = ({"dim": DIM} if "dim" in entry.config.model_fields else {}) | SAME.get(name, {})
    start = time.perf_counter()
    model = build_model(name, settings, pairs, features, np.random.default_rng(0))
    built = time.perf_counter() - start
    config = TrainingConfig(epochs=epochs + 2, batch_size=BATCH_SIZE, eval_every=10_000, patience=0)
    evaluation = EvaluationConfig(ks=(20,))
    trained = train(
        model, pairs, valid, features, config, evaluation=evaluation, rng=np.random.default_rng(1)
    )
    seconds = [row["seconds"] for row in trained.history][1:-1]  # the last one is evaluated, too
    model.eval()
    with torch.no_grad():
        start = time.perf_counter()
        evaluate(model.scorer(features), valid, pairs, evaluation)
        evaluated = time.perf_counter() - start
    # As the system counted it, for both sides: who looks again and again takes time from what is measured.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    speed, peak_flops = bandwidth(), arithmetic()
    flops = flops_of_step(model, pairs, features)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    steps = -(-len(pairs.user_rows) // BATCH_SIZE)
    layers = getattr(getattr(model, "config", None), "n_layers", 0)
    moved = steps * n_parameters * _FLOAT_BYTES * _ADAM_TRANSFERS
    moved += steps * 2 * layers * 2 * len(pairs.user_rows) * DIM * _FLOAT_BYTES
    return {
        "model": name,
        "epoch_s": round(min(seconds), 3) if seconds else None,
        "bytes_s": round(moved / speed, 3) if seconds else None,
        "flops_s": round(steps * flops / peak_flops, 3) if seconds else None,
        "evaluation_s": round(evaluated, 3),
        "build_s": round(built, 3),
        "memory_mb": round(peak / 1e6),
        "parameters": n_parameters,
    }


def write_for_mmrec(folder: Path) -> None:
    """Write pairs and features as MMRec reads them."""
    target = folder / "baby"
    target.mkdir(parents=True)
    lines = ["userID\titemID\tx_label"]
    for label, part in enumerate(("train", "val", "test")):
        pairs = baby(part)
        rows = zip(pairs.user_rows.tolist(), pairs.item_rows.tolist(), strict=True)
        lines += [f"{user}\t{item}\t{label}" for user, item in rows]
    (target / "baby.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, values in random_features().items():
        np.save(target / f"{name}_feat.npy", values)


def measure_beside(name: str, epochs: int, checkout: Path, python: str, data: Path) -> dict[str, float]:
    """What MMRec takes for the same; empty where it has no such model.

    Raises:
        RuntimeError: It did not run; the message ends with its own.
    """
    if name not in BESIDE:
        return {}
    model, settings = BESIDE[name]
    driver = Path(__file__).with_name("mmrec_driver.py").resolve()
    command = [python, str(driver), model, f"{data}/", str(epochs + 1), json.dumps(settings)]
    done = subprocess.run(command, cwd=checkout / "src", capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"MMRec's {model} did not run: {done.stderr[-2000:]}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure_in_process(name: str, epochs: int) -> dict[str, Any]:
    """One of our models in a process of its own.

    Raises:
        RuntimeError: It did not run; the message ends with its own.
    """
    command = [sys.executable, "-m", "benchmarks.training", "--one", "--models", name]
    command += ["--epochs", str(epochs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} did not run: {done.stderr[-2000:]}")
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def best_of(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The least of each time, and the most memory."""
    best = dict(rounds[0])
    for name, value in best.items():
        if name.endswith("_s") and value is not None:
            best[name] = min(each[name] for each in rounds)
        elif name == "memory_mb":
            best[name] = max(each[name] for each in rounds)
    return best


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
    parser.add_argument(
        "--rounds", type=int, default=1, help="times that each side takes its turn (default: 1)"
    )
    parser.add_argument("--beside", type=Path, help="a checkout of MMRec to run beside")
    parser.add_argument(
        "--beside-python", default=sys.executable, help="a Python that has what MMRec needs (default: this)"
    )
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--save", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_one(options.models[0], options.epochs)))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if options.beside:
            write_for_mmrec(Path(folder))
        for name in options.models:
            ours, others = [], []
            for _ in range(options.rounds):
                ours.append(measure_in_process(name, options.epochs))
                if options.beside:
                    beside = options.beside, options.beside_python, Path(folder)
                    others.append(measure_beside(name, options.epochs, *beside))
            row = best_of(ours)
            if options.beside:
                row["beside"] = best_of(others)
            rows.append(row)
            print(_line(row), file=sys.stderr)
    head = ["model", "epoch", "bound: bytes", "FLOPs", "of the bound", "validation", "build", "peak memory"]
    head += ["MMRec's epoch", "ratio", "its validation", "its memory"] if options.beside else []
    text = "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *map(_line, rows)])
    ratios = [row["beside"]["epoch_s"] / row["epoch_s"] for row in rows if row.get("beside")]
    if ratios:
        text += f"\n\nGeometric mean of the {len(ratios)} ratios: {np.exp(np.mean(np.log(ratios))):.1f}"
    report({"rows": rows, "machine": machine()}, as_json=options.json, save=options.save, text=text)
    return 0


def _line(row: dict[str, Any]) -> str:
    cells = [row["model"], "", "", "", ""]
    if row["epoch_s"] is not None:
        share = (row["bytes_s"] + row["flops_s"]) / row["epoch_s"]
        seconds = [f"{row[key]:.2f} s" for key in ("epoch_s", "bytes_s", "flops_s")]
        cells[1:] = [*seconds, f"{share:.0%}"]
    cells += [f"{row['evaluation_s']:.2f} s", f"{row['build_s']:.2f} s", f"{row['memory_mb']} MB"]
    if "beside" in row:
        other = row["beside"]
        cells += (
            [
                f"{other['epoch_s']:.2f} s",
                f"{other['epoch_s'] / row['epoch_s']:.1f}",
                f"{other['evaluation_s']:.2f} s",
                f"{other['memory_mb']} MB",
            ]
            if other
            else [""] * 4
        )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
