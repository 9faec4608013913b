"""The whole two-stage pipeline on real films: two encoders and their floors, indexes, five recommenders.

No pretrained weights are needed: the ViT-B/32 has the open_clip architecture with seeded random weights, from
a checkpoint file of the usual layout that this command writes. Its figures say that the path works, not how
good CLIP is; give real weights with ``--checkpoint`` to ask that.

    python -m benchmarks.movielens_posters --data ../shared/data/movielens-posters --store .tandem
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from string import Template

import polars as pl
import yaml
from rich.console import Console

from benchmarks.extraction import make_checkpoint
from pipeline.comparison.render import to_terminal
from pipeline.config import RunConfig, parse_config, with_overrides
from pipeline.console import run_app
from pipeline.errors import ConfigError
from pipeline.opening import default_cache
from pipeline.progress import RichReporter
from pipeline.stages.compare_features import restore_comparison
from pipeline.store import Store
from pipeline.two_stage import PlainStages, TwoStageResult, run_two_stage

CONFIG = Path(__file__).with_suffix(".yaml")
DEFAULT_DATA = Path(__file__).parents[2] / "shared" / "data" / "movielens-posters"


def seeded_checkpoint() -> Path:
    """Where the seeded random weights lie: in the user's cache, made there the first time."""
    path = default_cache() / "benchmarks" / "seeded-vit-b-32.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".partial")
        make_checkpoint("ViT-B-32", aside)
        aside.replace(path)
    return path


def account(result: TwoStageResult) -> list[str]:
    """Say where each item of the catalogue went, so that nothing is lost without a word."""
    facts = result.dataset.artefact.manifest.facts
    items = pl.read_parquet(result.dataset.artefact.path("items.parquet"))
    lines = [
        f"items {len(items):,}, without picture {facts['items_without_image']}, "
        f"without description {facts['items_without_description']}, drops {facts['drops']}"
    ]
    for (modality, encoder), made in result.features.items():
        counts = {name: made.artefact.manifest.facts[f"n_{name}"] for name in ("ok", "missing", "unreadable")}
        lines.append(f"{encoder} {modality}: {counts}, sum {sum(int(str(n)) for n in counts.values()):,}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Run the configuration beside this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of items.parquet and images/")
    parser.add_argument("--store", default=".tandem")
    parser.add_argument(
        "--checkpoint", type=Path, help="ViT-B/32 weights; without it, seeded random ones are made"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting")
    options = parser.parse_args(arguments)
    if not (options.data / "items.parquet").is_file():
        raise ConfigError(f"{options.data} holds no items.parquet; give the data's folder with --data.")
    store = Store(options.store)
    checkpoint = options.checkpoint or seeded_checkpoint()
    text = Template(CONFIG.read_text(encoding="utf-8")).substitute(
        data=options.data.resolve(), checkpoint=checkpoint.resolve()
    )
    config = parse_config(with_overrides(yaml.safe_load(text), options.set), RunConfig, str(CONFIG))
    console = Console(stderr=True)
    reporter = RichReporter(console)
    started = time.perf_counter()
    result = run_two_stage(config, PlainStages(store, reporter), lambda stage: reporter.say(stage.line()))
    assert result.comparison is not None  # a finished run has one
    for line in account(result):
        reporter.say(line)
    reporter.say(f"{len(result.all())} stages in {time.perf_counter() - started:.0f} s")
    Console().print(to_terminal(restore_comparison(result.comparison.artefact)))
    return 0


if __name__ == "__main__":
    sys.exit(run_app(lambda args, **_: main(args)))
