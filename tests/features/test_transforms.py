"""What reading does to vectors, against NumPy and scikit-learn; fitted on present rows only."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.decomposition import PCA
from torch import Tensor

import features.transforms
from features.errors import FeatureError
from features.transforms import TransformConfig, transform

EVERY_STEP = TransformConfig(
    truncate_dim=5, center="mean", normalise="standardise", project="whiten", project_dim=3
)
CONFIGS = [
    TransformConfig(),
    TransformConfig(truncate_dim=3, center="mean"),
    TransformConfig(project="pca", project_dim=4),
    EVERY_STEP,
]


def some_vectors(n_items: int = 60, width: int = 6) -> tuple[Tensor, Tensor]:
    """Correlated columns of unequal spread, off the origin; every fifth row is absent and holds nonsense."""
    rng = torch.Generator().manual_seed(0)
    vectors = torch.randn(n_items, width, generator=rng) @ torch.randn(width, width, generator=rng)
    vectors = vectors * torch.arange(1, width + 1) + 2
    present = torch.arange(n_items) % 5 != 4
    vectors[~present] = torch.nan
    return vectors, present


def assert_equal_up_to_sign(found: np.ndarray, expected: np.ndarray) -> None:
    signs = np.sign((found * expected).sum(axis=0))
    np.testing.assert_allclose(found, expected * signs, rtol=1e-4, atol=1e-4)


def test_the_default_gives_present_rows_length_one_and_leaves_zeros() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0], [5.0, 0.0]])
    scaled = transform(vectors, torch.tensor([True, True, False]), TransformConfig())
    torch.testing.assert_close(scaled, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 0.0]]))


def test_no_transform_leaves_every_bit_of_the_present_rows() -> None:
    vectors, present = some_vectors()
    assert torch.equal(
        transform(vectors, present, TransformConfig(normalise="none"))[present], vectors[present]
    )


def test_l2_of_float16_does_not_overflow() -> None:
    vectors = torch.full((1, 1000), 60_000.0, dtype=torch.float16)
    scaled = transform(vectors, torch.tensor([True]), TransformConfig())
    assert scaled.dtype == torch.float32
    assert scaled.double().norm().item() == pytest.approx(1, rel=1e-6)


def test_standardise_agrees_with_numpy_over_the_present_rows() -> None:
    vectors = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * 5 + 100
    vectors[:, 1] = 0.1  # constant
    present = torch.arange(50) % 4 != 0
    config = TransformConfig(normalise="standardise")
    scaled = transform(vectors, present, config)
    rows = vectors[present].double().numpy()
    expected = (rows - rows.mean(0)) / np.where(rows.std(0) < 1e-6, np.inf, rows.std(0))
    np.testing.assert_allclose(scaled[present].numpy(), expected, atol=1e-5)
    assert not scaled[~present].any()
    assert not scaled[:, 1].any()
    assert not transform(vectors, torch.zeros(50, dtype=torch.bool), config).any()


def test_truncation_comes_before_normalising() -> None:
    vectors, present = some_vectors()
    short = transform(vectors, present, TransformConfig(truncate_dim=2))
    rows = vectors[present, :2].double()
    torch.testing.assert_close(short[present], (rows / rows.norm(dim=1, keepdim=True)).float())


def test_centering_takes_the_mean_of_present_rows_away_and_then_normalises() -> None:
    vectors, present = some_vectors()
    centred = transform(vectors, present, TransformConfig(center="mean"))
    rows = vectors[present].double().numpy()
    rows = rows - rows.mean(axis=0)
    np.testing.assert_allclose(
        centred[present].numpy(), rows / np.linalg.norm(rows, axis=1, keepdims=True), atol=1e-6
    )


@pytest.mark.parametrize("dim", [0, 1, 4])
def test_components_agree_with_scikit_learn_up_to_sign(dim: int) -> None:
    vectors, present = some_vectors()
    config = TransformConfig(normalise="none", project="pca", project_dim=dim)
    found = transform(vectors, present, config)[present].numpy()
    assert_equal_up_to_sign(found, PCA(dim or 6).fit_transform(vectors[present].double().numpy()))


@pytest.mark.parametrize("dim", [0, 3])
def test_whitening_agrees_with_scikit_learn_up_to_sign(dim: int) -> None:
    vectors, present = some_vectors()
    config = TransformConfig(normalise="none", project="whiten", project_dim=dim, whiten_ridge=0)
    found = transform(vectors, present, config)[present].numpy()
    assert_equal_up_to_sign(
        found, PCA(dim or 6, whiten=True).fit_transform(vectors[present].double().numpy())
    )
    np.testing.assert_allclose(np.cov(found.T), np.eye(dim or 6), atol=1e-4)


def test_the_ridge_holds_small_components_down() -> None:
    rows = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e-3])
    everywhere = torch.ones(500, dtype=torch.bool)
    config = TransformConfig(normalise="none", project="whiten", whiten_ridge=0.01)
    spread = transform(rows, everywhere, config).std(dim=0)
    assert spread[0] == pytest.approx(1, rel=0.01)
    assert spread[1] < 0.05


def test_components_have_unit_length_again_after_l2_but_not_after_whitening() -> None:
    vectors, present = some_vectors()
    lengths = transform(vectors, present, TransformConfig(project="pca", project_dim=2))[present].norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(len(lengths)))
    whitened = transform(vectors, present, TransformConfig(project="whiten", whiten_ridge=0))[present]
    torch.testing.assert_close(whitened.T.cov(), torch.eye(6), atol=1e-4, rtol=0)


def test_each_component_points_to_its_largest_entry() -> None:
    vectors, present = some_vectors()
    config = TransformConfig(normalise="none", project="pca")
    found = transform(vectors, present, config)[present].double()
    rows = vectors[present].double()
    components = torch.linalg.lstsq(rows - rows.mean(dim=0), found).solution  # (F, G)
    assert (components.gather(0, components.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_equal_vectors_have_no_components_and_give_zeros() -> None:
    vectors, everywhere = torch.full((20, 4), 0.1), torch.ones(20, dtype=torch.bool)
    for project in ("pca", "whiten"):
        assert not transform(vectors, everywhere, TransformConfig(project=project, whiten_ridge=0)).any()


@pytest.mark.parametrize("config", CONFIGS)
def test_absent_rows_never_influence_a_fit(config: TransformConfig) -> None:
    vectors, present = some_vectors()
    scaled = transform(vectors, present, config)
    assert not scaled[~present].any()
    vectors[~present] = 1e6
    assert torch.equal(transform(vectors, present, config), scaled)
    alone = transform(vectors[present], torch.ones(int(present.sum()), dtype=torch.bool), config)
    torch.testing.assert_close(alone, scaled[present], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_permuted_items_give_permuted_vectors(config: TransformConfig) -> None:
    vectors, present = some_vectors()
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        transform(vectors[order], present[order], config),
        transform(vectors, present, config)[order],
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("config", CONFIGS)
def test_blocks_of_three_rows_give_what_one_block_gives(
    config: TransformConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, present = some_vectors()
    whole = transform(vectors, present, config)
    monkeypatch.setattr(features.transforms, "_BLOCK_NUMBERS", 20)
    torch.testing.assert_close(transform(vectors, present, config), whole, rtol=1e-5, atol=1e-5)


def test_an_empty_catalogue_keeps_its_width() -> None:
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.bool)
    assert transform(*nothing, TransformConfig(truncate_dim=3)).shape == (0, 3)


def test_more_numbers_than_there_are_are_refused() -> None:
    vectors, present = some_vectors()
    with pytest.raises(FeatureError, match=r"truncate_dim is 7, but a vector of poster holds 6.*at most 6"):
        transform(vectors, present, TransformConfig(truncate_dim=7), "poster")


def test_more_components_than_there_are_are_refused() -> None:
    vectors, present = some_vectors()
    config = TransformConfig(project="pca", project_dim=5)
    with pytest.raises(FeatureError, match=r"5 components .* 4 numbers .* 48 present rows; .* 4; lower"):
        transform(vectors[:, :4], present, config)
    with pytest.raises(FeatureError, match=r"6 numbers in a vector and 4 present rows; .* 4; lower"):
        transform(vectors[:5], present[:5], config)
    with pytest.raises(FeatureError, match=r"all components .* 0 present rows"):
        transform(vectors, torch.zeros(60, dtype=torch.bool), TransformConfig(project="pca"))


def test_a_dimension_that_nothing_would_use_is_refused() -> None:
    with pytest.raises(ValidationError, match="project_dim is 8, but project is none; set project to pca"):
        TransformConfig(project_dim=8)
