"""Small random models in the layout of transformers' `save_pretrained`, for the tests of its family."""

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel

TEXTS = [
    "a red bag",
    "Blue &amp; green shoes, “size” 10 — 😀",
    "",
    "word " * 200,
    "ﬁne caﬁé &quot;x&quot;",
]
SIDE = 32
LAYERS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION = {**LAYERS, "image_size": SIDE, "patch_size": 16}


def pictures() -> dict[str, Image.Image]:
    """Pictures of odd sizes and modes."""
    rng = np.random.default_rng(0)

    def noise(height: int, width: int, channels: int) -> Image.Image:
        shape = (height, width, channels) if channels > 1 else (height, width)
        return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))

    return {
        "landscape": noise(41, 90, 3),
        "portrait": noise(97, 33, 3),
        "square": noise(SIDE, SIDE, 3),
        "rgba": noise(50, 61, 4),
        "palette": noise(37, 54, 3).quantize(17),
        "grey": noise(45, 38, 1),
        "deep": Image.fromarray(rng.integers(0, 65536, (40, 51)).astype(np.uint16)),
        "row": noise(1, 150, 3),
        "column": noise(130, 1, 3),
        "dot": noise(1, 1, 3),
    }


def scaled(model: Any, seed: int = 0) -> Any:
    """Random weights, large enough for activations and masks to matter; normalisations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim > 1:
                value.copy_(noise * 0.3)
            elif value.ndim == 1:
                value.copy_(noise * 0.1 + (1.0 if name.endswith("weight") else 0.0))
    return model.eval()


def byte_pairs(folder: Path, **settings: Any) -> Any:
    """CLIP's tokenizer with single letters for words."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    ids = {token: number for number, token in enumerate([*vocabulary, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = transformers.CLIPTokenizer(vocab=ids, merges=[], **settings)
    tokenizer.save_pretrained(folder)
    return tokenizer


def word_pieces(folder: Path, kind: str = "BertTokenizer", **settings: Any) -> Any:
    """BERT's tokenizer with single letters for words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if kind == "MPNetTokenizer":
        special = ["<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>"]
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    tokens = [*special, *letters, *(f"##{letter}" for letter in string.ascii_lowercase), "red", "bag"]
    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer = getattr(transformers, kind)(vocab=ids, **settings)
    tokenizer.save_pretrained(folder)
    return tokenizer


def sentence_pieces(folder: Path, **settings: Any) -> Any:
    """XLM-RoBERTa's tokenizer with single letters for words."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    letters = ["▁", *string.ascii_letters, *string.digits, *string.punctuation]
    vocabulary = [(token, 0.0) for token in special] + [(letter, -2.0) for letter in letters]
    tokenizer = transformers.XLMRobertaTokenizer(vocab=vocabulary, **settings)
    tokenizer.save_pretrained(folder)
    return tokenizer


def byte_level(folder: Path, kind: str, special: list[str], **settings: Any) -> Any:
    """A byte-level tokenizer (RoBERTa, Qwen) with single bytes for words."""
    tokens = [*special, *sorted(ByteLevel.alphabet())]
    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer = getattr(transformers, kind)(vocab=ids, merges=[], **settings)
    tokenizer.save_pretrained(folder)
    return tokenizer


