"""What this machine is and which versions are installed, without importing anything heavy."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

import psutil
from pydantic import BaseModel, NonNegativeInt

DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "tandem": ("tandem-recsys",),
    "torch": ("torch",),
    "numpy": ("numpy",),
    "polars": ("polars",),
    "pyarrow": ("pyarrow",),
    "faiss": ("faiss-gpu", "faiss-cpu", "faiss-gpu-cu12", "faiss-gpu-cu11"),
    "open_clip": ("open_clip_torch",),
    "transformers": ("transformers",),
}
"""The libraries whose version can explain a different number, and the distributions that bring them."""


class Hardware(BaseModel, frozen=True, extra="forbid"):
    """The machine that made an artefact."""

    system: str
    """Operating system and processor family: "Linux 6.1 x86_64"."""
    cpu: str
    cores: NonNegativeInt
    """Logical cores this process may use."""
    memory_bytes: NonNegativeInt
    """Main memory this process may use: the machine's, or its container's limit."""
    gpus: tuple[str, ...] = ()


@cache
def describe_hardware() -> Hardware:
    """Describe this machine; asked once per process."""
    return Hardware(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu_model(),
        cores=_usable_cores(),
        memory_bytes=_usable_memory_bytes(),
        gpus=_gpu_names(),
    )


@cache
def library_versions() -> dict[str, str]:
    """Return the version of Python and of each library that matters; one that is absent is left out."""
    versions = {"python": platform.python_version()}
    for library, distributions in DISTRIBUTIONS.items():
        found = next((v for v in map(_version, distributions) if v), "")
        if found:
            versions[library] = found
    return versions


def _version(distribution: str) -> str:
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
    return f"{version} (gpu)" if distribution.startswith("faiss-gpu") else version


def _cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    for line in lines:
        field, _, value = line.partition(":")
        if field.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _usable_memory_bytes(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int(limit.read_text(encoding="ascii")))
    except (OSError, ValueError):  # no control group, or "max"
        return total


def _gpu_names(driver: Path = Path("/proc/driver/nvidia/gpus")) -> tuple[str, ...]:
    """Return the model of each NVIDIA GPU: from the driver's files, else from ``nvidia-smi``."""
    names = []
    for information in sorted(driver.glob("*/information")):
        try:
            lines = information.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return tuple(names) or _ask_nvidia_smi()


def _ask_nvidia_smi() -> tuple[str, ...]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    try:
        answer = subprocess.run(  # noqa: S603 - the driver's own tool, fixed arguments
            [command, "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in answer.stdout.splitlines() if line.strip())
