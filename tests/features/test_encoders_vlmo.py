"""VLMo as an encoder: specifications, loading, independence of the batch, errors."""

import http.server
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from features.encoders import download
from features.encoders.registry import describe_encoder, load_encoder
from features.encoders.vlmo import VlmoEncoder
from features.encoders.vlmo import encoder as vlmo_encoder
from features.encoders.vlmo.config import VARIANTS, VlmoConfig
from features.encoders.vlmo.losses import draw_negatives, matching_loss
from features.encoders.vlmo.model import Vlmo
from features.encoders.vlmo.weights import load_vlmo
from features.encoders.word_pieces import WordPieceTokenizer
from features.errors import EncoderError
from features.texts import clean_text
from tests.features.small_vlmo import WORDS, checkpoint, layout, write_vocabulary

SMALL = VlmoConfig(
    width=32,
    depth=3,
    n_heads=4,
    mlp_width=64,
    vl_start=2,
    patch_px=8,
    image_size_px=32,
    vocabulary=len(WORDS),
)
PLUS = SMALL.model_copy(update={"relative": False, "layer_scale": False, "n_heads": 16})
TEXTS = ["a red bag", "blue shoes & 10 red bags", "", "warm " * 200, "😀 unknown words"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_vocabulary(tmp_path)
    torch.save(checkpoint(SMALL), tmp_path / "small.pt")
    torch.save({"module": {f"module.{k}": v for k, v in checkpoint(PLUS).items()}}, tmp_path / "plus.pt")
    return tmp_path


def pixels(encoder: torch.nn.Module, n: int = 4) -> torch.Tensor:
    size = encoder.info.image_size_px
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("file", ["small.pt", "plus.pt"])
def test_an_encoder_gives_what_its_info_says(folder: Path, file: str) -> None:
    spec = f"vlmo/custom:{folder / file}"
    encoder = load_encoder(spec)
    assert encoder.info == describe_encoder(spec)
    assert encoder.info.modalities == ("image", "text", "fused")
    assert encoder.info.dims == {"image": 32, "text": 32, "fused": 32}
    tokens = encoder.tokenize(TEXTS[:4])
    with torch.inference_mode():
        assert encoder.encode_images(pixels(encoder)).shape == (4, 32)
        assert encoder.encode_texts(tokens).shape == (4, 32)
        assert encoder.encode_pairs(pixels(encoder), tokens).shape == (4, 32)


@pytest.mark.parametrize("options", ["", "+output=vl", "+output=cls+fused=cls"])
@pytest.mark.parametrize("file", ["small.pt", "plus.pt"])
def test_vectors_do_not_depend_on_the_batch(folder: Path, file: str, options: str) -> None:
    encoder = load_encoder(f"vlmo/custom:{folder / file}{options}")
    images, texts = pixels(encoder, len(TEXTS)), TEXTS
    with torch.inference_mode():
        whole = [
            encoder.encode_images(images),
            encoder.encode_texts(encoder.tokenize(texts)),
            encoder.encode_pairs(images, encoder.tokenize(texts)),
        ]
        padded = torch.nn.functional.pad(encoder.tokenize(texts), (0, 0))
        order = torch.tensor([3, 1, 4, 0, 2])
        shuffled = encoder.encode_pairs(images[order], padded[order])
        torch.testing.assert_close(shuffled, whole[2][order], rtol=1e-5, atol=1e-6)
        for row, text in enumerate(texts):
            tokens = encoder.tokenize([text])
            alone = [
                encoder.encode_images(images[row : row + 1]),
                encoder.encode_texts(tokens),
                encoder.encode_pairs(images[row : row + 1], tokens),
            ]
            for found, expected in zip(alone, whole, strict=True):
                torch.testing.assert_close(found[0], expected[row], rtol=1e-5, atol=1e-6)


def test_padding_to_the_full_length_changes_nothing(folder: Path) -> None:
    encoder = load_encoder(f"vlmo/custom:{folder / 'small.pt'}")
    tokens = encoder.tokenize(TEXTS[:3])
    long = torch.nn.functional.pad(tokens, (0, 40 - tokens.shape[1]), value=-1)
    with torch.inference_mode():
        torch.testing.assert_close(
            encoder.encode_texts(tokens), encoder.encode_texts(long), rtol=1e-5, atol=1e-6
        )


def test_kept_biases_follow_the_weights(folder: Path) -> None:
    encoder = load_encoder(f"vlmo/custom:{folder / 'small.pt'}")
    assert isinstance(encoder, VlmoEncoder)
    tokens, table = (
        encoder.tokenize(["a red bag"]),
        encoder.model.get_parameter("relative_position_bias_table"),
    )
    with torch.no_grad():
        before = encoder.encode_texts(tokens)
        table.mul_(3)
        after = encoder.encode_texts(tokens)
    fresh = encoder.encode_texts(tokens)  # with gradients nothing is kept
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, fresh.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["base", "base_plus", "large"])
def test_a_checkpoint_of_real_shapes(name: str, tmp_path: Path) -> None:
    config = VARIANTS[name]
    weights = {key: tensor.half() for key, tensor in checkpoint(config).items()}
    save_file(weights, tmp_path / "real.safetensors")
    n_numbers = sum(tensor.numel() for tensor in weights.values())
    del weights
    write_vocabulary(tmp_path, config.vocabulary)
    encoder = load_encoder(f"vlmo/{name}:{tmp_path / 'real.safetensors'}")
    assert encoder.info.n_parameters == n_numbers
    assert isinstance(encoder, VlmoEncoder)
    assert encoder.model.config == config.model_copy(update={"drop_path": 0.0})
    images, texts = pixels(encoder, 2), ["a red bag", "warm blue shoes & 10 bags"]
    tokens = encoder.tokenize(texts)
    with torch.inference_mode():
        whole = [
            encoder.encode_images(images),
            encoder.encode_texts(tokens),
            encoder.encode_pairs(images, tokens),
        ]
        alone = encoder.tokenize(texts[:1])
        single = [
            encoder.encode_images(images[:1]),
            encoder.encode_texts(alone),
            encoder.encode_pairs(images[:1], alone),
        ]
    for vectors, vector in zip(whole, single, strict=True):
        assert vectors.shape == (2, config.width)
        assert (vectors[0] - vector[0]).abs().max() < 1e-5 * vectors[0].abs().max()


