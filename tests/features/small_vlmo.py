"""VLMo checkpoints of any size with random tensors, laid out as the released files are."""

from pathlib import Path

import torch
from torch import Tensor

from features.encoders.vlmo.config import VlmoConfig

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "red",
    "bag",
    "##s",
    "blue",
    "shoes",
    "warm",
    "&",
    "10",
]


def layout(config: VlmoConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a released pre-trained file."""
    d, mlp, table = config.width, config.mlp_width, config.table_rows
    shapes: dict[str, tuple[int, ...]] = {
        "text_embeddings.word_embeddings.weight": (config.vocabulary, d),
        "text_embeddings.position_embeddings.weight": (config.text_length, d),
        "text_embeddings.token_type_embeddings.weight": (2, d),
        "text_embeddings.LayerNorm.weight": (d,),
        "text_embeddings.LayerNorm.bias": (d,),
        "token_type_embeddings.weight": (2, d),
        "transformer.cls_token": (1, 1, d),
        "transformer.patch_embed.proj.weight": (d, 3, config.patch_px, config.patch_px),
        "transformer.patch_embed.proj.bias": (d,),
        "transformer.norm.weight": (d,),
        "transformer.norm.bias": (d,),
        "pooler.dense.weight": (d, d),
        "pooler.dense.bias": (d,),
        "itm_score.fc.weight": (2, d),
        "itm_score.fc.bias": (2,),
        "logit_scale": (),
        "logit_vl_scale": (),
        "mlm_score.bias": (config.vocabulary,),
        "mlm_score.transform.dense.weight": (d, d),
        "mlm_score.transform.dense.bias": (d,),
        "mlm_score.transform.LayerNorm.weight": (d,),
        "mlm_score.transform.LayerNorm.bias": (d,),
        "mlm_score.decoder.weight": (config.vocabulary, d),
    }
    for head in ("itc_text", "itc_image", "itc_vl_text", "itc_vl_image"):
        shapes[f"{head}_proj.fc.weight"] = (d, d)
    if config.relative:
        shapes["relative_position_bias_table"] = (table, config.depth * config.n_heads)
    else:
        shapes["transformer.pos_embed"] = (1, config.grid**2 + 1, d)
    for n in range(config.depth):
        block = f"transformer.blocks.{n}."
        experts = ["text", "imag", *(["vl"] if n >= config.vl_start else [])]
        shapes |= {block + "norm1.weight": (d,), block + "norm1.bias": (d,)}
        shapes |= {block + "attn.q_bias": (d,), block + "attn.v_bias": (d,)}
        shapes |= {block + "attn.qkv.weight": (3 * d, d)}
        shapes |= {block + "attn.proj.weight": (d, d), block + "attn.proj.bias": (d,)}
        if config.layer_scale:
            shapes |= {block + "gamma_1": (d,), block + "gamma_2": (d,)}
        for expert in experts:
            shapes |= {block + f"norm2_{expert}.weight": (d,), block + f"norm2_{expert}.bias": (d,)}
            shapes |= {block + f"mlp_{expert}.fc1.weight": (mlp, d), block + f"mlp_{expert}.fc1.bias": (mlp,)}
            shapes |= {block + f"mlp_{expert}.fc2.weight": (d, mlp), block + f"mlp_{expert}.fc2.bias": (d,)}
    return shapes


def checkpoint(config: VlmoConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of a released file's layout, of moderate spread."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in layout(config).items():
        tensor = torch.empty(shape).normal_(std=0.05, generator=generator)
        is_scale = name.endswith(("norm.weight", "LayerNorm.weight")) or "norm1.weight" in name
        tensors[name] = tensor + 1 if is_scale or ("norm2" in name and name.endswith("weight")) else tensor
    return tensors


def write_vocabulary(folder: Path, n_words: int = 0) -> Path:
    """A vocab.txt, filled up to ``n_words`` with words nobody uses."""
    words = WORDS + [f"[unused{number}]" for number in range(n_words - len(WORDS))]
    path = folder / "vocab.txt"
    path.write_text("\n".join(words) + "\n", encoding="utf-8")
    return path
