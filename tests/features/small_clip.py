"""Small models in the layouts that open_clip knows, for the tests of its family."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from features.encoders.base import EncoderInfo
from features.encoders.clip import ClipEncoder, build_clip
from features.encoders.clip_tokens import ClipTokenizer
from features.encoders.pixels import PixelConfig

N_HEADS = 2


VISION = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 2}


TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": N_HEADS, "layers": 2}


SMALL = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT}


SIGLIP = {
    "embed_dim": 12,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": VISION,
    "text_cfg": {
        **TEXT,
        "context_length": 9,
        "vocab_size": 6,
        "hf_tokenizer_name": "owner/siglip",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
    },
}


TEXTS = ["a red bag", 'blue & green shoes, 10" — 😀', "", "word " * 200]


def small_encoder(config: dict[str, Any], seed: int = 0) -> ClipEncoder:
    torch.manual_seed(seed)
    model = build_clip(config)
    length = config["text_cfg"]["context_length"]
    info = EncoderInfo(
        spec="small",
        name="small",
        family="open_clip",
        weights_sha256="",
        preprocessing_sha256="",
        modalities=("image", "text"),
        dims={"image": 12, "text": 12},
        image_size_px=32,
        context_length=length,
        n_parameters=0,
    )
    return ClipEncoder(info, model, PixelConfig(size_px=32), ClipTokenizer(length)).eval()


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (70, 90, 3), dtype=np.uint8))


def hf_tokenizer(folder: Path) -> None:
    """Files of a tokenizer of transformers that knows a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<unk>": 1, "a": 2, "red": 3, "bag": 4, "blue": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))  # noqa: S106 - no password
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
