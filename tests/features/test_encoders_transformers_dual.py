"""Dual encoders of transformers: the library's own vectors, whatever else is in the batch."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from features.encoders.base import Encoder
from features.encoders.pixels import PixelTransform
from features.encoders.registry import describe_encoder, load_encoder
from features.errors import EncoderError
from features.texts import clean_text
from tests.features import small_transformers as small

CLEAN = [clean_text(text) for text in small.TEXTS]
KINDS = sorted(small.DUAL)
FUSED = ("blip", "blip-2", "flava")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def save(kind: str) -> Path:
        if kind not in made:
            made[kind] = small.DUAL[kind](tmp_path_factory.mktemp(kind))
        return made[kind]

    return save


@pytest.fixture(scope="module")
def loaded(saved: Callable[[str], Path]) -> Callable[[str], Encoder]:
    made: dict[str, Encoder] = {}

    def load(kind: str) -> Encoder:
        if kind not in made:
            made[kind] = load_encoder(f"transformers/local-dir:{saved(kind)}")
        return made[kind]

    return load


def library_pixels(folder: Path) -> dict[str, Tensor]:
    """What the library's own processor makes of the pictures, converted to RGB as a first step."""
    processor: Any = transformers.AutoImageProcessor
    loaded = processor.from_pretrained(folder, backend="pil")
    images = [image.convert("RGB") for image in small.pictures().values()]
    return dict(loaded(images, return_tensors="pt"))


