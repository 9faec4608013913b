"""Side networks: what they compute, how they start, what they leave alone, and how they are saved."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from features.encoders.base import Encoder, digest_file
from features.encoders.registry import describe_encoder, load_encoder
from features.encoders.saved import ENCODER_FILE, copy_saved, read_saved, save_encoder
from features.encoders.side import SideEncoder
from features.errors import EncoderError
from features.tuning.modes import TuningConfig, prepare_tuning
from features.tuning.side import SideConfig, SideTower, states_read
from features.tuning.side_mode import SideTuned, prepare_side
from features.tuning.towers import tower_of, towers_of
from tests.features import small_clip
from tests.features.small_clip import small_encoder
from tests.features.small_encoder import SmallEncoder
from tests.features.test_tuning_towers import ENCODERS, inputs_of, vectors_of

CONFIG = SideConfig(adapter_width=4, every_nth=1)
NAMES = [
    *("clip", "clip-resnet", "clip-siglip", "tiny-l2", "vlmo-vl", "hf-siglip", "dinov2-mean", "timm-map"),
    *("bert", "sentence-dense"),
]


def moved(tuned: SideTuned, seed: int = 0) -> SideTuned:
    """Some weights beside zero for all that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in tuned.trainable.values():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return tuned


def vectors(encoder: Encoder) -> dict[str, Tensor]:
    with torch.no_grad():
        modalities = [each for each in encoder.info.modalities if each != "fused"]
        return {each: vectors_of(encoder, each, inputs_of(encoder, each)) for each in modalities}


def plain_side(side: SideTower, states: list[Tensor], vector: Tensor) -> Tensor:
    """The side network of one item, as its docstring has it, in loops."""
    weights = {name: value.detach().double() for name, value in side.state_dict().items()}
    mapped = []
    for number, state in enumerate(states):
        s = state.double()
        if side.config.normalize_states:
            s = (s - s.mean()) / (s.var(correction=0) + 1e-5).sqrt()
        matrix = weights.get(f"maps.{number}.weight")
        mapped.append(s if matrix is None else matrix @ s)
    h = mapped[0]
    for number, state in enumerate(mapped[1:]):
        mu = 1 / (1 + torch.exp(-weights["gates"][number]))
        x = mu * state + (1 - mu) * h
        name = f"adapters.{number}"
        inside = weights[f"{name}.down.weight"] @ x + weights[f"{name}.down.bias"]
        inside = inside * 0.5 * (1 + torch.erf(inside / 2**0.5))
        h = x + weights[f"{name}.up.weight"] @ inside + weights[f"{name}.up.bias"]
    moved: Tensor = vector.double() + weights["output.weight"] @ h + weights["output.bias"]
    return moved


@pytest.mark.parametrize("normalize_states", [True, False])
def test_the_side_network_is_the_one_of_the_docstring(normalize_states: bool) -> None:
    config = CONFIG.model_copy(update={"normalize_states": normalize_states})
    encoder = small_encoder(small_clip.SMALL | {"vision_cfg": small_clip.VISION | {"layers": 3}})
    tuned = moved(prepare_side(encoder, config))
    side = tuned.encoder.side("image")
    assert side is not None
    pixels = inputs_of(encoder, "image")
    with torch.no_grad():
        states, frozen = tower_of(encoder, "image").pooled_states(pixels), encoder.encode_images(pixels)
        found = tuned.encoder.encode_images(pixels)
    assert len(states) == 4
    for row in range(len(pixels)):
        expected = plain_side(side, [state[row] for state in states], frozen[row])
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-4, atol=1e-5)


def test_states_of_other_widths_are_mapped_and_others_refused() -> None:
    torch.manual_seed(0)
    side = SideTower((3, 5), 2, SideConfig(adapter_width=4, normalize_states=False))
    torch.nn.init.ones_(side.output.weight)
    states, vector = [torch.randn(1, 3), torch.randn(1, 5)], torch.randn(1, 2)
    expected = plain_side(side, [state[0] for state in states], vector[0])
    torch.testing.assert_close(side(states, vector)[0].double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"widths \(5, 3\); expected \(3, 5\)"):
        side(states[::-1], vector)


