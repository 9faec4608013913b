"""FAISS indexes: build, search, keep on disk, and measure against exact search.

Cosine is the inner product of rows that the index itself normalises, queries too, so an index file is
complete: FAISS alone can read it and search it, and nobody has to remember how it was made.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from features.errors import IndexingError
from features.faiss_backend import faiss_backend, import_faiss, to_cpu, to_gpu
from features.index_file import load_index, save_index
from features.index_plan import IndexConfig, IndexKind, IndexPlan, plan_index
from features.knn import Metric, SimilarityTable, exact_neighbours, similarity_table

if TYPE_CHECKING:
    import faiss

__all__ = [
    "BuiltIndex",
    "IndexConfig",
    "IndexReport",
    "build_index",
    "load_index",
    "save_index",
    "search",
]

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]

_ROWS_ADDED_AT_ONCE = 65_536


@dataclass(frozen=True, kw_only=True)
class IndexReport(IndexPlan):
    """What was built, why, and how good it is: the plan, and what came of it.

    ``dataclasses.asdict`` of it is JSON.
    """

    requested: str
    """The kind that the configuration names, perhaps ``auto``."""
    metric: Metric
    n_vectors: int
    dim: int
    n_zero_vectors: int
    """Vectors of zeros, which have no direction: with cosine they are similar to nothing."""
    memory_budget_bytes: int
    """0: none was set."""
    device: Literal["cpu", "gpu"]
    device_reason: str
    faiss_version: str
    train_seconds: float
    add_seconds: float
    recall: float | None
    """Share of the true ``recall_k`` nearest that the index finds, on a sample; None: not measured."""
    recall_k: int
    recall_sample: int
    milliseconds_per_query: float | None
    """In one batch of the sample's queries."""


@dataclass(frozen=True)
class BuiltIndex:
    """An index in main memory, whose row i is row i of the vectors it was built from."""

    index: "faiss.Index"
    report: IndexReport


def build_index(
    vectors: npt.NDArray[np.floating],
    config: IndexConfig,
    rng: np.random.Generator,
    *,
    progress: Progress | None = None,
) -> BuiltIndex:
    """Build an index over the rows of ``vectors`` and measure its recall against exact search.

    Equal vectors, configuration and generator give an equal index (on one machine; and for ``hnsw`` only
    while ``reproducible``). Beside the index itself, memory is a block of rows and the rows trained on.

    Args:
        vectors: (N, F), any float type; only rows that exist, since an index has no absent rows.
        config: which index.
        rng: for training and for the sample that recall is measured on.
        progress: called with (rows added, N).

    Raises:
        IndexingError: no vectors, NaN or infinity, parameters these vectors cannot have, or a GPU is asked
            for that FAISS cannot use.
    """
    if vectors.ndim != 2:
        raise IndexingError(f"vectors are {vectors.shape}; expected a table (rows, dimensions).")
    plan = plan_index(len(vectors), vectors.shape[1], config)
    table = similarity_table(vectors, config.metric)
    on_gpu, device_reason = _choose_device(plan.kind, config)
    training_rng, sample_rng = rng.spawn(2)
    seed = int(training_rng.integers(2**31 - 1))
    training_rows = np.sort(training_rng.choice(len(vectors), plan.n_training_rows, replace=False))
    try:
        filled = _fill(vectors, training_rows, plan, config, seed=seed, on_gpu=on_gpu, progress=progress)
    except RuntimeError as error:
        if config.device == "gpu" or not on_gpu:
            raise IndexingError(f"FAISS cannot build {plan.factory}: {error}") from error
        on_gpu, device_reason = False, f"the GPU could not build {plan.factory}, so the CPU did: {error}"
        filled = _fill(vectors, training_rows, plan, config, seed=seed, on_gpu=False, progress=progress)
    sample = torch.from_numpy(
        np.sort(sample_rng.choice(len(vectors), min(config.recall_sample, len(vectors)), replace=False))
    )
    recall, seconds = _recall(filled.index, table, sample, config.recall_k)
    report = IndexReport(
        **asdict(plan),
        requested=config.kind,
        metric=config.metric,
        n_vectors=len(vectors),
        dim=vectors.shape[1],
        n_zero_vectors=int((table.lengths == 0).sum()),
        memory_budget_bytes=config.memory_budget_mb * 2**20,
        device="gpu" if on_gpu else "cpu",
        device_reason=device_reason,
        faiss_version=faiss_backend().version,
        train_seconds=filled.train_seconds,
        add_seconds=filled.add_seconds,
        recall=recall,
        recall_k=min(config.recall_k, len(vectors) - 1),
        recall_sample=0 if recall is None else len(sample),
        milliseconds_per_query=None if recall is None else 1000 * seconds / len(sample),
    )
    return BuiltIndex(to_cpu(filled.index) if on_gpu else filled.index, report)


