"""The open_clip family: the right activation, the right vectors, an answer to each wrong specification."""

import json
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from features.encoders import clip_specs, clip_weights, hub
from features.encoders.base import EncoderInfo
from features.encoders.clip import ClipEncoder, build_clip
from features.encoders.clip_tokens import ClipTokenizer
from features.encoders.clip_weights import count_numbers, read_weights
from features.encoders.pixels import PixelConfig
from features.encoders.registry import describe_encoder, load_encoder
from features.errors import EncoderError
from tests.references.plain_clip import gelu, plain_image_features, plain_text_features, quick_gelu

N_HEADS = 2
VISION = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 2}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": N_HEADS, "layers": 2}
SMALL = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT}
TEXTS = ["a red bag", 'blue & green shoes, 10" — 😀', "", "word " * 200]


@pytest.fixture
def small_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every architecture keeps its name, its tags and its activation, and shrinks to two narrow layers."""
    real = clip_specs.architecture_config

    def shrunken(architecture: str) -> dict[str, Any]:
        config = real(architecture)
        vision, text = config["vision_cfg"], config["text_cfg"]
        size = {"image_size": 4 * vision.get("patch_size", 16), "patch_size": vision.get("patch_size", 16)}
        config |= {
            "embed_dim": 12,
            "vision_cfg": VISION | size,
            "text_cfg": text | {"width": 16, "heads": N_HEADS},
        }
        config["text_cfg"]["layers"] = 2
        return config

    monkeypatch.setattr(clip_specs, "architecture_config", shrunken)


@pytest.fixture
def save_weights(tmp_path: Path) -> Callable[..., Path]:
    """Write seeded weights of an architecture's layout into a file."""

    def save(config: dict[str, Any], name: str = "weights.safetensors") -> Path:
        torch.manual_seed(0)
        weights = build_clip(config).state_dict()
        for tensor in weights.values():
            tensor.mul_(3)  # far enough from 0 for the activations to differ
        path = tmp_path / name
        if name.endswith(".safetensors"):
            save_file(weights, path)
        else:
            torch.save(weights, path)
        return path

    return save


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


def assert_runs_with(encoder: Any, path: Path, activation: Any, other: Any) -> None:
    """The features are the plain NumPy ones with one activation, and are not with the other."""
    weights = {name: tensor.double().numpy() for name, tensor in read_weights(path).items()}
    pixels = encoder.image_transform(picture())
    tokens = encoder.tokenize(TEXTS[:1])
    padded = np.zeros(encoder.info.context_length, dtype=np.int64)
    padded[: tokens.shape[1]] = tokens[0]
    with torch.inference_mode():
        image = encoder.encode_images(pixels[None])[0].double().numpy()
        text = encoder.encode_texts(tokens)[0].double().numpy()
    for ours, plain, given in (
        (image, plain_image_features, pixels.double().numpy()),
        (text, plain_text_features, padded),
    ):
        expected, wrong = (plain(given, weights, N_HEADS, each) for each in (activation, other))
        scale = np.abs(expected).max()
        np.testing.assert_allclose(ours, expected, atol=1e-4 * scale)
        assert np.abs(ours - wrong).max() > 4e-4 * scale


@pytest.mark.usefixtures("small_architectures")
@pytest.mark.parametrize(
    ("architecture", "quick"),
    [("ViT-B-32", False), ("ViT-B-32-quickgelu", True), ("ViT-B-16", False), ("ViT-B-16-quickgelu", True)],
)
def test_for_a_file_the_architecture_decides_the_activation(
    architecture: str, quick: bool, save_weights: Callable[..., Path]
) -> None:
    path = save_weights(clip_specs.architecture_config(architecture))
    encoder = load_encoder(f"open_clip/{architecture}:{path}")
    activations = (quick_gelu, gelu) if quick else (gelu, quick_gelu)
    assert_runs_with(encoder, path, *activations)