def test_every_nth_state_is_counted_from_the_last() -> None:
    assert states_read(12, 2) == (0, 2, 4, 6, 8, 10, 12)
    assert states_read(5, 2) == (0, 1, 3, 5)
    assert states_read(2, 9) == (0, 2)
    assert states_read(3, 1) == (0, 1, 2, 3)


@pytest.mark.parametrize("name", NAMES)
def test_training_starts_at_the_frozen_vectors_and_leaves_them(name: str, tmp_path: Path) -> None:
    encoder = ENCODERS[name](tmp_path)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    expected = vectors(encoder)
    stream = torch.get_rng_state()
    tuned = prepare_side(encoder, CONFIG, seed=1)
    assert torch.equal(torch.get_rng_state(), stream)
    found = vectors(tuned.encoder)
    assert found.keys() == expected.keys()
    for modality in towers_of(encoder):
        side = tuned.encoder.side(modality)
        assert side is not None
        with torch.no_grad():
            states, frozen = tuned.encoder.frozen(modality, inputs_of(encoder, modality))
            assert torch.equal(side(states, frozen), frozen)
        torch.testing.assert_close(found[modality], expected[modality], rtol=1e-6, atol=1e-6)
    tuned.train()
    assert tuned.encoder.sides.training
    assert not any(module.training for module in encoder.modules())
    optimizer = torch.optim.SGD(list(tuned.trainable.values()), lr=0.1)
    for _ in range(2):  # the first update moves the output, the second all that lies before it
        optimizer.zero_grad()
        total = torch.zeros(())
        for modality in towers_of(encoder):
            rows = vectors_of(tuned.encoder, modality, inputs_of(encoder, modality))
            total = total + (rows * torch.linspace(-1, 1, rows.shape[1])).sum()
        total.backward()  # type: ignore[no-untyped-call]  # torch's own signature lacks types
        optimizer.step()
    assert all(value.grad is not None and value.grad.any() for value in tuned.trainable.values())
    tuned.finish()
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert all(not torch.equal(rows, expected[each]) for each, rows in vectors(tuned.encoder).items())
    assert all(parameter.grad is None for parameter in tuned.encoder.parameters())


def test_info_digests_and_the_seed() -> None:
    inner = load_encoder("tiny")
    one, same, other = (prepare_side(load_encoder("tiny"), CONFIG, seed=seed) for seed in (1, 1, 2))
    assert one.encoder.info == same.encoder.info
    assert one.encoder.info.weights_sha256 != other.encoder.info.weights_sha256 != inner.info.weights_sha256
    dropped = prepare_side(load_encoder("tiny"), CONFIG.model_copy(update={"dropout": 0.5}), seed=1)
    assert dropped.encoder.info.preprocessing_sha256 != one.encoder.info.preprocessing_sha256
    assert one.encoder.info.name == "tiny-side"
    n_trained = sum(value.numel() for value in one.trainable.values())
    assert one.encoder.info.n_parameters == inner.info.n_parameters + n_trained
    before = one.encoder.info
    moved(one).finish()
    assert one.encoder.info.weights_sha256 != before.weights_sha256


def test_fused_vectors_are_left_out_and_one_tower_can_be_alone(tmp_path: Path) -> None:
    vlmo = ENCODERS["vlmo-vl"](tmp_path)
    assert "fused" in vlmo.info.modalities
    tuned = moved(prepare_side(vlmo, CONFIG.model_copy(update={"towers": ("text",)})))
    encoder = tuned.encoder
    assert encoder.info.modalities == ("image", "text")
    assert set(encoder.info.dims) == {"image", "text"}
    expected, found = vectors(vlmo), vectors(encoder)
    assert torch.equal(found["image"], expected["image"])
    assert not torch.equal(found["text"], expected["text"])
    with pytest.raises(EncoderError, match="has no modality 'fused'"):
        encoder.encode_pairs(inputs_of(vlmo, "image"), inputs_of(vlmo, "text"))


def test_dropout_is_on_in_training_only() -> None:
    tuned = moved(prepare_side(load_encoder("tiny"), SideConfig(dropout=0.5)))
    pixels = inputs_of(tuned.encoder, "image")
    tuned.train()
    assert not torch.equal(tuned.encoder.encode_images(pixels), tuned.encoder.encode_images(pixels))
    tuned.eval()
    assert torch.equal(tuned.encoder.encode_images(pixels), tuned.encoder.encode_images(pixels))


