"""How fast a feature artefact is read into a tensor, beside a plain read of the same files.

Both sides read from the page cache, in turns, and the fastest of each counts. The plain read is one
thread's `readinto` of each whole file into a buffer that exists already, which is the most that can
be asked of a file; ours allocates the tensor, reads ids and status, and checks them. Goal: at least
60% of the plain read's bytes a second, with at most 1.2 times the tensor's size in memory.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.measure import PeakMemory, machine, report
from features.feature_table import FeatureSet
from features.parts import PartRows, part_name, rows_per_part, write_part

MIN_RATIO, MAX_MEMORY = 0.6, 1.2


def write_artefact(folder: Path, n_rows: int, dim: int) -> list[Path]:
    """Parts with ids, hashes and gaussian vectors, as an extraction leaves them."""
    rng = np.random.default_rng(0)
    step = rows_per_part(n_rows)
    paths = []
    for number, start in enumerate(range(0, n_rows, step)):
        ids = [f"B{row:09d}" for row in range(start, min(start + step, n_rows))]
        hashes = [hashlib.sha256(item_id.encode()).hexdigest() for item_id in ids]
        vectors = rng.standard_normal((len(ids), dim), np.float32).astype(np.float16)
        paths.append(folder / part_name(number))
        nothing = [None] * len(ids)
        write_part(paths[-1], PartRows(ids, hashes, ["ok"] * len(ids), nothing, vectors))
    return paths


def plain_read(paths: list[Path], buffer: np.ndarray) -> None:
    """Each file's bytes into the buffer, one after the other."""
    rest = memoryview(buffer)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            rest = rest[file.readinto(rest) :]


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call; what it made is given back to the system after the clock has stopped."""
    start = time.perf_counter()
    made = action()
    taken = time.perf_counter() - start
    del made
    return taken


def memory_factor(folder: Path) -> float:
    """Peak memory of reading the artefact in a fresh process, in sizes of the tensor."""
    command = [sys.executable, "-m", "benchmarks.store", "--memory-of", str(folder)]
    root = Path(__file__).parents[1]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout)


def read_and_print_memory(folder: Path) -> None:
    """The child's side of `memory_factor`."""
    with PeakMemory(interval_s=0.002) as memory:
        features = FeatureSet.read(sorted(folder.iterdir()))
    print(memory.growth / features.vectors.nbytes)


def measure(n_rows: int, dim: int, repeats: int, folder: Path) -> dict[str, object]:
    """Both sides in turns, and the memory."""
    paths = write_artefact(folder, n_rows, dim)
    file_bytes = sum(path.stat().st_size for path in paths)
    buffer = np.zeros(file_bytes, np.uint8)
    plain_read(paths, buffer)  # warm: the page cache holds the files, the buffer its pages
    plain, ours = [], []
    for _ in range(repeats):
        plain.append(seconds(lambda: plain_read(paths, buffer)))
        ours.append(seconds(lambda: FeatureSet.read(paths)))
    verified = [seconds(lambda: FeatureSet.read(paths, verify=True)) for _ in range(3)]
    tensor_bytes = n_rows * dim * 2
    plain_rate = file_bytes / min(plain)
    rate = tensor_bytes / min(ours)
    return {
        "rows": n_rows,
        "dim": dim,
        "dtype": "float16",
        "parts": len(paths),
        "repeats": repeats,
        "plain_gb_per_s": round(plain_rate / 1e9, 2),
        "ours_gb_per_s": round(rate / 1e9, 2),
        "ours_seconds": round(min(ours), 3),
        "ratio": round(rate / plain_rate, 3),
        "verified_gb_per_s": round(tensor_bytes / min(verified) / 1e9, 2),
        "memory_factor": round(memory_factor(folder), 3),
        "read_threads": min(8, os.cpu_count() or 1),
        "machine": machine(),
    }


def main() -> int:
    """Measure, print, and fail where a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store", description=__doc__)
    parser.add_argument(
        "--rows", type=int, default=1_000_000, help="items in the artefact (default: %(default)s)"
    )
    parser.add_argument("--dim", type=int, default=512, help="numbers in a vector (default: %(default)s)")
    parser.add_argument(
        "--repeats",
        type=int,
        default=15,
        help="reads of each side; the fastest counts (default: %(default)s)",
    )
    parser.add_argument(
        "--folder", type=Path, help="where the temporary files go (default: the system's place)"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--save", type=Path, help="also write the result to this file")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of is not None:
        read_and_print_memory(options.memory_of)
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(options.rows, options.dim, options.repeats, Path(folder))
    text = (
        f"plain read {result['plain_gb_per_s']} GB/s, ours {result['ours_gb_per_s']} GB/s: ratio "
        f"{result['ratio']} (goal {MIN_RATIO}); memory {result['memory_factor']} x the tensor (goal "
        f"{MAX_MEMORY}); with checksums verified {result['verified_gb_per_s']} GB/s"
    )
    report(result, as_json=options.json, save=options.save, text=text)
    reached = float(str(result["ratio"])) >= MIN_RATIO and float(str(result["memory_factor"])) <= MAX_MEMORY
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
