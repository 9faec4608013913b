"""Recall@20 and NDCG@20 of the recommenders that read no features, on the Amazon Baby split.

Popularity, BPR-MF and LightGCN with one protocol: Adam at 0.001, batches of 2,048, embeddings of 64 numbers,
one uniform negative, validation Recall@20 every five epochs, the best epoch kept, all items ranked, training
items masked. The split is LATTICE's: train.json, val.json and test.json, from user to item numbers.

Examples: python -m benchmarks.accuracy
          python -m benchmarks.accuracy --models lightgcn --seeds 0
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import machine, report
from benchmarks.training import BABY, baby
from recommenders.evaluation import EvaluationConfig, evaluate
from recommenders.feature_input import FeatureTable
from recommenders.models.registry import Setting, build_model
from recommenders.training import TrainingConfig, train

PROTOCOLS: dict[str, dict[str, Setting]] = {
    "popularity": {},
    "bpr": {"l2": 0.05},
    "lightgcn": {"n_layers": 2, "l2": 0.05},
}
"""Settings beside the defaults."""
METRICS = ("recall@20", "ndcg@20")
MAX_EPOCHS, EVAL_EVERY, PATIENCE = 1000, 5, 20


def measure(name: str, seed: int, settings: dict[str, Setting]) -> dict[str, object]:
    """One model, one seed: its best epoch by validation, and what it reaches on the test part."""
    pairs, valid, test = baby("train"), baby("val"), baby("test")
    features = FeatureTable()
    init_rng, training_rng = np.random.default_rng(seed).spawn(2)
    model = build_model(name, settings, pairs, features, init_rng)
    config = TrainingConfig(epochs=MAX_EPOCHS, eval_every=EVAL_EVERY, patience=PATIENCE)
    evaluation = EvaluationConfig(ks=(20,))
    started = time.perf_counter()
    trained = train(model, pairs, valid, features, config, evaluation=evaluation, rng=training_rng)
    seconds = time.perf_counter() - started
    model.eval()
    with torch.no_grad():
        reached = {
            part: evaluate(model.scorer(features), held_out, pairs, evaluation).metrics
            for part, held_out in (("valid", valid), ("test", test))
        }
    return {
        "model": name,
        "seed": seed,
        "best_epoch": trained.best_epoch,
        "epochs": len(trained.history),
        "seconds": round(seconds),
        **{f"{part} {metric}": reached[part][metric] for part in reached for metric in METRICS},
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=list(PROTOCOLS), default=list(PROTOCOLS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="other settings of the model"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--save", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    if not BABY.exists():
        print(
            "The Amazon Baby split is not beside this checkout; nothing was measured.",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.models:
        settings = PROTOCOLS[name] | {
            key: float(value) for key, value in (each.split("=", 1) for each in options.set)
        }
        for seed in options.seeds if name != "popularity" else options.seeds[:1]:
            rows.append(measure(name, seed, settings))
            print(rows[-1], file=sys.stderr)
    report({"rows": rows, "machine": machine()}, as_json=options.json, save=options.save, text=_table(rows))
    return 0


def _table(rows: list[dict[str, object]]) -> str:
    """Mean and range over seeds."""
    lines = ["| model | Recall@20 | of the seeds | NDCG@20 | best epochs |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(str(row["model"]) for row in rows):
        own = [row for row in rows if row["model"] == name]
        recalls = [float(str(row["test recall@20"])) for row in own]
        ndcg = np.mean([float(str(row["test ndcg@20"])) for row in own])
        seeds, epochs = (" ".join(f"{value:.4f}" for value in recalls), [row["best_epoch"] for row in own])
        shown = ", ".join(map(str, epochs))
        lines.append(f"| {name} | {np.mean(recalls):.4f} | {seeds} | {ndcg:.4f} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
