"""What every benchmark needs: memory of a process and its children, the machine in words, a result file."""

import contextlib
import ctypes
import gc
import json
import os
import platform
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import psutil
import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, object]:
    """The machine as a reader of a result needs it: no names, no paths."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "day": datetime.now(tz=UTC).date().isoformat(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def resident_bytes() -> int:
    """Resident memory of this process and all its children."""
    me = psutil.Process()
    total = 0
    for process in (me, *me.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def give_back_memory() -> None:
    """Return to the system what was freed, so that the next reading shows what is in use."""
    gc.collect()
    if platform.system() == "Linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


class PeakMemory:
    """Highest resident memory of this process and its children while the block runs.

    Args:
        interval_s: Time between two looks. Each takes a millisecond of a core.
    """

    def __init__(self, interval_s: float = 0.1) -> None:
        self.interval_s = interval_s

    def __enter__(self) -> "PeakMemory":
        self.before = self.peak = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(self.interval_s):
            self.peak = max(self.peak, resident_bytes())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, resident_bytes())

    @property
    def growth(self) -> int:
        """Bytes above what was resident when the block began."""
        return self.peak - self.before


def report(result: dict[str, object], *, as_json: bool, save: Path | None, text: str) -> None:
    """Print a result for people or for programs, and keep it when asked to."""
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result) if as_json else text)
    sys.stdout.flush()
