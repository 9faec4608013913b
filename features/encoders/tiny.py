"""`tiny`: the small CLIP that is shipped, in open_clip's architecture, trained on rendered products.

Its folder holds `config.json` (open_clip's `model_cfg` and `preprocess_cfg`), `tokenizer.json` and
`tiny.safetensors` (float16). `tandem train-tiny` writes all three.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from features.encoders.base import EncoderInfo, digest_file, digest_json
from features.encoders.clip import ClipEncoder, build_clip, preprocessing_digest
from features.encoders.clip_weights import count_numbers, load_weights
from features.encoders.pixels import PixelConfig
from features.errors import EncoderError
from features.texts import MAX_TEXT_CHARS

TINY_FOLDER = Path(__file__).parent / "tiny"
"""Where the package keeps it."""

CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE = "config.json", "tokenizer.json", "tiny.safetensors"

VOCABULARY_SIZE = 3072
"""At most; a corpus with fewer byte pairs gives fewer."""

_PAD, _START, _END = "<pad>", "<start>", "<end>"

PIXELS = PixelConfig(size_px=64, resize_mode="squash")
"""Squash: products are seen whole."""

_VISION = {"image_size": PIXELS.size_px, "patch_size": 8, "width": 160, "head_width": 32, "layers": 5}
_TEXT = {"context_length": 64, "width": 128, "heads": 4, "layers": 3}
_EMBED_DIM = 96


@dataclass(frozen=True)
class TinyTokenizer:
    """Byte-level byte pairs: every text can be read, emoji included.

    Args:
        pairs: Made by `train_tiny_tokenizer`; its last ids are start and end: the tower pools the highest.
        context_length: Most ids of a text, start and end included.
    """

    pairs: Tokenizer
    context_length: int

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text: start, byte pairs, end; every word gives one, so that later ones are not read."""
        room = self.context_length - 2
        end = self.pairs.get_vocab_size() - 1
        start = end - 1
        kept = [" ".join(text[:MAX_TEXT_CHARS].split(maxsplit=room)[:room]) for text in texts]
        encoded = self.pairs.encode_batch_fast(kept, add_special_tokens=False)
        return [[start, *encoding.ids[:room], end] for encoding in encoded]


