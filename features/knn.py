"""The exact kNN graph of a feature table in blocks: I x k memory, never I x I.

Float32 matrix products propose, float64 decides. A block of products finds every pair that can be among a
row's k best, given the worst rounding a product of that length can suffer; those few pairs are computed
again in float64 and rounded once. So the graph does not depend on block sizes, thread counts or the device,
and equal vectors have equal similarities, which is what makes "ties go to the lowest row" mean something.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor

from features.errors import IndexingError

Metric = Literal["cosine", "inner_product"]
Progress = Callable[[int, int], None]
Vectors = Tensor | npt.NDArray[np.floating]

_UNIT_ROUNDOFF = {"highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8}
"""Of float32, TF32 and bfloat16: what torch.set_float32_matmul_precision lets a product be made of."""
_GATHERED_NUMBERS = 2**21
"""Numbers gathered at once in float64: 16 MiB."""
_LONGEST = 1e18
"""A longer vector's square would leave float32; a vector shorter than its inverse counts as zeros."""


class KnnConfig(BaseModel, frozen=True, extra="forbid"):
    """How a kNN graph is built; block sizes change memory and speed, never the result."""

    k: PositiveInt = Field(10, description="Neighbours kept per item, the item itself not counted.")
    metric: Metric = Field("cosine", description="Similarity: cosine, or the plain inner product.")
    block_rows: PositiveInt = Field(1024, description="Items whose neighbours are searched at once.")
    block_columns: PositiveInt = Field(8192, description="Items they are compared with at once.")


class KnnGraph(NamedTuple):
    """Each row's nearest rows, most similar first, on the device of the vectors.

    Where a row has fewer than k neighbours, or is itself absent, the places left are -1 with similarity 0.
    """

    neighbours: Tensor
    """(I, k) int64 rows."""
    similarities: Tensor
    """(I, k) float32."""


