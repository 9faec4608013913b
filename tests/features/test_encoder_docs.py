"""The docs of the encoders say what the code does."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from features.encoders import registry
from features.encoders.clip_specs import architecture_config, architectures
from features.encoders.presets import presets
from features.encoders.registry import FAMILIES, OF_A_CATALOGUE, Family, describe_encoder, load_encoder
from features.errors import EncoderError

FOLDER = Path(__file__).parents[2] / "docs" / "encoders"
TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_family_in_the_docs_works(monkeypatch: pytest.MonkeyPatch) -> None:
    source = next(
        block for block in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "describe_colours(spec" in block
    )
    module: dict[str, object] = {}
    exec(compile(source, "README.md", "exec"), module)  # noqa: S102 - our own docs
    family = Family("colours", module["describe_colours"], module["load_colours"])
    assert '"colours": Family("colours", describe_colours, load_colours),' in TEXT
    monkeypatch.setitem(registry.FAMILIES, "colours", family)
    encoder = load_encoder("colours")
    assert encoder.info == describe_encoder("colours")
    red_and_blue = np.zeros((40, 60, 3), np.uint8)
    red_and_blue[:20, :, 0], red_and_blue[20:, :, 2] = 255, 255
    vectors = encoder.encode_images(encoder.image_transform(Image.fromarray(red_and_blue))[None])
    assert vectors.shape == (1, 64)
    assert vectors[0, 48] == pytest.approx(0.5)
    assert vectors[0, 3] == pytest.approx(0.5)
    with pytest.raises(EncoderError, match="type colours"):
        describe_encoder("colours:3")


def test_every_family_has_a_page_with_an_example() -> None:
    pages = {path.name for path in FOLDER.glob("*.md")}
    for page in pages:
        assert f"({page})" in TEXT or page == "README.md"
        if page != "README.md":
            assert "tandem extract" in (FOLDER / page).read_text(encoding="utf-8"), page
    for word in (*FAMILIES, *OF_A_CATALOGUE):
        assert word in TEXT, word


def test_presets_name_known_families_and_what_open_clip_says_of_itself() -> None:
    for name, preset in presets().items():
        word = re.split(r"[/:+]", preset.spec)[0]
        assert word in FAMILIES or word in OF_A_CATALOGUE, name
        if word != "open_clip" or "hf-hub" in preset.spec:
            continue
        architecture = preset.spec.removeprefix("open_clip/").partition(":")[0]
        assert architecture in architectures(), name
        config = architecture_config(architecture)
        assert preset.dim == config["embed_dim"], name
        assert preset.image_size_px == config["vision_cfg"]["image_size"], name
        assert preset.context_length == config["text_cfg"].get("context_length", 77), name


def test_a_preset_stands_for_its_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    first = next(iter(presets().values())).model_copy(update={"spec": "random:8+l2=yes"})
    monkeypatch.setattr(registry, "presets", lambda: {"paper/x": first})
    info = describe_encoder("paper/x")
    assert (info.spec, info.name, info.family) == ("paper/x", "random-8-0-l2", "random")
    assert info.preprocessing_sha256 == describe_encoder("random:8+l2=yes").preprocessing_sha256
    pictures = torch.rand(3, 3, 1, 11).mul(255).round()
    assert load_encoder("paper/x").encode_images(pictures).norm(dim=1).tolist() == pytest.approx([1.0] * 3)
    raw = load_encoder("paper/x+l2=no").encode_images(pictures).norm(dim=1)
    assert not torch.allclose(raw, torch.ones(3), atol=0.01)
    with pytest.raises(EncoderError, match=r"'paper/y' is not known; did you mean 'paper/x'\?"):
        describe_encoder("paper/y")
