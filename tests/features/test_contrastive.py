"""Contrastive training: the loss against plain loops, two steps by hand, and real learning."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from features.contrastive import (
    ContrastiveConfig,
    ContrastiveResult,
    PairBatch,
    PreparedPairs,
    contrastive_loss,
    equal_rows,
    train_contrastive,
)
from features.encoders.tiny import build_tiny, train_tiny_tokenizer
from features.errors import FeatureError

pytestmark = pytest.mark.usefixtures("one_thread")


def plain_loss(images: np.ndarray, texts: np.ndarray, scale: float, positives: np.ndarray) -> float:
    """Cross-entropy of every row and every column, written out."""
    images = images / np.linalg.norm(images, axis=1, keepdims=True)
    texts = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    n = len(images)
    total = 0.0
    for a, b in ((images, texts), (texts, images)):
        for row in range(n):
            logits = [math.exp(scale) * float(a[row] @ b[column]) for column in range(n)]
            log_sum = math.log(sum(math.exp(logit - max(logits)) for logit in logits)) + max(logits)
            own = [column for column in range(n) if positives[row, column]]
            total += sum(log_sum - logits[column] for column in own) / len(own)
    return total / (2 * n)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_loss_is_the_plain_one(grouped: bool) -> None:
    rng = np.random.default_rng(0)
    images, texts = rng.standard_normal((2, 6, 5))
    group = np.array([0, 1, 0, 2, 0, 1]) if grouped else np.arange(6)
    positives = group[:, None] == group[None, :]
    ours = contrastive_loss(
        torch.from_numpy(images),
        torch.from_numpy(texts),
        torch.tensor(2.0, dtype=torch.float64),
        torch.from_numpy(positives) if grouped else None,
    )
    assert ours.item() == pytest.approx(plain_loss(images, texts, 2.0, positives), rel=1e-12)


def test_without_equal_texts_both_readings_agree() -> None:
    images, texts = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor(1.5)
    torch.testing.assert_close(
        contrastive_loss(images, texts, scale), contrastive_loss(images, texts, scale, torch.eye(8).bool())
    )


def test_equal_rows_are_found_whatever_the_padding() -> None:
    tokens = torch.tensor([[1, 2, 0], [1, 2, 3], [1, 2, 0], [2, 1, 0]])
    expected = torch.eye(4).bool()
    expected[0, 2] = expected[2, 0] = True
    assert torch.equal(equal_rows(tokens), expected)


class Linear(nn.Module):
    """The smallest dual encoder: a matrix for pictures, an embedding for texts."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.picture = nn.Parameter(torch.randn(12, 4, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        self.word = nn.Parameter(torch.randn(9, 4, generator=generator, dtype=torch.float64))
        self.logit_scale = nn.Parameter(torch.tensor(0.0, dtype=torch.float64))

    def encode_images(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1) @ self.picture + self.bias

    def encode_texts(self, tokens: Tensor) -> Tensor:
        return self.word[tokens].mean(dim=1)


