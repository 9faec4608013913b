from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from features.catalogue import Catalogue, TextConfig
from features.encoders.base import Encoder
from features.encoders.registry import load_encoder
from features.errors import FeatureError, FeatureFileError
from features.gradient_cache import chunked_forward
from features.images import ImageLimits
from features.live.building import LiveConfig, live_encoder
from features.live.encoder import CatalogueEncoder
from features.live.inputs import RowInputs
from features.live.states import StateFile
from features.tuning.modes import TuningConfig, prepare_tuning
from tests.features.small_catalogue import picture_catalogue
from tests.features.small_clip import SIGLIP, SMALL, small_encoder
from tests.features.small_encoder import SmallEncoder
from tests.features.test_tuning_towers import ENCODERS

CPU = torch.device("cpu")
N_ITEMS = 9
SEES_PADDING = SIGLIP | {"text_cfg": SIGLIP["text_cfg"] | {"vocab_size": 49408}}
ROWS = torch.tensor([7, 0, 3, 4, 8])
MODES = {
    "full": TuningConfig(mode="full"),
    "last-n": TuningConfig(mode="last-n", last_n=1),
    "lora": TuningConfig(mode="lora", lora_rank=2),
    "locked image": TuningConfig(mode="full", frozen_towers=("image",)),
}


@pytest.fixture(name="catalogue", scope="module")
def _catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return picture_catalogue(tmp_path_factory.mktemp("pictures"), N_ITEMS)


def row_inputs(
    catalogue: Catalogue, encoder: Encoder, modality: str, folder: Path, cache_mb: int
) -> RowInputs:
    file = folder / f"{modality}.f16"
    limits = ImageLimits()
    return RowInputs(
        catalogue, encoder, modality, TextConfig(), cache_file=file, cache_mb=cache_mb, limits=limits
    )


def everything() -> dict[str, torch.Tensor]:
    return {name: torch.ones(N_ITEMS, dtype=torch.bool) for name in ("image", "text")}


@pytest.mark.parametrize("config", [SMALL, SEES_PADDING], ids=["clip", "siglip"])
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize(("chunk", "activations_mb"), [(2, 0), (2, 64), (64, 0)])
def test_vectors_and_gradients_are_those_of_the_encoder_itself(
    config: dict[str, object],
    mode: str,
    chunk: int,
    activations_mb: int,
    catalogue: Catalogue,
    tmp_path: Path,
) -> None:
    encoder = small_encoder(config)
    tuned = prepare_tuning(encoder, MODES[mode])
    weights = torch.randn(len(ROWS), 12, generator=torch.Generator().manual_seed(0))
    expected: dict[str, torch.Tensor] = {}
    vectors: dict[str, torch.Tensor] = {}
    for modality in ("image", "text"):
        inputs = row_inputs(catalogue, encoder, modality, tmp_path, cache_mb=1)
        encode = encoder.encode_images if modality == "image" else encoder.encode_texts
        vectors[modality] = encode(inputs(ROWS, torch.device("cpu")))
        inputs.close()
    sum((vectors[name] * weights).sum() for name in vectors).backward()
    for name, parameter in tuned.trainable.items():
        if parameter.grad is not None:
            expected[name] = parameter.grad.clone()
            parameter.grad = None
    assert expected

    settings = LiveConfig(chunk=chunk, activations_mb=activations_mb)
    with live_encoder(
        tuned, catalogue, ("image", "text"), everything(), settings, folder=tmp_path / "live"
    ) as live:
        for modality in ("image", "text"):
            # Kept states are float16.
            torch.testing.assert_close(
                live.encode(modality, ROWS), vectors[modality].detach(), rtol=1e-3, atol=1e-3
            )
            torch.testing.assert_close(
                live.encode_all(modality, ROWS), vectors[modality].detach(), rtol=1e-3, atol=1e-3
            )
            live.encode(modality, ROWS)
            live.backward(modality, weights)
    tolerance = 3e-3 if mode in {"last-n", "locked image"} else 1e-5
    for name, parameter in tuned.trainable.items():
        if name not in expected:
            assert parameter.grad is None, name
            continue
        error = (parameter.grad - expected[name]).norm() / expected[name].norm().clamp_min(1e-3)
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("chunks_that_fit", [0, 2, 3, 100])
def test_towers_share_the_room_for_activations(
    chunks_that_fit: int, catalogue: Catalogue, tmp_path: Path
) -> None:
    encoder = small_encoder(SMALL)
    tuned = prepare_tuning(encoder, MODES["full"])
    ran = {"image": 0, "text": 0}
    for name, tower in (("image", encoder.model.visual.transformer), ("text", encoder.model.transformer)):
        tower.resblocks[0].mlp.register_forward_hook(lambda *_, name=name: ran.update({name: ran[name] + 1}))
    with live_encoder(
        tuned, catalogue, ("image", "text"), everything(), LiveConfig(), folder=tmp_path
    ) as rows:
        sources = rows.sources
        two = [lambda: sources["image"].vectors(ROWS[:2])] * 2
        held = chunked_forward(two, CPU, room=10**9, weights=encoder.parameters()).kept_bytes
        room = chunks_that_fit * held // 2
        live = CatalogueEncoder(tuned, sources, chunk=2, room=room, device=CPU, autocast=None)
        for _ in range(2):  # in the second step there is as much room again
            ran.update(image=0, text=0)
            for modality in ("image", "text"):
                live.encode(modality, ROWS)
            assert ran == {"image": 3, "text": 3}
            for modality in ("image", "text"):
                live.backward(modality, torch.ones(len(ROWS), 12))
            run_twice = {"image": max(0, 3 - chunks_that_fit), "text": 0 if chunks_that_fit == 100 else 3}
            assert ran == {name: 3 + more for name, more in run_twice.items()}


