"""The controls: equal content gives equal vectors, whatever surrounds it, and nothing else is known."""

import numpy as np
import pytest
import torch
from PIL import Image

from features.encoders.controls import load_control
from features.encoders.registry import describe_encoder, load_encoder
from features.errors import EncoderError


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8))


def test_random_gives_equal_content_equal_vectors_in_any_batch() -> None:
    encoder = load_encoder("random:16")
    texts = ["one", "two", "one", "three"]
    together = encoder.encode_texts(encoder.tokenize(texts))
    assert torch.equal(together[0], together[2])
    for row, text in enumerate(texts):
        assert torch.equal(encoder.encode_texts(encoder.tokenize([text]))[0], together[row])
    pixels = torch.stack([encoder.image_transform(picture(seed)) for seed in (0, 1, 0)])
    images = encoder.encode_images(pixels)
    assert torch.equal(images[0], images[2])
    assert torch.equal(encoder.encode_images(pixels[1:2])[0], images[1])


def test_random_gives_unlike_content_unlike_vectors() -> None:
    encoder = load_encoder("random:64:3")
    rows = encoder.encode_texts(encoder.tokenize([str(n) for n in range(2_000)]))
    assert rows.unique(dim=0).shape == (2_000, 64)
    assert abs(rows.mean().item()) < 0.02
    assert abs(rows.std().item() - 1) < 0.02
    gram = torch.corrcoef(rows[:200])
    assert (gram - torch.eye(200)).abs().max() < 0.65


def test_random_tells_sizes_modalities_and_seeds_apart() -> None:
    encoder = load_encoder("random:8")
    flat, tall = Image.new("RGB", (4, 1)), Image.new("RGB", (1, 4))
    pixels = torch.stack([encoder.image_transform(flat), encoder.image_transform(tall)])
    wide_row, tall_row = encoder.encode_images(pixels)
    assert not torch.equal(wide_row, tall_row)
    text = encoder.tokenize(["a"])
    assert not torch.equal(load_encoder("random:8:1").encode_texts(text), encoder.encode_texts(text))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_random_survives_half_precision_pixels(dtype: torch.dtype) -> None:
    encoder = load_encoder("random:8")
    pixels = torch.stack([encoder.image_transform(picture(seed)) for seed in range(20)])
    assert torch.equal(encoder.encode_images(pixels.to(dtype)), encoder.encode_images(pixels))


def test_random_reads_texts_that_cannot_be_encoded() -> None:
    encoder = load_encoder("random:8")
    assert encoder.encode_texts(encoder.tokenize(["\ud800", ""])).shape == (2, 8)


def test_constant_gives_ones_to_everything() -> None:
    encoder = load_encoder("constant:5")
    pixels = torch.stack([encoder.image_transform(picture(seed)) for seed in range(3)])
    assert torch.equal(encoder.encode_images(pixels), torch.ones(3, 5))
    assert torch.equal(encoder.encode_texts(encoder.tokenize(["a", "b"])), torch.ones(2, 5))


def test_settings_are_in_the_digests_and_the_name() -> None:
    specs = ["random", "random:32", "random:32:7", "constant", "constant:32"]
    infos = [describe_encoder(spec) for spec in specs]
    assert len({info.weights_sha256 for info in infos}) == len(specs)
    assert [info.name for info in infos] == [
        "random-64-0",
        "random-32-0",
        "random-32-7",
        "constant-64",
        "constant-32",
    ]
    assert describe_encoder("random:64:0").weights_sha256 == infos[0].weights_sha256


@pytest.mark.parametrize(
    "spec", ["random:", "random:0", "random:x", "random:8:1:2", "constant:8:1", "random:-1"]
)
def test_a_control_that_cannot_be_read_is_refused(spec: str) -> None:
    with pytest.raises(EncoderError, match=r"expected (random:<dim>:<seed>|constant:<dim>)"):
        load_control(spec)


def test_controls_have_no_fused_modality() -> None:
    encoder = load_encoder("random:8")
    with pytest.raises(EncoderError, match="no modality 'fused', only image, text"):
        encoder.encode_pairs(torch.zeros(1, 3, 1, 11), torch.zeros(1, 32))
