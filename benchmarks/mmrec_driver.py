"""Seconds an epoch of MMRec's own code, run as it is; `benchmarks.training --beside` starts it.

It is run by a Python that has what MMRec needs (torch, pandas, scikit-learn, torch_geometric ...) in the
``src`` folder of a checkout. What today's libraries no longer have, and what asks for a GPU, is put in place
here; the models and the training loop are the checkout's.

Arguments: model, folder of the data, epochs, the model's settings as JSON. The last line is JSON.
"""

# ruff: noqa: PLC0415

import importlib.util
import json
import re
import resource
import sys
import types

import numpy as np
import scipy.sparse as sp
import torch


def put_in_place() -> None:
    """Give MMRec what it expects of older libraries, and keep everything on the CPU."""
    sys.path.insert(0, ".")
    for name, kind in (("float", float), ("int", int), ("bool", bool)):
        if name not in np.__dict__:
            setattr(np, name, kind)
    if not hasattr(sp.dok_matrix, "_update"):
        sp.dok_matrix._update = lambda self, entries: self._dict.update(entries)
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
    if importlib.util.find_spec("lmdb") is None:
        sys.modules["lmdb"] = types.ModuleType("lmdb")  # imported, not used
    if importlib.util.find_spec("torch_scatter") is None:
        from torch_geometric.utils import scatter

        module = types.ModuleType("torch_scatter")
        module.scatter = scatter  # type: ignore[attr-defined]
        module.scatter_add = lambda src, index, dim=-1, out=None, dim_size=None: scatter(  # type: ignore[attr-defined] # noqa: ARG005
            src, index, dim=dim, dim_size=dim_size, reduce="sum"
        )
        sys.modules["torch_scatter"] = module


class Times:
    """Takes the place of its log, and reads the times in it."""

    def __init__(self) -> None:
        self.training: list[float] = []
        self.evaluation: list[float] = []

    def info(self, line: object) -> None:
        """Read one line."""
        found = re.search(r"epoch \d+ (training|evaluating) \[time: ([\d.]+)s", str(line))
        if found:
            (self.training if found[1] == "training" else self.evaluation).append(float(found[2]))


def main() -> None:
    """Train and print the times."""
    model, data, epochs, settings = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
    put_in_place()
    from utils.configurator import Config
    from utils.dataloader import EvalDataLoader, TrainDataLoader
    from utils.dataset import RecDataset
    from utils.utils import get_model, get_trainer, init_seed

    torch.set_num_threads(2)
    given = {"use_gpu": False, "epochs": epochs, "eval_step": epochs, "data_path": data, **settings}
    config = Config(model, "baby", given)
    for name in config["hyper_parameters"] or []:  # lists to search; the first of each, or what was given
        value = settings.get(name, config[name])
        config[name] = value[0] if isinstance(value, list) else value
    config["seed"] = 0
    init_seed(0)
    dataset = RecDataset(config)
    parts = dataset.split()
    for part in (dataset, *parts):
        str(part)  # counts its users and items
    train = TrainDataLoader(config, parts[0], batch_size=2048, shuffle=True)
    valid = EvalDataLoader(config, parts[1], additional_dataset=parts[0], batch_size=4096)
    train.pretrain_setup()
    trainer = get_trainer()(config, get_model(model)(config, train), False)
    trainer.logger = Times()
    trainer.fit(train, valid_data=valid, test_data=valid, saved=False, verbose=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    times = {"epoch_s": min(trainer.logger.training[1:]), "evaluation_s": min(trainer.logger.evaluation)}
    print(json.dumps({**times, "memory_mb": round(peak / 1e6)}))


if __name__ == "__main__":
    main()
