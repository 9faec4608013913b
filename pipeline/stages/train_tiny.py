"""Stage: rendered products in, the shipped encoder `tiny` out, and what its embeddings know of each trait."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, Field, JsonValue, NonNegativeInt, PositiveInt

from features.catalogue import Catalogue
from features.contrastive import ContrastiveConfig, ContrastiveResult, PairBatch, train_contrastive
from pipeline.datasets.demo import GENERATOR, DemoConfig, demo_traits, import_demo
from pipeline.datasets.demo_pairs import TrainingProduct, training_product
from pipeline.datasets.demo_traits import ALL_TRAITS, IntArray
from pipeline.errors import ConfigError
from pipeline.hardware import describe_hardware, library_versions
from pipeline.progress import SILENT, Progress, Reporter
from pipeline.stages.result import StageResult

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from features.encoders.clip import ClipEncoder
    from features.encoders.tiny import TinyTokenizer
    from pipeline.store import Draft, Store

Float32Array = NDArray[np.float32]

REPORT_FILE = "training.json"
"""Beside the weights: the command, its settings, and what was measured."""

ALIKE = ("colour", "background")
"""The traits that are learnt first; batches that share them leave only the others to tell pairs apart."""


class TrainTinyConfig(BaseModel, frozen=True, extra="forbid"):
    """How `tiny` is made. On one kind of CPU, equal settings, threads and torch give equal weights."""

    n_products: PositiveInt = Field(16_000, description="Products rendered for training.")
    seed: NonNegativeInt = Field(20_231, description="Of products, captions, weights and the order of pairs.")
    image_size_px: int = Field(96, ge=16, le=512, description="Size of the rendered pictures.")
    image_blocks: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = Field(
        (1, 1, 1, 1),
        description="Residual blocks of the image tower's four stages (open_clip's CLIP ResNet).",
    )
    image_width: PositiveInt = Field(
        16,
        description="Channels of its first stage. A ResNet learns looks from far fewer pictures than a ViT.",
    )
    text_layers: PositiveInt = Field(2, description="Layers of the text tower.")
    alike_share: float = Field(
        0.3, ge=0, le=1, description="Share of the batches whose products share colour and background."
    )
    contrastive: ContrastiveConfig = Field(
        default_factory=lambda: ContrastiveConfig(epochs=6, batch_size=64, learning_rate=2e-3),
        description="Epochs, batch, learning rate and so on.",
    )
    probe_seed: NonNegativeInt = Field(
        4711, description="Of the catalogue that the embeddings are probed on; no part of the training."
    )
    probe_items: int = Field(1000, ge=40, description="Products of that catalogue.")
    n_threads: PositiveInt = Field(1, description="Threads of torch; another number rounds differently.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="A GPU is faster and not bit for bit the same.")


def train_tiny(
    config: TrainTinyConfig, folder: Path, progress: Progress | None = None
) -> dict[str, JsonValue]:
    """Render products, train both towers on them, probe the embeddings, and write all that `tiny` is.

    Args:
        config: How.
        folder: Gets the weights, the tokenizer, ``config.json`` and ``training.json``.
        progress: Told of training steps.

    Returns:
        The report that ``training.json`` holds.

    Raises:
        ConfigError: A GPU is asked for and there is none, or fewer products than a batch.
    """
    from features.encoders.tiny import load_tiny, train_tiny_tokenizer  # noqa: PLC0415 - seconds of imports

    _check(config)
    started = time.perf_counter()
    products = [training_product(config.seed, row, config.image_size_px) for row in range(config.n_products)]
    rendered = time.perf_counter()
    captions_rng, order_rng = np.random.default_rng(config.seed).spawn(2)
    with _threads(config.n_threads):
        tokenizer = train_tiny_tokenizer([product.caption(captions_rng) for product in products])
        encoder = build_towers(config, tokenizer).to(memory_format=torch.channels_last).to(config.device)
        pairs = RenderedPairs(encoder, products, config.alike_share)
        result = train_contrastive(encoder, pairs, config.contrastive, rng=order_rng, progress=progress)
        save_towers(config, encoder, folder)
        shipped = load_tiny(f"tiny:{folder}").eval()  # probed as it will be used, rounded to float16
        probes = probe_traits(shipped, config)
    report = _report(config, result, probes, n_parameters=shipped.info.n_parameters)
    report["seconds"] = {
        "rendering": round(rendered - started, 1),
        "training": round(result.seconds, 1),
        "all": round(time.perf_counter() - started, 1),
    }
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def keep_tiny(
    store: Store, config: TrainTinyConfig, *, reporter: Reporter = SILENT, force: bool = False
) -> StageResult:
    """Train `tiny` and keep its files as an encoder artefact; ``tiny:<its folder>`` loads them.

    Raises:
        ConfigError: As ``train_tiny``.
    """

    def make(draft: Draft) -> None:
        with reporter.progress("training tiny") as progress:
            report = train_tiny(config, draft.folder, progress)
        draft.record(**report, summary={"parameters": report["n_parameters"], "seconds": report["seconds"]})

    outcome = store.produce(
        "encoder",
        slug="tiny",
        identity={"generator": GENERATOR, **config.model_dump(mode="json")},
        parameters=config.model_dump(mode="json"),
        make=make,
        force=force,
    )
    return StageResult.of(outcome)


def build_towers(config: TrainTinyConfig, tokenizer: Tokenizer) -> ClipEncoder:
    """`tiny` untrained, on the CPU, with the towers that the configuration describes."""
    from features.encoders.clip import ClipEncoder, build_clip  # noqa: PLC0415 - seconds of imports
    from features.encoders.tiny import PIXELS, build_tiny  # noqa: PLC0415 - seconds of imports

    plain = build_tiny(tokenizer, seed=config.seed)
    settings = _towers(config, tokenizer.get_vocab_size())["model_cfg"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_clip(settings)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    info = plain.info.model_copy(update={"n_parameters": n_parameters})
    return ClipEncoder(info, model, PIXELS, plain.tokenizer)


def save_towers(config: TrainTinyConfig, encoder: ClipEncoder, folder: Path) -> None:
    """Write the weights as float16, the tokenizer, and a ``config.json`` that names these towers."""
    from features.encoders.tiny import CONFIG_FILE, read_pairs, save_tiny  # noqa: PLC0415

    save_tiny(encoder, folder)
    tokenizer = cast("TinyTokenizer", encoder.tokenizer)
    settings = _towers(config, read_pairs(tokenizer.json).get_vocab_size())
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _towers(config: TrainTinyConfig, vocab_size: int) -> dict[str, Any]:
    """What ``config.json`` holds: the settings that `tiny` shares with its default, and other towers."""
    from features.encoders.tiny import PIXELS, tiny_config  # noqa: PLC0415 - seconds of imports

    settings = tiny_config(vocab_size)
    settings["model_cfg"]["vision_cfg"] = {
        "image_size": PIXELS.size_px,
        "layers": list(config.image_blocks),
        "width": config.image_width,
        "head_width": 64,
    }
    settings["model_cfg"]["text_cfg"]["layers"] = config.text_layers
    return settings


class RenderedPairs:
    """Pictures rendered once, with another caption in each epoch.

    Args:
        encoder: Its transform and tokenizer prepare the pairs.
        products: What is shown and told.
        alike_share: Share of the batches whose products share the traits of ``ALIKE``.
    """

    def __init__(
        self, encoder: ClipEncoder, products: list[TrainingProduct], alike_share: float = 0.0
    ) -> None:
        self._encoder = encoder
        self._products = products
        self._alike_share = alike_share
        self._pixels = torch.stack([encoder.image_transform(product.picture).half() for product in products])

    def __len__(self) -> int:
        return len(self._products)

    def epoch(self, batch_size: int, rng: np.random.Generator) -> Iterator[PairBatch]:
        """Every product once, but for an incomplete last batch."""
        order = rng.permutation(len(self))
        n_batches = len(self) // batch_size
        n_alike = int(n_batches * self._alike_share) * batch_size
        order[:n_alike] = sorted(order[:n_alike], key=lambda row: self._looks(self._products[row]))
        for batch in rng.permutation(n_batches):
            rows = order[batch * batch_size : (batch + 1) * batch_size]
            texts = [self._products[row].caption(rng) for row in rows]
            tokens = self._encoder.pad(self._encoder.token_ids(texts))
            pixels = self._pixels[rows].float().contiguous(memory_format=torch.channels_last)
            yield PairBatch(pixels, tokens)

    @staticmethod
    def _looks(product: TrainingProduct) -> tuple[int, ...]:
        """What alike products share; labels, which show no looks, are alike."""
        return () if product.is_label else tuple(product.traits[name] for name in ALIKE)


@dataclass(frozen=True)
class Probe:
    """What the embeddings of one modality know of one trait, on a catalogue that training never saw."""

    trait: str
    modality: Literal["image", "text"]
    chance: float
    accuracy: float
    """Of a linear classifier, fitted on one half of the items and measured on the other."""
    neighbours: float
    """Share of an item's ten nearest neighbours by cosine that have its value of the trait."""


