"""VLMo against numbers of an independent implementation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from features.encoders.vlmo.config import VlmoConfig, config_of_weights
from features.encoders.vlmo.losses import contrastive_loss, masked_language_loss
from features.encoders.vlmo.model import Vlmo
from features.encoders.vlmo.positions import image_index, joint_index, text_index
from features.encoders.vlmo.weights import load_vlmo

FOLDER = Path(__file__).with_name("vlmo_tiny")
TOLERANCE = 1e-5
PADDED = ("text/tokens", "joint/text_tokens", "joint/mlm_logits")

kinds = pytest.mark.parametrize("kind", ["tiny", "tiny-plus"])


def stored(kind: str) -> tuple[dict[str, Tensor], VlmoConfig]:
    weights = torch.load(FOLDER / kind / "checkpoint.pt", weights_only=True)
    return weights, config_of_weights(weights, n_heads=4, table_text_positions=20, text_length=12)


def numbers(kind: str, file: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / kind / f"{file}.npz") as archive:
        return {name: archive[name] for name in archive.files}


def outputs(model: Vlmo, pixels: Tensor, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    image, text = model.image_pass(pixels, vl=True), model.text_pass(tokens, mask, vl=True)
    joint, n_text = model.joint_pass(pixels, tokens, mask), tokens.shape[1]
    norm = model.transformer.norm
    return {
        "image/tokens": norm(image.own),
        "image/cls_prenorm": image.own[:, 0],
        "image/embedding": model.unit(model.image_embedding(image)),
        "image/vl_embedding": model.unit(model.image_embedding(image, vl=True)),
        "text/tokens": norm(text.own),
        "text/cls_prenorm": text.own[:, 0],
        "text/embedding": model.unit(model.text_embedding(text)),
        "text/vl_embedding": model.unit(model.text_embedding(text, vl=True)),
        "joint/text_tokens": joint[:, :n_text],
        "joint/image_tokens": joint[:, n_text:],
        "joint/cls": joint[:, 0],
        "joint/pooled": model.pooled(joint),
        "joint/itm_logits": model.itm_score(model.pooled(joint)),
        "joint/mlm_logits": model.mlm_score(joint[:, :n_text]),
    }


def assert_matches(found: dict[str, Tensor], expected: dict[str, np.ndarray], mask: np.ndarray) -> None:
    for name, reference in expected.items():
        if name.startswith(("debug/", "inputs/", "weights/")):
            continue
        got = found[name].detach().numpy()
        assert got.shape == reference.shape, name
        real = mask != 0 if name in PADDED else slice(None)
        error = np.abs(got[real] - reference[real]).max() / np.abs(reference).max()
        assert error < TOLERANCE, (name, error)


@kinds
@pytest.mark.parametrize("grad", [False, True])
def test_outputs(kind: str, grad: bool) -> None:
    model, _ = load_vlmo(*stored(kind))
    given = numbers(kind, "inputs")
    tensors = [torch.from_numpy(given[name]) for name in ("image", "text_ids", "text_masks")]
    with torch.set_grad_enabled(grad):
        assert_matches(outputs(model, *tensors), numbers(kind, "reference"), given["text_masks"])


@kinds
def test_outputs_at_another_picture_size(kind: str) -> None:
    weights, config = stored(kind)
    model, report = load_vlmo(weights, config, config.model_copy(update={"image_size_px": 40}))
    expected = numbers(kind, "resized")
    assert report.resized
    for name, reference in expected.items():
        if name.startswith("weights/"):
            np.testing.assert_allclose(
                model.state_dict()[name.removeprefix("weights/")], reference, rtol=0, atol=1e-6
            )
    tensors = [torch.from_numpy(expected[f"inputs/{name}"]) for name in ("image", "text_ids", "text_masks")]
    with torch.inference_mode():
        assert_matches(outputs(model, *tensors), expected, expected["inputs/text_masks"])


def test_rows_of_the_bias_table() -> None:
    _, config = stored("tiny")
    expected = numbers("tiny", "reference")
    assert (image_index(config).numpy() == expected["debug/image_index"]).all()
    assert (text_index(config, 12).numpy() == expected["debug/text_index"]).all()
    assert (joint_index(config, 12).numpy() == expected["debug/joint_index"]).all()


def test_rows_of_the_released_bias_table() -> None:
    config = VlmoConfig()
    image, text = image_index(config), text_index(config, 40)
    places = [(1, 1, 364), (1, 2, 363), (1, 15, 337), (15, 1, 391), (196, 1, 728), (1, 196, 0)]
    places += [(0, 5, 729), (5, 0, 730), (0, 0, 731)]
    assert config.table_rows == 1126
    assert all(image[row, column] == index for row, column, index in places)
    places = [(1, 1, 928), (1, 2, 929), (2, 1, 927), (1, 39, 966), (0, 5, 1123), (5, 0, 1124), (0, 0, 1125)]
    assert all(text[row, column] == index for row, column, index in places)


@kinds
def test_contrastive_loss(kind: str) -> None:
    model, _ = load_vlmo(*stored(kind))
    given = {name: torch.from_numpy(values) for name, values in numbers(kind, "inputs").items()}
    expected = json.loads((FOLDER / kind / "losses.json").read_text(encoding="utf-8"))
    image = model.image_pass(given["image"], vl=True)
    text = model.text_pass(given["text_ids"], given["text_masks"], vl=True)
    loss = contrastive_loss(model, image, text)
    assert loss.item() == pytest.approx(expected["itc_loss"], rel=1e-6)
    assert float(model.get_parameter("logit_scale").exp()) == pytest.approx(expected["logit_scale_exp"])
    if kind == "tiny":
        loss.backward()
        gradients = load_file(FOLDER / kind / "grads_itc.safetensors")
        own = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        assert own.keys() == gradients.keys()
        for name, reference in gradients.items():
            assert (own[name] - reference).abs().max() < TOLERANCE * reference.abs().max(), name


@kinds
def test_masked_language_loss(kind: str) -> None:
    model, _ = load_vlmo(*stored(kind))
    given = {name: torch.from_numpy(values) for name, values in numbers(kind, "inputs").items()}
    expected = json.loads((FOLDER / kind / "losses.json").read_text(encoding="utf-8"))
    loss = 0.25 * masked_language_loss(
        model, given["image"], given["text_ids_mlm"], given["text_masks"], given["text_labels_mlm"]
    )
    assert loss.item() == pytest.approx(expected["mlm_loss_weighted"], rel=1e-6)
    loss.backward()
    for name, norm in expected["mlm_grad_norms"].items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None, name
        assert float(gradient.norm()) == pytest.approx(norm, rel=1e-4, abs=1e-7), name
