"""A joint training in a process of its own that says each epoch: joint_shell.py <store> <dataset> <json>."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from pipeline.config import parse_config
from pipeline.joint_way import JointWayConfig, PlainJointStages, run_joint
from pipeline.progress import SilentReporter
from pipeline.store import Store


class Speaking(SilentReporter):
    """Says what is done."""

    @contextmanager
    def progress(self, what: str) -> Iterator[Callable[[int, int], None]]:
        def tell(done: int, of: int) -> None:
            if " with " in what:
                print(f"epoch {done} of {of}", flush=True)  # noqa: T201

        yield tell


def main(folder: str, dataset: str, raw: str) -> None:
    torch.set_num_threads(1)
    config = parse_config(json.loads(raw), JointWayConfig)
    run_joint(config, PlainJointStages(Store(folder), Speaking()), dataset)


if __name__ == "__main__":
    main(*sys.argv[1:])
