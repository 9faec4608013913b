"""The blocked kNN graph against a plain loop over pairs."""

import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from features.errors import IndexingError
from features.knn import Metric, knn_graph, nearest_candidates, similarity_table


def plain_graph(
    vectors: npt.NDArray[np.floating], k: int, metric: Metric, present: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Every pair, one after the other: the definition."""
    neighbours = np.full((len(vectors), k), -1, dtype=np.int64)
    similarities = np.zeros((len(vectors), k), dtype=np.float32)
    for row in np.flatnonzero(present):
        scored = []
        for other in np.flatnonzero(present):
            if other == row:
                continue
            a, b = vectors[row].astype(np.float64), vectors[other].astype(np.float64)
            similarity = float(np.dot(a, b))
            if metric == "cosine":
                length = float(np.linalg.norm(a) * np.linalg.norm(b))
                similarity = similarity / length if length > 0 else 0.0
            scored.append((-np.float32(similarity), other))
        for place, (negated, other) in enumerate(sorted(scored)[:k]):
            neighbours[row, place], similarities[row, place] = other, -negated
    return neighbours, similarities


def clustered(n_rows: int, dim: int, seed: int = 0) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(2, n_rows // 8), dim))
    rows = centres[rng.integers(len(centres), size=n_rows)] + 0.3 * rng.standard_normal((n_rows, dim))
    return rows.astype(np.float32)


@pytest.mark.parametrize("metric", ["cosine", "inner_product"])
@pytest.mark.parametrize(("block_rows", "block_columns"), [(1024, 8192), (7, 5), (1, 90), (90, 1)])
def test_graph_equals_the_plain_loop_for_any_block_size(
    metric: Metric, block_rows: int, block_columns: int
) -> None:
    vectors = clustered(90, 12)
    expected, similarities = plain_graph(vectors, 6, metric, np.ones(90, dtype=bool))
    graph = knn_graph(vectors, 6, metric=metric, block_rows=block_rows, block_columns=block_columns)
    np.testing.assert_array_equal(graph.neighbours.numpy(), expected)
    np.testing.assert_allclose(graph.similarities.numpy(), similarities, rtol=1e-6, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(*[st.integers(-2, 2)] * 3), min_size=1, max_size=24),
    absent=st.sets(st.integers(0, 23)),
    k=st.integers(1, 8),
    block_columns=st.integers(1, 9),
    metric=st.sampled_from(["cosine", "inner_product"]),
)
def test_graph_equals_the_plain_loop_where_most_similarities_are_equal(
    rows: list[tuple[int, int, int]], absent: set[int], k: int, block_columns: int, metric: Metric
) -> None:
    vectors = np.array(rows, dtype=np.float32)
    present = np.array([row not in absent for row in range(len(rows))])
    expected, similarities = plain_graph(vectors, k, metric, present)
    graph = knn_graph(vectors, k, metric=metric, present=present, block_rows=4, block_columns=block_columns)
    np.testing.assert_array_equal(graph.neighbours.numpy(), expected)
    np.testing.assert_allclose(graph.similarities.numpy(), similarities, rtol=1e-6, atol=1e-7)


def test_equal_rows_find_each_other_lowest_row_first_and_never_themselves() -> None:
    vectors = np.repeat(clustered(2, 40), [5, 1], axis=0)[[0, 5, 1, 2, 3, 4]]
    assert np.array_equal(vectors[0], vectors[5])
    graph = knn_graph(vectors, 3)
    assert graph.neighbours[:, :3].tolist() == [
        [2, 3, 4],
        [0, 2, 3],
        [0, 3, 4],
        [0, 2, 4],
        [0, 2, 3],
        [0, 2, 3],
    ]
    assert graph.similarities[0].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_constant_table_gives_the_lowest_rows_in_any_float_type(dtype: type[np.floating]) -> None:
    graph = knn_graph(np.full((300, 33), 0.1, dtype=dtype), 4, block_rows=64, block_columns=17)
    assert graph.neighbours[0].tolist() == [1, 2, 3, 4]
    assert graph.neighbours[2].tolist() == [0, 1, 3, 4]
    assert bool((graph.neighbours[5:] == torch.arange(4)).all())
    assert bool((graph.similarities == 1).all())


def test_more_equal_rows_than_neighbours_keep_only_the_first_as_candidates_of_all() -> None:
    vectors = np.concatenate([np.tile(clustered(1, 8), (40, 1)), clustered(30, 8, seed=1)])
    expected, _ = plain_graph(vectors, 5, "cosine", np.ones(70, dtype=bool))
    assert set(expected[:40].flatten()) == {0, 1, 2, 3, 4, 5}
    np.testing.assert_array_equal(knn_graph(vectors, 5, block_columns=16).neighbours.numpy(), expected)


def test_absent_rows_have_no_neighbours_and_are_none_whatever_they_hold() -> None:
    vectors = clustered(30, 6)
    present = np.ones(30, dtype=bool)
    present[[0, 7, 29]] = False
    vectors[[0, 7]] = np.nan
    graph = knn_graph(vectors, 4, present=present)
    assert bool((graph.neighbours[~present] == -1).all())
    assert bool((graph.similarities[~present] == 0).all())
    assert not set(graph.neighbours[present].flatten().tolist()) & {0, 7, 29, -1}


def test_with_fewer_rows_than_k_the_places_left_are_empty() -> None:
    graph = knn_graph(np.eye(3, dtype=np.float32), 5)
    assert graph.neighbours[1].tolist() == [0, 2, -1, -1, -1]
    assert graph.similarities[1].tolist() == [0.0] * 5
    alone = knn_graph(np.ones((1, 2), dtype=np.float32), 2)
    assert alone.neighbours.tolist() == [[-1, -1]]
    assert knn_graph(np.empty((0, 2), dtype=np.float32), 2).neighbours.shape == (0, 2)


def test_a_row_of_zeros_is_equally_far_from_all() -> None:
    vectors = np.array([[0, 0], [1, 0], [-1, 0], [1, 1]], dtype=np.float32)
    graph = knn_graph(vectors, 3)
    assert graph.neighbours[0].tolist() == [1, 2, 3]
    assert graph.similarities[0].tolist() == [0.0, 0.0, 0.0]
    assert graph.neighbours[1].tolist() == [3, 0, 2]


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize(("block_rows", "block_columns"), [(1024, 8192), (7, 5)])
def test_only_candidates_are_neighbours_of_the_rows_that_were_asked_for(
    alike: bool, block_rows: int, block_columns: int
) -> None:
    vectors = np.ones((40, 4), dtype=np.float32) if alike else clustered(40, 4)
    candidates = np.flatnonzero(np.arange(40) % 3 == 0)
    rows = np.array([31, 2, 3, 0])  # in any order; 3 and 0 are candidates themselves
    vectors[37:39] = np.nan  # used by nobody
    found = nearest_candidates(
        torch.from_numpy(vectors),
        torch.from_numpy(rows),
        torch.from_numpy(candidates),
        3,
        block_rows=block_rows,
        block_columns=block_columns,
    )
    for place, row in enumerate(rows):
        present = np.isin(np.arange(40), [row, *candidates])
        expected, similarities = plain_graph(vectors, 3, "cosine", present)
        np.testing.assert_array_equal(found.neighbours[place].numpy(), expected[row])
        np.testing.assert_allclose(found.similarities[place].numpy(), similarities[row], rtol=1e-6)


def test_nobody_asks_and_nobody_is_a_candidate() -> None:
    vectors, nobody = torch.ones(4, 2), torch.zeros(0, dtype=torch.int64)
    assert nearest_candidates(vectors, nobody, torch.arange(4), 2).neighbours.shape == (0, 2)
    assert nearest_candidates(vectors, torch.arange(2), nobody, 2).neighbours.tolist() == [[-1, -1]] * 2


def test_a_permuted_table_permutes_the_graph() -> None:
    vectors = clustered(60, 10)
    order = np.random.default_rng(3).permutation(60)
    graph, permuted = knn_graph(vectors, 5), knn_graph(vectors[order], 5)
    np.testing.assert_array_equal(order[permuted.neighbours.numpy()], graph.neighbours.numpy()[order])


def test_similarities_are_the_same_from_both_sides() -> None:
    table = similarity_table(clustered(50, 31), "cosine")
    left, right = torch.triu_indices(50, 50, 1)
    assert torch.equal(table.pairs(left, right), table.pairs(right, left))


def test_float16_rows_are_compared_as_the_numbers_they_are() -> None:
    vectors = torch.from_numpy(clustered(80, 16)).half()
    stored, widened = knn_graph(vectors, 5), knn_graph(vectors.float(), 5)
    assert torch.equal(stored.neighbours, widened.neighbours)
    assert torch.equal(stored.similarities, widened.similarities)


def test_a_coarser_product_still_gives_the_exact_graph() -> None:
    vectors = clustered(90, 12)
    exact = knn_graph(vectors, 6)
    torch.set_float32_matmul_precision("medium")
    try:
        coarse = knn_graph(vectors, 6, block_columns=11)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(coarse.neighbours, exact.neighbours)
    assert torch.equal(coarse.similarities, exact.similarities)


def test_rows_that_differ_less_than_a_product_rounds_are_ordered_by_their_true_similarity() -> None:
    rng = np.random.default_rng(5)
    query = rng.standard_normal(512)
    nearby = query + 2e-4 * rng.standard_normal((200, 512))
    vectors = np.vstack([query, nearby]).astype(np.float32)
    expected, _ = plain_graph(vectors[:, :], 10, "cosine", np.ones(201, dtype=bool))
    np.testing.assert_array_equal(knn_graph(vectors, 10).neighbours.numpy(), expected)


def test_progress_counts_rows_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    knn_graph(clustered(25, 4), 2, block_rows=10, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(10, 25), (20, 25), (25, 25)]


def test_a_read_only_array_is_read_in_place_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    vectors = clustered(10, 4)
    vectors.flags.writeable = False
    knn_graph(vectors, 2)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("vectors", "arguments", "message"),
    [
        (np.ones(4, dtype=np.float32), {}, r"vectors are \(4,\) of torch.float32"),
        (np.ones((4, 0), dtype=np.float32), {}, r"vectors are \(4, 0\)"),
        (np.ones((4, 2), dtype=np.int64), {}, "expected a table .* of floats"),
        (np.array([[1.0], [np.nan], [np.inf]]), {}, "2 of 3 vectors hold NaN, .* first in row 1"),
        (np.ones((4, 2)), {"k": 0}, "k = 0"),
        (np.ones((4, 2)), {"block_rows": 0}, "block_rows = 0"),
        (np.ones((4, 2)), {"present": np.ones(3, dtype=bool)}, r"present is \(3,\)"),
        (np.ones((4, 2)), {"present": np.ones(4)}, "expected .* of bool"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    vectors: npt.NDArray[np.floating], arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(IndexingError, match=message):
        knn_graph(vectors, **{"k": 2, **arguments})  # type: ignore[arg-type]  # one table of bad arguments


MEMORY_SCRIPT = """
import resource, sys
import torch
from features.knn import knn_graph
torch.set_num_threads(1)
vectors = torch.randn(16_000, 8, generator=torch.Generator().manual_seed(0))
knn_graph(vectors[:2_000], 10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
knn_graph(vectors, 10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux only")
def test_memory_stays_far_below_rows_times_rows() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT], check=True, capture_output=True, text=True, timeout=120
    )
    whole_table_kb = 16_000 * 16_000 * 4 / 1024
    assert float(done.stdout) < 0.1 * whole_table_kb, f"{done.stdout} kB more than before"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_gives_the_graph_of_the_cpu() -> None:
    vectors = torch.from_numpy(np.concatenate([clustered(500, 64), clustered(500, 64)]))
    cpu, gpu = knn_graph(vectors, 10), knn_graph(vectors.cuda(), 10, block_columns=100)
    assert torch.equal(cpu.neighbours, gpu.neighbours.cpu())
    assert torch.equal(cpu.similarities, gpu.similarities.cpu())
