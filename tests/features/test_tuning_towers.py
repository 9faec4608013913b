"""Towers: stem, blocks and head give the encoder's own vectors and gradients, from wherever one starts."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from features.catalogue import Modality
from features.encoders.base import Encoder
from features.encoders.pixels import PixelConfig, PixelTransform
from features.encoders.registry import load_encoder
from features.encoders.vlmo.config import VlmoConfig
from features.errors import EncoderError
from features.tuning.towers import Hidden, Tower, has_tower, tower_of, towers_of
from tests.features import small_clip, small_sentence, small_timm, small_transformers, small_vlmo
from tests.features.small_clip import hf_tokenizer, picture

TEXTS = ["a red bag", "blue shoes with laces of leather", "x"]
VLMO = VlmoConfig(
    width=24, depth=3, n_heads=2, mlp_width=32, vl_start=2, image_size_px=32, text_length=12, vocabulary=40
)

_RESNET = {**small_clip.SMALL, "vision_cfg": {"image_size": 32, "layers": [1, 1, 2, 1], "width": 8}}
_MEAN = {**small_clip.SMALL, "vision_cfg": {**small_clip.VISION, "pool_type": "avg"}}
_AFTER = {**small_clip.SMALL, "vision_cfg": {**small_clip.VISION, "final_ln_after_pool": True}}
_TIMM = {
    **small_clip.SIGLIP,
    "vision_cfg": {
        "image_size": 224,
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "embed_dim": 192,
}


def _clip(config: dict[str, object], folder: Path) -> Encoder:
    from features.encoders.clip_tokens import FolderTokenizer

    encoder = small_clip.small_encoder(config)
    if config is _TIMM:
        encoder.image_transform = PixelTransform(PixelConfig(size_px=224))
    if config.get("custom_text"):
        hf_tokenizer(folder)
        encoder.tokenizer = FolderTokenizer(str(folder), 9, "{}")
        encoder.pads_to = 9
    return encoder


def _vlmo(options: str, folder: Path, config: VlmoConfig = VLMO) -> Encoder:
    save_file(small_vlmo.checkpoint(config), folder / "weights.safetensors")
    small_vlmo.write_vocabulary(folder, config.vocabulary)
    return load_encoder(f"vlmo/custom:{folder}/weights.safetensors+tokens=12{options}")


def _local(family: str, write: Callable[[Path], object], options: str, folder: Path) -> Encoder:
    write(folder)
    return load_encoder(f"{family}/local-dir:{folder}{options}")


def _sentence(kind: str, folder: Path) -> Encoder:
    return load_encoder(f"sentence-transformers/local-dir:{small_sentence.save_sentence(folder, kind)}")


def _hf(name: str, options: str = "") -> Callable[[Path], Encoder]:
    return partial(_local, "transformers", getattr(small_transformers, name), options)


def _vision(kind: str, options: str = "") -> Callable[[Path], Encoder]:
    return partial(_local, "transformers", partial(small_transformers.vision, kind=kind), options)


def _text(kind: str, options: str = "") -> Callable[[Path], Encoder]:
    return partial(_local, "transformers", partial(small_transformers.text, kind=kind), options)


ENCODERS: dict[str, Callable[[Path], Encoder]] = {
    "clip": partial(_clip, small_clip.SMALL),
    "clip-mean": partial(_clip, _MEAN),
    "clip-norm-after-pool": partial(_clip, _AFTER),
    "clip-resnet": partial(_clip, _RESNET),
    "clip-siglip": partial(_clip, small_clip.SIGLIP),
    "clip-timm": partial(_clip, _TIMM),
    "tiny": lambda _: load_encoder("tiny"),
    "tiny-l2": lambda _: load_encoder("tiny+l2=yes"),
    "vlmo": partial(_vlmo, ""),
    "vlmo-vl": partial(_vlmo, "+output=vl"),
    "vlmo-cls": partial(_vlmo, "+output=cls"),
    "hf-clip": _hf("clip"),
    "hf-clip-legacy": _hf("clip_legacy"),
    "hf-siglip": _hf("siglip"),
    "vit": _vision("vit"),
    "vit-mean": _vision("vit", "+pool=mean"),
    "dinov2": _vision("dinov2"),
    "dinov2-mean": _vision("dinov2", "+pool=mean"),
    "dinov2-registers-mean": _vision("dinov2_with_registers", "+pool=mean"),
    "bert": _text("bert"),
    "roberta-cls": _text("roberta", "+pool=cls"),
    "xlm-roberta": _text("xlm-roberta"),
    "sentence-mean": partial(_sentence, "mean"),
    "sentence-dense": partial(_sentence, "dense"),
    "sentence-prompt": partial(_sentence, "instructor"),
    "timm": partial(_local, "timm", small_timm.save_timm, ""),
    "timm-registers": partial(_local, "timm", partial(small_timm.save_timm, name="registers"), ""),
    "timm-map": partial(_local, "timm", partial(small_timm.save_timm, name="attention"), ""),
}


def inputs_of(encoder: Encoder, modality: Modality) -> Tensor:
    if modality == "image":
        return torch.stack([encoder.image_transform(picture(seed)) for seed in range(3)])
    return encoder.tokenize(TEXTS)


def vectors_of(encoder: Encoder, modality: Modality, inputs: Tensor) -> Tensor:
    return encoder.encode_images(inputs) if modality == "image" else encoder.encode_texts(inputs)


def gradients(encoder: Encoder, vectors: Tensor) -> dict[str, Tensor]:
    encoder.zero_grad()
    weights = torch.linspace(-1, 1, vectors.shape[1])
    (vectors * weights).sum().backward()  # type: ignore[no-untyped-call]  # torch's own signature lacks types
    return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ENCODERS)
def test_stem_blocks_and_head_are_the_encoder(name: str, tmp_path: Path) -> None:
    encoder = ENCODERS[name](tmp_path)
    for modality, tower in towers_of(encoder).items():
        inputs = inputs_of(encoder, modality)
        expected = vectors_of(encoder, modality, inputs)
        own = gradients(encoder, expected)
        whole = tower.head(tower.run(tower.stem(inputs), 0, tower.n_blocks))
        torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-6)
        middle = tower.n_blocks // 2
        split = tower.head(tower.run(tower.run(tower.stem(inputs), 0, middle), middle, tower.n_blocks))
        torch.testing.assert_close(split, expected, rtol=1e-6, atol=1e-6)
        theirs = gradients(encoder, split)
        assert theirs.keys() == own.keys() == tower.parameters().keys() & own.keys()
        for parameter, gradient in own.items():
            scale = float(gradient.abs().max()) or 1.0
            torch.testing.assert_close(theirs[parameter] / scale, gradient / scale, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", list(ENCODERS))
def test_finishing_from_any_block_is_running_the_rest_and_the_head(name: str, tmp_path: Path) -> None:
    encoder = ENCODERS[name](tmp_path)
    for modality, tower in towers_of(encoder).items():
        hidden = tower.stem(inputs_of(encoder, modality))
        for start in range(tower.n_blocks + 1):
            below = tower.run(hidden, 0, start).detach()
            results, gradients = [], []
            for way in (lambda t, h, s: t.head(t.run(h, s)), lambda t, h, s: t.finish(h, s)):
                encoder.zero_grad()
                states = below.states.clone().requires_grad_()
                out = way(tower, below.with_states(states), start)
                (out * torch.linspace(-1, 1, out.shape[1])).sum().backward()
                results.append(out.detach())
                grads = {key: p.grad.clone() for key, p in encoder.named_parameters() if p.grad is not None}
                gradients.append({**grads, "states": states.grad})
            torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
            assert gradients[0].keys() == gradients[1].keys()
            for key, value in gradients[0].items():
                torch.testing.assert_close(gradients[1][key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", ENCODERS)
def test_blocks_share_no_parameter_and_pooled_states_have_the_stated_width(name: str, tmp_path: Path) -> None:
    encoder = ENCODERS[name](tmp_path)
    for modality, tower in towers_of(encoder).items():
        parts = [tower.stem_parameters(), *map(tower.block_parameters, range(tower.n_blocks))]
        parts.append(tower.head_parameters())
        names = [each for part in parts for each in part]
        assert len(names) == len(set(names))
        assert all(parts[:-1])
        inputs = inputs_of(encoder, modality)
        pooled = tower.pooled_states(inputs)
        assert [state.shape for state in pooled] == [(3, width) for width in tower.widths]
        last = tower.run(tower.stem(inputs))
        assert torch.equal(pooled[-1], tower.pooled(last))
        assert not torch.equal(pooled[0], pooled[-1])


@pytest.mark.parametrize("name", ["clip", "tiny", "vlmo", "hf-clip", "hf-siglip", "bert", "sentence-mean"])
def test_kept_states_of_other_lengths_can_be_joined_and_run_on(name: str, tmp_path: Path) -> None:
    encoder = ENCODERS[name](tmp_path)
    for modality, tower in towers_of(encoder).items():
        inputs = inputs_of(encoder, modality)
        with torch.no_grad():
            expected = vectors_of(encoder, modality, inputs)
            kept = [_alone(encoder, tower, modality, row, inputs) for row in range(3)]
            joined = Hidden.concatenate([Hidden.from_tensors(each.tensors()) for each in kept])
            vectors = tower.head(tower.run(joined, 1))
            torch.testing.assert_close(vectors, expected, rtol=1e-5, atol=2e-6)
            some = joined.rows(torch.tensor([2, 0])).trimmed()
            torch.testing.assert_close(tower.head(tower.run(some, 1)), expected[[2, 0]], rtol=1e-5, atol=2e-6)


def _alone(encoder: Encoder, tower: Tower, modality: Modality, row: int, inputs: Tensor) -> Hidden:
    """The state after block 0 of one item, a text at its own length."""
    own = inputs[row : row + 1] if modality == "image" else encoder.tokenize([TEXTS[row]])
    return tower.run(tower.stem(own), 0, 1)


def test_padding_is_cut_and_maps_are_not_padded() -> None:
    hidden = Hidden(torch.ones(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool(), torch.zeros(2).long())
    assert hidden.padded(5).states[:, 3:].abs().sum() == 0
    assert not hidden.padded(5).mask[:, 3:].any()
    assert hidden.padded(5).trimmed().states.shape == (2, 2, 4)
    with pytest.raises(ValueError, match="padded to 2 tokens: it has 3 tokens"):
        hidden.padded(2)
    maps = Hidden(torch.ones(2, 3, 4, 4), torch.ones(2, 0).bool(), torch.zeros(2).long())
    assert maps.trimmed() is maps
    assert Hidden.concatenate([maps, maps]).states.shape == (4, 3, 4, 4)
    with pytest.raises(ValueError, match="maps have no length"):
        maps.padded(5)
    with pytest.raises(ValueError, match="no hidden states"):
        Hidden.concatenate([])


def test_a_tower_that_is_not_there_is_refused(tmp_path: Path) -> None:
    random = load_encoder("random:8")
    with pytest.raises(EncoderError, match=r"'random:8' shows no image tower .* mode `full`.* still works"):
        tower_of(random, "image")
    assert not has_tower(random, "image")
    bert = ENCODERS["bert"](tmp_path)
    with pytest.raises(EncoderError, match="has no modality 'image', only text"):
        tower_of(bert, "image")
    (tmp_path / "vlmo").mkdir()
    with pytest.raises(EncoderError, match="meet inside it"):
        tower_of(_vlmo("", tmp_path / "vlmo"), "fused")
    tower = tower_of(bert, "text")
    hidden = tower.stem(bert.tokenize(TEXTS))
    with pytest.raises(ValueError, match="blocks 0 to 9 of a tower that has 2"):
        tower.run(hidden, 0, 9)


@pytest.mark.parametrize("kind", ["swin", "resnet", "convnext"])
def test_other_vision_models_are_refused(kind: str, tmp_path: Path) -> None:
    encoder = _vision(kind)(tmp_path)
    with pytest.raises(EncoderError, match=f"it is a {kind} of transformers.*mode `full`"):
        tower_of(encoder, "image")
