"""Which FAISS is installed here, and whether its GPU kernels really run."""

import functools
import importlib
import subprocess
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from features.errors import IndexingError

if TYPE_CHECKING:
    import faiss

_PROBE_TIMEOUT_S = 120
"""Generous: a first launch on a card that needs its kernels compiled takes about half a minute."""

_PROBE = """
import faiss, numpy as np
rows = np.random.default_rng(0).standard_normal((1024, 32), dtype=np.float32)
exact = faiss.IndexFlatIP(32)
exact.add(rows)
on_gpu = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, exact)
similarities, found = on_gpu.search(rows[:16], 5)
expected, _ = exact.search(rows[:16], 5)
assert np.allclose(similarities, expected, atol=1e-2), "the GPU found other neighbours than the CPU"
"""


@dataclass(frozen=True)
class FaissBackend:
    """What the installed FAISS can do on this machine."""

    version: str
    gpu_build: bool
    """The package was compiled with GPU support."""
    n_gpus: int
    """GPUs that FAISS sees."""
    gpu: bool
    """A search really ran on GPU 0 and gave what the CPU gives."""
    probe: str
    """What the probe found, for a person to read."""


def import_faiss() -> ModuleType:
    """Return the faiss module; imported late, because most commands do not need its 30 MB.

    Raises:
        IndexingError: no FAISS is installed, or it lacks a library it was built against.
    """
    try:
        return importlib.import_module("faiss")
    except (
        ImportError,
        RuntimeError,
    ) as error:  # the GPU package raises RuntimeError without the CUDA runtime
        raise IndexingError(
            f"FAISS cannot be imported: {error}. Indexes need it; install the package with its extra, "
            "`tandem-recsys[cpu]`, or `tandem-recsys[gpu]` for a machine with a GPU."
        ) from error


@functools.cache
def faiss_backend() -> FaissBackend:
    """Return what FAISS can do here; asked once a process.

    That a build has GPU support and sees a GPU does not mean that it works: some packages hold no kernels
    for newer cards. FAISS ends the whole process when a kernel cannot be launched (its CUDA_VERIFY calls
    abort), so the probe runs in a process of its own; without a GPU none is started.

    Raises:
        IndexingError: FAISS cannot be imported.
    """
    module = import_faiss()
    version = str(module.__version__)
    gpu_build = hasattr(module, "StandardGpuResources")
    n_gpus = int(module.get_num_gpus()) if gpu_build else 0
    if not gpu_build:
        return FaissBackend(version, gpu_build, n_gpus, gpu=False, probe="this FAISS has no GPU support")
    if n_gpus == 0:
        return FaissBackend(version, gpu_build, n_gpus, gpu=False, probe="FAISS sees no GPU")
    failure = _run_probe(_PROBE)
    probe = f"failed: {failure}" if failure else "a search ran on GPU 0"
    return FaissBackend(version, gpu_build, n_gpus, gpu=not failure, probe=probe)


def _run_probe(source: str) -> str:
    """Run Python source in a process of its own; return why it failed, or nothing."""
    command = [sys.executable, "-c", source]
    try:
        # S603: the command is this interpreter and a constant of this file.
        done = subprocess.run(  # noqa: S603
            command, check=False, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_PROBE_TIMEOUT_S} s"
    except OSError as error:
        return f"the probe could not be started ({error})"
    if done.returncode == 0:
        return ""
    last_lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return last_lines[-1][:300]


def to_gpu(index: "faiss.Index") -> "faiss.Index":
    """Return a copy of the index on GPU 0.

    Raises:
        RuntimeError: FAISS cannot hold this kind of index on a GPU, or the GPU's memory does not suffice.
    """
    module = import_faiss()
    on_gpu: faiss.Index = module.index_cpu_to_gpu(module.StandardGpuResources(), 0, index)
    return on_gpu


def to_cpu(index: "faiss.Index") -> "faiss.Index":
    """Return a copy in main memory of an index that is on a GPU."""
    on_cpu: faiss.Index = import_faiss().index_gpu_to_cpu(index)
    return on_cpu
