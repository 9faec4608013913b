"""One contract for every family, and an answer to whatever a person types."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from features.encoders import tiny
from features.encoders.base import Encoder, digest_file, digest_json
from features.encoders.clip import build_clip
from features.encoders.registry import FAMILIES, describe_encoder, inner_spec, load_encoder, parse_shuffled
from features.encoders.saved import save_encoder
from features.encoders.vlmo.config import VlmoConfig
from features.errors import EncoderError
from tests.features.small_sentence import save_sentence
from tests.features.small_timm import save_timm
from tests.features.small_transformers import clip
from tests.features.small_vlmo import WORDS, checkpoint, write_vocabulary

SMALL = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def tiny_spec(folder: Path) -> str:
    tiny.save_tiny(tiny.build_tiny(tiny.train_tiny_tokenizer(["a red bag"], 270), seed=0), folder)
    return f"tiny:{folder}"


def clip_spec(folder: Path) -> str:
    torch.manual_seed(0)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL}))
    save_file(build_clip(SMALL).state_dict(), folder / "open_clip_model.safetensors")
    return f"open_clip/local-dir:{folder}"


def vlmo_spec(folder: Path) -> str:
    config = VlmoConfig(
        width=32, depth=2, n_heads=4, mlp_width=64, vl_start=1, image_size_px=32, vocabulary=len(WORDS)
    )
    save_file(checkpoint(config), folder / "small.safetensors")
    write_vocabulary(folder)
    return f"vlmo/custom:{folder}/small.safetensors"


def saved_spec(folder: Path) -> str:
    save_encoder(load_encoder(tiny_spec(folder / "original")), folder / "saved")
    return f"saved:{folder / 'saved'}"


LOSSES_ONLY = tuple(f"model.{name}" for name in ("logit_", "itc_vl_", "itm_score", "mlm_score"))
"""Parameters that only losses use, not vectors."""

SPECS: dict[str, Callable[[Path], str]] = {
    "tiny": tiny_spec,
    "open_clip": clip_spec,
    "vlmo": vlmo_spec,
    "sentence-transformers": lambda folder: (
        f"sentence-transformers/local-dir:{save_sentence(folder, 'lasttoken')}"
    ),
    "transformers": lambda folder: f"transformers/local-dir:{clip(folder)}",
    "timm": lambda folder: f"timm/local-dir:{save_timm(folder)}",
    "saved": saved_spec,
    "random": lambda _: "random:24:1",
    "constant": lambda _: "constant:3",
}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return SPECS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def encoder(spec: str) -> Encoder:
    return load_encoder(spec)


TEXTS = ["a red bag", "", "😀 blue shoes of leather with stripes", "a red bag"]
PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    for seed in (0, 1, 2, 0)
]


def test_info_is_the_same_described_and_loaded(spec: str, encoder: Encoder) -> None:
    assert encoder.info == describe_encoder(spec)
    assert encoder.info.spec == spec
    assert encoder.info.model_validate_json(encoder.info.model_dump_json()) == encoder.info
    assert not encoder.training


def inputs(encoder: Encoder) -> dict[str, tuple[torch.Tensor, ...]]:
    """What the encoder takes, by modality."""
    pixels = torch.stack([encoder.image_transform(picture) for picture in PICTURES])
    tokens = encoder.tokenize(TEXTS)
    every = {"image": (pixels,), "text": (tokens,), "fused": (pixels, tokens)}
    return {modality: every[modality] for modality in encoder.info.modalities}


def encode(encoder: Encoder, modality: str, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
    names = {"image": "encode_images", "text": "encode_texts", "fused": "encode_pairs"}
    vectors: torch.Tensor = getattr(encoder, names[modality])(*given)
    return vectors


def test_vectors_have_the_stated_shape_and_type(encoder: Encoder) -> None:
    for modality, given in inputs(encoder).items():
        vectors = encode(encoder, modality, given)
        assert vectors.shape == (4, encoder.info.dims[modality])
        assert vectors.dtype == torch.float32
        if modality == "image":
            assert given[0].shape[1] == 3
            assert given[0].dtype == torch.float32


def test_a_vector_does_not_depend_on_its_batch(encoder: Encoder) -> None:
    with torch.inference_mode():
        for modality, given in inputs(encoder).items():
            vectors = encode(encoder, modality, given)
            for row in range(4):
                alone = [tensor[row : row + 1] for tensor in given]
                if modality != "image":
                    alone[-1] = encoder.tokenize(TEXTS[row : row + 1])
                found = encode(encoder, modality, tuple(alone))[0]
                torch.testing.assert_close(found, vectors[row], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(vectors[0], vectors[3])


def test_tokenizing_at_once_or_by_row_is_the_same(encoder: Encoder) -> None:
    rows = encoder.token_ids(TEXTS)
    assert encoder.token_lengths(TEXTS) == [len(row) for row in rows]
    assert torch.equal(encoder.pad(rows), encoder.tokenize(TEXTS))
    assert encoder.tokenize(TEXTS).dtype == torch.int64
    assert encoder.tokenize([]).shape[0] == 0


def test_preparation_can_be_pickled_for_loader_workers(encoder: Encoder) -> None:
    prepared = pickle.loads(pickle.dumps((encoder.image_transform, encoder.tokenizer)))  # noqa: S301 - made a moment ago
    assert torch.equal(prepared[0](PICTURES[0]), encoder.image_transform(PICTURES[0]))
    assert prepared[1](TEXTS) == encoder.token_ids(TEXTS)


def test_towers_with_weights_are_differentiable(encoder: Encoder) -> None:
    if not encoder.info.n_parameters:
        assert not list(encoder.parameters())
        return
    given = inputs(encoder)
    loss = torch.stack(
        [encode(encoder, modality, given[modality]).square().sum() for modality in given]
    ).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    without = [name for name, value in encoder.named_parameters() if value.grad is None]
    assert all(name.startswith(LOSSES_ONLY) for name in without), without


def test_shuffled_is_parsed_and_described_as_its_inner_encoder() -> None:
    shuffled = parse_shuffled("shuffled:random:8:1@5")
    assert shuffled is not None
    assert (shuffled.inner, shuffled.seed) == ("random:8:1", 5)
    assert inner_spec("shuffled:tiny") == "tiny"
    assert inner_spec("tiny") is None
    inner, dealt = describe_encoder("random:8:1"), describe_encoder("shuffled:random:8:1@5")
    assert dealt.dims == inner.dims
    assert dealt.weights_sha256 == inner.weights_sha256
    assert dealt.name == "shuffled-5-random-8-1"
    digests = {describe_encoder(f"shuffled:random:8:1@{seed}").preprocessing_sha256 for seed in range(3)}
    assert len(digests | {inner.preprocessing_sha256}) == 4
    assert describe_encoder("shuffled:random:8").preprocessing_sha256 in digests
    with pytest.raises(EncoderError, match="encodes nothing: it deals out the rows of 'random:8'"):
        load_encoder("shuffled:random:8")


@pytest.mark.parametrize(
    ("spec", "answer"),
    [
        ("tinny", r"'tinny' is not known; did you mean 'tiny'\?"),
        ("openclip/ViT-B-32:openai", r"did you mean 'open_clip'\? .*open_clip/ViT-B-32:openai"),
        ("rndom:3", r"did you mean 'random'"),
        ("", r"expected a form like tiny, open_clip/ViT-B-32:openai"),
        ("given", r"features that came with a dataset"),
        ("shuffled:", r"shuffles no encoder; for example shuffled:tiny"),
        ("shuffled:shuffled:tiny", r"shuffles no encoder"),
    ],
)
def test_an_unknown_encoder_is_answered_with_what_there_is(spec: str, answer: str) -> None:
    with pytest.raises(EncoderError, match=answer):
        describe_encoder(spec)
    with pytest.raises(EncoderError):
        load_encoder(spec)


def test_a_file_is_hashed_anew_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    first = digest_file(path)
    assert first == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    path.write_bytes(b"other")
    assert digest_file(path) != first


def test_equal_settings_have_equal_digests_whatever_their_order() -> None:
    assert digest_json({"a": 1, "b": [1, 2]}) == digest_json({"b": [1, 2], "a": 1})
    with pytest.raises(ValueError, match="Out of range"):
        digest_json({"a": float("nan")})