def test_a_state_is_put_back_and_only_where_it_fits() -> None:
    tuned = moved(prepare_side(load_encoder("tiny"), CONFIG))
    kept, expected = tuned.state(), vectors(tuned.encoder)
    assert set(kept) == set(tuned.trainable)
    moved(tuned, seed=1)
    assert not torch.equal(vectors(tuned.encoder)["text"], expected["text"])
    tuned.load_state(kept)
    assert all(torch.equal(rows, expected[each]) for each, rows in vectors(tuned.encoder).items())
    wider = prepare_side(load_encoder("tiny"), SideConfig(adapter_width=5, every_nth=1))
    with pytest.raises(EncoderError, match="does not fit the side networks of encoder 'tiny'"):
        wider.load_state(kept)


def test_what_has_no_towers_or_sides_already_is_refused() -> None:
    with pytest.raises(EncoderError, match="shows no image tower of blocks"):
        prepare_side(SmallEncoder(), CONFIG)
    tuned = prepare_side(load_encoder("tiny"), CONFIG)
    with pytest.raises(EncoderError, match="has side networks already"):
        prepare_side(tuned.encoder, CONFIG)
    with pytest.raises(EncoderError, match="was given no side network"):
        SideEncoder(load_encoder("tiny"), {}, CONFIG)
    text = tuned.encoder.side("text")
    assert text is not None
    with pytest.raises(EncoderError, match="It is another encoder's"):
        SideEncoder(small_encoder(small_clip.SMALL), {"text": text}, CONFIG)


@pytest.mark.parametrize("name", ["tiny", "tiny-l2", "vlmo-vl", "hf-clip", "sentence-dense", "timm"])
def test_a_saved_one_gives_the_same_vectors_with_the_original_gone(name: str, tmp_path: Path) -> None:
    original = tmp_path / "original"
    original.mkdir()
    tuned = moved(prepare_side(ENCODERS[name](original), CONFIG))
    tuned.finish()
    expected = vectors(tuned.encoder)
    for folder in ("first", "second"):
        save_encoder(tuned.encoder, tmp_path / folder, name="mine", provenance={"run": "abc"})
    shutil.rmtree(original)
    first, second = (describe_encoder(f"saved:{tmp_path / each}") for each in ("first", "second"))
    assert second.model_copy(update={"spec": first.spec}) == first
    copy_saved(tmp_path / "first", tmp_path / "copy")
    shutil.rmtree(tmp_path / "first")
    loaded = load_encoder(f"saved:{tmp_path / 'copy'}")
    assert isinstance(loaded, SideEncoder)
    assert loaded.info == first.model_copy(update={"spec": loaded.info.spec})
    assert (loaded.info.name, loaded.info.family) == ("mine", "saved")
    same = ("modalities", "dims", "image_size_px", "context_length")
    assert all(getattr(loaded.info, each) == getattr(tuned.encoder.info, each) for each in same)
    assert not any(module.training for module in loaded.modules())
    assert all(torch.equal(rows, expected[each]) for each, rows in vectors(loaded).items())
    save_encoder(loaded, tmp_path / "again", name="mine")
    again = describe_encoder(f"saved:{tmp_path / 'again'}")
    assert (again.weights_sha256, again.preprocessing_sha256) == (
        first.weights_sha256,
        first.preprocessing_sha256,
    )


