"""The open_clip family: the right activation, and open_clip's own vectors at a fraction of the work."""

import json
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from features.encoders import clip_specs
from features.encoders.clip import build_clip
from features.encoders.clip_tokens import ClipTokenizer
from features.encoders.clip_weights import read_weights
from features.encoders.registry import describe_encoder, load_encoder
from tests.features.small_clip import (
    N_HEADS,
    SIGLIP,
    SMALL,
    TEXT,
    TEXTS,
    VISION,
    hf_tokenizer,
    picture,
    small_encoder,
)
from tests.references.plain_clip import gelu, plain_image_features, plain_text_features, quick_gelu


def assert_runs_with(encoder: Any, path: Path, activation: Any, other: Any) -> None:
    """The features are the plain NumPy ones with one activation, and are not with the other."""
    weights = {name: tensor.double().numpy() for name, tensor in read_weights(path).items()}
    pixels = encoder.image_transform(picture())
    tokens = encoder.tokenize(TEXTS[:1])
    padded = np.zeros(encoder.info.context_length, dtype=np.int64)
    padded[: tokens.shape[1]] = tokens[0]
    with torch.inference_mode():
        image = encoder.encode_images(pixels[None])[0].double().numpy()
        text = encoder.encode_texts(tokens)[0].double().numpy()
    for ours, plain, given in (
        (image, plain_image_features, pixels.double().numpy()),
        (text, plain_text_features, padded),
    ):
        expected, wrong = (plain(given, weights, N_HEADS, each) for each in (activation, other))
        scale = np.abs(expected).max()
        np.testing.assert_allclose(ours, expected, atol=1e-4 * scale)
        assert np.abs(ours - wrong).max() > 4e-4 * scale


@pytest.mark.usefixtures("small_architectures")
@pytest.mark.parametrize(
    ("architecture", "quick"),
    [("ViT-B-32", False), ("ViT-B-32-quickgelu", True), ("ViT-B-16", False), ("ViT-B-16-quickgelu", True)],
)
def test_for_a_file_the_architecture_decides_the_activation(
    architecture: str, quick: bool, save_weights: Callable[..., Path]
) -> None:
    path = save_weights(clip_specs.architecture_config(architecture))
    encoder = load_encoder(f"open_clip/{architecture}:{path}")
    activations = (quick_gelu, gelu) if quick else (gelu, quick_gelu)
    assert_runs_with(encoder, path, *activations)


