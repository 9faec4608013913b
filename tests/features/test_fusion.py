"""One table of several, against plain loops."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

import features.fusion
from features.errors import FeatureError
from features.fusion import FuseHow, fuse
from features.imputation import Filled


def parts(*widths: int, n_items: int = 30) -> dict[str, Filled]:
    """Tables whose unknown rows hold 7, which must count as zeros; the last item has nothing."""
    rng = torch.Generator().manual_seed(0)
    made = {}
    for number, width in enumerate(widths):
        known = torch.rand(n_items, generator=rng) > 0.3
        known[-1] = False
        vectors = torch.randn(n_items, width, generator=rng)
        vectors[~known] = 7
        made[f"part {number}"] = Filled(vectors, known)
    return made


def anything(tables: dict[str, Filled]) -> torch.Tensor:
    return torch.stack([part.known for part in tables.values()]).any(dim=0)


def plain(tables: dict[str, Filled], how: str) -> np.ndarray:
    rows = []
    for item in range(30):
        has = [part.vectors[item].numpy() for part in tables.values() if part.known[item]]
        every = [part.vectors[item].numpy() * float(part.known[item]) for part in tables.values()]
        if how == "concat":
            rows.append(np.concatenate(every))
        else:
            rows.append(np.sum(every, axis=0) / (max(len(has), 1) if how == "mean" else 1))
    return np.stack(rows)


@pytest.mark.parametrize("how", ["concat", "sum", "mean"])
@pytest.mark.parametrize("widths", [(3,), (3, 3), (3, 3, 3)])
def test_parts_are_joined_as_a_plain_loop_joins_them(how: FuseHow, widths: tuple[int, ...]) -> None:
    tables = parts(*widths)
    joined, known = fuse(tables, anything(tables), how)
    np.testing.assert_allclose(joined.numpy(), plain(tables, how), rtol=1e-5, atol=1e-6)
    assert torch.equal(known, anything(tables))
    assert not joined[-1].any()


@pytest.mark.parametrize("how", ["sum", "mean"])
def test_sums_in_blocks_are_the_whole_sums(how: FuseHow, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = parts(3, 3)
    whole = fuse(tables, anything(tables), how).vectors
    monkeypatch.setattr(features.fusion, "_BLOCK_ROWS", 7)
    assert torch.equal(fuse(tables, anything(tables), how).vectors, whole)


def test_components_of_the_concatenation_agree_with_scikit_learn() -> None:
    tables = parts(3, 5)
    present = anything(tables)
    found, _ = fuse(tables, present, "pca", dim=4)
    expected = PCA(4).fit_transform(plain(tables, "concat")[present.numpy()])
    signs = np.sign((found[present].numpy() * expected).sum(axis=0))
    np.testing.assert_allclose(found[present].numpy(), expected * signs, rtol=1e-4, atol=1e-5)
    assert not found[~present].any()
    assert fuse(tables, present, "pca")[0].shape == (30, 8)
    of_unit_length = fuse(tables, present, "pca", dim=4, normalise="l2").vectors[present]
    torch.testing.assert_close(of_unit_length, torch.nn.functional.normalize(found[present]))


def test_filled_items_are_projected_but_not_fitted_on() -> None:
    tables = parts(3, 5)
    present = anything(tables)
    before = fuse(tables, present, "pca", dim=2)
    filled = {name: Filled(part.vectors, part.known.clone()) for name, part in tables.items()}
    for part in filled.values():
        part.known[-1] = True
    after = fuse(filled, present, "pca", dim=2)
    assert torch.equal(after.vectors[:-1], before.vectors[:-1])
    assert after.vectors[-1].any()
    assert after.known[-1]


@pytest.mark.parametrize("how", ["sum", "mean"])
def test_vectors_of_unequal_width_are_not_added(how: FuseHow) -> None:
    tables = parts(3, 5)
    with pytest.raises(
        FeatureError, match=rf"fuse is {how}, .* part 0 3, part 1 5; .*project_dim: 3 or less"
    ):
        fuse(tables, anything(tables), how)


def test_more_components_than_the_parts_have_are_refused() -> None:
    tables = parts(3, 5)
    with pytest.raises(FeatureError, match=r"9 components .* the concatenation of part 0, part 1 has 8"):
        fuse(tables, anything(tables), "pca", dim=9)
