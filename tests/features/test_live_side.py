"""Side networks on kept states: the same vectors and gradients as through the whole encoder, without it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from features.catalogue import Catalogue
from features.errors import FeatureFileError
from features.live.building import LiveConfig, live_encoder
from features.live.pooled import PooledFile, PooledWriter
from features.tuning.side import SideConfig
from features.tuning.side_mode import SideTuned, prepare_side
from tests.features.small_catalogue import picture_catalogue
from tests.features.small_clip import SMALL, small_encoder
from tests.features.test_live import N_ITEMS, ROWS, SEES_PADDING, everything, row_inputs

CPU = torch.device("cpu")


@pytest.fixture(name="catalogue", scope="module")
def _catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return picture_catalogue(tmp_path_factory.mktemp("pictures"), N_ITEMS)


def side_of(config: dict[str, object], **settings: object) -> SideTuned:
    """All weights beside zero, so that every one has a gradient."""
    tuned = prepare_side(small_encoder(config), SideConfig.model_validate({"adapter_width": 4, **settings}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in tuned.trainable.values():
            value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return tuned


@pytest.mark.parametrize("config", [SMALL, SEES_PADDING], ids=["clip", "siglip"])
@pytest.mark.parametrize(("side_states", "tolerance"), [("float16", 6e-3), ("float32", 1e-5)])
@pytest.mark.parametrize("chunk", [2, 64])
def test_vectors_and_gradients_are_those_of_the_encoder_itself(
    config: dict[str, object],
    side_states: str,
    tolerance: float,
    chunk: int,
    catalogue: Catalogue,
    tmp_path: Path,
) -> None:
    tuned = side_of(config)
    encoder = tuned.encoder
    weights = torch.randn(len(ROWS), 12, generator=torch.Generator().manual_seed(0))
    vectors: dict[str, Tensor] = {}
    for modality in ("image", "text"):
        # A cache of pictures would round them; side networks need none, as each is decoded once.
        inputs = row_inputs(catalogue, encoder, modality, tmp_path, cache_mb=0)
        encode = encoder.encode_images if modality == "image" else encoder.encode_texts
        vectors[modality] = encode(inputs(ROWS, CPU))
        (vectors[modality] * weights).sum().backward()  # type: ignore[no-untyped-call]  # torch lacks types
        inputs.close()
    expected: dict[str, Tensor] = {}
    for name, value in tuned.trainable.items():
        assert value.grad is not None
        expected[name], value.grad = value.grad, None
    settings = LiveConfig.model_validate({"chunk": chunk, "side_states": side_states})
    with live_encoder(
        tuned, catalogue, ("image", "text"), everything(), settings, folder=tmp_path / "live"
    ) as live:
        for modality, own in vectors.items():
            for found in (live.encode_all(modality, ROWS), live.encode(modality, ROWS)):
                torch.testing.assert_close(found, own.detach(), rtol=tolerance, atol=tolerance)
            live.backward(modality, weights)
    assert not (tmp_path / "live" / "pixels-image.f16").exists()
    for name, value in tuned.trainable.items():
        assert value.grad is not None
        error = (value.grad - expected[name]).norm() / expected[name].norm().clamp_min(1e-3)
        assert error < tolerance, (name, error)
    assert all(value.grad is None for value in encoder.inner.parameters())


def test_the_frozen_encoder_runs_once_and_never_in_an_epoch(catalogue: Catalogue, tmp_path: Path) -> None:
    tuned = side_of(SMALL)
    calls: list[str] = []
    model: Any = tuned.encoder.inner.model
    for part in (model.visual.conv1, *model.transformer.resblocks):
        part.register_forward_hook(lambda *_: calls.append("ran"))
    seen: list[tuple[int, int]] = []
    with live_encoder(
        tuned,
        catalogue,
        ("image", "text"),
        everything(),
        LiveConfig(chunk=4),
        folder=tmp_path,
        progress=lambda done, of: seen.append((done, of)),
    ) as live:
        assert len(calls) == 3 * 1 + 3 * 2  # three chunks: a stem of pictures, two blocks of texts
        assert seen == 2 * [(4, 9), (8, 9), (9, 9)]
        optimizer = torch.optim.SGD(list(live.parameters()), lr=0.1)
        before = live.encode_all("image", ROWS)
        for _ in range(3):
            for modality in live.modalities:
                live.encode(modality, ROWS)
                live.backward(modality, torch.ones(len(ROWS), 12))
            optimizer.step()
        assert not torch.equal(live.encode_all("image", ROWS), before)
        assert len(calls) == 9
        parts = live.parts()
        assert set(parts) == {"image", "text"}
        assert sum(map(len, parts.values())) == len(live.named_parameters())


def test_without_kept_states_or_a_side_network_the_encoder_itself_is_asked(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    tuned = side_of(SMALL, towers=("image",))
    settings = LiveConfig(keep_states=False, pixel_cache_mb=0)
    inputs = row_inputs(catalogue, tuned.encoder, "text", tmp_path, cache_mb=0)
    expected = tuned.encoder.inner.encode_texts(inputs(ROWS, CPU))
    with live_encoder(
        tuned, catalogue, ("image", "text"), everything(), settings, folder=tmp_path / "live"
    ) as live:
        torch.testing.assert_close(live.encode("text", ROWS), expected, rtol=1e-5, atol=1e-5)
        live.backward("text", torch.ones(len(ROWS), 12))
        live.encode("image", ROWS)
        live.backward("image", torch.ones(len(ROWS), 12))
        assert all(value.grad is not None for value in tuned.trainable.values())
    assert not (tmp_path / "live" / "states-image").exists()


def test_kept_states_are_whole_or_refused(tmp_path: Path) -> None:
    def write(value: float = 1.0) -> None:
        writer = PooledWriter(tmp_path, 3, blocks=(0, 2), widths=(4, 5))
        states = [torch.full((2, 4), value), torch.full((2, 5), 2.0)]
        writer.write(torch.tensor([2, 0]), states, torch.full((2, 6), 3.0))
        writer.finish()

    write()
    kept = PooledFile(tmp_path)
    states, vectors = kept.read(torch.tensor([2, 0]), CPU)
    assert [state.shape for state in states] == [(2, 4), (2, 5)]
    assert states[1].tolist() == [[2.0] * 5] * 2
    assert vectors.tolist() == [[3.0] * 6] * 2
    assert len(kept) == 3
    with pytest.raises(FeatureFileError, match="holds no state of item row 1"):
        kept.read(torch.tensor([2, 1]), CPU)
    with pytest.raises(FeatureFileError, match=r"beyond float16 \(65,504\)"):
        write(1e5)
    with pytest.raises(FeatureFileError, match="holds no whole states"):  # what was there is being replaced
        PooledFile(tmp_path)
    write()
    np.save(tmp_path / "states.npy", np.zeros((3, 8), np.float16))
    with pytest.raises(FeatureFileError, match="rows of the widths' sum"):
        PooledFile(tmp_path)
    (tmp_path / "vectors.npy").unlink()
    with pytest.raises(FeatureFileError, match="holds no whole states"):
        PooledFile(tmp_path)