@pytest.mark.usefixtures("small_architectures")
@pytest.mark.parametrize(
    ("architecture", "tag", "quick"),
    [
        ("ViT-B-16", "openai", True),
        ("ViT-B-16-quickgelu", "openai", True),
        ("ViT-B-32", "laion400m_e32", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
    ],
)
def test_for_a_tag_the_tag_decides_the_activation(
    architecture: str,
    tag: str,
    quick: bool,
    save_weights: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = save_weights(clip_specs.architecture_config(architecture))
    monkeypatch.setattr(clip_specs, "fetch_from_hub", lambda *_, **__: path)
    activations = (quick_gelu, gelu) if quick else (gelu, quick_gelu)
    fetched = load_encoder(f"open_clip/{architecture}:{tag}")
    assert_runs_with(fetched, path, *activations)
    brought = describe_encoder(f"open_clip/{architecture}:{tag}@{path}")
    assert brought.preprocessing_sha256 == fetched.info.preprocessing_sha256
    assert ("quickgelu" in brought.name) == quick


def test_a_folder_in_open_clip_s_layout_says_all_of_itself(
    save_weights: Callable[..., Path], tmp_path: Path
) -> None:
    config = {**SMALL, "quick_gelu": True}
    path = save_weights(config, "open_clip_model.safetensors")
    pixels = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear", "size": 32}
    layout = {"model_cfg": config, "preprocess_cfg": pixels}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(layout))
    encoder = load_encoder(f"open_clip/local-dir:{tmp_path}")
    assert_runs_with(encoder, path, quick_gelu, gelu)
    assert encoder.info == describe_encoder(f"open_clip/local-dir:{tmp_path}")
    assert encoder.image_transform(Image.new("RGB", (9, 9), "white")).unique().tolist() == [1.0]


@pytest.mark.usefixtures("small_architectures")
def test_the_digests_tell_activation_and_weights_apart(
    save_weights: Callable[..., Path], tmp_path: Path
) -> None:
    path = save_weights(clip_specs.architecture_config("ViT-B-32"))
    plain = describe_encoder(f"open_clip/ViT-B-32:{path}")
    quick = describe_encoder(f"open_clip/ViT-B-32-quickgelu:{path}")
    assert plain.weights_sha256 == quick.weights_sha256
    assert plain.preprocessing_sha256 != quick.preprocessing_sha256
    moved = tmp_path / "moved.safetensors"
    path.rename(moved)
    assert describe_encoder(f"open_clip/ViT-B-32:{moved}").weights_sha256 == plain.weights_sha256


@pytest.mark.parametrize("custom_text", [False, True])
def test_the_cut_text_tower_equals_open_clip_on_the_whole_context(custom_text: bool) -> None:
    encoder = small_encoder({**SMALL, "custom_text": custom_text})
    for texts in (TEXTS, TEXTS[:1], [""], ["a b", "c"]):
        tokens = encoder.tokenize(texts)
        assert tokens.shape[1] == max(encoder.token_lengths(texts))
        whole = torch.nn.functional.pad(tokens, (0, 77 - tokens.shape[1]))
        with torch.inference_mode():
            ours = encoder.encode_texts(tokens)
            theirs = encoder.model.encode_text(whole)  # type: ignore[operator]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
        assert ours.dtype == torch.float32


def test_the_cut_tower_s_gradient_equals_open_clip_s() -> None:
    encoder = small_encoder(SMALL)
    tokens = encoder.tokenize(TEXTS[:3])
    whole = torch.nn.functional.pad(tokens, (0, 77 - tokens.shape[1]))
    names, parameters = zip(*encoder.model.named_parameters(), strict=True)
    for name, ours, theirs in zip(
        names,
        torch.autograd.grad(encoder.encode_texts(tokens).square().sum(), parameters, allow_unused=True),
        torch.autograd.grad(encoder.model.encode_text(whole).square().sum(), parameters, allow_unused=True),  # type: ignore[operator]
        strict=True,
    ):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


COCA = {"multimodal_cfg": {**TEXT, "attn_pooler_heads": 2}, "custom_text": True}


@pytest.mark.parametrize(
    "config",
    [
        {"custom_text": True, "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last"}},
        {"custom_text": True, "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "argmax"}},
        {"custom_text": True, "text_cfg": {**TEXT, "pool_type": "first"}},
        {"text_cfg": {**TEXT, "pool_type": "last"}},
        {
            **COCA,
            "vision_cfg": {
                **VISION,
                "attentional_pool": True,
                "attn_pooler_heads": 2,
                "output_tokens": True,
            },
            "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        },
    ],
    ids=["siglip", "not-causal", "first", "last", "coca"],
)
def test_other_towers_take_the_whole_context(config: dict[str, Any]) -> None:
    encoder = small_encoder({**SMALL, **config})
    tokens = encoder.tokenize(TEXTS[:2])
    assert tokens.shape == (2, 77)
    with torch.inference_mode():
        ours = encoder.encode_texts(tokens)
        theirs = encoder.model.encode_text(tokens, normalize=False)  # type: ignore[operator]
        images = encoder.encode_images(encoder.image_transform(picture())[None])
    assert torch.equal(ours, theirs)
    assert images.shape == (1, 12)
    assert abs(images.norm().item() - 1) > 1e-3  # raw, not normalised


def test_a_siglip_folder_gives_open_clip_s_own_features(
    save_weights: Callable[..., Path], tmp_path: Path
) -> None:
    import open_clip

    hf_tokenizer(tmp_path)
    save_weights(SIGLIP, "open_clip_model.safetensors")
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": SIGLIP, "preprocess_cfg": pixels})
    )
    encoder = load_encoder(f"open_clip/local-dir:{tmp_path}")
    theirs, transform = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    texts = ["A red bag!", "blue", ""]
    assert torch.equal(encoder.tokenize(texts), tokenizer(texts))
    assert torch.equal(encoder.image_transform(picture()), transform(picture()))
    with torch.inference_mode():
        torch.testing.assert_close(
            encoder.encode_texts(encoder.tokenize(texts)), theirs.encode_text(tokenizer(texts))
        )
        pixels = transform(picture())[None]
        torch.testing.assert_close(encoder.encode_images(pixels), theirs.encode_image(pixels))
    assert pickle.loads(pickle.dumps(encoder.tokenizer))(texts) == encoder.token_ids(texts)  # noqa: S301
    before = encoder.info.preprocessing_sha256
    (tmp_path / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text() + "\n")
    assert describe_encoder(f"open_clip/local-dir:{tmp_path}").preprocessing_sha256 != before


def test_a_timm_tower_is_built_without_fetching_its_weights() -> None:
    vision = {"timm_model_name": "test_vit", "timm_model_pretrained": True, "timm_proj": "linear"}
    model = build_clip({**SMALL, "vision_cfg": {**vision, "timm_pool": "avg", "image_size": 160}})
    assert model.visual(torch.zeros(1, 3, 160, 160)).shape == (1, 12)  # type: ignore[operator]


def test_the_tokenizer_gives_open_clip_s_ids() -> None:
    import open_clip

    rng = random.Random(0)  # noqa: S311 - texts to compare, no secrets
    letters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    texts = [
        *TEXTS,
        "<start_of_text> and <end_of_text>",
        "it's they'LL don't 'S",
        "ΑΣ ΟΔΟΣ İstanbul ſ 'ſ",
        "3,141.59 km² x" * 20,
        "naïve—café… “quoted” &amp;amp; <b>",
        "日本語のテキスト、とても長い" * 10,
        "👨‍👩‍👧🇩🇪" * 30,
        "x" * 300,
    ]
    texts += ["".join(rng.choices(letters, k=rng.randint(0, 60))) for _ in range(400)]
    texts += ["".join(rng.choices("abcd ef'!?.,012é😂🇺🇸 -", k=rng.randint(0, 200))) for _ in range(400)]
    for clean in ("lower", "whitespace", "canonicalize"):
        theirs = open_clip.tokenizer.SimpleTokenizer(clean=clean)(texts)
        for text, ids, expected in zip(texts, ClipTokenizer(77, clean)(texts), theirs.tolist(), strict=True):
            assert ids + [0] * (77 - len(ids)) == expected, text


@pytest.mark.parametrize("unit", ["x", "!", "word ", "漢", "😀", " ", "&amp;", "a1"])
def test_100_000_characters_are_tokenized_in_bounded_time(unit: str) -> None:
    tokenizer = ClipTokenizer(77)
    tokenizer(["warm up"])
    started = time.process_time()
    (ids,) = tokenizer([(unit * 100_000)[:100_000]])
    assert time.process_time() - started < 3
    assert len(ids) <= 77
    assert ids[-1] == 49407


def test_tokenizer_and_transform_can_be_pickled_for_loader_workers() -> None:
    encoder = small_encoder(SMALL)
    tokenizer, transform = pickle.loads(pickle.dumps((encoder.tokenizer, encoder.image_transform)))  # noqa: S301 - made a moment ago
    assert tokenizer(TEXTS) == encoder.token_ids(TEXTS)
    assert torch.equal(transform(picture()), encoder.image_transform(picture()))
