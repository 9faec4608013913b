"""Vision models of transformers: the library's own vectors, pooled as stated."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from features.encoders.registry import describe_encoder, load_encoder
from features.errors import EncoderError
from tests.features import small_transformers as small

N_PREFIX = {"vit": 1, "deit": 2, "beit": 1, "dinov2": 1, "dinov2_with_registers": 4, "dinov3_vit": 3}
N_PREFIX |= {"clip_vision_model": 1, "siglip_vision_model": 0, "swin": 0, "dinov3_convnext": 1, "pvt": 1}
DEFAULTS = dict.fromkeys(("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit_mae"), "cls")
DEFAULTS["pvt"] = "mean"
"""What is taken without an option; the pooler of all others."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def save(kind: str) -> Path:
        if kind not in made:
            made[kind] = small.vision(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return save


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def library(folder: Path, **arguments: Any) -> tuple[Tensor, Any]:
    """The library's pixels and output."""
    processor: Any = transformers.AutoImageProcessor
    images = [image.convert("RGB") for image in small.pictures().values()]
    pixels = processor.from_pretrained(folder, backend="pil")(images, return_tensors="pt")["pixel_values"]
    model = transformers.AutoModel.from_pretrained(folder, **arguments).eval()
    with torch.inference_mode():
        return pixels, model(pixels, output_hidden_states=True)


def mean(states: Tensor, n_prefix: int) -> Tensor:
    return states.mean(dim=(2, 3)) if states.ndim == 4 else states[:, n_prefix:].mean(dim=1)


@pytest.mark.parametrize("kind", [kind for kind in small.VISION_KINDS if kind != "vit_mae"])
def test_the_vectors_are_the_library_s_own(kind: str, saved: Callable[[str], Path]) -> None:
    folder = saved(kind)
    spec = f"transformers/local-dir:{folder}"
    encoder = load_encoder(spec)
    assert encoder.info == describe_encoder(spec)
    theirs_pixels, given = library(folder)
    pixels = torch.stack([encoder.image_transform(image) for image in small.pictures().values()])
    assert_close(pixels, theirs_pixels)
    default = DEFAULTS.get(kind, "pooler")
    expected: dict[str, Any] = {
        "cls": given.last_hidden_state[:, 0] if N_PREFIX.get(kind) else None,
        "pooler": given["pooler_output"].flatten(1) if "pooler_output" in given else None,
        "mean": mean(given.last_hidden_state, N_PREFIX.get(kind, 0)),
    }
    with torch.inference_mode():
        ours = encoder.encode_images(pixels)
        assert_close(ours, expected[default])
        assert ours.std(dim=0).mean() > 1e-4
        for row in range(len(pixels)):
            assert_close(encoder.encode_images(pixels[row : row + 1])[0], ours[row])
        if kind != "beit":  # whose tokens are normalised or not by the same setting
            plain = load_encoder(f"{spec}+pool=mean")
            assert_close(plain.encode_images(pixels), expected["mean"])
    assert encoder.info.dims == {"image": ours.shape[1]}
    assert encoder.info.image_size_px == small.SIDE
    transform = pickle.loads(pickle.dumps(encoder.image_transform))  # noqa: S301 - made a moment ago
    image = small.pictures()["palette"]
    assert torch.equal(transform(image), encoder.image_transform(image))


@pytest.mark.parametrize("kind", small.VISION_KINDS)
def test_gradients_reach_the_first_layer_and_bfloat16_works(kind: str, saved: Callable[[str], Path]) -> None:
    encoder = load_encoder(f"transformers/local-dir:{saved(kind)}")
    pixels = torch.stack([encoder.image_transform(image) for image in small.pictures().values()])[:3]
    with torch.no_grad():
        exact = encoder.encode_images(pixels)
    encoder.encode_images(pixels).square().sum().backward()  # type: ignore[no-untyped-call]
    first = next(
        value for name, value in encoder.named_parameters() if value.ndim == 4 and "mask" not in name
    )
    assert first.grad is not None
    assert first.grad.abs().max() > 0
    with torch.no_grad():
        rough = encoder.to(torch.bfloat16).encode_images(pixels)
    assert rough.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(rough, exact).min() > 0.9


@pytest.mark.parametrize("kind", ["vit", "dinov2_with_registers", "dinov3_vit", "resnet", "swin"])
def test_a_layer_in_between_is_pooled(kind: str, saved: Callable[[str], Path]) -> None:
    spec = f"transformers/local-dir:{saved(kind)}"
    pixels, given = library(saved(kind))
    n_prefix = N_PREFIX.get(kind, 0)
    with torch.inference_mode():
        for layer in (-2, 1):
            ours = load_encoder(f"{spec}+layer={layer}+pool=mean").encode_images(pixels)
            assert_close(ours, mean(given.hidden_states[layer], n_prefix))
        penultimate = load_encoder(f"{spec}+pool=penultimate")
        states = given.hidden_states[-2]
        assert_close(
            penultimate.encode_images(pixels), states[:, 0] if kind in DEFAULTS else mean(states, n_prefix)
        )
    same = describe_encoder(f"{spec}+layer=-2")
    assert same.preprocessing_sha256 == penultimate.info.preprocessing_sha256
    assert same.preprocessing_sha256 != describe_encoder(spec).preprocessing_sha256


def test_beit_s_default_is_behind_its_last_normalisation(saved: Callable[[str], Path]) -> None:
    pixels, given = library(saved("beit"))
    encoder = load_encoder(f"transformers/local-dir:{saved('beit')}")
    with torch.inference_mode():
        assert_close(encoder.encode_images(pixels), given.pooler_output)


def test_a_masked_autoencoder_hides_no_patches(saved: Callable[[str], Path]) -> None:
    encoder = load_encoder(f"transformers/local-dir:{saved('vit_mae')}")
    pixels = torch.stack([encoder.image_transform(image) for image in small.pictures().values()])
    with torch.inference_mode():
        once, again = encoder.encode_images(pixels), encoder.encode_images(pixels)
    assert_close(once, again)
    assert encoder.model.config.mask_ratio == 0


def test_a_pooler_without_weights_is_refused_where_it_is_asked_for(saved: Callable[[str], Path]) -> None:
    """A ViT for classification has no pooler; by default it needs none."""
    spec = f"transformers/local-dir:{saved('vit')}"
    assert "classifier" in load_encoder(spec).notes[0]
    with pytest.raises(EncoderError, match=r"2 of its tensors are missing \(pooler.dense.bias"):
        load_encoder(f"{spec}+pool=pooler")


@pytest.mark.parametrize(
    ("kind", "option", "answer"),
    [
        ("resnet", "pool=cls", "it has no first token that stands for the picture"),
        ("swin", "pool=cls", "it has no first token that stands for the picture"),
        ("vit", "pool=last", "pool=last does not apply to vit; choose one of cls, mean, pooler"),
        ("vit", "layer=7", "it has 3 hidden states, so expected -3 to 2"),
        ("vit", "layer=-2+pool=pooler", "does not apply together with a layer"),
        ("vit", "layer=-2+pool=penultimate", "pool=penultimate is layer -2"),
        ("dinov2", "layer=last", "option layer is 'last'"),
    ],
)
def test_an_option_that_does_not_apply_is_refused(
    kind: str, option: str, answer: str, saved: Callable[[str], Path]
) -> None:
    with pytest.raises(EncoderError, match=answer):
        describe_encoder(f"transformers/local-dir:{saved(kind)}+{option}")


def test_a_processor_that_keeps_the_aspect_is_refused(tmp_path: Path) -> None:
    folder = small.vision(tmp_path, "dinov2")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_center_crop": False}))
    with pytest.raises(EncoderError, match="gives pictures of different shapes"):
        describe_encoder(f"transformers/local-dir:{folder}")


def test_a_strip_of_100_000_pixels_costs_no_gigabytes(saved: Callable[[str], Path]) -> None:
    for kind in ("dinov2", "vit", "dinov3_vit"):
        transform = load_encoder(f"transformers/local-dir:{saved(kind)}").image_transform
        assert transform(Image.new("RGB", (100_000, 1))).shape == (3, small.SIDE, small.SIDE)
