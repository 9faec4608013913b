"""Where models of transformers come from: folders, the hub's cache, and what is said where they do not."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers

from features.encoders import hub
from features.encoders.base import digest_file
from features.encoders.presets import presets
from features.encoders.registry import describe_encoder, load_encoder
from features.encoders.transformers_dual import DUAL_KINDS
from features.errors import EncoderError
from tests.features import small_transformers as small

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "fedcba9876543210fedcba9876543210fedcba98"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


def keep(folder: Path, cache: Path, commit: str = COMMIT, branch: str = "main") -> Path:
    """Put a model's files where the hub's client keeps them."""
    repository = cache / "models--owner--small"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / branch).write_text(commit)
    snapshot = repository / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    return snapshot


def test_a_cached_repository_needs_no_network(tmp_path: Path, cache: Path) -> None:
    folder = small.clip(tmp_path / "saved")
    snapshot = keep(folder, cache)
    encoder = load_encoder("transformers/owner/small")
    local = describe_encoder(f"transformers/local-dir:{folder}")
    assert encoder.info.name == "owner-small"
    assert encoder.info.weights_sha256 == digest_file(snapshot / "model.safetensors")
    same = ("weights_sha256", "preprocessing_sha256", "dims", "n_parameters", "context_length")
    assert all(getattr(encoder.info, name) == getattr(local, name) for name in same)
    assert encoder.info == describe_encoder("transformers/owner/small")


def test_a_folder_written_by_a_whole_processor_is_the_same(tmp_path: Path) -> None:
    """Since transformers 5 it keeps the image processor's settings inside processor_config.json."""
    folder = small.clip(tmp_path)
    apart = describe_encoder(f"transformers/local-dir:{folder}")
    processor = transformers.CLIPProcessor(
        transformers.CLIPImageProcessorPil.from_pretrained(folder),
        transformers.CLIPTokenizer.from_pretrained(folder),
    )
    (folder / "preprocessor_config.json").unlink()
    processor.save_pretrained(folder)
    assert not (folder / "preprocessor_config.json").exists()
    whole = load_encoder(f"transformers/local-dir:{folder}")
    image = small.pictures()["portrait"]
    theirs = processor(images=image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(whole.image_transform(image), theirs)
    assert whole.info.image_size_px == apart.image_size_px


def test_a_revision_has_its_own_files(tmp_path: Path, cache: Path) -> None:
    keep(small.text(tmp_path / "first", "bert"), cache)
    keep(small.vision(tmp_path / "second", "vit"), cache, OTHER, "pictures")
    assert describe_encoder("transformers/owner/small").modalities == ("text",)
    for revision in ("pictures", OTHER):
        info = describe_encoder(f"transformers/owner/small+revision={revision}")
        assert info.modalities == ("image",)


def test_without_network_the_way_by_hand_is_shown(cache: Path) -> None:
    with pytest.raises(
        EncoderError,
        match=r"no network to fetch config.json .* transformers/local-dir:<folder with all files of",
    ):
        describe_encoder("transformers/facebook/dinov2-base")


def test_a_half_cached_repository_says_what_it_lacks(tmp_path: Path, cache: Path) -> None:
    snapshot = keep(small.clip(tmp_path / "saved"), cache)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match=r"no network to fetch model.safetensors"):
        describe_encoder("transformers/owner/small")
    (snapshot / "tokenizer.json").unlink()
    with pytest.raises(EncoderError, match=r"needs its tokenizer: no network to fetch tokenizer.json"):
        describe_encoder("transformers/owner/small")


