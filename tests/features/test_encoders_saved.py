"""Saved encoders: the same vectors, digests and options from a folder that stands alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from features.encoders.base import Encoder
from features.encoders.clip import load_clip
from features.encoders.registry import describe_encoder, load_encoder
from features.encoders.saved import ENCODER_FILE, copy_saved, read_saved, save_encoder
from features.encoders.tiny import build_tiny, load_tiny, train_tiny_tokenizer
from features.errors import EncoderError
from features.tuning.modes import TuningConfig, prepare_tuning
from tests.features import small_clip, small_sentence, small_transformers
from tests.features.test_tuning_modes import step, vectors
from tests.features.test_tuning_towers import ENCODERS, inputs_of

TEXTS = ["a red bag", "", "blue shoes " * 40]


def _open_clip(folder: Path) -> Encoder:
    """In open_clip's layout, as its repositories have it."""
    from safetensors.torch import save_file

    encoder = small_clip.small_encoder(small_clip.SMALL, seed=4)
    facts = {"model_cfg": small_clip.SMALL, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}
    (folder / "open_clip_config.json").write_text(json.dumps(facts))
    save_file(encoder.model.state_dict(), folder / "open_clip_model.safetensors")
    return load_encoder(f"open_clip/local-dir:{folder}")


def _open_clip_siglip(folder: Path) -> Encoder:
    from safetensors.torch import save_file

    encoder = small_clip.small_encoder(small_clip.SIGLIP, seed=4)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": small_clip.SIGLIP}))
    save_file(encoder.model.state_dict(), folder / "open_clip_model.safetensors")
    small_clip.hf_tokenizer(folder)
    return load_encoder(f"open_clip/local-dir:{folder}")


def _transformers(write: Callable[[Path], object], options: str = "") -> Callable[[Path], Encoder]:
    def make(folder: Path) -> Encoder:
        write(folder)
        return load_encoder(f"transformers/local-dir:{folder}{options}")

    return make


def _sentence(kind: str, options: str = "") -> Callable[[Path], Encoder]:
    def make(folder: Path) -> Encoder:
        made = small_sentence.save_sentence(folder, kind)
        return load_encoder(f"sentence-transformers/local-dir:{made}{options}")

    return make


FAMILIES: dict[str, Callable[[Path], Encoder]] = {
    "open_clip": _open_clip,
    "open_clip-siglip": _open_clip_siglip,
    **{name: ENCODERS[name] for name in ("tiny", "tiny-l2", "vlmo", "vlmo-vl", "vlmo-cls", "hf-clip")},
    **{name: ENCODERS[name] for name in ("hf-siglip", "vit-mean", "dinov2", "bert", "roberta-cls")},
    **{name: ENCODERS[name] for name in ("timm", "timm-map", "timm-registers")},
    "siglip2": _transformers(small_transformers.siglip2),
    "layer": _transformers(lambda folder: small_transformers.vision(folder, "dinov2"), "+layer=-2+pool=mean"),
    "blip-2": _transformers(small_transformers.blip_2, "+pool=cls"),
    "qwen3": _transformers(lambda folder: small_transformers.text(folder, "qwen3")),
    "sentence-dense": _sentence("dense"),
    "sentence-prompt": _sentence("instructor", "+prompt=query+max_tokens=12"),
    "sentence-clip": _sentence("clip"),
}


def everything(encoder: Encoder) -> dict[str, Tensor]:
    found = {}
    with torch.inference_mode():
        if "image" in encoder.info.modalities:
            found["image"] = encoder.encode_images(inputs_of(encoder, "image"))
        if "text" in encoder.info.modalities:
            found["text"] = encoder.encode_texts(encoder.tokenize(TEXTS))
        if "fused" in encoder.info.modalities:
            pixels = inputs_of(encoder, "image")
            found["fused"] = encoder.encode_pairs(pixels, encoder.tokenize(TEXTS))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_encoder_gives_the_same_vectors_with_the_original_gone(family: str, tmp_path: Path) -> None:
    original = tmp_path / "original"
    original.mkdir()
    encoder = FAMILIES[family](original)
    expected = everything(encoder)
    first, second, moved = tmp_path / "first", tmp_path / "second", tmp_path / "moved"
    for folder in (first, second):
        save_encoder(encoder, folder, name="mine", provenance={"run": "abc"})
    shutil.rmtree(original)
    info = describe_encoder(f"saved:{first}")
    first.rename(moved)
    loaded = load_encoder(f"saved:{moved}")
    assert loaded.info == describe_encoder(f"saved:{moved}")
    assert loaded.info == info.model_copy(update={"spec": f"saved:{moved}"})
    assert (loaded.info.name, loaded.info.family) == ("mine", "saved")
    same = ("modalities", "dims", "image_size_px", "context_length")
    assert all(getattr(loaded.info, name) == getattr(encoder.info, name) for name in same)
    assert not loaded.training
    found = everything(loaded)
    assert found.keys() == expected.keys() == set(encoder.info.modalities)
    for modality, rows in found.items():
        assert torch.equal(rows, expected[modality]), modality
    other = describe_encoder(f"saved:{second}")
    assert other.model_copy(update={"spec": info.spec}) == info
    assert not [path for path in moved.rglob("*") if str(original).encode() in _without_base(path)]
    again = tmp_path / "again"
    save_encoder(loaded, again, name="mine")
    twice = describe_encoder(f"saved:{again}")
    assert twice.weights_sha256 == info.weights_sha256
    assert all(
        torch.equal(rows, expected[each]) for each, rows in everything(load_encoder(twice.spec)).items()
    )