def library_tokens(folder: Path, length: int, texts: list[str] = CLEAN) -> dict[str, Tensor]:
    """All rows at full length, as the towers were trained."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return dict(
        tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    )


def library_features(kind: str, folder: Path, length: int) -> tuple[Tensor, Tensor]:
    pixels, tokens = library_pixels(folder), library_tokens(folder, length)
    if kind == "blip-2":
        model: Any = transformers.Blip2ForImageTextRetrieval.from_pretrained(folder).eval()
        vision = {name: pixels[name] for name in ("pixel_values",)}
        five = {name: value[:5] for name, value in vision.items()}
        texts = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        given = model(**five, **texts)
        more = model(pixel_values=vision["pixel_values"][5:], **texts)
        return torch.cat([given.image_embeds, more.image_embeds]).mean(dim=1), given.text_embeds
    if kind == "blip":
        model = transformers.BlipForImageTextRetrieval.from_pretrained(folder).eval()
        texts = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        states = model(**pixels, **texts, use_itm_head=False)
        return model.vision_proj(states.last_hidden_state[:, 0]), model.text_proj(
            states.question_embeds[:, 0]
        )
    model = transformers.AutoModel.from_pretrained(folder).eval()
    image = model.get_image_features(**pixels).pooler_output
    if kind.startswith("blip"):
        tokens.pop("token_type_ids", None)
    text = model.get_text_features(**tokens).pooler_output
    return (image[:, 0], text[:, 0]) if kind == "flava" else (image, text)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1.0, theirs.abs().max().item()))


def prepared(encoder: Encoder) -> tuple[Tensor, Tensor]:
    pixels = torch.stack([encoder.image_transform(image) for image in small.pictures().values()])
    return pixels, encoder.tokenize(CLEAN)


@pytest.mark.parametrize("kind", KINDS)
def test_the_vectors_are_the_library_s_own(
    kind: str, saved: Callable[[str], Path], loaded: Callable[[str], Encoder]
) -> None:
    encoder = loaded(kind)
    pixels, tokens = prepared(encoder)
    with torch.inference_mode():
        image, text = library_features(kind, saved(kind), encoder.info.context_length)
        ours_image, ours_text = encoder.encode_images(pixels), encoder.encode_texts(tokens)
    assert_close(ours_image, image)
    assert_close(ours_text, text)
    assert text.std(dim=0).mean() > 1e-3  # the texts differ, or the comparison says nothing
    assert image.std(dim=0).mean() > 1e-4
    assert encoder.info.dims["image"] == image.shape[1]
    assert encoder.info.dims["text"] == text.shape[1]
    if kind not in ("siglip", "siglip2"):
        lengths = encoder.token_lengths(CLEAN[:3])
        assert encoder.tokenize(CLEAN[:3]).shape[1] == max(lengths) < encoder.info.context_length


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_does_not_depend_on_its_batch(kind: str, loaded: Callable[[str], Encoder]) -> None:
    encoder = loaded(kind)
    pixels, tokens = prepared(encoder)
    with torch.inference_mode():
        images, texts = encoder.encode_images(pixels), encoder.encode_texts(tokens)
        for row in range(len(CLEAN)):
            assert_close(encoder.encode_images(pixels[row : row + 1])[0], images[row])
            assert_close(encoder.encode_texts(encoder.tokenize(CLEAN[row : row + 1]))[0], texts[row])
            if "fused" in encoder.info.modalities:
                pairs = encoder.encode_pairs(pixels[:5], tokens)
                alone = encoder.tokenize(CLEAN[row : row + 1])
                assert_close(encoder.encode_pairs(pixels[row : row + 1], alone)[0], pairs[row])


@pytest.mark.parametrize("kind", KINDS)
def test_described_is_loaded_and_preparation_can_be_pickled(
    kind: str, saved: Callable[[str], Path], loaded: Callable[[str], Encoder]
) -> None:
    encoder = loaded(kind)
    assert describe_encoder(f"transformers/local-dir:{saved(kind)}") == encoder.info
    transform, tokenizer = pickle.loads(pickle.dumps((encoder.image_transform, encoder.tokenizer)))  # noqa: S301 - made a moment ago
    image = small.pictures()["portrait"]
    assert torch.equal(transform(image), encoder.image_transform(image))
    assert tokenizer(CLEAN) == encoder.token_ids(CLEAN)
    assert encoder.token_ids([]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_first_layers_and_bfloat16_works(kind: str, saved: Callable[[str], Path]) -> None:
    encoder = load_encoder(f"transformers/local-dir:{saved(kind)}")
    pixels, tokens = prepared(encoder)
    with torch.no_grad():
        exact = encoder.encode_images(pixels), encoder.encode_texts(tokens)
    loss = encoder.encode_images(pixels).square().sum() + encoder.encode_texts(tokens).square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    first = next(
        value for name, value in encoder.named_parameters() if value.ndim == 4 or "patch_emb" in name
    )
    words = next(
        value for name, value in encoder.named_parameters() if "token_emb" in name or "word_emb" in name
    )
    for value in (first, words):
        assert value.grad is not None
        assert value.grad.abs().max() > 0
    encoder = encoder.to(torch.bfloat16)
    with torch.no_grad():
        rough = encoder.encode_images(pixels), encoder.encode_texts(tokens)
    for ours, theirs in zip(rough, exact, strict=True):
        assert ours.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(ours, theirs).min() > 0.95
    if "fused" in encoder.info.modalities:
        assert encoder.encode_pairs(pixels[:5], tokens).dtype == torch.float32


@pytest.mark.parametrize("kind", FUSED)
def test_the_fused_vector_is_what_the_library_s_matching_reads(
    kind: str, saved: Callable[[str], Path], loaded: Callable[[str], Encoder]
) -> None:
    encoder, folder = loaded(kind), saved(kind)
    pixels, tokens = prepared(encoder)
    theirs_tokens = library_tokens(folder, encoder.info.context_length)
    given = {name: theirs_tokens[name] for name in ("input_ids", "attention_mask")}
    given["pixel_values"] = library_pixels(folder)["pixel_values"][:5]
    with torch.inference_mode():
        ours = encoder.encode_pairs(pixels[:5], tokens)
        if kind == "flava":
            model: Any = transformers.FlavaModel.from_pretrained(folder).eval()
            assert_close(ours, model(**given).multimodal_embeddings[:, 0])
        elif kind == "blip":
            model = transformers.BlipForImageTextRetrieval.from_pretrained(folder).eval()
            assert_close(model.itm_head(ours), model(**given).itm_score)
        else:
            model = transformers.Blip2ForImageTextRetrieval.from_pretrained(folder).eval()
            theirs = model(**given, use_image_text_matching_head=True).logits_per_image
            assert_close(model.itm_head(ours), theirs)


def test_blip_s_cosines_are_those_of_its_own_matching(
    saved: Callable[[str], Path], loaded: Callable[[str], Encoder]
) -> None:
    encoder, folder = loaded("blip"), saved("blip")
    pixels, tokens = prepared(encoder)
    given = library_tokens(folder, encoder.info.context_length)
    model: Any = transformers.BlipForImageTextRetrieval.from_pretrained(folder).eval()
    with torch.inference_mode():
        theirs = model(
            pixel_values=library_pixels(folder)["pixel_values"],
            input_ids=given["input_ids"],
            attention_mask=given["attention_mask"],
            use_itm_head=False,
        ).itm_score
        ours = normalize(encoder.encode_images(pixels)) @ normalize(encoder.encode_texts(tokens)).T
    assert_close(ours, theirs)


def test_blip_2_takes_the_first_query_where_it_is_asked_for(saved: Callable[[str], Path]) -> None:
    folder = saved("blip-2")
    encoder = load_encoder(f"transformers/local-dir:{folder}+pool=cls")
    pixels, _ = prepared(encoder)
    model: Any = transformers.Blip2ForImageTextRetrieval.from_pretrained(folder).eval()
    tokens = library_tokens(folder, encoder.info.context_length)
    with torch.inference_mode():
        theirs = model(
            pixel_values=pixels, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).image_embeds
        assert_close(encoder.encode_images(pixels), theirs[:, 0])
    plain = describe_encoder(f"transformers/local-dir:{folder}")
    assert plain.preprocessing_sha256 != encoder.info.preprocessing_sha256


@pytest.mark.parametrize("legacy", [False, True])
def test_the_text_behind_the_end_changes_nothing(legacy: bool, tmp_path: Path) -> None:
    """Whether the end is found by its id, or, in old configurations, as the highest id."""
    folder = small.clip(tmp_path, legacy=legacy)
    encoder = load_encoder(f"transformers/local-dir:{folder}")
    model: Any = transformers.CLIPModel.from_pretrained(folder).eval()
    assert (model.text_model.eos_token_id == 2) == legacy
    with torch.inference_mode():
        for texts in (CLEAN, CLEAN[:1], [""], ["a b", "c"]):
            tokens = encoder.tokenize(texts)
            assert tokens.shape[1] == max(encoder.token_lengths(texts))
            whole = library_tokens(folder, 77, texts)["input_ids"]  # no mask: as OpenAI's own code
            assert_close(encoder.encode_texts(tokens), model.get_text_features(whole).pooler_output)


def test_the_activation_is_config_json_s_word(tmp_path: Path) -> None:
    """QuickGELU's error has a cosine of 0.9999, so that only a tolerance sees it."""
    folder = small.clip(tmp_path)
    quick = load_encoder(f"transformers/local-dir:{folder}")
    pixels, tokens = prepared(quick)
    with torch.inference_mode():
        with_quick = quick.encode_images(pixels), quick.encode_texts(tokens)
    path = folder / "config.json"
    path.write_text(path.read_text().replace("quick_gelu", "gelu"))
    plain = load_encoder(f"transformers/local-dir:{folder}")
    assert plain.info.weights_sha256 == quick.info.weights_sha256
    assert plain.info.preprocessing_sha256 != quick.info.preprocessing_sha256
    with torch.inference_mode():
        assert (plain.encode_images(pixels) - with_quick[0]).abs().max() > 1e-3
        assert (plain.encode_texts(tokens) - with_quick[1]).abs().max() > 1e-3