def gemma_letters(folder: Path, **settings: Any) -> Any:
    """SigLIP 2's tokenizer, which lower-cases, with single letters for words."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.ascii_lowercase]
    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer = transformers.Siglip2Tokenizer(vocab=ids, merges=[], **settings)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _square(kind: str, **settings: Any) -> Any:
    return getattr(transformers, kind)(size={"height": SIDE, "width": SIDE}, **settings)


def _cropped(kind: str = "CLIPImageProcessorPil", **settings: Any) -> Any:
    crop = {"height": SIDE, "width": SIDE}
    return getattr(transformers, kind)(size={"shortest_edge": 36}, crop_size=crop, **settings)


def _save(folder: Path, model: Any, processor: Any) -> Path:
    scaled(model).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def _clip_text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {
        **LAYERS,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 77,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        **more,
    }


def _bert_text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {
        **LAYERS,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 90,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def clip(folder: Path, *, activation: str = "quick_gelu", legacy: bool = False) -> Path:
    tokenizer = byte_pairs(folder)
    text = _clip_text(tokenizer, hidden_act=activation)
    if legacy:
        text |= {"eos_token_id": 2}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**VISION, "hidden_act": activation}, projection_dim=12
    )
    return _save(folder, transformers.CLIPModel(config), _cropped())


def clip_legacy(folder: Path) -> Path:
    return clip(folder, legacy=True)


def clipseg(folder: Path) -> Path:
    tokenizer = byte_pairs(folder)
    config = transformers.CLIPSegConfig(
        text_config=_clip_text(tokenizer),
        vision_config=VISION,
        projection_dim=12,
        extract_layers=[0],
        reduce_dim=4,
    )
    larger = {"height": 48, "width": 48}
    processor = transformers.ViTImageProcessorPil(size=larger)
    return _save(folder, transformers.CLIPSegForImageSegmentation(config), processor)


def metaclip_2(folder: Path) -> Path:
    tokenizer = sentence_pieces(folder)
    config = transformers.MetaClip2Config(
        text_config=_clip_text(tokenizer), vision_config=VISION, projection_dim=12
    )
    return _save(folder, transformers.MetaClip2Model(config), _cropped())


def aimv2(folder: Path) -> Path:
    tokenizer = byte_pairs(folder)
    config = transformers.Aimv2Config(
        text_config=_clip_text(tokenizer), vision_config=VISION, projection_dim=12
    )
    return _save(folder, transformers.Aimv2Model(config), _cropped())


def siglip(folder: Path) -> Path:
    tokenizer = gemma_letters(folder, padding_side="right", model_input_names=["input_ids"])
    text = _bert_text(tokenizer, max_position_embeddings=16)
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    return _save(folder, transformers.SiglipModel(config), _square("SiglipImageProcessorPil"))


def siglip2(folder: Path) -> Path:
    tokenizer = gemma_letters(folder)
    text = _bert_text(tokenizer, max_position_embeddings=64)
    vision = {**LAYERS, "num_patches": 16, "patch_size": 16}
    config = transformers.Siglip2Config(text_config=text, vision_config=vision)
    processor = transformers.Siglip2ImageProcessorPil(patch_size=16, max_num_patches=16)
    return _save(folder, transformers.Siglip2Model(config), processor)


def align(folder: Path) -> Path:
    tokenizer = word_pieces(folder)
    vision = {
        "image_size": SIDE,
        "hidden_dim": 16,
        "width_coefficient": 0.1,
        "depth_coefficient": 0.1,
        "kernel_sizes": [3],
        "in_channels": [16],
        "out_channels": [16],
        "strides": [2],
        "num_block_repeats": [1],
        "expand_ratios": [1],
        "depthwise_padding": [],
        "num_hidden_layers": 4,
    }
    config = transformers.AlignConfig(
        text_config=_bert_text(tokenizer), vision_config=vision, projection_dim=16
    )
    return _save(folder, transformers.AlignModel(config), _square("EfficientNetImageProcessorPil"))


def altclip(folder: Path) -> Path:
    tokenizer = sentence_pieces(folder)
    text = _bert_text(tokenizer, max_position_embeddings=100, project_dim=16)
    config = transformers.AltCLIPConfig(text_config=text, vision_config=VISION, projection_dim=12)
    return _save(folder, transformers.AltCLIPModel(config), _cropped())


def chinese_clip(folder: Path) -> Path:
    tokenizer = word_pieces(folder)
    config = transformers.ChineseCLIPConfig(
        text_config=_bert_text(tokenizer), vision_config=VISION, projection_dim=12
    )
    processor = _cropped("ChineseCLIPImageProcessorPil")
    return _save(folder, transformers.ChineseCLIPModel(config), processor)


def _blip_config(tokenizer: Any) -> Any:
    text = _bert_text(tokenizer, encoder_hidden_size=16, bos_token_id=2, eos_token_id=3, sep_token_id=3)
    return transformers.BlipConfig(
        text_config=text, vision_config=VISION, projection_dim=12, image_text_hidden_size=10
    )


def blip(folder: Path) -> Path:
    tokenizer = word_pieces(folder)
    model = transformers.BlipForImageTextRetrieval(_blip_config(tokenizer))
    return _save(folder, model, _square("BlipImageProcessorPil"))


def blip_model(folder: Path) -> Path:
    tokenizer = word_pieces(folder)
    return _save(folder, transformers.BlipModel(_blip_config(tokenizer)), _square("BlipImageProcessorPil"))


def blip_2(folder: Path) -> Path:
    tokenizer = word_pieces(folder)
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config=_bert_text(tokenizer, encoder_hidden_size=16, use_qformer_text_input=True),
        text_config={
            "model_type": "opt",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        num_query_tokens=3,
        image_text_hidden_size=10,
    )
    return _save(folder, transformers.Blip2ForImageTextRetrieval(config), _square("BlipImageProcessorPil"))


def flava(folder: Path) -> Path:
    tokenizer = word_pieces(folder)
    config = transformers.FlavaConfig(
        text_config=_bert_text(tokenizer), image_config=VISION, multimodal_config=LAYERS, projection_dim=12
    )
    size = {"height": SIDE, "width": SIDE}
    processor = transformers.FlavaImageProcessorPil(size=size, crop_size=size)
    return _save(folder, transformers.FlavaModel(config), processor)


DUAL: dict[str, Callable[[Path], Path]] = {
    "clip": clip,
    "clip_legacy": clip_legacy,
    "clipseg": clipseg,
    "metaclip_2": metaclip_2,
    "aimv2": aimv2,
    "siglip": siglip,
    "siglip2": siglip2,
    "align": align,
    "altclip": altclip,
    "chinese_clip": chinese_clip,
    "blip": blip,
    "blip_model": blip_model,
    "blip-2": blip_2,
    "flava": flava,
}


def vision(folder: Path, kind: str) -> Path:
    """A vision model by its model_type."""
    vit = VISION
    stages = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]}
    swin = {
        "image_size": SIDE,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    }
    made: dict[str, tuple[str, str, dict[str, Any], Any]] = {
        "vit": ("ViTConfig", "ViTForImageClassification", vit, _square("ViTImageProcessorPil")),
        "deit": ("DeiTConfig", "DeiTModel", vit, _cropped("DeiTImageProcessorPil")),
        "beit": (
            "BeitConfig",
            "BeitForImageClassification",
            vit,
            _square("BeitImageProcessorPil", do_center_crop=False),
        ),
        "dinov2": ("Dinov2Config", "Dinov2Model", vit, _cropped("BitImageProcessorPil")),
        "dinov2_with_registers": (
            "Dinov2WithRegistersConfig",
            "Dinov2WithRegistersModel",
            {**vit, "num_register_tokens": 3},
            _cropped("BitImageProcessorPil"),
        ),
        "dinov3_vit": (
            "DINOv3ViTConfig",
            "DINOv3ViTModel",
            {**vit, "num_register_tokens": 2},
            _square("DINOv3ViTImageProcessor"),
        ),
        "dinov3_convnext": (
            "DINOv3ConvNextConfig",
            "DINOv3ConvNextModel",
            stages,
            _square("DINOv3ViTImageProcessor"),
        ),
        "swin": (
            "SwinConfig",
            "SwinForImageClassification",
            swin,
            _square("ViTImageProcessorPil", resample=3),
        ),
        "resnet": (
            "ResNetConfig",
            "ResNetForImageClassification",
            {**stages, "embedding_size": 8},
            transformers.ConvNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_pct=0.875),
        ),
        "convnext": (
            "ConvNextConfig",
            "ConvNextForImageClassification",
            stages,
            transformers.ConvNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_pct=0.875),
        ),
        "convnextv2": (
            "ConvNextV2Config",
            "ConvNextV2Model",
            stages,
            transformers.ConvNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_pct=0.875),
        ),
        "aimv2_vision_model": ("Aimv2VisionConfig", "Aimv2VisionModel", vit, _cropped()),
        "pvt": (
            "PvtConfig",
            "PvtModel",
            {
                "image_size": SIDE,
                "hidden_sizes": [8, 8, 8, 16],
                "depths": [1, 1, 1, 1],
                "num_attention_heads": [1, 1, 1, 2],
                "mlp_ratios": [1, 1, 1, 1],
                "sequence_reduction_ratios": [1, 1, 1, 1],
            },
            _square("ViTImageProcessorPil"),
        ),
        "regnet": (
            "RegNetConfig",
            "RegNetModel",
            {**stages, "embedding_size": 8, "groups_width": 4},
            transformers.ConvNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_pct=0.875),
        ),
        "clip_vision_model": ("CLIPVisionConfig", "CLIPVisionModel", vit, _cropped()),
        "siglip_vision_model": (
            "SiglipVisionConfig",
            "SiglipVisionModel",
            vit,
            _square("SiglipImageProcessorPil"),
        ),
        "vit_mae": (
            "ViTMAEConfig",
            "ViTMAEModel",
            vit,
            _square("ViTImageProcessorPil"),
        ),
    }
    config, model, settings, processor = made[kind]
    return _save(folder, getattr(transformers, model)(getattr(transformers, config)(**settings)), processor)


VISION_KINDS = (
    "vit",
    "deit",
    "beit",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "dinov3_convnext",
    "swin",
    "resnet",
    "convnext",
    "convnextv2",
    "aimv2_vision_model",
    "pvt",
    "regnet",
    "clip_vision_model",
    "siglip_vision_model",
    "vit_mae",
)


def text(folder: Path, kind: str) -> Path:
    """A text model by its model_type."""
    if kind in ("bert", "distilbert", "mpnet"):
        tokenizer = word_pieces(folder, "MPNetTokenizer" if kind == "mpnet" else "BertTokenizer")
    elif kind == "xlm-roberta":
        tokenizer = sentence_pieces(folder)
    elif kind == "roberta":
        tokenizer = byte_level(folder, "RobertaTokenizer", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    else:
        tokenizer = byte_level(folder, "Qwen2Tokenizer", ["<|endoftext|>"], model_max_length=80)
    settings = _bert_text(tokenizer)
    if kind == "distilbert":
        settings = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "vocab_size": len(tokenizer)}
        settings |= {"max_position_embeddings": 90}
    if kind == "qwen3":
        settings |= {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": None}
    names = {
        "bert": ("BertConfig", "BertForMaskedLM"),
        "distilbert": ("DistilBertConfig", "DistilBertModel"),
        "mpnet": ("MPNetConfig", "MPNetModel"),
        "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaModel"),
        "roberta": ("RobertaConfig", "RobertaModel"),
        "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    }
    config, model = names[kind]
    return _save(folder, getattr(transformers, model)(getattr(transformers, config)(**settings)), None)


TEXT_KINDS = ("bert", "distilbert", "mpnet", "xlm-roberta", "roberta", "qwen3")