def test_blocks_that_are_computed_again_are_not_kept_as_well(catalogue: Catalogue, tmp_path: Path) -> None:
    encoder = small_encoder(SMALL)
    tuned = prepare_tuning(encoder, TuningConfig(mode="full", gradient_checkpointing=True))
    ran: list[int] = []
    encoder.model.visual.ln_pre.register_forward_hook(lambda *_: ran.append(1))  # no part of a block
    with live_encoder(
        tuned, catalogue, ("image",), everything(), LiveConfig(chunk=2), folder=tmp_path
    ) as live:
        vectors = live.encode("image", ROWS)
        live.backward("image", torch.ones_like(vectors))
    assert len(ran) == 6


def test_what_is_kept_changes_nothing_of_an_encoder_with_batch_normalisation(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    found = []
    for at, room in enumerate((0, 10**9)):
        encoder = load_encoder("tiny")
        tuned = prepare_tuning(encoder, MODES["full"])
        with live_encoder(
            tuned, catalogue, ("image",), everything(), LiveConfig(), folder=tmp_path / str(at)
        ) as rows:
            live = CatalogueEncoder(tuned, rows.sources, chunk=2, room=room, device=CPU, autocast=None)
            vectors = live.encode("image", ROWS)
            live.backward("image", torch.ones_like(vectors))
        gradients = {name: value.grad for name, value in tuned.trainable.items() if value.grad is not None}
        found.append(({"vectors": vectors} | gradients, encoder.state_dict()))
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_only_blocks_above_the_kept_states_run_in_an_epoch(catalogue: Catalogue, tmp_path: Path) -> None:
    encoder = small_encoder(SMALL)
    tuned = prepare_tuning(encoder, MODES["last-n"])
    calls = {"first": 0, "last": 0}
    blocks = encoder.model.visual.transformer.resblocks
    blocks[0].mlp.register_forward_hook(lambda *_: calls.update(first=calls["first"] + 1))
    blocks[1].mlp.register_forward_hook(lambda *_: calls.update(last=calls["last"] + 1))
    seen: list[tuple[int, int]] = []
    with live_encoder(
        tuned,
        catalogue,
        ("image",),
        everything(),
        LiveConfig(chunk=4),
        folder=tmp_path,
        progress=lambda done, of: seen.append((done, of)),
    ) as live:
        assert calls == {"first": 3, "last": 0}
        assert seen == [(4, 9), (8, 9), (9, 9)]
        for _ in range(5):
            live.encode("image", ROWS[:4])
            live.backward("image", torch.ones(4, 12))
        assert calls == {"first": 3, "last": 5}


def test_no_row_at_all_gives_no_vectors_and_no_gradient(catalogue: Catalogue, tmp_path: Path) -> None:
    tuned = prepare_tuning(small_encoder(SMALL), MODES["full"])
    with live_encoder(tuned, catalogue, ("text",), everything(), LiveConfig(), folder=tmp_path) as live:
        assert live.encode("text", ROWS[:0]).shape == (0, 12)
        live.backward("text", torch.zeros(0, 12))
        assert live.encode_all("text", ROWS[:0]).shape == (0, 12)
        assert all(parameter.grad is None for parameter in live.parameters())
        with pytest.raises(RuntimeError, match="no text rows were encoded"):
            live.backward("text", torch.zeros(0, 12))


@pytest.mark.parametrize("cache_mb", [0, 1])
def test_pictures_are_decoded_once_where_they_may_be_kept(
    cache_mb: int, catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = small_encoder(SMALL)
    decoded: list[int] = []
    transform = encoder.image_transform
    monkeypatch.setattr(encoder, "image_transform", lambda image: decoded.append(1) or transform(image))
    inputs = row_inputs(catalogue, encoder, "image", tmp_path, cache_mb)
    first = inputs(ROWS, torch.device("cpu"))
    again = inputs(ROWS.flip(0), torch.device("cpu"))
    assert len(decoded) == (5 if cache_mb else 10)
    torch.testing.assert_close(first.flip(0), again, rtol=0, atol=2e-3)
    assert (tmp_path / "image.f16").exists() == bool(cache_mb)
    inputs.close()
    assert not (tmp_path / "image.f16").exists()


def test_a_picture_that_is_gone_is_named(tmp_path: Path) -> None:
    catalogue = picture_catalogue(tmp_path / "pictures", 3)
    (tmp_path / "pictures" / "1.png").unlink()
    inputs = row_inputs(catalogue, small_encoder(SMALL), "image", tmp_path, 1)
    with pytest.raises(FeatureError, match="picture of item 'i1' cannot be read any more"):
        inputs(torch.arange(3), torch.device("cpu"))


def test_fused_vectors_cannot_be_live(catalogue: Catalogue, tmp_path: Path) -> None:
    tuned = prepare_tuning(small_encoder(SMALL), MODES["full"])
    with (
        pytest.raises(FeatureError, match="fused vectors cannot be live"),
        live_encoder(tuned, catalogue, ("fused",), everything(), LiveConfig(), folder=tmp_path),
    ):
        pass


def test_half_written_states_are_refused(catalogue: Catalogue, tmp_path: Path) -> None:
    tuned = prepare_tuning(small_encoder(SMALL), MODES["last-n"])
    with live_encoder(tuned, catalogue, ("text",), everything(), LiveConfig(), folder=tmp_path):
        (tmp_path / "states-text" / "states.json").unlink()
        with pytest.raises(FeatureFileError, match="states-text holds no whole states"):
            StateFile(tmp_path / "states-text")


def test_items_without_a_text_are_never_asked_for(tmp_path: Path) -> None:
    items = pl.DataFrame({"item_id": ["a", "b"], "title": ["red bag", None], "description": [None, None]})
    catalogue = Catalogue(items.cast({"description": pl.String}))
    tuned = prepare_tuning(small_encoder(SMALL), MODES["last-n"])
    present = {"text": torch.tensor([True, False])}
    with live_encoder(tuned, catalogue, ("text",), present, LiveConfig(), folder=tmp_path) as live:
        assert live.encode("text", torch.tensor([0])).shape == (1, 12)


def catalogue_encoder(encoder: Encoder, mode: str = "full") -> CatalogueEncoder:
    tuned = prepare_tuning(encoder, MODES[mode])
    return CatalogueEncoder(tuned, {}, chunk=2, device=torch.device("cpu"), autocast=None)


def test_parts_tell_towers_apart_and_leave_nothing_out() -> None:
    encoder = small_encoder(SMALL)
    live = catalogue_encoder(encoder)
    model: Any = encoder.model
    parts = live.parts()
    assert set(parts) == {"image", "text", "shared"}
    assert {id(value) for value in parts["image"]} == set(map(id, model.visual.parameters()))
    assert [id(value) for value in parts["shared"]] == [id(model.logit_scale)]
    assert any(value is model.token_embedding.weight for value in parts["text"])
    everyone = [id(value) for part in parts.values() for value in part]
    assert sorted(everyone) == sorted(map(id, live.parameters()))
    assert len(everyone) == len(list(encoder.parameters()))


def test_parts_of_a_frozen_tower_and_of_shared_attention(tmp_path: Path) -> None:
    assert set(catalogue_encoder(small_encoder(SMALL), "locked image").parts()) == {"text", "shared"}
    vlmo: Any = ENCODERS["vlmo"](tmp_path)
    shared = catalogue_encoder(vlmo).parts()["shared"]
    assert any(value is vlmo.model.transformer.blocks[0].attn.qkv.weight for value in shared)


def test_an_encoder_that_shows_no_towers_is_one_part() -> None:
    encoder = SmallEncoder()
    parts = catalogue_encoder(encoder).parts()
    assert {name: list(map(id, part)) for name, part in parts.items()} == {
        "encoder": list(map(id, encoder.parameters()))
    }


def test_names_and_states_are_those_of_what_is_trained() -> None:
    live = catalogue_encoder(small_encoder(SMALL), "last-n")
    named = live.named_parameters()
    assert list(named) == list(live.tuned.trainable)
    before = live.state()
    assert set(named) <= set(before)
    with torch.no_grad():
        for value in named.values():
            value.add_(1.0)
    assert not any(torch.equal(value, before[name]) for name, value in named.items())
    live.load_state(before)
    assert all(torch.equal(value, before[name]) for name, value in named.items())