def search(index: "faiss.Index", queries: npt.NDArray[np.floating], k: int) -> tuple[IntArray, FloatArray]:
    """Return the rows most similar to each query: (B, k) rows and (B, k) similarities, best first.

    A place that the index could not fill (fewer than k rows, or too few in the lists searched) holds row
    -1 and similarity 0. Queries for a cosine index need not be normalised.

    Args:
        index: as built or loaded here.
        queries: (B, F), any float type.
        k: rows wanted for each.

    Raises:
        IndexingError: queries of another dimension, NaN or infinity in them, or k below 1.
    """
    if queries.ndim != 2 or queries.shape[1] != index.d:
        raise IndexingError(
            f"queries are {queries.shape}; the index holds vectors of {index.d} dimensions, so expected "
            f"(queries, {index.d}). Encode the query with the encoder that the index was built from."
        )
    if k < 1:
        raise IndexingError(f"k is {k}; expected at least 1.")
    finite = np.isfinite(queries).all(axis=1)
    if not finite.all():
        raise IndexingError(f"query {int(np.argmin(finite))} holds NaN or infinity; expected finite numbers.")
    try:
        similarities, rows = index.search(
            np.ascontiguousarray(queries, dtype=np.float32), min(k, max(1, index.ntotal))
        )
    except RuntimeError as error:  # such as more neighbours than a GPU index can return
        raise IndexingError(f"FAISS cannot search for {k} neighbours: {error}") from error
    empty = rows < 0
    padding = ((0, 0), (0, k - rows.shape[1]))
    return (
        np.pad(rows, padding, constant_values=-1),
        np.pad(np.where(empty, np.float32(0), similarities), padding),
    )


def _choose_device(kind: IndexKind, config: IndexConfig) -> tuple[bool, str]:
    """Return whether to build on a GPU, and the reason.

    Raises:
        IndexingError: a GPU is asked for and cannot be used.
    """
    if config.device == "cpu":
        return False, "device: cpu was asked for"
    backend = faiss_backend()
    reason = "FAISS has no HNSW for GPUs" if kind == "hnsw" else backend.probe
    usable = backend.gpu and kind != "hnsw"
    if config.device == "gpu" and not usable:
        raise IndexingError(
            f"device: gpu was asked for, but {reason} (FAISS {backend.version}). "
            "Set device: auto to build on the CPU, or install `tandem-recsys[gpu]` on a machine with a GPU."
        )
    return usable, reason


def _empty_index(plan: IndexPlan, dim: int, *, seed: int) -> "faiss.Index":
    module = import_faiss()
    index: faiss.Index = module.index_factory(dim, plan.factory, module.METRIC_INNER_PRODUCT)
    core = _core(index)
    if plan.kind == "hnsw":
        core.hnsw.rng = module.RandomGenerator(seed)
        core.hnsw.efConstruction = plan.ef_construction
        core.hnsw.efSearch = plan.ef_search
    if plan.nlist:
        core.nprobe = plan.nprobe
        for clustering in [core.cp, core.pq.cp] if plan.kind == "ivf_pq" else [core.cp]:
            clustering.seed = seed
            clustering.min_points_per_centroid = 1  # FAISS would print; too few rows stand in the notes
            clustering.max_points_per_centroid = 64
    return index


