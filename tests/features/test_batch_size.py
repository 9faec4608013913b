"""Batches that fit a memory budget."""

from pathlib import Path

import pytest
import torch

from features.assembling import Plan
from features.batch_size import activation_bytes, fitting_batch_size
from features.encoders.registry import load_encoder
from features.encoding import EncodingRun, ExtractionConfig
from features.extraction import extract
from features.feature_table import FeatureSet
from tests.features.small_catalogue import picture_catalogue

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("item_bytes", "device", "budget_mb", "expected"),
    [
        (2**20, CPU, 0, 64),
        (2**20, GPU, 0, 1024),
        (2**25, CPU, 0, 32),
        (2**20, CPU, 20, 16),
        (2**20, CPU, 5, 5),
        (2**40, CPU, 0, 1),
        (0, CPU, 0, 64),
    ],
)
def test_a_batch_fills_the_budget(
    item_bytes: int, device: torch.device, budget_mb: int, expected: int
) -> None:
    assert fitting_batch_size(item_bytes, device, budget_mb) == expected


def test_the_estimate_covers_the_largest_layer() -> None:
    encoder = load_encoder("tiny")
    sizes = []
    handles = [
        module.register_forward_hook(
            lambda _m, _i, out: sizes.append(out.numel() * 4 if hasattr(out, "numel") else 0)
        )
        for module in encoder.modules()
    ]
    pixels = torch.zeros(1, 3, 64, 64)
    with torch.inference_mode():
        encoder.encode_images(pixels)
    for handle in handles:
        handle.remove()
    one = activation_bytes(encoder, pixels, None)
    assert one >= 2 * max(sizes)
    assert not any(module._forward_hooks for module in encoder.modules())
    assert activation_bytes(encoder, None, encoder.tokenize(["a red bag"])) > 0
    with pytest.raises(ValueError, match="neither"):
        activation_bytes(encoder, None, None)


def test_the_setting_bounds_the_batch_and_the_size_given_wins(tmp_path: Path) -> None:
    catalogue = picture_catalogue(tmp_path, 4)
    encoder, plan = load_encoder("tiny"), Plan.make(catalogue.contents("image", None), 4, None)

    def size(**settings: int) -> int:
        return EncodingRun(encoder, "image", plan, ExtractionConfig(**settings)).batch_size

    assert size() == 64
    assert 1 <= size(memory_mb=4) < 64
    assert size(memory_mb=4, batch_size=50) == 50


def test_long_texts_come_in_batches_of_fewer_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("features.encoding._LONG_TEXT", 40)
    catalogue = picture_catalogue(tmp_path / "pictures", 40)
    encoder = load_encoder("tiny")
    shapes: list[tuple[int, ...]] = []
    encode = encoder.encode_texts

    def noting(tokens: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(tokens.shape))
        return encode(tokens)

    monkeypatch.setattr(encoder, "encode_texts", noting)
    done = extract(encoder, catalogue, "text", tmp_path / "out", ExtractionConfig(batch_size=16))
    assert done.encoded == 40
    assert len(FeatureSet.read([tmp_path / "out" / "part-00000.parquet"])) == 40
    assert max(rows * length for rows, length in shapes) <= 16 * 40
    assert any(length > 40 and rows < 16 for rows, length in shapes)