def test_text_of_every_kind_becomes_the_library_s_ids(folder: Path) -> None:
    encoder = load_encoder(f"vlmo/custom:{folder / 'small.pt'}")
    start, end, unknown = WORDS.index("[CLS]"), WORDS.index("[SEP]"), WORDS.index("[UNK]")
    ids = encoder.token_ids(["A RED Bags", "", "warm " * 200, "😀"])
    assert ids[0] == [start, *(WORDS.index(word) for word in ("a", "red", "bag", "##s")), end]
    assert ids[1] == [start, end]
    assert len(ids[2]) == 40
    assert ids[2][-1] == end
    assert ids[3] == [start, unknown, end]


def test_pixels_are_squashed_and_scaled_to_one(folder: Path) -> None:
    encoder = load_encoder(f"vlmo/custom:{folder / 'small.pt'}")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 20, 3), np.uint8))
    expected = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)).astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(encoder.image_transform(picture).permute(1, 2, 0), expected, atol=1e-6)
    copies = pickle.loads(pickle.dumps((encoder.image_transform, encoder.tokenizer)))  # noqa: S301 - our own
    assert copies[1](["a red bag"]) == encoder.tokenizer(["a red bag"])


def test_options_change_size_text_and_digest(folder: Path) -> None:
    spec = f"vlmo/custom:{folder / 'small.pt'}"
    plain, changed = describe_encoder(spec), describe_encoder(f"{spec}+image_size=48+tokens=7+l2=yes")
    assert (changed.image_size_px, changed.context_length) == (48, 7)
    assert changed.preprocessing_sha256 != plain.preprocessing_sha256
    encoder = load_encoder(f"{spec}+image_size=48+tokens=7+l2=yes")
    with torch.inference_mode():
        assert encoder.encode_images(pixels(encoder)).norm(dim=1).tolist() == pytest.approx([1.0] * 4)
    assert max(map(len, encoder.token_ids(TEXTS))) == 7