@dataclass(frozen=True)
class _Filled:
    index: "faiss.Index"
    train_seconds: float
    add_seconds: float


def _fill(
    vectors: npt.NDArray[np.floating],
    training_rows: IntArray,
    plan: IndexPlan,
    config: IndexConfig,
    *,
    seed: int,
    on_gpu: bool,
    progress: Progress | None,
) -> _Filled:
    """Train an index on some rows and add all of them; ``on_gpu``, the index returned is there.

    Raises:
        RuntimeError: what FAISS itself raises, for one a GPU without enough memory.
    """
    module = import_faiss()
    started = time.perf_counter()
    index = _empty_index(plan, vectors.shape[1], seed=seed)
    if len(training_rows):
        core = _core(index)
        if on_gpu:  # k-means on the GPU; the lists themselves stay here and keep their seed
            core.clustering_index = to_gpu(module.IndexFlatIP(core.d))
        index.train(np.ascontiguousarray(vectors[training_rows], dtype=np.float32))
        core.clustering_index = None
    trained = time.perf_counter()
    index = to_gpu(index) if on_gpu else index
    n_threads = module.omp_get_max_threads()
    try:
        if plan.kind == "hnsw" and config.reproducible:
            module.omp_set_num_threads(1)  # the order in which threads link rows would shape the graph
        for start in range(0, len(vectors), _ROWS_ADDED_AT_ONCE):
            block = vectors[start : start + _ROWS_ADDED_AT_ONCE]
            index.add(np.ascontiguousarray(block, dtype=np.float32))
            if progress is not None:
                progress(start + len(block), len(vectors))
    finally:
        module.omp_set_num_threads(n_threads)
    return _Filled(index, trained - started, time.perf_counter() - trained)


def _core(index: "faiss.Index") -> Any:
    """Return the index below the normalisation and padding, as the class that it is."""
    module = import_faiss()
    index = module.downcast_index(index)
    return module.downcast_index(index.index) if isinstance(index, module.IndexPreTransform) else index


def _recall(
    index: "faiss.Index", table: SimilarityTable, rows: Tensor, recall_k: int
) -> tuple[float | None, float]:
    """Return the share of the k nearest that the index finds, and the seconds it took to search.

    The row itself is left out. A row found counts if it is as similar as the k-th nearest, whichever row it
    is: where vectors are equal, any of them is right. The tolerance is float32's, in which FAISS searches.

    Args:
        index: over the rows of ``table``.
        table: the vectors.
        rows: (R,) rows whose neighbours are compared.
        recall_k: neighbours compared; fewer if there are fewer.
    """
    n_rows = len(table.vectors)
    k = min(recall_k, n_rows - 1)
    if len(rows) == 0 or k < 1:
        return None, 0.0
    queries = table.vectors[rows].float().numpy()
    started = time.perf_counter()
    found = torch.from_numpy(search(index, queries, k + 1)[0])  # (R, k + 1), the row itself among them
    seconds = time.perf_counter() - started
    counted = (found >= 0) & (found != rows[:, None])
    counted &= counted.cumsum(dim=1) <= k
    everything = torch.arange(n_rows)
    kth = torch.cat(
        [
            exact_neighbours(table, block, everything, k).similarities[:, -1]
            for block in torch.split(rows, 1024)
        ]
    )
    queried = rows[:, None].expand_as(found)[counted]
    similarities = table.pairs(queried, found[counted])
    tolerance = 1e-6 * table.lengths[queried] * table.lengths[found[counted]]
    hits = similarities >= kth[:, None].expand_as(found)[counted] - tolerance
    return int(hits.sum()) / (len(rows) * k), seconds
