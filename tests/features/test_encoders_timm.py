"""The timm family: timm's own vectors and pixels, from folders, files and the hub's cache."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from features.encoders import timm_models
from features.encoders.presets import presets
from features.encoders.registry import describe_encoder, load_encoder
from features.errors import EncoderError
from tests.features.small_timm import FACTS, SMALL, build, save_timm
from tests.features.small_transformers import pictures


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in made:
            made[name] = save_timm(tmp_path_factory.mktemp(name), name)
        return made[name]

    return save


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def timm_pixels(names: list[str] | None = None, **facts: Any) -> Tensor:
    """Timm's own pipeline, on pictures that are converted to RGB as a first step."""
    data: Any = timm.data
    given = {key: value for key, value in {**FACTS, **facts}.items() if key != "num_classes"}
    transform = data.create_transform(**given, is_training=False)
    return torch.stack([transform(pictures()[name].convert("RGB")) for name in names or list(pictures())])


@pytest.mark.parametrize("name", sorted(SMALL))
def test_the_vectors_are_timm_s_own(name: str, saved: Callable[[str], Path]) -> None:
    spec = f"timm/local-dir:{saved(name)}"
    encoder = load_encoder(spec)
    assert encoder.info == describe_encoder(spec)
    pixels = torch.stack([encoder.image_transform(image) for image in pictures().values()])
    assert torch.equal(pixels, timm_pixels())
    model = build(name)
    model.reset_classifier(0)
    with torch.inference_mode():
        ours, theirs = encoder.encode_images(pixels), model.eval()(pixels)
        assert_close(ours, theirs)
        assert ours.std(dim=0).mean() > 1e-4
        for row in range(len(pixels)):
            assert_close(encoder.encode_images(pixels[row : row + 1])[0], ours[row])
    assert encoder.info.dims == {"image": theirs.shape[1]}
    assert encoder.info.image_size_px == 32
    transform = pickle.loads(pickle.dumps(encoder.image_transform))  # noqa: S301 - made a moment ago
    assert torch.equal(transform(pictures()["rgba"]), encoder.image_transform(pictures()["rgba"]))


@pytest.mark.parametrize("name", sorted(SMALL))
def test_gradients_reach_the_first_layer_and_bfloat16_works(name: str, saved: Callable[[str], Path]) -> None:
    encoder = load_encoder(f"timm/local-dir:{saved(name)}")
    pixels = timm_pixels()[:3]
    with torch.no_grad():
        exact = encoder.encode_images(pixels)
    encoder.encode_images(pixels).square().sum().backward()  # type: ignore[no-untyped-call]
    first = next(value for value in encoder.parameters() if value.ndim == 4)
    assert first.grad is not None
    assert first.grad.abs().max() > 0
    with torch.no_grad():
        rough = encoder.to(torch.bfloat16).encode_images(pixels)
    assert rough.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(rough, exact).min() > 0.95


@pytest.mark.parametrize(
    ("crop_mode", "crop_pct", "interpolation"),
    [
        ("center", 0.875, "bilinear"),
        ("squash", 1.0, "bicubic"),
        ("border", 0.95, "bicubic"),
        ("center", 1.0, "lanczos"),
    ],
)
def test_pixels_follow_the_pretrained_configuration(
    crop_mode: str, crop_pct: float, interpolation: str, tmp_path: Path
) -> None:
    facts = {"crop_mode": crop_mode, "crop_pct": crop_pct, "interpolation": interpolation}
    folder = save_timm(tmp_path, "resnet", **facts)
    encoder = load_encoder(f"timm/local-dir:{folder}")
    strips = ("row", "column") if crop_mode == "border" else ()  # timm fails: it scales them to 0 pixels
    names = [name for name in pictures() if name not in strips]
    ours = torch.stack([encoder.image_transform(pictures()[name]) for name in names])
    assert torch.equal(ours, timm_pixels(names, **facts))
    for name in strips:
        assert encoder.image_transform(pictures()[name]).shape == (3, 32, 32)


def test_a_strip_of_100_000_pixels_costs_no_gigabytes(saved: Callable[[str], Path]) -> None:
    transform = load_encoder(f"timm/local-dir:{saved('vit')}").image_transform
    assert transform(Image.new("RGB", (100_000, 1))).shape == (3, 32, 32)
    assert transform(Image.new("RGB", (1, 100_000))).shape == (3, 32, 32)


@pytest.mark.parametrize("name", ["vit", "registers"])
def test_tokens_are_pooled_as_asked_for(name: str, saved: Callable[[str], Path]) -> None:
    base = f"timm/local-dir:{saved(name)}"
    model, pixels = build(name).eval(), timm_pixels()
    n_prefix = {"vit": 1, "registers": 4}[name]
    digests = set()
    with torch.inference_mode():
        tokens = model.forward_features(pixels)
        blocks = model.forward_intermediates(pixels, return_prefix_tokens=True, intermediates_only=True)
        expected = {
            "+pool=cls": tokens[:, 0],
            "+pool=mean": tokens[:, n_prefix:].mean(dim=1),
            "+layer=penultimate": tokens[:, 0],
            "+layer=0": blocks[0][1][:, 0],
            "+layer=-2": blocks[0][1][:, 0],
            "+layer=0+pool=mean": blocks[0][0].mean(dim=(2, 3)),
        }
        for options, theirs in expected.items():
            encoder = load_encoder(base + options)
            assert_close(encoder.encode_images(pixels), theirs)
            assert encoder.info.dims["image"] == theirs.shape[1]
            digests.add(encoder.info.preprocessing_sha256)
    assert len(digests) == len(expected)


