"""`tiny`: small enough, of open_clip's architecture, reads anything, is the same each time it is saved."""

import json
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from features.encoders import tiny
from features.encoders.clip import ClipEncoder
from features.encoders.registry import describe_encoder, load_encoder
from features.errors import EncoderError

CAPTIONS = ["a red cotton bag with stripes", "blue leather shoes, round", "green wool hat", "a red bag"] * 5
TEXTS = ["A red bag", "schöne Schuhe 😀👨‍👩‍👧", "", "日本語", "<end> <pad>", "word " * 500]


@pytest.fixture(scope="module")
def untrained() -> ClipEncoder:
    return tiny.build_tiny(tiny.train_tiny_tokenizer(CAPTIONS, 300), seed=0).eval()


@pytest.fixture(scope="module")
def folder(untrained: ClipEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny.save_tiny(untrained, path)
    return path


def test_with_its_whole_vocabulary_it_stays_below_3m_parameters_and_6_mb() -> None:
    from features.encoders.clip import build_clip

    model = build_clip(tiny.tiny_config(tiny.VOCABULARY_SIZE)["model_cfg"])
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert n_parameters <= 3_000_000
    assert 2 * n_parameters + 20_000 <= 6_000_000


def test_what_is_shipped_loads_and_is_small() -> None:
    if not (tiny.TINY_FOLDER / tiny.WEIGHTS_FILE).is_file():
        pytest.skip("the weights are not there; make them with `tandem train-tiny`")
    assert (tiny.TINY_FOLDER / tiny.WEIGHTS_FILE).stat().st_size <= 6_000_000
    encoder = load_encoder("tiny")
    assert encoder.info == describe_encoder("tiny")
    assert encoder.info.n_parameters <= 3_000_000


def test_open_clip_s_own_class_gives_the_same_features_from_the_same_files(folder: Path) -> None:
    import open_clip

    encoder = load_encoder(f"tiny:{folder}")
    config = json.loads((folder / "config.json").read_text())
    theirs = open_clip.CLIP(**config["model_cfg"]).eval()
    weights = load_file(folder / "tiny.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    theirs.load_state_dict(weights)
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    tokens = encoder.tokenize(TEXTS[:3])
    whole = torch.nn.functional.pad(tokens, (0, theirs.context_length - tokens.shape[1]))
    with torch.inference_mode():
        torch.testing.assert_close(encoder.encode_images(pixels), theirs.encode_image(pixels))
        torch.testing.assert_close(
            encoder.encode_texts(tokens), theirs.encode_text(whole), rtol=1e-5, atol=1e-5
        )


def test_saving_what_was_loaded_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    encoder = load_encoder(f"tiny:{folder}")
    assert isinstance(encoder, ClipEncoder)
    tiny.save_tiny(encoder, tmp_path)
    for name in ("config.json", "tokenizer.json", "tiny.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_describing_says_what_loading_gives(folder: Path) -> None:
    info = describe_encoder(f"tiny:{folder}")
    assert load_encoder(f"tiny:{folder}").info == info
    assert (info.name, info.image_size_px, info.context_length) == ("tiny", 64, 64)
    assert info.dims == {"image": 96, "text": 96}


def test_one_seed_gives_one_model_and_leaves_the_global_generator_alone(untrained: ClipEncoder) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert isinstance(untrained.tokenizer, tiny.TinyTokenizer)
    pairs = tiny.read_pairs(untrained.tokenizer.json)
    again = tiny.build_tiny(pairs, seed=0)
    assert torch.equal(torch.rand(1), expected)
    for (name, ours), theirs in zip(untrained.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    other = tiny.build_tiny(pairs, seed=1)
    assert not torch.equal(other.model.visual.proj, untrained.model.visual.proj)  # type: ignore[union-attr,arg-type]


def test_the_vocabulary_is_the_same_each_time() -> None:
    texts = [
        f"{colour} {thing} {n}" for n in range(50) for colour in ("red", "blue") for thing in ("bag", "hat")
    ]
    first = tiny.train_tiny_tokenizer(texts, 400).to_str()
    assert tiny.train_tiny_tokenizer(iter(texts), 400).to_str() == first


def test_the_end_token_has_the_highest_id_and_every_text_ends_with_it(untrained: ClipEncoder) -> None:
    rows = untrained.token_ids(TEXTS)
    highest = untrained.model.vocab_size - 1  # type: ignore[operator]
    for row in rows:
        assert row[-1] == highest
        assert max(row[:-1]) < highest
        assert len(row) <= 64
    assert len(rows[2]) == 2
    assert len(rows[-1]) == 64


@pytest.mark.parametrize("text", ["a red bag", "schöne schuhe 😀👨‍👩‍👧🏽", "日本語", "<end>", "x\u0000y"])
def test_every_text_can_be_read_and_read_back(untrained: ClipEncoder, text: str) -> None:
    assert isinstance(untrained.tokenizer, tiny.TinyTokenizer)
    ids = untrained.token_ids([text])[0][1:-1]
    assert tiny.read_pairs(untrained.tokenizer.json).decode(ids).strip() == text


def test_case_and_compatibility_forms_are_one(untrained: ClipEncoder) -> None:
    assert len({tuple(row) for row in untrained.token_ids(["Red Bag", "red  bag", "ｒｅｄ bag"])}) == 1


@pytest.mark.parametrize("unit", ["x", "word ", "😀", "a1!"])
def test_100_000_characters_are_read_in_bounded_time(untrained: ClipEncoder, unit: str) -> None:
    started = time.process_time()
    assert len(untrained.token_ids([(unit * 100_000)[:100_000]])[0]) == 64
    assert time.process_time() - started < 3


def test_a_whole_picture_is_seen_whatever_its_shape(untrained: ClipEncoder) -> None:
    half = Image.fromarray(np.repeat([[0], [255]], 50, axis=0).repeat(10, 1).astype(np.uint8)).convert("RGB")
    pixels = untrained.image_transform(half)
    assert pixels.shape == (3, 64, 64)
    assert pixels[:, 0].max() < pixels[:, -1].min()
    assert pickle.loads(pickle.dumps(untrained.image_transform)) == untrained.image_transform  # noqa: S301
    assert pickle.loads(pickle.dumps(untrained.tokenizer))(TEXTS) == untrained.token_ids(TEXTS)  # noqa: S301


def test_missing_files_are_answered_with_the_command_that_makes_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "TINY_FOLDER", tmp_path)
    with pytest.raises(EncoderError, match=r"has no tiny\.safetensors .*make it with `tandem train-tiny`"):
        load_encoder("tiny")
    (tmp_path / "tiny.safetensors").write_bytes((folder / "tiny.safetensors").read_bytes())
    with pytest.raises(EncoderError, match=r"has no config\.json and no tokenizer\.json"):
        describe_encoder("tiny")
    with pytest.raises(EncoderError, match=r"expected tiny or tiny:<folder>"):
        load_encoder("tiny/x")


def test_files_that_do_not_fit_each_other_are_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tiny.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    weights = load_file(tmp_path / "tiny.safetensors")
    weights["visual.proj"] = weights["visual.proj"][:-1].clone()
    save_file(weights, tmp_path / "tiny.safetensors")
    with pytest.raises(EncoderError, match=r"visual\.proj is \(159, 96\), expected \(160, 96\)"):
        load_encoder(f"tiny:{tmp_path}")
    (tmp_path / "tiny.safetensors").write_bytes((folder / "tiny.safetensors").read_bytes())
    larger = tiny.train_tiny_tokenizer(CAPTIONS, 290)
    (tmp_path / "tokenizer.json").write_text(larger.to_str())
    with pytest.raises(EncoderError, match=r"has 290 ids, but config.json says 300"):
        load_encoder(f"tiny:{tmp_path}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(EncoderError, match=r"is no tokenizer"):
        load_encoder(f"tiny:{tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EncoderError, match=r"is no configuration of tiny"):
        load_encoder(f"tiny:{tmp_path}")


def test_only_tiny_is_saved_as_tiny(folder: Path, tmp_path: Path) -> None:
    encoder = load_encoder("random:8")
    with pytest.raises(TypeError, match="'random:8' is no tiny"):
        tiny.save_tiny(encoder, tmp_path)  # type: ignore[arg-type]


def test_a_vocabulary_without_room_for_all_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="need 260 or more"):
        tiny.train_tiny_tokenizer(CAPTIONS, 200)