def probe_traits(encoder: ClipEncoder, config: TrainTinyConfig) -> list[Probe]:
    """Encode a demo catalogue and look for each trait in the embeddings of each modality."""
    catalogue = DemoConfig(
        seed=config.probe_seed,
        n_items=config.probe_items,
        n_users=1,
        image_size_px=config.image_size_px,
        missing_image_share=0.0,
        missing_text_share=0.0,
    )
    traits = demo_traits(catalogue)
    with tempfile.TemporaryDirectory() as folder:
        dataset = import_demo(catalogue, Path(folder))
        pictures = [Image.open(Path(folder) / name) for name in dataset.items["image"].drop_nulls()]
        pixels = torch.stack([encoder.image_transform(picture) for picture in pictures])
        texts = [text or "" for text in Catalogue(dataset.items, folder).texts()]
    device = encoder.logit_scale.device
    with torch.inference_mode():
        blocks = range(0, len(texts), 100)
        images = [encoder.encode_images(pixels[at : at + 100].to(device)) for at in blocks]
        words = [encoder.encode_texts(encoder.tokenize(texts[at : at + 100]).to(device)) for at in blocks]
    vectors: dict[Literal["image", "text"], Float32Array] = {
        "image": torch.cat(images).cpu().numpy(),
        "text": torch.cat(words).cpu().numpy(),
    }
    return [
        Probe(
            trait.name,
            modality,
            chance=1 / len(trait.values),
            accuracy=linear_probe(rows, traits.values[trait.name]),
            neighbours=neighbour_agreement(rows, traits.values[trait.name]),
        )
        for trait in ALL_TRAITS
        for modality, rows in vectors.items()
    ]


