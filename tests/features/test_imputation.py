"""Filling absent rows, against plain loops."""

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor

import features.imputation
from features.errors import FeatureError
from features.imputation import Part, fill_absent, fill_from_neighbours, propagate


def table(n_items: int, width: int, seed: int, absent_share: float = 0.3) -> Part:
    rng = torch.Generator().manual_seed(seed)
    present = torch.rand(n_items, generator=rng) >= absent_share
    vectors = torch.randn(n_items, width, generator=rng)
    vectors[~present] = 7  # must never be read
    return Part(vectors, present)


def some_interactions(n_users: int, n_items: int, seed: int = 0, density: float = 0.15) -> sparse.csr_matrix:
    rng = np.random.default_rng(seed)
    return sparse.csr_matrix((rng.random((n_users, n_items)) < density).astype(np.float32))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


def plain_neighbour_fill(own: Part, others: list[Part], k: int) -> tuple[Tensor, list[bool]]:
    """Item by item, candidate by candidate."""
    filled, known = torch.zeros_like(own.vectors), []
    for item in range(len(filled)):
        if own.present[item]:
            filled[item] = own.vectors[item]
            known.append(True)
            continue
        has = [other for other in others if other.present[item]]
        best: list[int] = []
        for used in [has, *([other] for other in has)]:
            nearness = {
                candidate: np.mean([cosine(o.vectors[item], o.vectors[candidate]) for o in used])
                for candidate in range(len(filled))
                if used and own.present[candidate] and all(o.present[candidate] for o in used)
            }
            best = sorted(nearness, key=lambda candidate: -nearness[candidate])[:k]
            if best:
                break
        known.append(bool(best))
        if best:
            filled[item] = own.vectors[best].mean(dim=0)
    return filled, known


def plain_propagation(own: Part, liked: np.ndarray, n_steps: int) -> np.ndarray:
    """Edge by edge: what each item sends over each user to each item, the present ones set back each time."""
    x = np.where(own.present.numpy()[:, None], own.vectors.double().numpy(), 0.0)
    start = x.copy()
    for _ in range(n_steps):
        new = np.zeros_like(x)
        for user in range(len(liked)):
            mine = np.flatnonzero(liked[user])
            for i in mine:
                for j in mine:
                    weight = len(mine) * np.sqrt(liked[:, i].sum() * liked[:, j].sum())
                    new[i] += x[j] / weight
        new[own.present.numpy()] = start[own.present.numpy()]
        x = new
    return x


def test_filling_with_the_mean_looks_at_present_rows_only() -> None:
    vectors = torch.tensor([[1.0, 2.0], [9.0, 9.0], [3.0, 6.0]])
    present = torch.tensor([True, False, True])
    mean, zero = fill_absent(vectors, present, "mean"), fill_absent(vectors, present, "zero")
    assert mean.vectors.tolist() == [[1, 2], [2, 4], [3, 6]]
    assert zero.vectors.tolist() == [[1, 2], [0, 0], [3, 6]]
    assert mean.known.tolist() == [True, True, True]
    assert zero.known.tolist() == [True, False, True]
    assert vectors[1].tolist() == [9, 9], "the input must stay"


def test_there_is_no_mean_of_nothing() -> None:
    with pytest.raises(FeatureError, match="none of the 2 items has a vector"):
        fill_absent(torch.zeros(2, 2), torch.zeros(2, dtype=torch.bool), "mean")
    assert fill_absent(torch.zeros(0, 2), torch.zeros(0, dtype=torch.bool), "mean").vectors.shape == (0, 2)


@pytest.mark.parametrize("n_others", [0, 1, 2])
@pytest.mark.parametrize("k", [1, 4, 1000])
def test_neighbours_agree_with_the_plain_loop(n_others: int, k: int) -> None:
    own = table(40, 5, seed=0)
    others = [table(40, 3 + number, seed=10 + number) for number in range(n_others)]
    filled, known = fill_from_neighbours(*own, others, k)
    expected, expected_known = plain_neighbour_fill(own, others, k)
    assert known.tolist() == expected_known
    torch.testing.assert_close(filled, expected, rtol=1e-5, atol=1e-5)
    if n_others:
        assert 0 < int((~known).sum()) < int((~own.present).sum()), "some are filled, some have nothing"


