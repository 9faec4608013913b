"""Computing in fewer bits: what is cast, what is kept, and when the probe says no."""

from pathlib import Path

import pytest
import torch
from torch import nn

from features import extraction
from features.encoders.base import Encoder
from features.encoders.registry import load_encoder
from features.encoding import ExtractionConfig
from features.extraction import extract, settle_precision
from features.feature_table import FeatureSet
from features.precision import (
    compute_dtype,
    has_bfloat16,
    in_precision,
    judge,
    neighbour_overlap,
    precision_in_key,
    spread,
)
from tests.features.small_catalogue import picture_catalogue

CPU = torch.device("cpu")


def tables(noise: float, n: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(n, 32, generator=generator)
    return reference, reference + noise * torch.randn(n, 32, generator=generator)


def test_a_copy_is_cast_and_the_encoder_stays() -> None:
    encoder = load_encoder("tiny")
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    cast = in_precision(encoder, "bfloat16")
    assert compute_dtype(cast) == torch.bfloat16
    assert compute_dtype(encoder) == torch.float32
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    for name, tensor in cast.state_dict().items():
        kept = "bn" in name or "running" in name or "downsample.1" in name or not tensor.is_floating_point()
        if not kept:
            assert tensor.dtype == torch.bfloat16, name
            assert torch.equal(tensor, before[name].bfloat16())


def test_batch_normalisation_keeps_its_statistics() -> None:
    encoder = load_encoder("tiny")
    norms = [
        module for module in in_precision(encoder, "bfloat16").modules() if isinstance(module, nn.BatchNorm2d)
    ]
    assert norms
    assert all(norm.running_var is not None and norm.running_var.dtype == torch.float32 for norm in norms)


def test_float32_and_encoders_without_weights_are_taken_as_they_are() -> None:
    tiny, random = load_encoder("tiny"), load_encoder("random:8")
    assert in_precision(tiny, "float32") is tiny
    assert in_precision(random, "bfloat16") is random


def test_neighbour_overlap_counts_shared_neighbours() -> None:
    reference, _ = tables(0)
    assert neighbour_overlap(reference, 3 * reference) == 1.0
    other = torch.randn(60, 32, generator=torch.Generator().manual_seed(9))
    by_hand = 0
    for row in range(60):
        names = []
        for table in (reference, other):
            unit = table / table.norm(dim=1, keepdim=True)
            order = [int(at) for at in (unit @ unit[row]).argsort(descending=True) if at != row]
            names.append(set(order[:10]))
        by_hand += len(names[0] & names[1])
    assert neighbour_overlap(reference, other) == pytest.approx(by_hand / 600)
    assert neighbour_overlap(reference[:1], other[:1]) == 1.0


def test_the_judge_takes_what_is_close_and_says_why() -> None:
    close = judge(*tables(1e-3))
    assert close.taken == "bfloat16"
    assert close.cosine is not None
    assert close.cosine > 0.999
    assert "60 items" in close.reason
    far = judge(*tables(0.2))
    assert far.taken == "float32"
    assert "too far" in far.reason
    reference, _ = tables(0)
    assert judge(reference, torch.full_like(reference, torch.nan)).taken == "float32"


def test_vectors_close_in_angle_but_not_in_neighbours_are_refused() -> None:
    reference, noise = tables(0.02)
    offset = 100 * torch.ones(32)  # all vectors point the same way, as those of a collapsed encoder do
    report = judge(reference + offset, (noise + offset))
    assert report.cosine is not None
    assert report.cosine > 0.999
    nothing = judge(
        reference + offset, torch.randn(60, 32, generator=torch.Generator().manual_seed(3)) + offset
    )
    assert nothing.cosine is not None
    assert nothing.cosine > 0.9
    assert nothing.taken == "float32"


def test_only_auto_looks_at_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [precision_in_key(name, CPU) for name in ("float32", "bfloat16")] == ["float32", "bfloat16"]
    monkeypatch.setattr("features.precision.has_bfloat16", lambda _: True)
    assert precision_in_key("auto", CPU) == "auto"
    monkeypatch.setattr("features.precision.has_bfloat16", lambda _: False)
    assert precision_in_key("auto", CPU) == "float32"
    assert isinstance(has_bfloat16(CPU), bool)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_auto_probes_the_catalogue_s_own_items(
    modality: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "has_bfloat16", lambda _: True)
    catalogue = picture_catalogue(tmp_path / "pictures", 80)
    encoder, config = load_encoder("tiny"), ExtractionConfig(precision="auto", rows_per_part=40)
    settled, report = settle_precision(encoder, catalogue, modality, config)
    assert report.cosine is not None
    assert settled.precision == report.taken
    done = extract(encoder, catalogue, modality, tmp_path / "auto", config)
    assert done.precision == report.taken
    assert report.reason in done.notes
    extract(encoder, catalogue, modality, tmp_path / "asked", settled)
    vectors = [
        FeatureSet.read(sorted((tmp_path / name).glob("part-*"))).vectors for name in ("auto", "asked")
    ]
    assert torch.equal(vectors[0], vectors[1])


def test_auto_without_instructions_for_bfloat16_is_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "has_bfloat16", lambda _: False)
    catalogue = picture_catalogue(tmp_path, 4)
    settled, report = settle_precision(
        load_encoder("tiny"), catalogue, "image", ExtractionConfig(precision="auto")
    )
    assert settled.precision == "float32"
    assert "no bfloat16 instructions" in report.reason


def test_auto_for_an_encoder_without_weights_is_float32(tmp_path: Path) -> None:
    catalogue = picture_catalogue(tmp_path, 4)
    _, report = settle_precision(
        load_encoder("random:8"), catalogue, "image", ExtractionConfig(precision="auto")
    )
    assert "no weights" in report.reason


@pytest.mark.parametrize("modality", ["image", "text"])
def test_bfloat16_vectors_are_close_to_float32_s(modality: str, tmp_path: Path) -> None:
    catalogue = picture_catalogue(tmp_path / "pictures", 30)
    encoder: Encoder = load_encoder("tiny")
    vectors = {}
    for precision in ("float32", "bfloat16"):
        config = ExtractionConfig(precision=precision, dtype="float32")
        done = extract(encoder, catalogue, modality, tmp_path / precision, config)
        assert done.precision == precision
        vectors[precision] = FeatureSet.read(sorted((tmp_path / precision).glob("part-*"))).vectors
    assert not torch.equal(vectors["float32"], vectors["bfloat16"])
    cosine = nn.functional.cosine_similarity(vectors["float32"], vectors["bfloat16"])
    assert cosine.min() > 0.99


def test_compiled_vectors_are_the_plain_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    compile_it = torch.compile

    def eager(function: object, **options: object) -> object:
        asked.append(options)
        return compile_it(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", eager)
    catalogue = picture_catalogue(tmp_path / "pictures", 5)
    for name in (False, True):
        extract(
            load_encoder("tiny"), catalogue, "image", tmp_path / str(name), ExtractionConfig(compile=name)
        )
    plain, compiled = (
        FeatureSet.read([tmp_path / str(name) / "part-00000.parquet"]) for name in (False, True)
    )
    assert asked == [{"dynamic": True}]
    assert torch.equal(plain.vectors, compiled.vectors)


def test_spread_is_even_and_bounded() -> None:
    assert spread(range(10), 20) == list(range(10))
    assert spread(range(1000), 4) == [0, 250, 500, 750]
    assert len(spread(range(127), 64)) == 64
