"""What this machine can do, in one line a topic."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pipeline.console import human_bytes
from pipeline.errors import StoreError


def examine(store_url: str) -> dict[str, str]:
    """Look at the machine, the libraries and the store; a topic that fails says so instead of raising."""
    return {
        "machine": _machine(),
        "device": _device(),
        "faiss": _faiss(),
        "versions": _versions(),
        "store": _store(store_url),
    }


def _machine() -> str:
    from pipeline.hardware import describe_hardware

    hardware = describe_hardware()
    return ", ".join(f"{name} {value}" for name, value in hardware.model_dump().items() if value)


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"cpu, {torch.get_num_threads()} threads (torch sees no GPU)"
    free, total = torch.cuda.mem_get_info()
    return f"cuda: {torch.cuda.get_device_name()}, {human_bytes(free)} of {human_bytes(total)} free"


def _faiss() -> str:
    from features.faiss_backend import faiss_backend

    backend = faiss_backend()
    return f"{backend.version}, {'GPU' if backend.gpu else 'CPU'}: {backend.probe}"


def _versions() -> str:
    from pipeline.hardware import library_versions

    return ", ".join(f"{name} {version}" for name, version in library_versions().items())


def _store(url: str) -> str:
    from pipeline.store import Store

    try:
        store = Store(url)
        held = store.list()
    except StoreError as error:
        return f"not usable: {error}"
    size = human_bytes(sum(artefact.manifest.bytes for artefact in held))
    place = Path(store.url)
    free = f", {human_bytes(shutil.disk_usage(place).free)} free" if place.exists() else ""
    writable = "" if "://" in store.url or os.access(place, os.W_OK) else ", READ-ONLY"
    return f"{store.url}: {len(held)} artefacts, {size}{free}{writable}"