@pytest.mark.parametrize("name", ["resnet", "convnext", "swin"])
def test_maps_are_averaged_over_their_places(name: str, saved: Callable[[str], Path]) -> None:
    base = f"timm/local-dir:{saved(name)}"
    model, pixels = build(name).eval(), timm_pixels()
    with torch.inference_mode():
        last = model.forward_features(pixels)
        stages = model.forward_intermediates(pixels, intermediates_only=True)
        places = (1, 2) if name == "swin" else (2, 3)
        ours = load_encoder(f"{base}+pool=mean").encode_images(pixels)
        assert_close(ours, last.mean(dim=places))
        ours = load_encoder(f"{base}+layer=0").encode_images(pixels)
        assert_close(ours, stages[0].mean(dim=(2, 3)))


def test_a_file_and_the_hub_s_cache_give_the_same_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An architecture's real shape, with 10 classes instead of 1000: the classifier is not used anyway."""
    model = timm.create_model("test_vit", num_classes=10).eval()
    weights = tmp_path / "fine.safetensors"
    save_file(model.state_dict(), weights)
    from_file = load_encoder(f"timm/test_vit:{weights}")
    asked: list[tuple[str, list[str]]] = []

    def fetch(repository: str, names: list[str], **_: object) -> Path:
        asked.append((repository, list(names)))
        return weights

    monkeypatch.setattr(timm_models, "fetch_from_hub", fetch)
    from_hub = load_encoder("timm/test_vit")
    assert asked[0] == ("timm/test_vit.r160_in1k", ["model.safetensors", "pytorch_model.bin"])
    assert from_hub.info.name == "test_vit.r160_in1k"
    assert from_hub.info.preprocessing_sha256 == from_file.info.preprocessing_sha256
    assert from_hub.info.weights_sha256 == from_file.info.weights_sha256
    pickled = tmp_path / "fine.pth"
    torch.save({"state_dict": model.state_dict()}, pickled)
    from_pickle = load_encoder(f"timm/test_vit.r160_in1k:{pickled}")
    pixels = from_file.image_transform(pictures()["square"])[None]
    model.reset_classifier(0)
    with torch.inference_mode():
        for encoder in (from_file, from_hub, from_pickle):
            assert_close(encoder.encode_images(pixels), model(pixels))
    assert from_file.info.image_size_px == 160


def test_weights_published_elsewhere_as_well_are_fetched_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of these timm marks the original .npz as needing a loader of its own; the hub has tensors."""
    weights = tmp_path / "model.safetensors"
    save_file({"none": torch.zeros(1)}, weights)
    asked: list[str] = []

    def fetch(repository: str, *_: object, **__: object) -> Path:
        asked.append(repository)
        return weights

    monkeypatch.setattr(timm_models, "fetch_from_hub", fetch)
    describe_encoder("timm/vit_base_patch16_224.augreg_in21k")
    assert asked == ["timm/vit_base_patch16_224.augreg_in21k"]


@pytest.mark.parametrize(
    ("spec", "answer"),
    [
        ("timm/resnet5", r"timm has no architecture 'resnet5'; did you mean resnet"),
        ("timm/resnet50.a1_in1", r"resnet50 has no tag 'a1_in1'; did you mean a1_in1k"),
        ("timm/resnet50:none.safetensors", r"there is no weights file 'none.safetensors'"),
        ("timm/local-dir:/nowhere", r"'/nowhere' has no model.safetensors or pytorch_model.bin"),
        ("timm/resnet50+pol=mean", r"did you mean 'pool'\?"),
    ],
)
def test_what_cannot_be_had_is_answered_with_what_to_type(spec: str, answer: str) -> None:
    with pytest.raises(EncoderError, match=answer):
        describe_encoder(spec)


def test_without_network_the_way_by_hand_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EncoderError, match=r"no network .* type timm/resnet50.a1_in1k:<path of the file>"):
        describe_encoder("timm/resnet50")


def test_options_that_do_not_apply_are_refused(saved: Callable[[str], Path]) -> None:
    with pytest.raises(EncoderError, match="it has no first token that stands for the picture"):
        describe_encoder(f"timm/local-dir:{saved('resnet')}+pool=cls")
    with pytest.raises(EncoderError, match="it has 2 layers, so expected -2 to 1"):
        describe_encoder(f"timm/local-dir:{saved('vit')}+layer=2")


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = save_timm(tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = "blocks.1.attn.qkv.weight"
    save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(EncoderError, match=rf"does not fit encoder .*{name}"):
        load_encoder(f"timm/local-dir:{folder}")
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(EncoderError, match="is no configuration of timm"):
        describe_encoder(f"timm/local-dir:{folder}")
    (folder / "config.json").unlink()
    with pytest.raises(EncoderError, match=r"has no config.json; expected timm's layout"):
        describe_encoder(f"timm/local-dir:{folder}")
    text = folder / "weights.txt"
    text.write_text("")
    with pytest.raises(EncoderError, match=r"ends in '.txt'"):
        describe_encoder(f"timm/resnet50:{text}")


@pytest.mark.parametrize(
    "name", [name for name, preset in presets().items() if preset.spec.startswith("timm/")]
)
def test_the_presets_state_what_timm_s_configurations_state(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "model.safetensors"
    save_file({"none": torch.zeros(1)}, weights)
    monkeypatch.setattr(timm_models, "fetch_from_hub", lambda *_, **__: weights)
    preset = presets()[name]
    info = describe_encoder(name)
    assert info.dims == {"image": preset.dim}
    assert info.image_size_px == preset.image_size_px
    assert info.modalities == preset.modalities
