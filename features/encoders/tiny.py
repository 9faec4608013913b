"""`tiny`: the small CLIP that is shipped, in open_clip's architecture, trained on rendered products.

Its folder holds `config.json` (open_clip's `model_cfg` and `preprocess_cfg`), `tokenizer.json` and
`tiny.safetensors` (float16). `tandem train-tiny` writes all three.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
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

_MAKE = "make it with `tandem train-tiny`"

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
        json: What `tokenizer.json` holds; its last ids are start and end, as the tower pools at the highest.
        context_length: Most ids of a text, start and end included.
    """

    json: str
    context_length: int

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text: start, byte pairs, end; every word gives one, so that later ones are not read."""
        pairs = read_pairs(self.json)
        room = self.context_length - 2
        end = pairs.get_vocab_size() - 1
        start = end - 1
        kept = [" ".join(text[:MAX_TEXT_CHARS].split(maxsplit=room)[:room]) for text in texts]
        encoded = pairs.encode_batch_fast(kept, add_special_tokens=False)
        return [[start, *encoding.ids[:room], end] for encoding in encoded]


@lru_cache(maxsize=4)
def read_pairs(json: str) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, one a process; in its texts "<end>" is letters, not the end."""
    tokenizer = Tokenizer.from_str(json)
    tokenizer.encode_special_tokens = True  # not part of the JSON, and lost when pickled
    return tokenizer


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
    settings = tiny_config(tokenizer.get_vocab_size())["model_cfg"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_clip(settings)
    pairs = tokenizer.to_str()
    info = _info(
        "tiny:untrained",
        settings,
        PIXELS,
        tokenizer=pairs,
        weights_sha256=digest_json({"untrained": seed}),
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    tokens = TinyTokenizer(pairs, info.context_length)
    return ClipEncoder(info, model, PIXELS, tokens, model_cfg=settings)


def save_tiny(encoder: ClipEncoder, folder: Path) -> None:
    """Write `config.json`, `tokenizer.json` and the weights as float16; equal encoders give equal bytes.

    Raises:
        TypeError: ``encoder`` is not one of `build_tiny` or `load_tiny`.
    """
    if not isinstance(encoder.tokenizer, TinyTokenizer):
        kind = type(encoder.tokenizer).__name__
        raise TypeError(f"{encoder.info.spec!r} is no tiny: its tokenizer is a {kind}.")
    pairs = encoder.tokenizer.json
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(tiny_config(read_pairs(pairs).get_vocab_size()), indent=2)
    (folder / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
    (folder / TOKENIZER_FILE).write_text(pairs + "\n", encoding="utf-8")
    weights = {
        name: tensor.detach().cpu().half().contiguous() for name, tensor in encoder.model.state_dict().items()
    }
    save_file(weights, folder / WEIGHTS_FILE)


def describe_tiny(spec: str) -> EncoderInfo:
    """Info of `tiny`, or of `tiny:<folder>` for one trained elsewhere."""
    folder = _folder(spec)
    model, pixels = _read_config(folder)
    return _info(
        spec,
        model,
        pixels,
        tokenizer=_read_tokenizer(folder, model),
        weights_sha256=digest_file(folder / WEIGHTS_FILE),
        n_parameters=count_numbers(folder / WEIGHTS_FILE),
    )


def load_tiny(spec: str) -> ClipEncoder:
    """The encoder of `tiny` or `tiny:<folder>`, its weights as float32.

    Raises:
        EncoderError: Files are missing, damaged or do not fit each other.
    """
    info = describe_tiny(spec)
    folder = _folder(spec)
    settings, pixels = _read_config(folder)
    model = build_clip(settings)
    load_weights(model, folder / WEIGHTS_FILE, spec)
    tokenizer = TinyTokenizer(_read_tokenizer(folder, settings), info.context_length)
    return ClipEncoder(info, model, pixels, tokenizer, model_cfg=settings)


def _folder(spec: str) -> Path:
    """The folder that a specification names, all three files in it."""
    word, _, typed = spec.partition(":")
    if word != "tiny" or (spec != "tiny" and not typed):
        raise EncoderError(f"encoder {spec!r} is not known; expected tiny or tiny:<folder>.")
    folder = Path(typed).expanduser() if typed else TINY_FOLDER
    missing = [name for name in (WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FILE) if not (folder / name).is_file()]
    if missing:
        raise EncoderError(f"encoder {spec!r}: {str(folder)!r} has no {' and no '.join(missing)}; {_MAKE}.")
    return folder


def _read_config(folder: Path) -> tuple[dict[str, Any], PixelConfig]:
    """open_clip's `model_cfg`, and how pictures are prepared."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        stated = {name: value for name, value in config["preprocess_cfg"].items() if name != "mode"}
        pixels = PixelConfig(size_px=stated.pop("size"), **stated)
        model: dict[str, Any] = config["model_cfg"]
        expected = tiny_config(int(model["text_cfg"]["vocab_size"]))["model_cfg"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EncoderError(f"{str(path)!r} is no configuration of tiny ({error!r}); {_MAKE}.") from error
    if model.keys() != expected.keys():
        raise EncoderError(f"{str(path)!r} is no configuration of tiny ({', '.join(model)}); {_MAKE}.")
    return model, pixels


def _read_tokenizer(folder: Path, model: dict[str, Any]) -> str:
    """The text of `tokenizer.json`, which must have as many ids as the text tower has embeddings."""
    path = folder / TOKENIZER_FILE
    text = path.read_text(encoding="utf-8").strip()
    expected = model["text_cfg"]["vocab_size"]
    try:
        n_ids = read_pairs(text).get_vocab_size()
    except Exception as error:  # the library raises plain Exception
        raise EncoderError(f"{str(path)!r} is no tokenizer ({error}); {_MAKE}.") from error
    if n_ids != expected:
        raise EncoderError(f"{str(path)!r} has {n_ids} ids, but {CONFIG_FILE} says {expected}; {_MAKE}.")
    return text


def _info(
    spec: str,
    model: dict[str, Any],
    pixels: PixelConfig,
    *,
    tokenizer: str,
    weights_sha256: str,
    n_parameters: int,
) -> EncoderInfo:
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