def train_tiny_tokenizer(texts: Iterable[str], vocab_size: int = VOCABULARY_SIZE) -> Tokenizer:
    """Learn byte pairs, the same ones each time; case and compatibility forms are folded first.

    Args:
        texts: The captions `tiny` is trained on, cleaned.
        vocab_size: Ids at most: 256 bytes, three special tokens, the rest merges.

    Raises:
        ValueError: ``vocab_size`` leaves no room for all bytes.
    """
    if vocab_size < 260:
        raise ValueError(f"vocab_size is {vocab_size}; 256 bytes and 3 special tokens need 260 or more.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(r"\s+"), behavior="removed")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        special_tokens=[_PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([_START, _END])  # last: the end of text needs the highest id
    tokenizer.encode_special_tokens = True  # "<end>" in a text is read as letters
    return tokenizer


def tiny_config(vocab_size: int) -> dict[str, Any]:
    """What `config.json` holds: open_clip's `model_cfg` and `preprocess_cfg`."""
    model = {
        "embed_dim": _EMBED_DIM,
        "vision_cfg": dict(_VISION),
        "text_cfg": {**_TEXT, "vocab_size": vocab_size},
    }
    pixels = PIXELS.model_dump(mode="json")
    return {"model_cfg": model, "preprocess_cfg": {"size": pixels.pop("size_px"), "mode": "RGB", **pixels}}


def build_tiny(tokenizer: Tokenizer, *, seed: int) -> ClipEncoder:
    """An untrained `tiny` on the CPU, ready for contrastive training.

    Args:
        tokenizer: Of `train_tiny_tokenizer`.
        seed: Of the weights; torch's global generator is left as it was.
    """
    config = tiny_config(tokenizer.get_vocab_size())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_clip(config["model_cfg"])
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    untrained = digest_json({"untrained": seed})
    info = _info("tiny:untrained", config, tokenizer.to_str(), untrained, n_parameters)
    return ClipEncoder(info, model, PIXELS, TinyTokenizer(tokenizer, info.context_length))


def save_tiny(encoder: ClipEncoder, folder: Path) -> None:
    """Write `config.json`, `tokenizer.json` and the weights as float16; equal encoders give equal bytes.

    Raises:
        TypeError: ``encoder`` is not one of `build_tiny` or `load_tiny`.
    """
    if not isinstance(encoder.tokenizer, TinyTokenizer):
        kind = type(encoder.tokenizer).__name__
        raise TypeError(f"{encoder.info.spec!r} is no tiny: its tokenizer is a {kind}.")
    pairs = encoder.tokenizer.pairs
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(tiny_config(pairs.get_vocab_size()), indent=2)
    (folder / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
    (folder / TOKENIZER_FILE).write_text(pairs.to_str() + "\n", encoding="utf-8")
    weights = {
        name: tensor.detach().cpu().half().contiguous() for name, tensor in encoder.model.state_dict().items()
    }
    save_file(weights, folder / WEIGHTS_FILE)


def describe_tiny(spec: str) -> EncoderInfo:
    """Info of `tiny`, or of `tiny:<folder>` for one trained elsewhere."""
    folder = _folder(spec)
    weights = folder / WEIGHTS_FILE
    tokenizer = (folder / TOKENIZER_FILE).read_text(encoding="utf-8").strip()
    return _info(spec, _read_config(folder), tokenizer, digest_file(weights), count_numbers(weights))


def load_tiny(spec: str) -> ClipEncoder:
    """The encoder of `tiny` or `tiny:<folder>`, its weights as float32.

    Raises:
        EncoderError: Files are missing, damaged or do not fit each other.
    """
    folder = _folder(spec)
    info = describe_tiny(spec)
    config = _read_config(folder)
    model = build_clip(config["model_cfg"])
    load_weights(model, folder / WEIGHTS_FILE, spec)
    tokenizer = Tokenizer.from_str((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
    tokenizer.encode_special_tokens = True
    return ClipEncoder(info, model, _pixels(config), TinyTokenizer(tokenizer, info.context_length))


def _folder(spec: str) -> Path:
    """The folder that a specification names, all three files in it."""
    word, _, typed = spec.partition(":")
    if word != "tiny" or (spec != "tiny" and not typed):
        raise EncoderError(f"encoder {spec!r} is not known; expected tiny or tiny:<folder>.")
    folder = Path(typed).expanduser() if typed else TINY_FOLDER
    missing = [name for name in (WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FILE) if not (folder / name).is_file()]
    if missing:
        raise EncoderError(
            f"encoder {spec!r}: {str(folder)!r} has no {' and no '.join(missing)}; make it with "
            "`tandem train-tiny`."
        )
    return folder


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        config["model_cfg"]["text_cfg"]["context_length"], _pixels(config)
    except (ValueError, KeyError, TypeError) as error:
        raise EncoderError(
            f"{str(folder / CONFIG_FILE)!r} is no configuration of tiny ({error}); make it with "
            "`tandem train-tiny`."
        ) from error
    return config


def _pixels(config: dict[str, Any]) -> PixelConfig:
    stated = {**config["preprocess_cfg"]}
    stated.pop("mode", None)
    return PixelConfig(size_px=stated.pop("size"), **stated)


def _info(
    spec: str, config: dict[str, Any], tokenizer: str, weights_sha256: str, n_parameters: int
) -> EncoderInfo:
    model = config["model_cfg"]
    pixels = _pixels(config)
    identity: dict[str, JsonValue] = {"name": "tiny", "sha256": digest_json({"tokenizer": tokenizer})}
    return EncoderInfo(
        spec=spec,
        name="tiny",
        family="tiny",
        weights_sha256=weights_sha256,
        preprocessing_sha256=preprocessing_digest(model, pixels, identity),
        modalities=("image", "text"),
        dims={"image": model["embed_dim"], "text": model["embed_dim"]},
        image_size_px=pixels.size_px,
        context_length=model["text_cfg"]["context_length"],
        n_parameters=n_parameters,
    )