def test_digests_of_a_saved_one_follow_weights_settings_and_the_inner_encoder(tmp_path: Path) -> None:
    tuned = prepare_side(load_encoder("tiny"), CONFIG, seed=1)
    save_encoder(tuned.encoder, tmp_path / "before")
    moved(tuned).finish()
    save_encoder(tuned.encoder, tmp_path / "after")
    dropped = moved(prepare_side(load_encoder("tiny"), CONFIG.model_copy(update={"dropout": 0.5})))
    save_encoder(dropped.encoder, tmp_path / "dropped")
    unit = moved(prepare_side(load_encoder("tiny+l2=yes"), CONFIG))
    save_encoder(unit.encoder, tmp_path / "unit")
    before, after, other, inner = (
        describe_encoder(f"saved:{tmp_path / each}") for each in ("before", "after", "dropped", "unit")
    )
    assert before.preprocessing_sha256 == after.preprocessing_sha256
    assert before.weights_sha256 != after.weights_sha256
    assert other.weights_sha256 == after.weights_sha256
    assert len({info.preprocessing_sha256 for info in (after, other, inner)}) == 3
    n_trained = sum(value.numel() for value in dropped.trainable.values())
    assert after.n_parameters == describe_encoder("tiny").n_parameters + n_trained
    assert after.name == "tiny-side-saved"


def test_unit_length_around_a_saved_one(tmp_path: Path) -> None:
    save_encoder(moved(prepare_side(load_encoder("tiny"), CONFIG)).encoder, tmp_path / "side")
    unit = load_encoder(f"saved:{tmp_path / 'side'}+l2=yes")
    pixels = inputs_of(unit, "image")
    torch.testing.assert_close(unit.encode_images(pixels).norm(dim=1), torch.ones(3))
    save_encoder(unit, tmp_path / "unit")
    assert torch.equal(
        load_encoder(f"saved:{tmp_path / 'unit'}").encode_images(pixels), unit.encode_images(pixels)
    )


def test_a_saved_one_can_be_trained_whole(tmp_path: Path) -> None:
    save_encoder(moved(prepare_side(load_encoder("tiny"), CONFIG)).encoder, tmp_path / "side")
    tuned = prepare_tuning(load_encoder(f"saved:{tmp_path / 'side'}"), TuningConfig())
    tuned.encoder.encode_images(inputs_of(tuned.encoder, "image")).sum().backward()  # type: ignore[no-untyped-call]
    got = {name for name, value in tuned.trainable.items() if value.grad is not None}
    assert any(name.startswith("inner.") for name in got)
    assert any(name.startswith("sides.image.") for name in got)


def _rewritten(folder: Path, name: str, change: Callable[[Path], object]) -> None:
    """Change a file and its digest in encoder.json, as one who writes such folders by hand would."""
    change(folder / name)
    described = json.loads((folder / ENCODER_FILE).read_text())
    described["files"][name] = digest_file(folder / name)
    (folder / ENCODER_FILE).write_text(json.dumps(described))


def test_damage_is_told(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "damaged"
    save_encoder(moved(prepare_side(load_encoder("tiny"), CONFIG)).encoder, whole)
    names = set(read_saved(f"saved:{whole}")[1].files)
    assert {"side.json", "side.safetensors", "inner/encoder.json", "inner/model.safetensors"} <= names
    spec = f"saved:{folder}"
    for name in sorted(names):
        for content, match in ((b"{}", f"{name}' is not as it was written"), (None, f"'{name}' is not in")):
            copy_saved(whole, folder)
            (folder / name).unlink()
            if content is not None:
                (folder / name).write_bytes(content)
            for use in (describe_encoder, load_encoder):
                with pytest.raises(EncoderError, match=match):
                    use(spec)

    def refused(name: str, change: Callable[[Path], object], match: str) -> None:
        copy_saved(whole, folder)
        _rewritten(folder, name, change)
        with pytest.raises(EncoderError, match=match):
            load_encoder(spec)

    def other_settings(**changes: object) -> Callable[[Path], object]:
        return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    refused("side.json", lambda path: path.write_text("{"), "describes no side networks of format 1")
    refused("side.json", other_settings(format=2), "describes no side networks of format 1")
    refused("side.json", other_settings(extra=2), "describes no side networks of format 1")
    wrong = {"image": {"widths": [3, 3, 3], "dim": 96}}
    refused("side.json", other_settings(towers=wrong), "It is another encoder's")
    refused("side.safetensors", lambda path: path.write_bytes(b"x"), "side.safetensors' cannot be read")

    def without_one(path: Path) -> None:
        tensors = load_file(path)
        tensors.pop("text.gates")
        save_file(tensors, path)

    refused("side.safetensors", without_one, r"Missing key.*text\.gates")
    copy_saved(whole, folder)
    load_encoder(spec)
