"""One of several processes that train jointly; prints what it ended with. Usage: joint_worker.py <folder>."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from recommenders.joint import JointInput, train_jointly
from recommenders.live import LiveTable
from recommenders.models.registry import build_model
from recommenders.peers import AcceleratePeers
from tests.recommenders.linear_encoder import LinearEncoder
from tests.recommenders.test_joint import EVALUATION, JOINT, TRAINING, WORLD
from tests.recommenders.test_live import contents, table_of, unit


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    peers = AcceleratePeers(cpu=True)
    encoder = LinearEncoder(contents())
    table = table_of(encoder, absent=(5,))
    model = build_model("freedom", {"dim": 4, "k": 3}, WORLD.split.train, table, np.random.default_rng(0))
    live = LiveTable(table, encoder, unit, peers)
    joint = JointInput(live, encoder, JOINT, writes=peers.rank == 0)
    train_jointly(
        model,
        WORLD.split.train,
        WORLD.split.valid,
        joint,
        TRAINING,
        evaluation=EVALUATION,
        rng=np.random.default_rng(1),
    )
    state = {name: value.contiguous() for name, value in {**model.state_dict(), **encoder.state()}.items()}
    state["rows encoded"] = torch.tensor(sum(len(rows) for _, rows in encoder.encoded))
    save_file(state, folder / f"{peers.rank}-of-{peers.n_processes}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