def test_what_is_not_used_is_said(folder: Path) -> None:
    weights = checkpoint(SMALL) | {"vqa_classifier.0.weight": torch.zeros(64, 32)}
    weights["token_type_embeddings.weight"] = torch.randn(3, 32)
    torch.save({"state_dict": weights}, folder / "more.pt")
    encoder = load_encoder(f"vlmo/custom:{folder / 'more.pt'}")
    assert "vqa_classifier.0.weight" in encoder.notes[0]
    assert "text_embeddings.position_embeddings.weight" in encoder.notes[0]  # stored, never trained


def test_a_file_without_contrastive_heads_offers_what_it_can(folder: Path) -> None:
    weights = {name: tensor for name, tensor in checkpoint(SMALL).items() if not name.startswith("itc_")}
    torch.save(weights, folder / "vqa.pt")
    assert describe_encoder(f"vlmo/custom:{folder / 'vqa.pt'}").modalities == ("fused",)
    assert describe_encoder(f"vlmo/custom:{folder / 'vqa.pt'}+output=cls").modalities == (
        "image",
        "text",
        "fused",
    )
    encoder = load_encoder(f"vlmo/custom:{folder / 'vqa.pt'}")
    with pytest.raises(EncoderError, match="no modality 'image', only fused"):
        encoder.encode_images(pixels(encoder))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vlmo/basis", r"'basis' is no variant.*did you mean 'base'"),
        ("vlmo/base:cooc", r"'cooc' is no release.*coco.*did you mean 'coco'"),
        ("vlmo/base:nowhere/x.pt", "there is no weights file 'nowhere/x.pt'"),
        ("vlmo/custom", "names no weights"),
        ("vlmo/base+fuse=cls", "no option 'fuse'; did you mean 'fused'"),
        ("vlmo/custom:{folder}/small.pt+output=both", "option output is 'both'"),
        ("vlmo/custom:{folder}/small.pt+image_size=33", "no multiple of patch_px 8"),
        ("vlmo/custom:{folder}/small.pt+tokens=300", "more than the bias table's 196"),
        ("vlmo/custom:{folder}/small.pt+vocab=none.txt", "there is no vocabulary 'none.txt'"),
        ("vlmo/base:{folder}/small.pt", "it is no released variant: type vlmo/custom"),
        ("vlmo/custom:{folder}/other.pt", "so they are no VLMo"),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, spec: str, message: str) -> None:
    torch.save({"a": torch.zeros(1)}, folder / "other.pt")
    with pytest.raises(EncoderError, match=message):
        load_encoder(spec.format(folder=folder))


def test_a_missing_encoder_tensor_is_refused_by_name(folder: Path) -> None:
    weights = checkpoint(SMALL)
    del weights["transformer.blocks.1.attn.v_bias"]
    torch.save(weights, folder / "short.pt")
    with pytest.raises(EncoderError, match=r"lack 1 tensors \(transformer\.blocks\.1\.attn\.v_bias\)"):
        load_encoder(f"vlmo/custom:{folder / 'short.pt'}")


def test_a_vocabulary_without_the_special_tokens_is_refused(folder: Path) -> None:
    (folder / "words.txt").write_text("a\nb\n", encoding="utf-8")
    with pytest.raises(EncoderError, match=r"lacks \[PAD\], \[UNK\]"):
        load_encoder(f"vlmo/custom:{folder / 'small.pt'}+vocab={folder / 'words.txt'}")


def test_other_weights_of_a_released_variant_are_named(tmp_path: Path) -> None:
    write_vocabulary(tmp_path)
    config = VARIANTS["base_plus"]
    # Shapes are all that is looked at before the weights are loaded, and these take no memory.
    weights = {name: torch.zeros(()).expand(shape) for name, shape in layout(config).items()}
    source = vlmo_encoder.VlmoSource(
        "vlmo/base:x.pt", "x", vlmo_encoder.VlmoOptions(), Path("x.pt"), tmp_path / "vocab.txt", "base"
    )
    with pytest.raises(EncoderError, match="it is vlmo/base_plus"):
        vlmo_encoder._configs(source, weights)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    def handler(*args: object) -> _Quiet:
        return _Quiet(*args, directory=str(folder))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