@pytest.mark.usefixtures("small_architectures")
@pytest.mark.parametrize(
    ("architecture", "tag", "quick"),
    [
        ("ViT-B-16", "openai", True),
        ("ViT-B-16-quickgelu", "openai", True),
        ("ViT-B-32", "laion400m_e32", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
    ],
)
def test_for_a_tag_the_tag_decides_the_activation(
    architecture: str,
    tag: str,
    quick: bool,
    save_weights: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = save_weights(clip_specs.architecture_config(architecture))
    monkeypatch.setattr(clip_specs, "fetch_from_hub", lambda *_, **__: path)
    activations = (quick_gelu, gelu) if quick else (gelu, quick_gelu)
    fetched = load_encoder(f"open_clip/{architecture}:{tag}")
    assert_runs_with(fetched, path, *activations)
    brought = describe_encoder(f"open_clip/{architecture}:{tag}@{path}")
    assert brought.preprocessing_sha256 == fetched.info.preprocessing_sha256
    assert ("quickgelu" in brought.name) == quick


@pytest.mark.usefixtures("small_architectures")
def test_the_digests_tell_activation_and_weights_apart(
    save_weights: Callable[..., Path], tmp_path: Path
) -> None:
    path = save_weights(clip_specs.architecture_config("ViT-B-32"))
    plain = describe_encoder(f"open_clip/ViT-B-32:{path}")
    quick = describe_encoder(f"open_clip/ViT-B-32-quickgelu:{path}")
    assert plain.weights_sha256 == quick.weights_sha256
    assert plain.preprocessing_sha256 != quick.preprocessing_sha256
    moved = tmp_path / "moved.safetensors"
    path.rename(moved)
    assert describe_encoder(f"open_clip/ViT-B-32:{moved}").weights_sha256 == plain.weights_sha256


def test_every_tag_s_activation_is_its_own_or_its_architecture_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_specs, "_tokenizer_sha256", lambda *_: "")
    for architecture in clip_specs.architectures():
        for tag, facts in clip_specs._tags(architecture).items():
            source = clip_specs._with_tag("spec", architecture, tag, facts, Path("x"))
            config = clip_specs.architecture_config(architecture)
            assert source.model.get("quick_gelu", False) == bool(
                facts.get("quick_gelu") or config.get("quick_gelu")
            )
            assert source.pixels.mean == tuple(facts["mean"])
            assert source.pixels.resize_mode == facts["resize_mode"]


def test_siglip_files_are_scaled_as_all_tags_of_their_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_specs, "_tokenizer_sha256", lambda *_: "")
    source = clip_specs._with_file("spec", "ViT-B-16-SigLIP", clip_specs._tags("ViT-B-16-SigLIP"), Path("x"))
    assert source.pixels.mean == (0.5, 0.5, 0.5)
    assert source.pixels.resize_mode == "squash"


@pytest.mark.parametrize("custom_text", [False, True])
def test_the_cut_text_tower_equals_open_clip_on_the_whole_context(custom_text: bool) -> None:
    encoder = small_encoder({**SMALL, "custom_text": custom_text})
    for texts in (TEXTS, TEXTS[:1], [""], ["a b", "c"]):
        tokens = encoder.tokenize(texts)
        assert tokens.shape[1] == max(encoder.token_lengths(texts))
        whole = torch.nn.functional.pad(tokens, (0, 77 - tokens.shape[1]))
        with torch.inference_mode():
            ours = encoder.encode_texts(tokens)
            theirs = encoder.model.encode_text(whole)  # type: ignore[operator]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
        assert ours.dtype == torch.float32


def test_the_cut_tower_s_gradient_equals_open_clip_s() -> None:
    encoder = small_encoder(SMALL)
    tokens = encoder.tokenize(TEXTS[:3])
    whole = torch.nn.functional.pad(tokens, (0, 77 - tokens.shape[1]))
    names, parameters = zip(*encoder.model.named_parameters(), strict=True)
    for name, ours, theirs in zip(
        names,
        torch.autograd.grad(encoder.encode_texts(tokens).square().sum(), parameters, allow_unused=True),
        torch.autograd.grad(encoder.model.encode_text(whole).square().sum(), parameters, allow_unused=True),  # type: ignore[operator]
        strict=True,
    ):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


COCA = {"multimodal_cfg": {**TEXT, "attn_pooler_heads": 2}, "custom_text": True}


