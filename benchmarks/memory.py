"""Does extraction need more memory for more items?

Pictures and texts of 1,000 and of 20,000 rendered items go through the shipped encoder, each catalogue in a
process of its own; peak resident memory above what is resident once the encoder is loaded is compared.
Goal: 20 times the items take at most 60 MB more (ids, hashes and texts of the catalogue itself are the rest).

Example: python -m benchmarks.memory
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import polars as pl

from benchmarks.extraction import KINDS, rendered
from benchmarks.measure import PeakMemory, give_back_memory, machine, report, resident_bytes
from features.catalogue import Catalogue
from features.encoders.registry import load_encoder
from features.extraction import extract

SIZES = (1_000, 20_000)
MAX_GROWTH_MB = 60


def measure_one(folder: Path, n_items: int) -> dict[str, float]:
    """Peak memory in MB above the loaded encoder, by modality, in this process."""
    catalogue = Catalogue(pl.read_parquet(folder / "items.parquet").head(n_items), str(folder))
    encoder = load_encoder("tiny")
    peaks: dict[str, float] = {}
    for modality in ("image", "text"):
        give_back_memory()
        resident = resident_bytes()
        with tempfile.TemporaryDirectory() as out, PeakMemory() as memory:
            done = extract(encoder, catalogue, modality, Path(out), text=KINDS["plots"][1])
        assert done.n_ok == n_items, done
        peaks[modality] = round((memory.peak - resident) / 1e6, 1)
    return peaks


def main() -> int:
    """Measure, print, and fail where memory grows with the items."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "ITEMS"), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--save", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_one(Path(options.one[0]), int(options.one[1]))))
        return 0
    peaks = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rendered(folder, max(SIZES)).items.write_parquet(folder / "items.parquet")
        for size in SIZES:
            command = [sys.executable, "-m", "benchmarks.memory", "--one", str(folder), str(size)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            peaks[size] = json.loads(done.stdout)
    growth = {
        modality: round(peaks[SIZES[1]][modality] - peaks[SIZES[0]][modality], 1)
        for modality in peaks[SIZES[0]]
    }
    lines = [
        f"{modality}: {peaks[SIZES[0]][modality]} MB above the encoder for {SIZES[0]:,} items, "
        f"{peaks[SIZES[1]][modality]} MB for {SIZES[1]:,}: {grown} MB more (goal {MAX_GROWTH_MB})"
        for modality, grown in growth.items()
    ]
    result = {"peaks_mb": peaks, "growth_mb": growth, "machine": machine()}
    report(result, as_json=options.json, save=options.save, text="\n".join(lines))
    return 0 if max(growth.values()) <= MAX_GROWTH_MB else 1


if __name__ == "__main__":
    sys.exit(main())