def test_released_weights_are_fetched_once(
    folder: Path, server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(vlmo_encoder, "RELEASES_URL", server)
    monkeypatch.setattr(vlmo_encoder, "VARIANTS", {"base": SMALL})
    monkeypatch.setattr(download, "weights_cache", lambda: cache)
    (folder / "small.pt").rename(folder / "vlmo_base_patch16_224.pt")
    spec = f"vlmo/base+vocab={folder / 'vocab.txt'}"
    info = describe_encoder(spec)
    (folder / "vlmo_base_patch16_224.pt").unlink()  # a second fetch would fail
    assert load_encoder(spec).info == info
    assert [path.name for path in cache.iterdir()] == ["vlmo_base_patch16_224.pt"]


def test_without_network_the_error_says_how_to_bring_the_file(
    folder: Path, server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(vlmo_encoder, "RELEASES_URL", server)
    monkeypatch.setattr(download, "weights_cache", lambda: tmp_path / "cache")
    with pytest.raises(EncoderError, match=r"could not fetch .*_384_coco\.pt.*type vlmo/base:coco@<file>"):
        describe_encoder(f"vlmo/base:coco+vocab={folder / 'vocab.txt'}")
    assert not list((tmp_path / "cache").glob("*"))


def test_matching_loss_equals_three_separate_passes() -> None:
    model, _ = load_vlmo(checkpoint(SMALL), SMALL)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, 32, 32, generator=generator)
    tokens = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0], [2, 8, 9, 3]])
    mask = tokens != 0
    pictures, texts = torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])
    logits = [
        model.itm_score(model.pooled(model.joint_pass(images[i : i + 1], tokens[j : j + 1], mask[j : j + 1])))
        for i, j in [(0, 0), (1, 1), (2, 2), (1, 0), (2, 1), (0, 2), (0, 2), (1, 0), (2, 1)]
    ]
    expected = cross_entropy(torch.cat(logits), torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 0]))
    found = matching_loss(model, images, tokens, mask, (pictures, texts))
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_negatives_are_never_the_partner_and_follow_the_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[9.0, 3.0, -9.0], [-9.0, 9.0, 3.0], [3.0, -9.0, 9.0]])
    for _ in range(20):
        pictures, texts = draw_negatives(logits, generator)
        assert pictures.tolist() == [2, 0, 1]
        assert texts.tolist() == [1, 2, 0]
    perfect = 1000 * torch.eye(4)
    pictures, texts = draw_negatives(perfect, generator)
    assert all(pictures != torch.arange(4))
    assert all(texts != torch.arange(4))
    with pytest.raises(ValueError, match="at least 2"):
        draw_negatives(torch.ones(1, 1))


def test_stochastic_depth_drops_samples_in_training_only() -> None:
    config = SMALL.model_copy(update={"drop_path": 0.9})
    model, _ = load_vlmo(checkpoint(SMALL), SMALL, config)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.image_pass(images).own, model.image_pass(images).own)
        model.train()
        torch.manual_seed(0)
        assert not torch.equal(model.image_pass(images).own, model.image_pass(images).own)


def test_a_fresh_model_starts_as_published() -> None:
    model = Vlmo(SMALL)
    model.reset(torch.Generator().manual_seed(0))
    assert model.get_parameter("relative_position_bias_table").abs().max() == 0
    assert float(model.get_parameter("logit_scale").exp()) == pytest.approx(1 / 0.07)
    weight = model.get_parameter("transformer.blocks.0.attn.qkv.weight")
    assert 0.015 < float(weight.std()) < 0.025
    assert model.get_parameter("transformer.blocks.0.norm1.weight").unique().tolist() == [1.0]
    assert model.get_parameter("transformer.blocks.0.gamma_1").tolist() == pytest.approx([0.1] * 32)


def test_word_pieces_are_those_of_the_library_s_bert(tmp_path: Path) -> None:
    from transformers import BertTokenizer

    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789", *"!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~"]
    pieces = [
        *WORDS,
        *letters,
        *(f"##{letter}" for letter in letters),
        "quot",
        "amp",
        "’",
        "“",
        "é",
        "ca",
        "##fe",
    ]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(dict.fromkeys(pieces)), encoding="utf-8")
    library = BertTokenizer(str(path), do_lower_case=True)
    texts = [
        "10&quot; red &amp; BLUE bags",
        "“curly” it’s CAFÉ café",
        "😀 a [MASK] b",
        "",
        "x" * 300,
        "a red bag " * 99,
    ]
    texts += [clean_text(text) for text in texts]
    expected = library(texts, truncation=True, max_length=40)["input_ids"]
    assert WordPieceTokenizer(str(path), 40)(texts) == expected