@pytest.mark.parametrize(
    "config",
    [
        {"custom_text": True, "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last"}},
        {"custom_text": True, "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "argmax"}},
        {"custom_text": True, "text_cfg": {**TEXT, "pool_type": "first"}},
        {"text_cfg": {**TEXT, "pool_type": "last"}},
        {
            **COCA,
            "vision_cfg": {
                **VISION,
                "attentional_pool": True,
                "attn_pooler_heads": 2,
                "output_tokens": True,
            },
            "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        },
    ],
    ids=["siglip", "not-causal", "first", "last", "coca"],
)
def test_other_towers_take_the_whole_context(config: dict[str, Any]) -> None:
    encoder = small_encoder({**SMALL, **config})
    tokens = encoder.tokenize(TEXTS[:2])
    assert tokens.shape == (2, 77)
    with torch.inference_mode():
        ours = encoder.encode_texts(tokens)
        theirs = encoder.model.encode_text(tokens, normalize=False)  # type: ignore[operator]
        images = encoder.encode_images(encoder.image_transform(picture())[None])
    assert torch.equal(ours, theirs)
    assert images.shape == (1, 12)
    assert abs(images.norm().item() - 1) > 1e-3  # raw, not normalised


def test_the_tokenizer_gives_open_clip_s_ids() -> None:
    import open_clip

    rng = random.Random(0)  # noqa: S311 - texts to compare, no secrets
    letters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    texts = [
        *TEXTS,
        "<start_of_text> and <end_of_text>",
        "it's they'LL don't 'S",
        "ΑΣ ΟΔΟΣ İstanbul ſ 'ſ",
        "3,141.59 km² x" * 20,
        "naïve—café… “quoted” &amp;amp; <b>",
        "日本語のテキスト、とても長い" * 10,
        "👨‍👩‍👧🇩🇪" * 30,
        "x" * 300,
    ]
    texts += ["".join(rng.choices(letters, k=rng.randint(0, 60))) for _ in range(400)]
    texts += ["".join(rng.choices("abcd ef'!?.,012é😂🇺🇸 -", k=rng.randint(0, 200))) for _ in range(400)]
    for clean in ("lower", "whitespace", "canonicalize"):
        theirs = open_clip.tokenizer.SimpleTokenizer(clean=clean)(texts)
        for text, ids, expected in zip(texts, ClipTokenizer(77, clean)(texts), theirs.tolist(), strict=True):
            assert ids + [0] * (77 - len(ids)) == expected, text


@pytest.mark.parametrize("unit", ["x", "!", "word ", "漢", "😀", " ", "&amp;", "a1"])
def test_100_000_characters_are_tokenized_in_bounded_time(unit: str) -> None:
    tokenizer = ClipTokenizer(77)
    tokenizer(["warm up"])
    started = time.process_time()
    (ids,) = tokenizer([(unit * 100_000)[:100_000]])
    assert time.process_time() - started < 3
    assert len(ids) <= 77
    assert ids[-1] == 49407


def test_tokenizer_and_transform_can_be_pickled_for_loader_workers() -> None:
    encoder = small_encoder(SMALL)
    tokenizer, transform = pickle.loads(pickle.dumps((encoder.tokenizer, encoder.image_transform)))  # noqa: S301 - made a moment ago
    assert tokenizer(TEXTS) == encoder.token_ids(TEXTS)
    assert torch.equal(transform(picture()), encoder.image_transform(picture()))


@pytest.mark.usefixtures("small_architectures")
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.bin"])
def test_weights_are_read_from_every_kind_of_file(name: str, save_weights: Callable[..., Path]) -> None:
    path = save_weights(clip_specs.architecture_config("ViT-B-32"), name)
    info = describe_encoder(f"open_clip/ViT-B-32:{path}")
    encoder = load_encoder(f"open_clip/ViT-B-32:{path}")
    assert encoder.info == info
    assert info.n_parameters == sum(parameter.numel() for parameter in encoder.parameters())
    assert not encoder.training
    assert info.dims == {"image": 12, "text": 12}
    assert info.image_size_px == 128


@pytest.mark.usefixtures("small_architectures")
def test_training_checkpoints_and_half_precision_are_read(
    save_weights: Callable[..., Path], tmp_path: Path
) -> None:
    path = save_weights(clip_specs.architecture_config("ViT-B-32"))
    weights = read_weights(path)
    wrapped = tmp_path / "epoch_3.pt"
    halves = {f"module.{name}": tensor.half() for name, tensor in weights.items()}
    torch.save({"epoch": 3, "state_dict": halves, "optimizer": {"step": 1}}, wrapped)
    assert count_numbers(wrapped) == count_numbers(path)
    ours = load_encoder(f"open_clip/ViT-B-32:{wrapped}").state_dict()
    for name, tensor in weights.items():
        torch.testing.assert_close(ours[f"model.{name}"], tensor.half().float(), rtol=0, atol=0)


def test_a_folder_in_open_clip_s_layout_says_all_of_itself(
    save_weights: Callable[..., Path], tmp_path: Path
) -> None:
    config = {**SMALL, "quick_gelu": True}
    path = save_weights(config, "open_clip_model.safetensors")
    pixels = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear", "size": 32}
    layout = {"model_cfg": config, "preprocess_cfg": pixels}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(layout))
    encoder = load_encoder(f"open_clip/local-dir:{tmp_path}")
    assert_runs_with(encoder, path, quick_gelu, gelu)
    assert encoder.info == describe_encoder(f"open_clip/local-dir:{tmp_path}")
    assert encoder.image_transform(Image.new("RGB", (9, 9), "white")).unique().tolist() == [1.0]