@dataclass(frozen=True)
class SimilarityTable:
    """Vectors with what their similarities are made of; :func:`similarity_table` makes one."""

    vectors: Tensor
    """(I, F), any float type."""
    scales: Tensor
    """(I,) float64: 1 / length for cosine, 1 for the inner product, 0 for a row of zeros."""
    lengths: Tensor
    """(I,) float64 length of each row times its scale."""

    def scaled(self, rows: Tensor) -> Tensor:
        """Return (B, F) float32 vectors whose plain products are the similarities, about."""
        return self.vectors[rows].float() * self.scales[rows].float()[:, None]

    def pairs(self, left: Tensor, right: Tensor) -> Tensor:
        """Return (P,) float32 similarities of pairs of rows, summed in float64 and rounded once."""
        similarities = torch.empty(len(left), dtype=torch.float32, device=self.vectors.device)
        for place in _blocks(torch.arange(len(left), device=left.device), self.rows_at_once):
            a, b = left[place], right[place]
            dots = (self.vectors[a].double() * self.vectors[b].double()).sum(dim=1)
            # The scales first: their product is the same from both sides, so s(a, b) = s(b, a).
            similarities[place] = (dots * (self.scales[a] * self.scales[b])).float()
        return similarities

    @property
    def rows_at_once(self) -> int:
        """How many rows may be gathered in float64 at once."""
        return max(1, _GATHERED_NUMBERS // self.vectors.shape[1])


def similarity_table(vectors: Vectors, metric: Metric, used: Tensor | None = None) -> SimilarityTable:
    """Check the vectors and measure their lengths; the vectors themselves are not copied.

    Args:
        vectors: (I, F), any float type.
        metric: cosine, or the plain inner product.
        used: (I,) bool, rows that will be used; the others may hold anything. None: all.

    Raises:
        IndexingError: not a table of floats, or a row that is used holds NaN or infinity.
    """
    if isinstance(vectors, np.ndarray):
        with warnings.catch_warnings():  # a memory map cannot be written to; nothing here writes
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            vectors = torch.from_numpy(vectors)
    if vectors.ndim != 2 or vectors.shape[1] == 0 or not vectors.is_floating_point():
        raise IndexingError(
            f"vectors are {tuple(vectors.shape)} of {vectors.dtype}; "
            "expected a table (rows, dimensions) of floats."
        )
    vectors = vectors.detach()
    lengths = torch.zeros(len(vectors), dtype=torch.float64, device=vectors.device)
    table = SimilarityTable(vectors, torch.ones_like(lengths), lengths)
    rows = torch.arange(len(vectors), device=vectors.device)
    for block in _blocks(rows if used is None else rows[used], table.rows_at_once):
        lengths[block] = torch.linalg.vector_norm(vectors[block].double(), dim=1)
    bad = (~(lengths < _LONGEST)).nonzero()[:, 0]
    if len(bad):
        raise IndexingError(
            f"{len(bad)} of {len(vectors)} vectors hold NaN, infinity or numbers beyond {_LONGEST:g}, "
            f"the first in row {int(bad[0])}; similarities need finite vectors. "
            "Extract those items again, or mark them as absent."
        )
    if metric == "inner_product":
        return table
    scales = torch.where(lengths > 1 / _LONGEST, 1 / lengths, 0.0)
    return SimilarityTable(vectors, scales, lengths * scales)


def knn_graph(
    vectors: Vectors,
    k: int,
    *,
    metric: Metric = "cosine",
    present: Tensor | npt.NDArray[np.bool_] | None = None,
    block_rows: int = 1024,
    block_columns: int = 8192,
    progress: Progress | None = None,
) -> KnnGraph:
    """Return each row's k most similar rows, itself left out, exactly; ties go to the lowest row.

    A row is left out by its number, so of two equal rows each finds the other. A row of zeros has cosine 0
    with every row. Beside the vectors and the result, memory is two float32 blocks of vectors and about
    10 bytes for each of ``block_rows * block_columns`` (70 where nearly all similarities are equal).

    Args:
        vectors: (I, F), any float type, on any device; a NumPy array is read in place.
        k: neighbours per row.
        metric: cosine, or the plain inner product.
        present: (I,) which rows have a vector; the others neither have neighbours nor are any. None: all.
        block_rows: rows whose neighbours are searched at once.
        block_columns: rows they are compared with at once.
        progress: called with (rows done, rows in all).

    Raises:
        IndexingError: not a table of floats, k below 1, a mask of another length, or a present row that
            holds NaN or infinity.
    """
    n_rows = len(vectors)
    mask = torch.ones(n_rows, dtype=torch.bool) if present is None else torch.as_tensor(present)
    if mask.shape != (n_rows,) or mask.dtype != torch.bool:
        raise IndexingError(
            f"present is {tuple(mask.shape)} of {mask.dtype}; "
            f"expected ({n_rows},) of bool: one truth value per vector."
        )
    if k < 1 or block_rows < 1 or block_columns < 1:
        raise IndexingError(
            f"k = {k}, block_rows = {block_rows}, block_columns = {block_columns}; each must be at least 1."
        )
    device = vectors.device if isinstance(vectors, Tensor) else torch.device("cpu")
    mask = mask.to(device)
    table = similarity_table(vectors, metric, used=mask)
    rows = mask.nonzero()[:, 0]
    graph = KnnGraph(
        torch.full((n_rows, k), -1, dtype=torch.int64, device=device),
        torch.zeros((n_rows, k), dtype=torch.float32, device=device),
    )
    candidates = rows[~_late_duplicates(table, rows, k)]
    for block in _blocks(rows, block_rows, progress):
        found = exact_neighbours(table, block, candidates, k, block_columns=block_columns)
        graph.neighbours[block] = found.neighbours
        graph.similarities[block] = found.similarities
    return graph


def nearest_candidates(
    vectors: Vectors,
    rows: Tensor,
    candidates: Tensor,
    k: int,
    *,
    metric: Metric = "cosine",
    block_rows: int = 1024,
    block_columns: int = 8192,
) -> KnnGraph:
    """Return the k most similar candidates of some rows, exactly; ties go to the lowest row.

    Args:
        vectors: (I, F), any float type; rows that are neither asked for nor candidates may hold anything.
        rows: (B,) int64 rows whose neighbours are wanted; a row is not its own neighbour.
        candidates: (C,) int64 rows that can be neighbours, ascending.
        k: neighbours per row.
        metric: cosine, or the plain inner product.
        block_rows: rows whose neighbours are searched at once.
        block_columns: candidates they are compared with at once.

    Returns:
        (B, k) neighbours and similarities, in the order of ``rows``.

    Raises:
        IndexingError: not a table of floats, or a row that is used holds NaN or infinity.
    """
    used = torch.zeros(len(vectors), dtype=torch.bool, device=rows.device)
    used[rows] = True
    used[candidates] = True
    table = similarity_table(vectors, metric, used=used)
    candidates = candidates[~_late_duplicates(table, candidates, k)]
    found = [
        exact_neighbours(table, block, candidates, k, block_columns=block_columns)
        for block in _blocks(rows, block_rows)
    ]
    if not found:
        nobody = torch.empty((0, k), dtype=torch.int64, device=rows.device)
        return KnnGraph(nobody, nobody.float())
    return KnnGraph(*(torch.cat(column) for column in zip(*found, strict=True)))


def exact_neighbours(
    table: SimilarityTable, rows: Tensor, candidates: Tensor, k: int, *, block_columns: int = 8192
) -> KnnGraph:
    """Return the k most similar candidates of one block of rows: (B, k), a row itself left out.

    Args:
        table: the vectors, checked.
        rows: (B,) int64 rows to find neighbours for.
        candidates: (C,) int64 rows that can be neighbours, ascending.
        k: neighbours per row.
        block_columns: candidates they are compared with at once.
    """
    unit = _UNIT_ROUNDOFF[torch.get_float32_matmul_precision()]
    queries = table.scaled(rows)  # (B, F)
    best = KnnGraph(
        torch.full((len(rows), k), -1, dtype=torch.int64, device=rows.device),
        torch.full((len(rows), k), -torch.inf, device=rows.device),
    )
    for columns in _blocks(candidates, block_columns):
        products = queries @ table.scaled(columns).T  # (B, C)
        # A product of F numbers is off by at most F u |a| |b| (Higham, Accuracy and Stability, eq. 3.5);
        # 8 more for the scaling and for the rounding of the result; twice, for both sides of a comparison.
        error = 2 * (queries.shape[1] + 8) * unit * table.lengths[rows] * table.lengths[columns].max()
        close = _can_be_among_best(products, best.similarities[:, -1], error.float(), k)
        places, others = close.nonzero(as_tuple=True)
        left, right = rows[places], columns[others]
        other = left != right
        if bool(other.any()):
            similarities = table.pairs(left[other], right[other])
            best = _merge(best, places[other], right[other], similarities)
    return KnnGraph(best.neighbours, best.similarities.masked_fill(best.neighbours < 0, 0.0))


def _blocks(rows: Tensor, size: int, progress: Progress | None = None) -> Iterator[Tensor]:
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        yield block
        if progress is not None:
            progress(start + len(block), len(rows))


def _can_be_among_best(products: Tensor, kth: Tensor, error: Tensor, k: int) -> Tensor:
    """Return (B, C): which products may, within their error, belong to the k best of their row.

    Args:
        products: (B, C) float32 similarities as the matrix product has them.
        kth: (B,) the k-th best similarity found so far, -inf while there are fewer.
        error: (B,) how far two products of a row can be off together.
        k: neighbours per row.
    """
    close = products >= (kth - error)[:, None]
    # Counting is cheaper than a selection, and after the first blocks few are left; k + 1, as a row
    # meets itself.
    if int(close.sum()) > 4 * (k + 1) * len(products):
        kth_here = products.topk(min(k + 1, products.shape[1]), dim=1, sorted=False).values.amin(dim=1)
        close &= products >= (kth_here - error)[:, None]
    return close


def _merge(best: KnnGraph, rows: Tensor, columns: Tensor, similarities: Tensor) -> KnnGraph:
    """Return the k best of what was found so far and of new pairs.

    Args:
        best: (B, k), most similar first, equal ones by row; its rows come before all of ``columns``.
        rows: (P,) places in the block, ascending.
        columns: (P,) candidates, ascending within a place.
        similarities: (P,) float32.
    """
    n_rows, k = best.neighbours.shape
    all_rows = torch.cat([torch.arange(n_rows, device=rows.device).repeat_interleave(k), rows])
    all_columns = torch.cat([best.neighbours.flatten(), columns])
    all_similarities = torch.cat([best.similarities.flatten(), similarities])
    # Two stable sorts: by row, then by similarity, and what is equal stays in the order of columns.
    order = all_similarities.argsort(descending=True, stable=True)
    order = order[all_rows[order].argsort(stable=True)]
    sorted_rows = all_rows[order]
    counts = torch.bincount(sorted_rows, minlength=n_rows)
    place = torch.arange(len(order), device=rows.device) - (counts.cumsum(0) - counts)[sorted_rows]
    order = order[place < k]  # each row has at least its k old places
    return KnnGraph(all_columns[order].view(n_rows, k), all_similarities[order].view(n_rows, k))


def _late_duplicates(table: SimilarityTable, rows: Tensor, k: int) -> Tensor:
    """Return (R,): which rows have more than k equal ones before them, and so can be nobody's neighbour.

    Without this a table of equal rows (a constant encoder) would make every pair a candidate. Rows are
    grouped by a 64-bit hash of their bits; a group whose rows are not all equal is left alone.
    """
    vectors, step = table.vectors, table.rows_at_once
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[vectors.element_size()]
    draws = torch.Generator().manual_seed(0)
    odd = torch.randint(-(2**62), 2**62, (vectors.shape[1],), generator=draws) * 2 + 1
    odd = odd.to(vectors.device)
    hashes = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    for block in _blocks(rows, step):
        hashes[block] = (vectors[block].view(whole).long() * odd).sum(dim=1)
    _, group, counts = torch.unique(hashes[rows], return_inverse=True, return_counts=True)
    order = group.argsort(stable=True)
    ends = counts.cumsum(0)
    late = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for number in (counts > k + 1).nonzero()[:, 0].tolist():
        members = order[ends[number] - counts[number] : ends[number]]
        first = vectors[rows[members[0]]]
        if all(bool((vectors[block] == first).all()) for block in _blocks(rows[members], step)):
            late[members[k + 1 :]] = True
    return late