def test_siglip_pads_to_its_length_and_lower_cases(loaded: Callable[[str], Encoder]) -> None:
    encoder = loaded("siglip")
    assert encoder.tokenize(["A Red BAG"]).shape == (1, 16)
    assert encoder.token_ids(["A Red BAG"]) == encoder.token_ids(["a red bag"])


def test_temperature_and_unused_tensors_are_shown(loaded: Callable[[str], Encoder]) -> None:
    assert isinstance(loaded("clip").logit_scale, torch.nn.Parameter)
    assert not hasattr(loaded("blip"), "logit_scale")
    assert "24 tensors of the weights are not used: decoder.film_add" in loaded("clipseg").notes[0]
    assert loaded("clip").notes == ()


def test_a_squash_is_done_by_our_own_transform_bit_for_bit(
    saved: Callable[[str], Path], loaded: Callable[[str], Encoder]
) -> None:
    for kind in ("siglip", "blip", "clipseg"):
        transform = loaded(kind).image_transform
        assert isinstance(transform, PixelTransform)
        for ours, theirs in zip(
            small.pictures().values(), library_pixels(saved(kind))["pixel_values"], strict=True
        ):
            assert torch.equal(transform(ours), theirs)


def test_a_checkpoint_without_its_projections_is_refused(tmp_path: Path) -> None:
    """A BLIP of captioning has no trained projections: random ones would look like features."""
    folder = small.blip_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "architectures": ["BlipForConditionalGeneration"]})
    )
    with pytest.raises(EncoderError, match=r"do not fill BlipForImageTextRetrieval: .* are missing \("):
        load_encoder(f"transformers/local-dir:{folder}")


def test_a_missing_tensor_is_named_and_a_reshaped_one_too(tmp_path: Path) -> None:
    folder = small.clip(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EncoderError, match=r"1 of its tensors are missing \(visual_projection.weight\)"):
        load_encoder(f"transformers/local-dir:{folder}")
    weights["visual_projection.weight"] = torch.zeros(5, 16)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EncoderError, match=r"have another shape \(visual_projection.weight\)"):
        load_encoder(f"transformers/local-dir:{folder}")


def test_a_tokenizer_that_ends_no_text_is_refused(tmp_path: Path) -> None:
    folder = small.clip(tmp_path)
    path = folder / "tokenizer.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "post_processor": None}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    plain = {**config, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(plain))
    with pytest.raises(EncoderError, match=r"ends a text with the id \d+, but its text tower .* eos_token"):
        describe_encoder(f"transformers/local-dir:{folder}")


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        ("pool=mean", "option pool does not apply to clip, whose projections"),
        ("pool=last", "pool=last does not apply to clip; choose one of cls, mean"),
        ("layer=-2", "option layer does not apply to clip"),
        ("pool=penultimate", "option layer does not apply to clip"),
        ("pool=best", "option pool is 'best'"),
        ("revision=main", "a folder has no revisions"),
        ("pol=cls", r"did you mean 'pool'\?"),
    ],
)
def test_an_option_that_does_not_apply_is_refused(
    option: str, answer: str, saved: Callable[[str], Path]
) -> None:
    with pytest.raises(EncoderError, match=answer):
        describe_encoder(f"transformers/local-dir:{saved('clip')}+{option}")


def test_a_processor_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = small.clip(tmp_path)
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "crop_size": {"height": 48, "width": 48}}))
    with pytest.raises(EncoderError, match="gives 48 x 48 pixels, its model takes 32 x 32"):
        describe_encoder(f"transformers/local-dir:{folder}")
