"""Making `tiny`: repeatable, whole, and probed by measures that are right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from features.contrastive import ContrastiveConfig, PairBatch
from features.encoders.registry import describe_encoder, load_encoder
from features.encoders.tiny import TINY_FOLDER, WEIGHTS_FILE, build_tiny, train_tiny_tokenizer
from pipeline.datasets.demo_pairs import training_product
from pipeline.errors import ConfigError
from pipeline.stages.train_tiny import (
    ALIKE,
    RenderedPairs,
    TrainTinyConfig,
    linear_probe,
    neighbour_agreement,
    train_tiny,
)

QUICK = TrainTinyConfig(
    n_products=48,
    image_size_px=32,
    contrastive=ContrastiveConfig(epochs=1, batch_size=16),
    probe_items=60,
    n_threads=1,
)


def test_the_same_command_makes_the_same_files(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    report = train_tiny(QUICK, tmp_path / "one", lambda done, total: steps.append((done, total)))
    train_tiny(QUICK, tmp_path / "two")
    assert steps == [(1, 3), (2, 3), (3, 3)]
    for name in ("tiny.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert json.loads((tmp_path / "one" / "training.json").read_text()) == report
    assert len(report["probes"]) == 16  # type: ignore[arg-type]
    loaded = load_encoder(f"tiny:{tmp_path / 'one'}")
    assert loaded.info.n_parameters == report["n_parameters"]


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"n_products is 8, less than one batch of 16"):
        train_tiny(QUICK.model_copy(update={"n_products": 8}), tmp_path)


def test_alike_batches_share_their_easy_traits_and_every_product_comes_once() -> None:
    products = [training_product(0, row, 16) for row in range(256)]
    encoder = build_tiny(train_tiny_tokenizer(["red"]), seed=0)
    batches = list(RenderedPairs(encoder, products, alike_share=0.5).epoch(16, np.random.default_rng(0)))
    of_pixels = {
        encoder.image_transform(product.picture).half().float().numpy().tobytes(): product
        for product in products
    }
    seen = [
        [of_pixels.pop(pixels.contiguous().numpy().tobytes()) for pixels in batch.pixels] for batch in batches
    ]
    assert [len(batch) for batch in seen] == [16] * 16
    assert not of_pixels
    colours = [len({product.traits[ALIKE[0]] for product in batch if not product.is_label}) for batch in seen]
    assert sum(count <= 4 for count in colours) == 8
    assert sum(count > 4 for count in colours) == 8


def pixels_of(batch: PairBatch) -> set[bytes]:
    return {pixels.contiguous().numpy().tobytes() for pixels in batch.pixels}


def test_captions_change_from_epoch_to_epoch() -> None:
    products = [training_product(0, row, 16) for row in range(16)]
    encoder = build_tiny(train_tiny_tokenizer(["red"]), seed=0)
    pairs = RenderedPairs(encoder, products)
    rng = np.random.default_rng(0)
    (first,), (second,) = pairs.epoch(16, rng), pairs.epoch(16, rng)
    assert pixels_of(first) == pixels_of(second)
    assert first.tokens.tolist() != second.tokens.tolist()


def test_the_probe_finds_what_is_linear_and_nothing_in_noise() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(5, size=1000)
    noise = rng.standard_normal((1000, 20)).astype(np.float32)
    told = noise + 3 * rng.standard_normal((5, 20))[values].astype(np.float32)
    assert linear_probe(told, values) > 0.95
    assert abs(linear_probe(noise, values) - 0.2) < 0.06


def test_neighbours_agree_where_vectors_do() -> None:
    values = np.arange(40) % 4
    rng = np.random.default_rng(0)
    vectors = (10 * np.eye(4)[values] + rng.uniform(size=(40, 4))).astype(np.float32)
    assert neighbour_agreement(vectors, values, k=9) == 1.0
    plain = np.mean(
        [
            values[other] == values[row]
            for row in range(40)
            for other in sorted(
                (other for other in range(40) if other != row),
                key=lambda other: (
                    -np.dot(vectors[row], vectors[other])
                    / np.linalg.norm(vectors[row])
                    / np.linalg.norm(vectors[other])
                ),
            )[:15]
        ]
    )
    assert neighbour_agreement(vectors, values, k=15) == pytest.approx(plain)


def test_the_shipped_tiny_is_small_and_knows_its_traits() -> None:
    info = describe_encoder("tiny")
    assert info.n_parameters <= 3_000_000
    assert (TINY_FOLDER / WEIGHTS_FILE).stat().st_size <= 6_000_000
    report = json.loads((TINY_FOLDER / "training.json").read_text())
    assert report["n_parameters"] == info.n_parameters