def test_a_gated_repository_says_where_consent_is_given(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_: object, **__: object) -> None:
        response = httpx.Response(403, request=httpx.Request("GET", "https://example.org"))
        raise GatedRepoError("403 Client Error. (Request ID: 1)", response=response)

    monkeypatch.setattr(hub, "_hub_answers", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(EncoderError, match=r"owner asks for consent first; .*hf auth login"):
        describe_encoder("transformers/facebook/dinov3-vitb16-pretrain-lvd1689m")


@pytest.mark.parametrize(
    ("names", "answer"),
    [
        (["config.json"], r"has no config.json; expected a folder that `save_pretrained` wrote"),
        (["model.safetensors"], r"has no weights; expected model.safetensors or"),
        (["tokenizer.json"], r"has no tokenizer; expected tokenizer.json or"),
        (["preprocessor_config.json"], r"has no image processor; expected preprocessor_config.json or"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused(names: list[str], answer: str, tmp_path: Path) -> None:
    folder = small.clip(tmp_path)
    for name in names:
        (folder / name).unlink()
    with pytest.raises(EncoderError, match=answer):
        describe_encoder(f"transformers/local-dir:{folder}")


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({"model_type": "dinov22"}, r"knows no model type 'dinov22'; did it mean dinov2"),
        ({"model_type": "zzz"}, r"knows no model type 'zzz'; a newer transformers may know it"),
        (
            {"model_type": "nomic", "auto_map": {"AutoModel": "code.Model"}},
            r"'nomic' is code in its repository, and code of others is never run",
        ),
        ({"model_type": None}, r"states no model_type; it is no configuration of transformers"),
        ({"model_type": "llava"}, r"read image and text in a way that is not supported; dual encoders: clip"),
        ({"model_type": "whisper"}, r"read audio"),
        ({"hidden_size": "wide"}, r"transformers cannot read"),
    ],
)
def test_a_model_that_is_not_known_is_refused(change: dict[str, Any], answer: str, tmp_path: Path) -> None:
    folder = small.text(tmp_path, "bert")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(EncoderError, match=answer):
        describe_encoder(f"transformers/local-dir:{folder}")


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    transformers.T5Config().save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="is an encoder with a decoder, which gives no vector"):
        describe_encoder(f"transformers/local-dir:{tmp_path}")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = small.text(tmp_path, "bert")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:100])
    with pytest.raises(EncoderError, match="damaged, cut short"):
        load_encoder(f"transformers/local-dir:{folder}")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(EncoderError, match="lists no parts of the weights"):
        describe_encoder(f"transformers/local-dir:{folder}")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(EncoderError, match="no tokenizer can be made of"):
        describe_encoder(f"transformers/local-dir:{folder}")
    (folder / "config.json").write_text("{")
    with pytest.raises(EncoderError, match="is no JSON"):
        describe_encoder(f"transformers/local-dir:{folder}")


class Dangerous:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must not run",))


def test_a_pickle_is_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = small.text(tmp_path, "bert")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1), "more": Dangerous()}, folder / "pytorch_model.bin")
    with pytest.raises(EncoderError, match=r"holds more\s+than tensors"):
        load_encoder(f"transformers/local-dir:{folder}")
    assert "this must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("spec", ["transformers/", "transformers/a/b/c", "transformers/x:y"])
def test_a_specification_without_a_model_is_answered(spec: str) -> None:
    with pytest.raises(EncoderError, match=r"names no model; expected transformers/<owner>/<name>"):
        describe_encoder(spec)


def test_settings_of_the_tokenizer_and_the_processor_change_the_digest(tmp_path: Path) -> None:
    folder = small.clip(tmp_path)
    spec = f"transformers/local-dir:{folder}"
    digests = [describe_encoder(spec).preprocessing_sha256]
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": [0.1, 0.2, 0.3]}))
    digests.append(describe_encoder(spec).preprocessing_sha256)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    digests.append(describe_encoder(spec).preprocessing_sha256)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "transformers_version": "4.0", "_name_or_path": "elsewhere"}))
    assert describe_encoder(spec).preprocessing_sha256 == digests[-1]
    path.write_text(
        json.dumps({**config, "vision_config": {**config["vision_config"], "layer_norm_eps": 0.1}})
    )
    digests.append(describe_encoder(spec).preprocessing_sha256)
    assert len(set(digests)) == 4


@pytest.mark.parametrize(
    ("preset", "kind", "config", "context_length"),
    [
        ("siglip2", "siglip", "SiglipConfig", 64),
        ("align", "align", "AlignConfig", 64),
        ("altclip", "altclip", "AltCLIPConfig", 77),
        ("chinese-clip", "chinese_clip", "ChineseCLIPConfig", 52),
    ],
)
def test_presets_of_dual_encoders_state_what_the_library_s_base_models_have(
    preset: str, kind: str, config: str, context_length: int
) -> None:
    """The library's default settings are those of the base models that the presets name."""
    stated, base = presets()[preset], getattr(transformers, config)()
    dims = DUAL_KINDS[kind].dims(base)
    assert dims == {"image": stated.dim, "text": stated.dim}
    assert stated.modalities == ("image", "text")
    assert stated.context_length == context_length
    assert context_length == (DUAL_KINDS[kind].context_length or base.text_config.max_position_embeddings)
    if not DUAL_KINDS[kind].any_size:
        assert stated.image_size_px == base.vision_config.image_size


def test_presets_of_single_encoders_state_what_the_library_s_base_models_have() -> None:
    bert, dino = presets()["bert"], presets()["dinov2"]
    assert bert.dim == transformers.BertConfig().hidden_size
    assert bert.context_length == transformers.BertConfig().max_position_embeddings
    assert dino.dim == transformers.Dinov2Config().hidden_size
    assert dino.image_size_px == transformers.Dinov2Config().image_size