def _without_base(path: Path) -> bytes:
    """A file's bytes; of encoder.json all but what the original was called."""
    if not path.is_file():
        return b""
    if path.name != ENCODER_FILE:
        return path.read_bytes()
    return json.dumps({**json.loads(path.read_text()), "base": None}).encode()


@pytest.mark.parametrize("name", ["tiny", "vlmo", "hf-clip", "bert", "sentence-dense", "timm"])
def test_tuned_weights_are_saved_and_change_the_weights_digest_only(name: str, tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    encoder = ENCODERS[name](tmp_path / "original")
    save_encoder(encoder, tmp_path / "before")
    tuned = prepare_tuning(encoder, TuningConfig(mode="lora"), seed=1)
    step(tuned)
    tuned.finish()
    save_encoder(encoder, tmp_path / "after")
    before, after = (describe_encoder(f"saved:{tmp_path / each}") for each in ("before", "after"))
    assert before.weights_sha256 != after.weights_sha256
    assert before.preprocessing_sha256 == after.preprocessing_sha256
    assert before.n_parameters == after.n_parameters
    learnt, loaded = vectors(encoder), vectors(load_encoder(after.spec))
    assert all(torch.equal(rows, loaded[each]) for each, rows in learnt.items())


def test_options_names_and_unit_length(tmp_path: Path) -> None:
    encoder = load_encoder("tiny")
    save_encoder(encoder, tmp_path / "plain", provenance={"data": {"items": 3}})
    spec = f"saved:{tmp_path / 'plain'}"
    assert describe_encoder(spec).name == "tiny-saved"
    assert read_saved(spec)[1].provenance == {"data": {"items": 3}}
    assert read_saved(spec)[1].base == encoder.info
    unit = load_encoder(f"{spec}+l2=yes")
    assert unit.info.name == "tiny-saved-l2"
    pixels = inputs_of(encoder, "image")
    torch.testing.assert_close(unit.encode_images(pixels).norm(dim=1), torch.ones(3))
    save_encoder(unit, tmp_path / "unit", name="u")
    reloaded = load_encoder(f"saved:{tmp_path / 'unit'}")
    assert torch.equal(reloaded.encode_images(pixels), unit.encode_images(pixels))
    assert reloaded.info.preprocessing_sha256 != describe_encoder(spec).preprocessing_sha256
    assert describe_encoder(f"shuffled:{spec}@3").name == "shuffled-3-tiny-saved"
    copy_saved(tmp_path / "plain", tmp_path / "copy")
    assert (
        describe_encoder(f"saved:{tmp_path / 'copy'}").weights_sha256 == describe_encoder(spec).weights_sha256
    )


def test_an_untrained_tiny_of_other_words_is_saved_with_them(tmp_path: Path) -> None:
    encoder = build_tiny(train_tiny_tokenizer(["ärmel und knöpfe"] * 3, 300), seed=1).eval()
    save_encoder(encoder, tmp_path / "own")
    loaded = load_encoder(f"saved:{tmp_path / 'own'}")
    assert (
        loaded.token_ids(["ärmel"]) == encoder.token_ids(["ärmel"]) != load_tiny("tiny").token_ids(["ärmel"])
    )
    assert torch.equal(everything(loaded)["text"], everything(encoder)["text"])


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"'random:8' cannot be saved: its family is 'random'"):
        save_encoder(load_encoder("random:8"), tmp_path / "random")
    with pytest.raises(EncoderError, match="without open_clip's settings"):
        save_encoder(small_clip.small_encoder(small_clip.SMALL), tmp_path / "by-hand")
    with pytest.raises(FileExistsError, match="is not empty"):
        save_encoder(load_encoder("tiny"), tmp_path)


def test_damage_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    spec = f"saved:{folder}"
    save_encoder(load_encoder("tiny"), folder)
    whole = (folder / ENCODER_FILE).read_text()

    def refused(match: str) -> None:
        for use in (describe_encoder, load_encoder):
            with pytest.raises(EncoderError, match=match):
                use(spec)

    (folder / ENCODER_FILE).write_text(whole[:-40])
    refused("encoder.json' is damaged")
    (folder / ENCODER_FILE).write_text(json.dumps({**json.loads(whole), "format": 2}))
    refused("has format 2, this Tandem reads 1; upgrade")
    (folder / ENCODER_FILE).write_text(json.dumps({**json.loads(whole), "files": {"../x": "0" * 64}}))
    refused("'../x' is not in")
    (folder / ENCODER_FILE).write_text(whole)
    (folder / "tokenizer.json").write_text("{}")
    refused("tokenizer.json' is not as it was written")
    (folder / "model.safetensors").unlink()
    refused("'model.safetensors' is not in")
    shutil.rmtree(folder)
    refused("has no encoder.json")
    with pytest.raises(EncoderError, match="expected saved:<folder>"):
        describe_encoder("saved:")
    with pytest.raises(EncoderError, match="'store/x' lies in a store"):
        describe_encoder("store/x")


def test_the_loader_of_open_clip_keeps_its_settings(tmp_path: Path) -> None:
    _open_clip(tmp_path)
    loaded = load_clip(f"open_clip/local-dir:{tmp_path}")
    assert getattr(loaded, "model_cfg", None) == small_clip.SMALL