class Trap:
    """Running it is what must not happen."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


@pytest.mark.usefixtures("small_architectures")
def test_a_pickle_is_read_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Trap()}, "trap.pt")
    with pytest.raises(EncoderError, match="holds more than tensors"):
        load_encoder("open_clip/ViT-B-32:./trap.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.usefixtures("small_architectures")
def test_damaged_and_foreign_weights_files_are_refused(
    save_weights: Callable[..., Path], tmp_path: Path
) -> None:
    for name in ("w.safetensors", "w.pt"):
        path = save_weights(clip_specs.architecture_config("ViT-B-32"), name)
        path.write_bytes(path.read_bytes()[:5_000])
        with pytest.raises(EncoderError, match=r"cannot be read .* fetch it again"):
            load_encoder(f"open_clip/ViT-B-32:{path}")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(EncoderError, match="holds no named tensors"):
        load_encoder(f"open_clip/ViT-B-32:{tmp_path / 'list.pt'}")


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_torchscript_archive_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "ViT-B-32.pt"))
    with pytest.raises(
        EncoderError, match=r"TorchScript program, which is not run; convert it once: torch\.save"
    ):
        describe_encoder(f"open_clip/ViT-B-32:{tmp_path / 'ViT-B-32.pt'}")


def test_weights_of_another_architecture_are_refused_and_named(
    save_weights: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = {**SMALL, "vision_cfg": {**VISION, "width": 64}}
    for module in (clip_specs, clip_weights):
        monkeypatch.setattr(module, "architecture_config", lambda name: SMALL if name == "ViT-S-32" else wide)
    path = save_weights(SMALL)
    with pytest.raises(EncoderError) as refusal:
        load_encoder(f"open_clip/ViT-M-32:{path}")
    message = str(refusal.value)
    assert "does not fit encoder 'open_clip/ViT-M-32:" in message
    assert "visual.class_embedding is (32,), expected (64,)" in message
    assert message.endswith("they have the shapes of ViT-S-32.")


def test_missing_and_unexpected_tensors_are_listed(save_weights: Callable[..., Path], tmp_path: Path) -> None:
    path = save_weights(SMALL, "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL}))
    weights = read_weights(path)
    weights["visual.proj_renamed"] = weights.pop("visual.proj")
    save_file(weights, path)
    with pytest.raises(
        EncoderError, match=r"1 missing \(visual\.proj\); 1 unexpected \(visual\.proj_renamed\)"
    ):
        load_encoder(f"open_clip/local-dir:{tmp_path}")


def test_position_embeddings_of_another_size_are_not_stretched(
    save_weights: Callable[..., Path], tmp_path: Path
) -> None:
    save_weights(SMALL, "open_clip_model.safetensors")
    larger = {**SMALL, "vision_cfg": {**VISION, "image_size": 64}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": larger}))
    with pytest.raises(EncoderError, match=r"visual\.positional_embedding is \(5, 32\), expected \(17, 32\)"):
        load_encoder(f"open_clip/local-dir:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "answer"),
    [
        ("open_clip/ViT-B-33:openai", r"no architecture 'ViT-B-33'; did you mean .*ViT-B-32"),
        ("open_clip/ViT-B-32:opnai", r"ViT-B-32 has no tag 'opnai'; did you mean openai\?"),
        ("open_clip/ViT-B-32:zzz", r"no tag 'zzz'; for a file type its path"),
        ("open_clip/ViT-B-32", r"names no weights; type open_clip/ViT-B-32:<tag or file>. Tags: openai, "),
        ("open_clip/ViT-B-32-quickgelu:laion2b_s34b_b79k", r"type open_clip/ViT-B-32:laion2b_s34b_b79k"),
        ("open_clip/ViT-B-32:./none.safetensors", r"there is no weights file './none.safetensors'; check"),
        ("open_clip/ViT-B-32:openai@none.pt", r"there is no weights file 'none.pt'"),
        ("open_clip/local-dir:/none", r"'/none' has no open_clip_model.safetensors or open_clip_pytorch_mo"),
        ("open_clip", r"open_clip has no architecture 'open_clip'"),
    ],
)
def test_a_wrong_specification_is_answered_with_what_to_type(spec: str, answer: str) -> None:
    with pytest.raises(EncoderError, match=answer):
        describe_encoder(spec)


def test_a_misspelt_file_is_answered_with_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "vit_b32.safetensors").touch()
    with pytest.raises(EncoderError, match=r"did you mean vit_b32\.safetensors\?"):
        describe_encoder(f"open_clip/ViT-B-32:{tmp_path}/vit_b_32.safetensors")
    (tmp_path / "weights.npz").touch()
    with pytest.raises(EncoderError, match=r"ends in '\.npz'; expected one of \.safetensors"):
        describe_encoder(f"open_clip/ViT-B-32:{tmp_path}/weights.npz")
    with pytest.raises(EncoderError, match=r"is a folder; name the weights file in it"):
        describe_encoder(f"open_clip/ViT-B-32:{tmp_path}")


def test_without_network_one_line_says_which_file_to_bring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "_hub_answers", lambda: False)
    with pytest.raises(EncoderError) as refusal:
        describe_encoder("open_clip/ViT-B-32:openai")
    assert str(refusal.value) == (
        "no network to fetch open_clip_model.safetensors of the hub's repository "
        "timm/vit_base_patch32_clip_224.openai; fetch it on a machine with network, bring it here and type "
        "open_clip/ViT-B-32:openai@<path of the file>."
    )
    with pytest.raises(EncoderError, match=r"type open_clip/local-dir:<folder with open_clip_config\.json"):
        describe_encoder("open_clip/hf-hub:owner/name")


def test_offline_mode_and_a_closed_port_count_as_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert not hub._hub_answers()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert hub._hub_answers()  # the proxy may know the way
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert not hub._hub_answers()


@pytest.mark.usefixtures("small_architectures")
def test_cached_weights_of_a_tag_need_no_network(
    save_weights: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "cache" / "models--timm--vit_base_patch16_clip_224.openai"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    save_weights(clip_specs.architecture_config("ViT-B-16")).rename(snapshot / "open_clip_model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_hub_answers", lambda: False)
    assert describe_encoder("open_clip/ViT-B-16:openai").name == "ViT-B-16-quickgelu-openai"


def test_a_siglip_tokenizer_that_cannot_be_fetched_is_named(
    save_weights: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_hub_answers", lambda: False)
    path = save_weights(SMALL)
    with pytest.raises(EncoderError, match=r"tokenizer\.json of the hub's repository timm/ViT-B-16-SigLIP"):
        describe_encoder(f"open_clip/ViT-B-16-SigLIP:{path}")


def test_describing_imports_neither_open_clip_nor_torchvision(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    program = (
        "import sys\n"
        "from features.encoders.registry import describe_encoder\n"
        f"describe_encoder('open_clip/ViT-B-16:openai@{tmp_path}/w.safetensors')\n"
        "assert not {'open_clip', 'torchvision', 'timm', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
