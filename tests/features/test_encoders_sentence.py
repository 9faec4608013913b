"""Encoders of sentence-transformers give the library's own vectors, whatever is in the batch."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from features.encoders import hub
from features.encoders.base import Encoder
from features.encoders.registry import describe_encoder, load_encoder
from features.errors import EncoderError
from tests.features.small_clip import picture
from tests.features.small_sentence import (
    MAX_TOKENS,
    TEXTS,
    library_vectors,
    minilm,
    save_bert,
    save_sentence,
)

KINDS = ["mean", "cls", "both", "dense", "lasttoken", "instructor", "unlimited", "clip", "clip of today"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sentence(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def mean_folder(tmp_path: Path) -> Path:
    return save_sentence(tmp_path, "mean")


def spec_of(folder: Path, options: str = "") -> str:
    return f"sentence-transformers/local-dir:{folder}{options}"


def vectors(encoder: Encoder, texts: list[str]) -> np.ndarray:
    with torch.inference_mode():
        return encoder.encode_texts(encoder.tokenize(texts)).numpy()


def test_texts_get_the_vectors_of_the_library(folder: Path) -> None:
    encoder = load_encoder(spec_of(folder))
    got = vectors(encoder, TEXTS)
    assert got.dtype == np.float32
    assert got.shape == (len(TEXTS), encoder.info.dims["text"])
    np.testing.assert_allclose(got, library_vectors(folder, TEXTS), atol=1e-5)
    assert len({row.tobytes() for row in got}) == len(TEXTS)  # the texts are told apart


def test_prompts_get_the_vectors_of_the_library(folder: Path) -> None:
    if not (folder / "config_sentence_transformers.json").is_file():
        with pytest.raises(EncoderError, match="has no prompt 'query'; it has none"):
            load_encoder(spec_of(folder, "+prompt=query"))
        return
    encoder = load_encoder(spec_of(folder, "+prompt=query"))
    got = vectors(encoder, TEXTS)
    np.testing.assert_allclose(got, library_vectors(folder, TEXTS, prompt_name="query"), atol=1e-5)
    plain = load_encoder(spec_of(folder))
    assert not np.allclose(got, vectors(plain, TEXTS), atol=1e-3)
    assert encoder.info.preprocessing_sha256 != plain.info.preprocessing_sha256
    assert encoder.info.weights_sha256 == plain.info.weights_sha256
    assert encoder.info.name.endswith("-query")


def test_a_vector_does_not_depend_on_its_batch(folder: Path) -> None:
    encoder = load_encoder(spec_of(folder))
    together = vectors(encoder, TEXTS)
    for text, row in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(vectors(encoder, [text])[0], row, atol=1e-5)


def test_info_is_the_same_described_and_loaded(folder: Path) -> None:
    encoder = load_encoder(spec_of(folder))
    assert encoder.info == describe_encoder(spec_of(folder))
    assert encoder.info.name in (folder.name, f"{folder.parent.name}-model")
    assert encoder.info.n_parameters > 0
    assert not encoder.training


def test_gradient_reaches_the_word_embeddings(folder: Path) -> None:
    encoder = load_encoder(spec_of(folder))
    made = encoder.encode_texts(encoder.tokenize(TEXTS))
    (made * torch.linspace(-1, 1, made.shape[1])).sum().backward()  # type: ignore[no-untyped-call]
    names = ("word_embeddings.weight", "embed_tokens.weight", "token_embedding.weight")
    (table,) = [value for name, value in encoder.named_parameters() if name.endswith(names)]
    assert table.grad is not None
    assert float(table.grad.abs().sum()) > 0


def test_half_precision_gives_nearby_float32(folder: Path) -> None:
    encoder = load_encoder(spec_of(folder))
    exact = vectors(encoder, TEXTS)
    halved = vectors(encoder.to(torch.bfloat16), TEXTS)
    assert halved.dtype == np.float32
    np.testing.assert_allclose(halved, exact, atol=0.1 * float(np.abs(exact).max()))


def test_the_tokenizer_can_be_pickled_for_loader_workers(folder: Path) -> None:
    encoder = load_encoder(spec_of(folder, "+max_tokens=7"))
    again = pickle.loads(pickle.dumps(encoder.tokenizer))  # noqa: S301 - made a moment ago
    assert again(TEXTS) == encoder.token_ids(TEXTS)
    assert max(encoder.token_lengths(TEXTS)) == 7
    assert encoder.info.context_length == 7
    assert encoder.token_ids([]) == []


def test_long_texts_are_cut_where_the_library_cuts_them(mean_folder: Path) -> None:
    encoder = load_encoder(spec_of(mean_folder))
    assert encoder.info.context_length == MAX_TOKENS
    assert encoder.token_lengths(["leather " * 60]) == [MAX_TOKENS]


@pytest.mark.parametrize("kind", ["clip", "clip of today"])
def test_pictures_get_the_vectors_of_the_library(tmp_path: Path, kind: str) -> None:
    folder = save_sentence(tmp_path, kind)
    encoder = load_encoder(spec_of(folder))
    assert encoder.info.modalities == ("image", "text")
    assert encoder.info.image_size_px == 32
    pictures = [picture(seed) for seed in range(3)]
    transform = pickle.loads(pickle.dumps(encoder.image_transform))  # noqa: S301 - made a moment ago
    with torch.inference_mode():
        got = encoder.encode_images(torch.stack([transform(image) for image in pictures])).numpy()
    np.testing.assert_allclose(got, library_vectors(folder, pictures), atol=1e-5)


def test_texts_alone_refuse_pictures(mean_folder: Path) -> None:
    encoder = load_encoder(spec_of(mean_folder))
    assert encoder.info.modalities == ("text",)
    with pytest.raises(EncoderError, match="has no modality 'image', only text"):
        encoder.encode_images(torch.zeros(1, 3, 4, 4))


def test_upper_case_is_folded_where_the_folder_says_so(tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    tower = Transformer(str(save_bert(tmp_path / "base", lower=False)), do_lower_case=True, max_seq_length=16)
    SentenceTransformer(modules=[tower, Pooling(24)], device="cpu").save(str(tmp_path / "model"))
    encoder = load_encoder(spec_of(tmp_path / "model"))
    assert encoder.token_ids(["BLUE Shoes"]) == encoder.token_ids(["blue shoes"])
    np.testing.assert_allclose(vectors(encoder, TEXTS), library_vectors(tmp_path / "model", TEXTS), atol=1e-5)


def test_minilm_gives_the_vectors_of_the_library() -> None:
    folder = minilm()
    encoder = load_encoder(spec_of(folder))
    assert (encoder.info.context_length, encoder.info.dims["text"]) == (256, 384)
    texts = [*TEXTS, "word " * 1000]
    got = vectors(encoder, texts)
    np.testing.assert_allclose(got, library_vectors(folder, texts), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
    bag, mug, car = vectors(encoder, ["a red handbag", "a crimson purse", "an engine of a lorry"])
    assert bag @ mug > 0.5 > bag @ car


def test_a_saved_truncation_is_kept(mean_folder: Path) -> None:
    path = mean_folder / "config_sentence_transformers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "truncate_dim": 5}))
    encoder = load_encoder(spec_of(mean_folder))
    assert encoder.info.dims == {"text": 5}
    np.testing.assert_allclose(vectors(encoder, TEXTS), library_vectors(mean_folder, TEXTS), atol=1e-5)


def test_weights_of_older_folders_are_read_without_running_them(mean_folder: Path) -> None:
    expected = vectors(load_encoder(spec_of(mean_folder)), TEXTS)
    weights = load_file(mean_folder / "model.safetensors")
    (mean_folder / "model.safetensors").unlink()
    torch.save(weights, mean_folder / "pytorch_model.bin")
    np.testing.assert_array_equal(vectors(load_encoder(spec_of(mean_folder)), TEXTS), expected)
    torch.save({"weight": Path("/")}, mean_folder / "pytorch_model.bin")  # unpickling it would run code
    with pytest.raises(EncoderError, match="cannot be read"):
        load_encoder(spec_of(mean_folder))


def test_digests_follow_what_changes_vectors(mean_folder: Path) -> None:
    before = describe_encoder(spec_of(mean_folder))
    assert describe_encoder(spec_of(mean_folder, "+max_tokens=8")).preprocessing_sha256 != (
        before.preprocessing_sha256
    )
    pooling = mean_folder / "1_Pooling" / "config.json"
    pooling.write_text(pooling.read_text().replace("mean", "cls"))
    assert describe_encoder(spec_of(mean_folder)).preprocessing_sha256 != before.preprocessing_sha256
    copy = mean_folder.with_name("elsewhere")
    shutil.copytree(mean_folder, copy)
    moved = describe_encoder(spec_of(copy))
    assert (moved.weights_sha256, moved.preprocessing_sha256) == (
        before.weights_sha256,
        describe_encoder(spec_of(mean_folder)).preprocessing_sha256,
    )


def test_missing_tensors_are_an_error_not_random_numbers(mean_folder: Path) -> None:
    path = mean_folder / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        EncoderError, match=r"lack 1 tensors, first 'encoder\.layer\.1\.output\.dense\.weight'"
    ):
        load_encoder(spec_of(mean_folder))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(EncoderError, match="cannot be read"):
        describe_encoder(spec_of(mean_folder))


def test_each_broken_folder_has_its_line(mean_folder: Path, tmp_path: Path) -> None:
    def refused(match: str, options: str = "") -> None:
        with pytest.raises(EncoderError, match=match):
            describe_encoder(spec_of(mean_folder, options))

    refused(r"has no prompt 'nothing'; its prompts are .*document", "+prompt=nothing")
    refused(r"option max_tokens is 17, but it reads at most 16 tokens", "+max_tokens=17")
    refused(r"no option 'promt'; did you mean 'prompt'", "+promt=query")
    modules = mean_folder / "modules.json"
    lines = json.loads(modules.read_text())
    modules.write_text(json.dumps([*lines, {"path": "", "type": "custom_code.Thing"}]))
    refused("needs code of its own .*custom_code.Thing.*precomputed/npy")
    modules.write_text(json.dumps([*lines, {"path": "", "type": "sentence_transformers.models.LSTM"}]))
    refused("has a module LSTM, which is not supported")
    modules.write_text(json.dumps([*lines, {"path": "../x", "type": "sentence_transformers.models.Dense"}]))
    refused("lies outside")
    modules.write_text(json.dumps(lines[:1]))
    refused("expected Transformer or CLIPModel first, and Pooling")
    modules.write_text("{")
    refused("cannot be read")
    modules.unlink()
    refused("has no modules.json; expected the layout of the library")
    modules.write_text(json.dumps(lines))
    (mean_folder / "model.safetensors").unlink()
    refused("has no weights; expected model.safetensors or pytorch_model.bin")
    with pytest.raises(EncoderError, match="there is no folder"):
        describe_encoder(spec_of(tmp_path / "nowhere"))
    with pytest.raises(EncoderError, match="is no name on the hub"):
        describe_encoder("sentence-transformers/a/b/c")


def test_without_network_the_error_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_hub_answers", lambda: False)
    for name in ("no-such-model-here", "sentence-transformers/no-such-model-here"):
        with pytest.raises(
            EncoderError, match=r"repository sentence-transformers/no-such-model-here; .*local-dir:<folder>"
        ):
            describe_encoder(f"sentence-transformers/{name}")


def test_hub_names_without_an_owner_are_the_library_s_own(
    mean_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fetch_folder(repository: str, patterns: object, *, needed: object, instead: str) -> Path:
        asked.append(repository)
        return mean_folder

    def fetch(repository: str, filenames: list[str], *, instead: str) -> Path:
        asked.append(f"{repository}: {' or '.join(filenames)}")
        save_file(weights, mean_folder / "model.safetensors", metadata={"format": "pt"})
        return mean_folder / "model.safetensors"

    monkeypatch.setattr("features.encoders.sentence_files.fetch_folder_from_hub", fetch_folder)
    monkeypatch.setattr("features.encoders.sentence_files.fetch_from_hub", fetch)
    assert describe_encoder("sentence-transformers/all-MiniLM-L6-v2").name == "all-MiniLM-L6-v2"
    assert describe_encoder("sentence-transformers/BAAI/bge-base-en-v1.5+prompt=query").name == (
        "bge-base-en-v1.5-query"
    )
    assert describe_encoder("baseline/minilm").name == "all-MiniLM-L6-v2"
    weights = load_file(mean_folder / "model.safetensors")
    (mean_folder / "model.safetensors").unlink()
    load_encoder("sentence-transformers/owner/name")
    assert asked[:3] == [
        "sentence-transformers/all-MiniLM-L6-v2",
        "BAAI/bge-base-en-v1.5",
        "sentence-transformers/all-MiniLM-L6-v2",
    ]
    assert "owner/name: model.safetensors or pytorch_model.bin" in asked