class FixedBatches:
    """Given batches, the same in each epoch."""

    def __init__(self, batches: list[PairBatch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return sum(len(batch.tokens) for batch in self.batches)

    def epoch(self, batch_size: int, rng: np.random.Generator) -> list[PairBatch]:
        assert all(len(batch.tokens) == batch_size for batch in self.batches)
        return self.batches


def two_batches() -> FixedBatches:
    generator = torch.Generator().manual_seed(1)
    return FixedBatches(
        [
            PairBatch(
                torch.randn(5, 3, 2, 2, generator=generator, dtype=torch.float64),
                torch.tensor([[0, 1], [2, 3], [0, 1], [4, 8], [5, 6]]),
            )
            for _ in range(2)
        ]
    )


def plain_step(
    values: dict[str, np.ndarray],
    batch: PairBatch,
    moments: dict[str, list[np.ndarray]],
    step: int,
    config: ContrastiveConfig,
    n_steps: int,
) -> float:
    """AdamW on central differences of the plain loss (Loshchilov and Hutter, 2019, algorithm 2)."""
    tokens = batch.tokens.numpy()
    positives = (tokens[:, None] == tokens[None]).all(axis=2)

    def loss_of(parameters: dict[str, np.ndarray]) -> float:
        pixels = batch.pixels.numpy().reshape(len(tokens), -1)
        images = pixels @ parameters["picture"] + parameters["bias"]
        texts = parameters["word"][tokens].mean(axis=1)
        return plain_loss(images, texts, float(parameters["logit_scale"]), positives)

    loss = loss_of(values)
    gradients = {name: np.zeros_like(value) for name, value in values.items()}
    for name, value in values.items():
        for place in np.ndindex(value.shape):
            shifted = []
            for sign in (1, -1):
                moved = {key: array.copy() for key, array in values.items()}
                moved[name][place] += sign * 1e-5
                shifted.append(loss_of(moved))
            gradients[name][place] = (shifted[0] - shifted[1]) / 2e-5
    length = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values()))
    cut = min(1.0, config.max_gradient_norm / (length + 1e-6))
    n_warmup = int(config.warmup_share * n_steps)
    share = (
        (step + 1) / n_warmup
        if step < n_warmup
        else 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / (n_steps - n_warmup)))
    )
    rate = config.learning_rate * share
    for name, value in values.items():
        first, second = moments[name]
        first[...] = 0.9 * first + 0.1 * cut * gradients[name]
        second[...] = 0.98 * second + 0.02 * (cut * gradients[name]) ** 2
        decay = config.weight_decay if value.ndim > 1 else 0.0
        value[...] = value * (1 - rate * decay)
        unbiased = np.sqrt(second / (1 - 0.98 ** (step + 1))) + 1e-6
        value[...] = value - rate * (first / (1 - 0.9 ** (step + 1))) / unbiased
    values["logit_scale"][...] = min(float(values["logit_scale"]), -math.log(config.min_temperature))
    return loss


def test_four_steps_match_the_plain_loop() -> None:
    model, pairs = Linear(), two_batches()
    config = ContrastiveConfig(
        epochs=2, batch_size=5, learning_rate=0.05, warmup_share=0.5, max_gradient_norm=0.2, weight_decay=0.3
    )
    values = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
    values["logit_scale"] = np.array(-math.log(config.initial_temperature))
    moments = {name: [np.zeros_like(value), np.zeros_like(value)] for name, value in values.items()}
    losses = [
        plain_step(values, batch, moments, step, config, 4)
        for step, batch in enumerate(pairs.batches + pairs.batches)
    ]
    result = train_contrastive(model, pairs, config, rng=np.random.default_rng(0))
    for name, value in model.named_parameters():
        np.testing.assert_allclose(value.detach().numpy(), values[name], rtol=1e-4, atol=1e-6, err_msg=name)
    np.testing.assert_allclose([row.loss for row in result.history], np.reshape(losses, (2, 2)).mean(axis=1))


COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 40),
    "blue": (40, 60, 220),
    "yellow": (230, 220, 40),
    "black": (20, 20, 20),
    "white": (240, 240, 240),
}
THINGS = ("bag", "hat", "shoe")


def coloured(rng: np.random.Generator, n: int) -> list[tuple[Image.Image, str]]:
    """Pictures whose colour the text names and whose noise and thing it cannot know."""
    pairs = []
    for _ in range(n):
        name = str(rng.choice(list(COLOURS)))
        noise = rng.integers(-20, 20, (24, 24, 3))
        picture = Image.fromarray(np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8))
        pairs.append((picture, f"a {name} {rng.choice(THINGS)}"))
    return pairs


def train_on_colours(seed: int, epochs: int) -> tuple[nn.Module, ContrastiveResult, list[tuple[int, int]]]:
    pairs = coloured(np.random.default_rng(0), 64)
    tokenizer = train_tiny_tokenizer([text for _, text in pairs], 280)
    encoder = build_tiny(tokenizer, seed=seed)
    calls: list[tuple[int, int]] = []
    config = ContrastiveConfig(epochs=epochs, batch_size=16, learning_rate=2e-3)
    result = train_contrastive(
        encoder,
        PreparedPairs(encoder, pairs),
        config,
        rng=np.random.default_rng(seed),
        progress=lambda done, total: calls.append((done, total)),
    )
    return encoder, result, calls


