"""The losses against plain loops and against VLMo's own, whole and in chunks."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from features.contrastive import sigmoid_loss
from features.encoders.base import Encoder, EncoderInfo
from features.encoders.vlmo import losses
from features.encoders.vlmo.config import VlmoConfig
from features.encoders.vlmo.encoder import VlmoEncoder, VlmoOptions
from features.encoders.vlmo.model import Vlmo
from features.encoders.word_pieces import WordPieceTokenizer
from features.errors import FeatureError
from features.finetuning.augment import Augmented
from features.finetuning.co_purchases import CoPurchases, co_purchase_loss
from features.finetuning.config import AugmentConfig, ObjectivesConfig, OptimizerConfig
from features.finetuning.contrast import PlainContrast, VlmoContrast
from features.finetuning.items import Batch
from features.finetuning.objectives import BatchReport, Objectives
from features.finetuning.optimizer import make_optimizer, rate_factors, temperature_limits
from features.finetuning.retrieval import cross_modal_retrieval
from features.finetuning.vlmo_objectives import mask_words, masked_loss, masked_passes
from features.gradient_cache import chunked_forward
from tests.features.small_clip import SIGLIP, SMALL, small_encoder
from tests.features.small_encoder import SmallEncoder
from tests.features.small_vlmo import WORDS, write_vocabulary

CPU = torch.device("cpu")
ALL = {"image_text": 1.0, "matching": 0.5, "masked_language": 0.25, "co_purchase": 2.0}


def vlmo(folder: Path) -> VlmoEncoder:
    sizes: dict[str, Any] = {"width": 16, "depth": 3, "n_heads": 2, "mlp_width": 24, "vl_start": 2}
    settings = VlmoConfig(
        **sizes, patch_px=4, image_size_px=8, text_length=8, table_text_positions=8, vocabulary=len(WORDS)
    )
    model = Vlmo(settings)
    model.reset(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(4)  # far enough from 0 for every head to matter
        for scale in (model.logit_scale, model.logit_vl_scale):
            scale.fill_(2.0)
    info = EncoderInfo(
        spec="vlmo/small",
        name="small",
        family="vlmo",
        weights_sha256="0" * 64,
        preprocessing_sha256="0" * 64,
        modalities=("image", "text", "fused"),
        dims={"image": 16, "text": 16, "fused": 16},
        image_size_px=8,
        context_length=8,
        n_parameters=0,
    )
    return VlmoEncoder(info, model, VlmoOptions(), WordPieceTokenizer(str(write_vocabulary(folder)), 8))


def batch_for(encoder: Encoder, n_items: int = 7, size_px: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(2)
    words = ["red bags", "blue shoes", "warm", "a red bag & shoes", "10 bags", "blue bag", "a warm red bag"]
    pixels = torch.randn(n_items, 3, size_px, size_px, generator=generator)
    pairs = np.array([[0, 1], [2, 3], [4, 5], [1, 6]])
    return Batch(np.arange(n_items), n_items, pairs, pixels, encoder.tokenize(words[:n_items]))


def bought() -> CoPurchases:
    pairs = np.array([[0, 1], [2, 3], [4, 5], [1, 6]])
    users = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    items = np.array([0, 1, 2, 3, 4, 5, 1, 6, 0, 3])
    return CoPurchases(pairs, np.ones(4), users, items, 7)


def gradients_of(
    encoder: Encoder, weights: dict[str, Any], chunk_size: int, room: int = 0
) -> tuple[BatchReport, dict[str, Tensor]]:
    objectives = Objectives(
        encoder,
        ObjectivesConfig.model_validate(weights),
        chunk_size,
        room=room,
        co_purchases=bought(),
        autocast=nullcontext,
        same_picture=lambda rows: torch.eye(len(rows), dtype=torch.bool),
    )
    encoder.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    report = objectives.backward(
        batch_for(encoder, size_px=encoder.info.image_size_px), 1.0, lambda loss: loss
    )
    assert report is not None
    found = {name: value.grad.clone() for name, value in encoder.named_parameters() if value.grad is not None}
    return report, found


@pytest.mark.parametrize("of", ["each", "fused"])
@pytest.mark.parametrize("kind", ["vlmo", "clip", "siglip", "small"])
def test_every_parameter_gets_in_chunks_what_it_gets_whole(kind: str, of: str, tmp_path: Path) -> None:
    weights: dict[str, Any] = {"co_purchase": 2.0, "pairs": {"of": of}}
    if kind == "vlmo":
        encoder: Encoder = vlmo(tmp_path)
        weights |= ALL
    elif kind == "small":
        encoder = SmallEncoder().eval()
    else:
        encoder = small_encoder(SIGLIP if kind == "siglip" else SMALL)
        encoder.tokenizer = _few_ids  # the small text tower knows six words
    whole, expected = gradients_of(encoder, weights, 100)
    assert set(whole.losses) == {"loss", *(name for name in ("image_text", *weights) if name != "pairs")}
    for size, room in ((1, 0), (3, 0), (3, 100_000), (3, 10**9)):
        chunked, found = gradients_of(encoder, weights, size, room)
        assert chunked.losses == pytest.approx(whole.losses, abs=1e-5)
        assert chunked.gradient_norms == pytest.approx(whole.gradient_norms, rel=1e-3)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert any(value.abs().max() > 1e-4 for value in expected.values())


def _few_ids(texts: Any) -> list[list[int]]:
    return [[1 + (len(text) + at) % 4 for at in range(3)] + [5] for text in texts]


def test_vlmos_contrast_is_its_own_loss(tmp_path: Path) -> None:
    encoder = vlmo(tmp_path)
    batch, model = batch_for(encoder), encoder.model
    assert batch.pixels is not None
    assert batch.tokens is not None
    mask = batch.tokens >= 0
    images = model.image_pass(batch.pixels, vl=True)
    texts = model.text_pass(batch.tokens.clamp(min=0), mask, vl=True)
    contrast = VlmoContrast(encoder)
    pictures, words = contrast.images(batch.pixels), contrast.texts(batch.tokens)
    torch.testing.assert_close(
        contrast.loss(pictures, words, None), losses.contrastive_loss(model, images, texts)
    )
    torch.testing.assert_close(
        contrast.logits(pictures, words), losses.contrastive_logits(model, images, texts, vl=False)
    )
    torch.testing.assert_close(contrast.vectors(pictures), encoder.encode_images(batch.pixels))


def test_vlmos_matching_and_masked_words_are_its_own_losses(tmp_path: Path) -> None:
    encoder = vlmo(tmp_path)
    model, batch = encoder.model, batch_for(encoder)
    assert batch.pixels is not None
    assert batch.tokens is not None
    tokens, mask = batch.tokens.clamp(min=0), batch.tokens >= 0
    report, _ = gradients_of(encoder, {"image_text": 0.0, "matching": 1.0}, 2)
    contrast = VlmoContrast(encoder)
    torch.manual_seed(0)
    logits = contrast.logits(contrast.images(batch.pixels), contrast.texts(batch.tokens))
    negatives = losses.draw_negatives(logits)
    expected = losses.matching_loss(model, batch.pixels, tokens, mask, negatives)
    assert report.losses["matching"] == pytest.approx(expected.item(), abs=1e-5)

    tokenizer = encoder.tokenizer
    assert isinstance(tokenizer, WordPieceTokenizer)
    hidden, labels = mask_words(batch.tokens, tokenizer, len(WORDS), 0.5)
    passes = masked_passes(model, batch.pixels, hidden, labels, size=2, enter=lambda run: run)
    states = chunked_forward(passes, CPU).outputs
    whole = losses.masked_language_loss(model, batch.pixels, hidden.clamp(min=0), mask, labels)
    torch.testing.assert_close(masked_loss(model, states, labels), whole)


def test_masked_words_are_bert_s_and_never_padding_or_special(tmp_path: Path) -> None:
    tokenizer = WordPieceTokenizer(str(write_vocabulary(tmp_path)), 8)
    tokens = torch.tensor([[2, 6, 7, 9, 10, 11, 3, -1]]).repeat(2000, 1)
    torch.manual_seed(0)
    hidden, labels = mask_words(tokens, tokenizer, len(WORDS), 0.3)
    told = labels != losses.IGNORED
    assert torch.equal(labels[told], tokens[told])
    assert not told[:, [0, 6, 7]].any()
    assert torch.equal(hidden[~told], tokens[~told])
    assert told[:, 1:6].float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert (hidden[told] == tokenizer.special_id("[MASK]")).float().mean().item() == pytest.approx(
        0.8, abs=0.03
    )
    assert (hidden[told] == tokens[told]).float().mean().item() == pytest.approx(0.1, abs=0.03)


def test_the_sigmoid_loss_is_the_plain_one() -> None:
    rng = np.random.default_rng(0)
    images, texts = rng.standard_normal((2, 5, 4))
    positives = np.eye(5, dtype=bool)
    positives[0, 3] = positives[3, 0] = True
    total = 0.0
    for a in range(5):
        for b in range(5):
            cosine = float(images[a] @ texts[b]) / np.linalg.norm(images[a]) / np.linalg.norm(texts[b])
            logit = math.exp(1.2) * cosine - 3.0
            total -= math.log(1 / (1 + math.exp(-logit if positives[a, b] else logit)))
    scale, bias = torch.tensor(1.2, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    ours = sigmoid_loss(
        torch.from_numpy(images), torch.from_numpy(texts), scale, bias, torch.from_numpy(positives)
    )
    assert ours.item() == pytest.approx(total / 5, rel=1e-12)


def test_the_loss_is_chosen_by_what_the_encoder_was_trained_with() -> None:
    assert PlainContrast(small_encoder(SMALL), "auto").kind == "softmax"
    siglip = PlainContrast(small_encoder(SIGLIP), "auto")
    assert siglip.kind == "sigmoid"
    assert not siglip.own
    assert set(PlainContrast(SmallEncoder(), "auto").own) == {"contrast.logit_scale"}
    assert set(PlainContrast(SmallEncoder(), "sigmoid").own) == {
        "contrast.logit_scale",
        "contrast.logit_bias",
    }


def test_pairs_are_drawn_by_weight_and_the_bought_are_known() -> None:
    pairs = CoPurchases(
        np.array([[0, 1], [2, 3]]), np.array([1.0, 3.0]), np.array([0, 0, 1]), np.array([0, 1, 3]), 4
    )
    drawn = pairs.draw(4000, np.random.default_rng(0))
    assert np.isin(drawn, [2, 3]).all(axis=1).mean() == pytest.approx(0.75, abs=0.03)
    assert (drawn[:, 0] > drawn[:, 1]).mean() == pytest.approx(0.5, abs=0.03)  # either end may be first
    together = pairs.together(np.array([0, 3]), np.array([1, 0, 3]))
    assert together.tolist() == [[True, True, False], [False, False, True]]
    assert pairs.among(np.array([0, 1, 2])).pairs.tolist() == [[0, 1]]
    with pytest.raises(FeatureError, match="none of 2 pairs"):
        pairs.among(np.array([0, 2]))


def test_what_was_bought_together_is_no_negative() -> None:
    left, right = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    ignored = torch.zeros(4, 4, dtype=torch.bool)
    ignored[0, 2] = True
    cosine = nn.functional.normalize(left) @ nn.functional.normalize(right).T / 0.5
    total = 0.0
    for logits, hidden in ((cosine, ignored), (cosine.T, ignored.T)):
        for row in range(4):
            others = [math.exp(logits[row, at]) for at in range(4) if not hidden[row, at]]
            total += math.log(sum(others)) - float(logits[row, row])
    assert co_purchase_loss(left, right, 0.5, ignored).item() == pytest.approx(total / 8, rel=1e-5)
    assert torch.isfinite(co_purchase_loss(left, right, 0.5, torch.ones(4, 4, dtype=torch.bool)))


def test_retrieval_counts_equal_contents_as_found() -> None:
    images = torch.eye(12)
    texts = torch.eye(12)[[1, 0, *range(2, 12)]]  # the first two are swapped
    rows = torch.arange(12)
    found = cross_modal_retrieval(images, texts, rows, rows)
    assert found.image_to_text == pytest.approx({1: 10 / 12, 10: 1.0})
    equal = rows.clone()
    equal[1] = 0  # their texts are the same, so that nobody could tell
    found = cross_modal_retrieval(images, texts, rows, equal)
    assert found.image_to_text[1] == 1.0
    assert found.text_to_image[1] == pytest.approx(10 / 12)
    assert found.mean == pytest.approx((1 + 1 + 10 / 12 + 1) / 4)


def gradient_picture() -> Image.Image:
    across = np.tile(np.arange(60, dtype=np.uint8), (40, 1))
    return Image.fromarray(np.stack([across] * 3, axis=2))


def test_crops_keep_the_share_that_is_asked_for_and_draw_by_seed_and_picture() -> None:
    picture = gradient_picture()
    settings = AugmentConfig(crop_least_area=0.5)
    sizes = [Augmented(to_tensor, settings, seed).augment(picture).size for seed in range(200)]
    areas = np.array([width * height / 2400 for width, height in sizes])
    assert 0.45 < areas.min() < 0.6
    assert 0.9 < areas.max() <= 1
    first = Augmented(to_tensor, settings, 3)
    assert torch.equal(first(picture), first(picture))
    assert len(set(sizes)) > 50


def test_mirrors_are_off_unless_asked_for() -> None:
    picture = gradient_picture()
    plain = AugmentConfig(crop_least_area=1.0)
    assert Augmented(to_tensor, plain, 0).augment(picture) is picture
    mirrored = Augmented(to_tensor, AugmentConfig(crop_least_area=1.0, flip=1.0), 0)(picture)
    assert torch.equal(mirrored, to_tensor(picture).flip(2))
    some = [
        Augmented(to_tensor, AugmentConfig(crop_least_area=1.0, flip=0.25), seed)(picture)[0, 0, 0] > 0
        for seed in range(400)
    ]
    assert np.mean(some) == pytest.approx(0.25, abs=0.07)


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def test_rates_fall_from_the_head_down_and_vectors_do_not_decay() -> None:
    encoder = small_encoder(SMALL)
    trainable = dict(encoder.named_parameters())
    settings = OptimizerConfig(learning_rate=1.0, layer_decay=0.5, head_factor=3.0)
    factors = rate_factors(encoder, trainable, settings)
    assert factors["model.visual.proj"] == factors["model.logit_scale"] == 3.0
    assert factors["model.visual.transformer.resblocks.1.attn.in_proj_weight"] == 1.0
    assert factors["model.visual.transformer.resblocks.0.attn.in_proj_weight"] == 0.5
    assert factors["model.visual.conv1.weight"] == factors["model.token_embedding.weight"] == 0.25
    groups = make_optimizer(trainable, factors, settings).param_groups
    by_id = {id(value): group for group in groups for value in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(trainable)
    for name, value in trainable.items():
        assert by_id[id(value)]["lr"] == factors[name]
        assert by_id[id(value)]["weight_decay"] == (0.05 if value.ndim > 1 else 0.0)
    with pytest.raises(FeatureError, match=r"set optimizer\.layer_decay to 1"):
        rate_factors(SmallEncoder(), dict(SmallEncoder().named_parameters()), settings)


def test_a_temperature_may_stay_where_it_started() -> None:
    cold = {"logit_scale": nn.Parameter(torch.tensor(5.0)), "logit_bias": nn.Parameter(torch.tensor(9.0))}
    assert temperature_limits(cold, OptimizerConfig()) == {"logit_scale": 5.0}
    warm = {"logit_scale": nn.Parameter(torch.tensor(2.0))}
    assert temperature_limits(warm, OptimizerConfig())["logit_scale"] == pytest.approx(math.log(100))