def test_an_item_whose_modalities_nobody_has_together_asks_them_one_by_one() -> None:
    own = Part(torch.tensor([[0.0], [4.0], [6.0]]), torch.tensor([False, True, True]))
    first = Part(torch.ones(3, 2), torch.tensor([True, False, False]))
    second = Part(torch.ones(3, 2), torch.tensor([True, True, True]))
    filled, known = fill_from_neighbours(*own, [first, second], 2)
    assert filled[0].tolist() == [5]
    assert known.all()


def test_a_table_without_absent_rows_stays() -> None:
    whole = table(10, 3, seed=0, absent_share=0)
    assert whole.present.all()
    for filled, known in (
        fill_from_neighbours(*whole, [table(10, 2, seed=1)], 3),
        propagate(*whole, some_interactions(4, 10), 3),
        fill_absent(*whole, "mean"),
    ):
        assert torch.equal(filled, whole.vectors)
        assert known.all()


def test_many_neighbours_are_averaged_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = table(40, 5, seed=0), table(40, 3, seed=1)
    whole = fill_from_neighbours(*own, [other], 4)
    monkeypatch.setattr(features.imputation, "_BLOCK_NUMBERS", 50)
    assert torch.equal(fill_from_neighbours(*own, [other], 4).vectors, whole.vectors)


def test_neighbours_of_permuted_items_are_permuted() -> None:
    own, other = table(40, 5, seed=0), table(40, 3, seed=1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    filled = fill_from_neighbours(*own, [other], 3)
    permuted = fill_from_neighbours(
        own.vectors[order], own.present[order], [Part(other.vectors[order], other.present[order])], 3
    )
    torch.testing.assert_close(permuted.vectors, filled.vectors[order], rtol=1e-5, atol=1e-6)
    assert torch.equal(permuted.known, filled.known[order])


@pytest.mark.parametrize("n_steps", [1, 2, 7])
def test_propagation_agrees_with_the_plain_loop(n_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own, train = table(15, 4, seed=3, absent_share=0.5), some_interactions(9, 15)
    expected = plain_propagation(own, train.toarray(), n_steps)
    filled, known = propagate(*own, train, n_steps)
    np.testing.assert_allclose(filled.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert known.tolist() == (own.present.numpy() | expected.any(axis=1)).tolist()
    monkeypatch.setattr(features.imputation, "_BLOCK_NUMBERS", 20)
    torch.testing.assert_close(propagate(*own, train, n_steps).vectors, filled)


def test_propagation_leaves_present_rows_and_items_that_nobody_met() -> None:
    own, train = table(15, 4, seed=3, absent_share=0.5), some_interactions(9, 15)
    cold = int((~own.present).nonzero()[0])
    met = np.ones(15, dtype=np.float32)
    met[cold] = 0
    filled, known = propagate(*own, sparse.csr_matrix(train.multiply(met)), 5)
    assert torch.equal(filled[own.present], own.vectors[own.present])
    assert not filled[cold].any()
    assert not known[cold]
    everybody = torch.ones(15, dtype=torch.bool)
    assert torch.equal(propagate(own.vectors, everybody, train, 5).vectors, own.vectors)


def test_propagation_reaches_as_far_as_its_steps() -> None:
    # item 0 - user 0 - item 1 - user 1 - item 2: only item 0 has a vector
    train = sparse.csr_matrix(np.array([[1, 1, 0], [0, 1, 1]], dtype=np.float32))
    vectors, present = torch.ones(3, 2), torch.tensor([True, False, False])
    assert propagate(vectors, present, train, 1).known.tolist() == [True, True, False]
    assert propagate(vectors, present, train, 2).known.tolist() == [True, True, True]


def test_propagation_over_permuted_items_is_permuted() -> None:
    own, train = table(15, 4, seed=3, absent_share=0.5), some_interactions(9, 15)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(2))
    permuted = propagate(own.vectors[order], own.present[order], train[:, order.numpy()], 4)
    torch.testing.assert_close(permuted.vectors, propagate(*own, train, 4).vectors[order])