def test_tiny_learns_which_colour_a_text_names() -> None:
    encoder, result, calls = train_on_colours(seed=0, epochs=5)
    assert calls[0] == (1, 20)
    assert calls[-1] == (20, 20)
    assert not encoder.training
    assert result.n_steps == 20
    assert [row.epoch for row in result.history] == list(range(5))
    assert result.history[-1].loss < 0.7 * result.history[0].loss
    unseen = coloured(np.random.default_rng(7), 60)
    names = [text.split()[1] for _, text in unseen]
    pixels = torch.stack([encoder.image_transform(picture) for picture, _ in unseen])  # type: ignore[operator]
    with torch.inference_mode():
        images = nn.functional.normalize(encoder.encode_images(pixels))  # type: ignore[operator]
        texts = nn.functional.normalize(
            encoder.encode_texts(encoder.tokenize([f"a {name} bag" for name in COLOURS]))  # type: ignore[operator]
        )
    found = [list(COLOURS)[best] for best in (images @ texts.T).argmax(dim=1).tolist()]
    assert np.mean([ours == name for ours, name in zip(found, names, strict=True)]) > 0.8


def test_equal_seeds_train_equal_weights_bit_for_bit() -> None:
    first, second = (train_on_colours(seed=1, epochs=1)[0].state_dict() for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_an_epoch_has_every_pair_once_in_whole_batches() -> None:
    pairs = coloured(np.random.default_rng(0), 10)
    encoder = build_tiny(train_tiny_tokenizer(["a"], 260), seed=0)
    prepared = PreparedPairs(encoder, pairs)
    batches = list(prepared.epoch(4, np.random.default_rng(0)))
    assert [batch.pixels.shape for batch in batches] == [(4, 3, 64, 64)] * 2
    seen = torch.cat([batch.pixels for batch in batches])
    assert len(seen.flatten(1).unique(dim=0)) == 8
    with pytest.raises(ValueError, match="there are no pairs"):
        PreparedPairs(encoder, [])


def test_the_temperature_is_kept_or_set_and_never_falls_below_its_floor() -> None:
    model = Linear()
    config = ContrastiveConfig(
        epochs=20, batch_size=5, learning_rate=0.5, initial_temperature=0, min_temperature=0.5, warmup_share=0
    )
    result = train_contrastive(model, two_batches(), config, rng=np.random.default_rng(0))
    assert min(row.temperature for row in result.history) == pytest.approx(0.5)
    kept = Linear()
    slow = config.model_copy(update={"learning_rate": 1e-9, "min_temperature": 0.01})
    assert train_contrastive(kept, two_batches(), slow, rng=np.random.default_rng(0)).history[
        -1
    ].temperature == pytest.approx(1.0)


def test_frozen_parameters_stay_as_they_are() -> None:
    model = Linear()
    model.word.requires_grad_(requires_grad=False)
    before = model.word.detach().clone()
    train_contrastive(
        model, two_batches(), ContrastiveConfig(epochs=1, batch_size=5), rng=np.random.default_rng(0)
    )
    assert torch.equal(model.word, before)


def test_a_loss_that_is_no_number_stops_with_the_step_and_advice() -> None:
    pairs = two_batches()
    pairs.batches[1] = PairBatch(pairs.batches[1].pixels * math.nan, pairs.batches[1].tokens)
    model = Linear()
    with pytest.raises(
        FeatureError, match=r"loss is nan in step 2 of 2 \(epoch 0\); lower learning_rate \(0\.001\)"
    ):
        train_contrastive(
            model, pairs, ContrastiveConfig(epochs=1, batch_size=5), rng=np.random.default_rng(0)
        )
    assert torch.isfinite(model.picture).all()


def test_too_few_pairs_for_a_batch_are_refused() -> None:
    with pytest.raises(FeatureError, match="10 pairs do not fill a batch of 256; lower batch_size"):
        train_contrastive(Linear(), two_batches(), ContrastiveConfig(), rng=np.random.default_rng(0))
