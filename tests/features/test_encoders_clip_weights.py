"""Weights files: every kind is read, none is run, and what does not fit is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from features.encoders import clip_specs, clip_weights
from features.encoders.clip_weights import count_numbers, read_weights
from features.encoders.registry import describe_encoder, load_encoder
from features.errors import EncoderError
from tests.features.small_clip import SIGLIP, SMALL, TEXT, VISION


@pytest.mark.usefixtures("small_architectures")
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.bin"])
def test_weights_are_read_from_every_kind_of_file(name: str, save_weights: Callable[..., Path]) -> None:
    path = save_weights(clip_specs.architecture_config("ViT-B-32"), name)
    info = describe_encoder(f"open_clip/ViT-B-32:{path}")
    encoder = load_encoder(f"open_clip/ViT-B-32:{path}")
    assert encoder.info == info
    assert info.n_parameters == sum(parameter.numel() for parameter in encoder.parameters())
    assert not encoder.training
    assert info.dims == {"image": 12, "text": 12}
    assert info.image_size_px == 128


@pytest.mark.usefixtures("small_architectures")
def test_training_checkpoints_and_half_precision_are_read(
    save_weights: Callable[..., Path], tmp_path: Path
) -> None:
    path = save_weights(clip_specs.architecture_config("ViT-B-32"))
    weights = read_weights(path)
    wrapped = tmp_path / "epoch_3.pt"
    halves = {f"module.{name}": tensor.half() for name, tensor in weights.items()}
    torch.save({"epoch": 3, "state_dict": halves, "optimizer": {"step": 1}}, wrapped)
    assert count_numbers(wrapped) == count_numbers(path)
    ours = load_encoder(f"open_clip/ViT-B-32:{wrapped}").state_dict()
    for name, tensor in weights.items():
        torch.testing.assert_close(ours[f"model.{name}"], tensor.half().float(), rtol=0, atol=0)


class Trap:
    """Running it is what must not happen."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


@pytest.mark.usefixtures("small_architectures")
def test_a_pickle_is_read_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Trap()}, "trap.pt")
    with pytest.raises(EncoderError, match="holds more than tensors"):
        load_encoder("open_clip/ViT-B-32:./trap.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.usefixtures("small_architectures")
def test_damaged_and_foreign_weights_files_are_refused(
    save_weights: Callable[..., Path], tmp_path: Path
) -> None:
    for name in ("w.safetensors", "w.pt"):
        path = save_weights(clip_specs.architecture_config("ViT-B-32"), name)
        path.write_bytes(path.read_bytes()[:5_000])
        with pytest.raises(EncoderError, match=r"cannot be read .* fetch it again"):
            load_encoder(f"open_clip/ViT-B-32:{path}")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(EncoderError, match="holds no named tensors"):
        load_encoder(f"open_clip/ViT-B-32:{tmp_path / 'list.pt'}")


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_torchscript_archive_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "ViT-B-32.pt"))
    with pytest.raises(
        EncoderError, match=r"TorchScript program, which is not run; convert it once: torch\.save"
    ):
        describe_encoder(f"open_clip/ViT-B-32:{tmp_path / 'ViT-B-32.pt'}")


def test_weights_of_another_architecture_are_refused_and_named(
    save_weights: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = {**SMALL, "vision_cfg": {**VISION, "width": 64}}
    for module in (clip_specs, clip_weights):
        monkeypatch.setattr(module, "architecture_config", lambda name: SMALL if name == "ViT-S-32" else wide)
    path = save_weights(SMALL)
    with pytest.raises(EncoderError) as refusal:
        load_encoder(f"open_clip/ViT-M-32:{path}")
    message = str(refusal.value)
    assert "does not fit encoder 'open_clip/ViT-M-32:" in message
    assert "visual.class_embedding is (32,), expected (64,)" in message
    assert message.endswith("they have the shapes of ViT-S-32.")


def test_missing_and_unexpected_tensors_are_listed(save_weights: Callable[..., Path], tmp_path: Path) -> None:
    path = save_weights(SMALL, "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL}))
    weights = read_weights(path)
    weights["visual.proj_renamed"] = weights.pop("visual.proj")
    save_file(weights, path)
    with pytest.raises(
        EncoderError, match=r"1 missing \(visual\.proj\); 1 unexpected \(visual\.proj_renamed\)"
    ):
        load_encoder(f"open_clip/local-dir:{tmp_path}")


def test_position_embeddings_of_another_size_are_not_stretched(
    save_weights: Callable[..., Path], tmp_path: Path
) -> None:
    save_weights(SMALL, "open_clip_model.safetensors")
    larger = {**SMALL, "vision_cfg": {**VISION, "image_size": 64}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": larger}))
    with pytest.raises(EncoderError, match=r"visual\.positional_embedding is \(5, 32\), expected \(17, 32\)"):
        load_encoder(f"open_clip/local-dir:{tmp_path}")


def test_a_folder_that_lacks_its_tokenizer_or_whose_tokenizer_is_damaged_is_refused(
    save_weights: Callable[..., Path], tmp_path: Path
) -> None:
    save_weights(SIGLIP, "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": SIGLIP}))
    with pytest.raises(EncoderError, match=r"has no tokenizer; expected one of tokenizer\.json"):
        describe_encoder(f"open_clip/local-dir:{tmp_path}")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(EncoderError, match="no tokenizer can be made of"):
        load_encoder(f"open_clip/local-dir:{tmp_path}")


@pytest.mark.parametrize(
    ("config", "answer"),
    [
        ("{}", "is no open_clip configuration"),
        ('{"model_cfg": {"embed_dim": 1}}', "is no open_clip configuration"),
        ("not json", "is no open_clip configuration"),
        (json.dumps({"model_cfg": {**SMALL, "surprise": 1}}), "open_clip cannot build the architecture"),
        (
            json.dumps({"model_cfg": SMALL, "preprocess_cfg": {"resize_mode": "stretch"}}),
            r"pixels cannot be prepared as \{'resize_mode': 'stretch'\} \(resize_mode\)",
        ),
        (
            json.dumps({"model_cfg": {**SMALL, "vision_cfg": {**VISION, "image_size": [32, 64]}}}),
            r"takes \[32, 64\] pixels; only squares are supported",
        ),
        (
            json.dumps({"model_cfg": {**SMALL, "text_cfg": {**TEXT, "tokenizer_kwargs": {"x": 1}}}}),
            r"tokenizer_kwargs \{'x': 1\} are for training only",
        ),
    ],
)
def test_a_folder_with_a_wrong_configuration_is_refused(
    config: str, answer: str, save_weights: Callable[..., Path], tmp_path: Path
) -> None:
    save_weights(SMALL, "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(config)
    with pytest.raises(EncoderError, match=answer):
        load_encoder(f"open_clip/local-dir:{tmp_path}")
