"""What a person types after `open_clip/`: looked up without building anything, answered if it is wrong."""

import fnmatch
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest

from features.encoders import clip_specs, hub
from features.encoders.clip import build_clip
from features.encoders.registry import describe_encoder, load_encoder
from features.errors import EncoderError
from tests.features.small_clip import SIGLIP, SMALL, hf_tokenizer


def test_every_tag_s_activation_is_its_own_or_its_architecture_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_specs, "_tokenizer_folder", lambda *_: None)
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
    monkeypatch.setattr(clip_specs, "_tokenizer_folder", lambda *_: None)
    source = clip_specs._with_file("spec", "ViT-B-16-SigLIP", clip_specs._tags("ViT-B-16-SigLIP"), Path("x"))
    assert source.pixels.mean == (0.5, 0.5, 0.5)
    assert source.pixels.resize_mode == "squash"


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


def test_a_text_model_whose_settings_cannot_be_fetched_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "_hub_answers", lambda: False)
    config = {**SMALL, "text_cfg": {"hf_model_name": "owner/text-model"}}
    with pytest.raises(
        EncoderError, match=r"no network to fetch config\.json of the hub's repository owner/text"
    ):
        build_clip(config)


def fake_hub(monkeypatch: pytest.MonkeyPatch, folder: Path, files: dict[str, bytes]) -> None:
    """A hub that answers, nothing of it cached, with one repository of some files."""
    from huggingface_hub.errors import EntryNotFoundError

    def download(repository: str, filename: str, revision: str | None = None) -> str:
        if repository != "owner/name":
            raise OSError("404 Client Error\nmore")
        if filename not in files:
            raise EntryNotFoundError(filename)
        (folder / filename).write_bytes(files[filename])
        return str(folder / filename)

    def snapshot(repository: str, allow_patterns: list[str], revision: str | None = None) -> str:
        for name in files:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                download(repository, name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "none"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(hub, "_hub_answers", lambda: True)


def test_a_hub_repository_is_fetched_file_by_file(
    save_weights: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_tokenizer(tmp_path)
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    config = {**SIGLIP, "text_cfg": {**SIGLIP["text_cfg"], "hf_tokenizer_name": "owner/name"}}  # type: ignore[dict-item]
    files = {
        "open_clip_config.json": json.dumps({"model_cfg": config}).encode(),
        "open_clip_pytorch_model.bin": save_weights(config, "w.bin").read_bytes(),
        "tokenizer.json": (tmp_path / "tokenizer.json").read_bytes(),
        "tokenizer_config.json": (tmp_path / "tokenizer_config.json").read_bytes(),
        "README.md": b"not wanted",
    }
    fake_hub(monkeypatch, fetched, files)
    encoder = load_encoder("open_clip/hf-hub:owner/name")
    assert encoder.info.name == "owner-name"
    assert encoder.tokenize(["a red bag"]).tolist() == [[2, 3, 4, 0, 0, 0, 0, 0, 0]]
    assert not (fetched / "README.md").exists()


def test_a_repository_that_is_not_there_or_lacks_the_files_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub(monkeypatch, tmp_path, {"README.md": b""})
    with pytest.raises(
        EncoderError, match=r"repository owner/name has none of open_clip_config\.json; check"
    ):
        describe_encoder("open_clip/hf-hub:owner/name")
    with pytest.raises(
        EncoderError, match=r"could not fetch .* of the hub's repository owner/nme \(404 Client Err"
    ):
        describe_encoder("open_clip/hf-hub:owner/nme")
    with pytest.raises(EncoderError, match=r"repository owner/name has none of tokenizer\.json"):
        hub.fetch_folder_from_hub("owner/name", ["tokenizer*"], needed=["tokenizer.json"], instead="x")


def test_describing_imports_neither_open_clip_nor_torchvision(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    program = (
        "import sys\n"
        "from features.encoders.registry import describe_encoder\n"
        f"describe_encoder('open_clip/ViT-B-16:openai@{tmp_path}/w.safetensors')\n"
        "assert not {'open_clip', 'torchvision', 'timm', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
