"""What is said of the machine and of the libraries."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import hardware
from pipeline.hardware import describe_hardware, library_versions


def test_the_machine_is_described_as_the_system_knows_it() -> None:
    import psutil

    described = describe_hardware()
    assert (
        described.cores == len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count()
    )
    assert 0 < described.memory_bytes <= psutil.virtual_memory().total
    assert described.cpu
    assert described.system.startswith(os.uname().sysname)


def test_versions_are_those_of_the_installed_distributions() -> None:
    versions = library_versions()
    assert versions["torch"] == importlib.metadata.version("torch")
    assert versions["polars"] == importlib.metadata.version("polars")
    assert versions["tandem"] == importlib.metadata.version("tandem-recsys")
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))


def test_the_gpu_build_of_faiss_is_told_from_the_cpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    library_versions.cache_clear()
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: {"faiss-gpu": "1.15.0"}.get(name) or _missing(name)
    )
    assert {k: v for k, v in library_versions().items() if k != "python"} == {"faiss": "1.15.0 (gpu)"}
    library_versions.cache_clear()


def _missing(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def test_gpus_are_read_from_the_drivers_files(tmp_path: Path) -> None:
    for bus in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "information").write_text(
            "Model: \t\t NVIDIA H200\nIRQ:   \t\t 1\nGPU UUID: \t GPU-1\n"
        )
    assert hardware._gpu_names(tmp_path) == ("NVIDIA H200", "NVIDIA H200")


def test_gpus_are_asked_of_nvidia_smi_where_the_driver_has_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf 'NVIDIA L4\\nNVIDIA L4\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert hardware._gpu_names(tmp_path / "no-driver") == ("NVIDIA L4", "NVIDIA L4")
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert hardware._gpu_names(tmp_path / "no-driver") == ()


def test_a_machine_without_gpu_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware._gpu_names(tmp_path / "no-driver") == ()


def test_the_processors_name_is_found_or_said_to_be_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: AMD EPYC 9555\nmodel name\t: AMD EPYC 9555\n")
    assert hardware._cpu_model(cpuinfo) == "AMD EPYC 9555"
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "")
    assert hardware._cpu_model(tmp_path / "none") == "unknown"


def test_a_containers_memory_limit_counts(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("1000000\n")
    assert hardware._usable_memory_bytes(limit) == 1_000_000
    limit.write_text("max\n")
    assert (
        hardware._usable_memory_bytes(limit) == hardware._usable_memory_bytes(tmp_path / "none") > 1_000_000
    )


def test_cores_are_counted_where_affinity_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert hardware._usable_cores() == os.cpu_count()


def test_describing_the_machine_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pipeline.hardware import describe_hardware, library_versions; "
        "describe_hardware(); library_versions(); "
        "print([name for name in ['torch', 'numpy', 'polars', 'faiss'] if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
