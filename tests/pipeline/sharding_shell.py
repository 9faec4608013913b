"""``tandem`` for the tests of sharding, in a process that knows the store made of local files."""

import sys

import tests.pipeline.store_world  # noqa: F401 - registers objects://
from flows.cli import app
from pipeline.console import run_app

if __name__ == "__main__":
    raise SystemExit(run_app(app, sys.argv[1:]))
