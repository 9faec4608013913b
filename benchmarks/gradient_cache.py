"""What chunks of a contrastive batch cost in time and save in memory, each size in a process of its own.

python -m benchmarks.gradient_cache
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from features.contrastive import contrastive_loss
from features.encoders.clip import build_clip
from features.gradient_cache import backward_through, chunked_forward

BATCH, SIDE_PX = 128, 64
TOWER = {"image_size": SIDE_PX, "patch_size": 8, "width": 256, "head_width": 64, "layers": 6}
TEXT = {"context_length": 16, "vocab_size": 1000, "width": 64, "heads": 2, "layers": 1}


def measure(chunk: int) -> None:
    """Print the seconds of a step and the MiB it needs above the model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_clip({"embed_dim": 128, "vision_cfg": TOWER, "text_cfg": TEXT})
    pixels, texts = torch.randn(BATCH, 3, SIDE_PX, SIDE_PX), torch.randn(BATCH, 128)
    scale = torch.tensor(2.0)

    def encode(rows: Tensor) -> Callable[[], Tensor]:
        return lambda: model.encode_image(rows)  # type: ignore[operator]  # torch types attributes as modules

    def step(rows: Tensor) -> None:
        model.zero_grad()
        chunks = chunked_forward([encode(some) for some in torch.split(rows, chunk)], rows.device)
        contrastive_loss(chunks.outputs, texts[: len(rows)], scale).backward()  # type: ignore[no-untyped-call]
        backward_through(chunks)

    step(pixels[:2])  # what a first step allocates once belongs to the model
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    step(pixels)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"| {chunk} | {seconds:.1f} | {(peak - before) / 1024:.0f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunk", type=int, help="measure this size, in this process")
    options = parser.parse_args()
    if options.chunk:
        measure(options.chunk)
    else:
        command = [sys.executable, "-m", "benchmarks.gradient_cache", "--chunk"]
        for size in (128, 32, 8):
            subprocess.run([*command, str(size)], check=True)