def linear_probe(vectors: Float32Array, values: IntArray, ridge: float = 1.0) -> float:
    """Fit a ridge regression to one column per value on the first half of the rows; accuracy on the second.

    Args:
        vectors: (N, D); each is scaled to length 1 first.
        values: (N,) from 0.
        ridge: Weight of the squared coefficients, the columns being standardised.
    """
    rows = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    half = len(rows) // 2
    rows = (rows - rows[:half].mean(axis=0)) / (rows[:half].std(axis=0) + 1e-12)
    design = np.concatenate([rows, np.ones((len(rows), 1))], axis=1).astype(np.float64)
    known, asked = design[:half], design[half:]
    targets = np.eye(int(values.max()) + 1)[values[:half]]  # (N / 2, values)
    weights = np.linalg.solve(known.T @ known + ridge * np.eye(known.shape[1]), known.T @ targets)
    return float(((asked @ weights).argmax(axis=1) == values[half:]).mean())


def neighbour_agreement(vectors: Float32Array, values: IntArray, k: int = 10) -> float:
    """Share of the ``k`` nearest rows by cosine, not itself, that have a row's value; (N, D) and (N,)."""
    rows = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similar = rows @ rows.T
    np.fill_diagonal(similar, -np.inf)
    nearest = np.argpartition(-similar, k, axis=1)[:, :k]
    return float((values[nearest] == values[:, None]).mean())


def _report(
    config: TrainTinyConfig, result: ContrastiveResult, probes: list[Probe], n_parameters: int
) -> dict[str, JsonValue]:
    return {
        "command": "tandem train-tiny --output features/encoders/tiny",
        "settings": config.model_dump(mode="json"),
        "n_parameters": n_parameters,
        "probes": [
            {
                key: round(value, 3) if isinstance(value, float) else value
                for key, value in asdict(probe).items()
            }
            for probe in probes
        ],
        "history": [
            {key: round(float(value), 4) for key, value in asdict(row).items()} for row in result.history
        ],
        "versions": dict(library_versions()),
        "cpu": describe_hardware().cpu,
    }


def _check(config: TrainTinyConfig) -> None:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch finds no GPU here; set device to cpu.")
    if config.n_products < config.contrastive.batch_size:
        raise ConfigError(
            f"n_products is {config.n_products}, less than one batch of {config.contrastive.batch_size}; "
            "raise n_products or lower contrastive.batch_size."
        )


@contextmanager
def _threads(n_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
