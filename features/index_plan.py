"""Which FAISS index to build: from the number of rows, the dimension and a memory budget, before any work."""

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, Field, NonNegativeInt

from features.errors import IndexingError
from features.knn import Metric

IndexKind = Literal["flat", "hnsw", "ivf_flat", "ivf_pq"]

_PQ_CENTROIDS = 256
"""One byte a code: what the GPU supports and what FAISS's own guidelines use."""
_DIMENSIONS_PER_BYTE = 4
"""Of a product quantiser, when it is chosen here: a sixteenth of float32's size."""
_ROWS_PER_LIST = 39
"""Fewer training rows a centroid, and FAISS warns that its k-means has too few."""
_TRAINED_ROWS_PER_LIST = 64
"""More do not change the lists much; FAISS's own limit, 256, makes training four times as long."""


class IndexConfig(BaseModel, frozen=True, extra="forbid"):
    """Which index to build and how; 0 means that the value is chosen from the number of rows and dimensions.

    ``auto`` is exact wherever exact is affordable:

    1. up to ``exact_up_to`` rows, ``flat`` if it fits ``memory_budget_mb``;
    2. above that, ``ivf_flat`` if it fits the budget;
    3. otherwise ``ivf_pq``.

    Sizes are those of the finished index. The budget is a number rather than this machine's free memory,
    because the same configuration has to give the same artefact everywhere. ``hnsw`` is never chosen
    unasked: it answers fastest, but takes longest to build and cannot be built on a GPU.
    """

    kind: Literal["auto", "flat", "hnsw", "ivf_flat", "ivf_pq"] = Field(
        "auto", description="Index structure; auto is exact up to exact_up_to rows if it fits the budget."
    )
    metric: Metric = Field("cosine", description="Similarity: cosine, or the plain inner product.")
    device: Literal["auto", "cpu", "gpu"] = Field(
        "auto", description="Where to build: auto takes a GPU that FAISS can really use, else the CPU."
    )
    exact_up_to: NonNegativeInt = Field(1_000_000, description="Rows up to which auto prefers exact search.")
    memory_budget_mb: NonNegativeInt = Field(
        8192, description="Largest index auto may choose, in MiB; 0: no limit."
    )
    nlist: NonNegativeInt = Field(
        0, description="IVF: number of lists; 0: 4 sqrt(rows), with at least 39 rows for each."
    )
    nprobe: NonNegativeInt = Field(
        0, description="IVF: lists searched for a query; 0: a sixteenth, at least 8."
    )
    pq_m: NonNegativeInt = Field(0, description="IVF-PQ: bytes a vector; 0: one for every 4 dimensions.")
    hnsw_m: NonNegativeInt = Field(0, description="HNSW: links of a vector; 0: 32.")
    ef_construction: NonNegativeInt = Field(0, description="HNSW: breadth while building; 0: 80.")
    ef_search: NonNegativeInt = Field(
        0, description="HNSW: breadth while searching; 0: 128, at least 4 recall_k."
    )
    reproducible: bool = Field(
        default=True,
        description="HNSW: build on one thread, so that equal vectors give equal files; off: on all cores.",
    )
    recall_k: int = Field(20, ge=1, le=1000, description="Neighbours that recall is measured over.")
    recall_sample: NonNegativeInt = Field(
        1000, description="Rows whose neighbours are compared with exact search; 0: recall is not measured."
    )


@dataclass(frozen=True)
class IndexPlan:
    """What will be built; values that a kind of index does not have are 0."""

    kind: IndexKind
    factory: str
    """For ``faiss.index_factory``."""
    reason: str
    """Why this kind."""
    notes: tuple[str, ...]
    """What was chosen or changed otherwise than asked for."""
    estimated_bytes: dict[IndexKind, int]
    """Size of each kind of index over these rows."""
    n_training_rows: int
    nlist: int = 0
    nprobe: int = 0
    pq_m: int = 0
    hnsw_m: int = 0
    ef_construction: int = 0
    ef_search: int = 0


@dataclass(frozen=True)
class _Sizes:
    """The parameters of all kinds, before a kind is chosen."""

    nlist: int
    nprobe: int
    pq_m: int
    padded_dim: int
    hnsw_m: int
    ef_construction: int
    ef_search: int


def plan_index(n_rows: int, dim: int, config: IndexConfig) -> IndexPlan:
    """Choose the index for a table of ``n_rows`` vectors of ``dim`` numbers; reads no vector.

    Raises:
        IndexingError: no rows; a parameter that these rows cannot have (more lists than rows, more bytes
            than dimensions, fewer rows than a product quantiser's 256 centroids); or nothing fits the budget.
    """
    if n_rows < 1 or dim < 1:
        raise IndexingError(
            f"there are {n_rows} vectors of {dim} numbers; an index needs at least one of each. "
            "Check that the feature set has items whose status is ok."
        )
    sizes = _sizes(n_rows, dim, config)
    estimated = _estimate(n_rows, dim, sizes)
    kind, reason = _choose(n_rows, config, estimated)
    _refuse_impossible(n_rows, dim, kind, config)
    inverted, graph = kind in {"ivf_flat", "ivf_pq"}, kind == "hnsw"
    quantised = kind == "ivf_pq"
    return IndexPlan(
        kind=kind,
        factory=_factory(kind, dim, sizes, config.metric),
        reason=reason,
        notes=tuple(_notes(n_rows, dim, kind, sizes, config)),
        estimated_bytes=estimated,
        n_training_rows=_training_rows(n_rows, sizes.nlist, quantised=quantised) if inverted else 0,
        nlist=sizes.nlist if inverted else 0,
        nprobe=sizes.nprobe if inverted else 0,
        pq_m=sizes.pq_m if quantised else 0,
        hnsw_m=sizes.hnsw_m if graph else 0,
        ef_construction=sizes.ef_construction if graph else 0,
        ef_search=sizes.ef_search if graph else 0,
    )


def _sizes(n_rows: int, dim: int, config: IndexConfig) -> _Sizes:
    # 4 sqrt(N): the lower end of what FAISS's "Guidelines to choose an index" gives for up to 1M rows.
    nlist = config.nlist or max(1, min(round(4 * math.sqrt(n_rows)), n_rows // _ROWS_PER_LIST))
    pq_m = config.pq_m or max(1, math.ceil(dim / _DIMENSIONS_PER_BYTE))
    return _Sizes(
        nlist=nlist,
        nprobe=min(nlist, config.nprobe or max(8, nlist // 16)),
        pq_m=pq_m,
        padded_dim=math.ceil(dim / pq_m) * pq_m,
        hnsw_m=config.hnsw_m or 32,
        ef_construction=config.ef_construction or 80,
        ef_search=config.ef_search or max(128, 4 * config.recall_k),
    )


def _training_rows(n_rows: int, nlist: int, *, quantised: bool) -> int:
    centroids = max(nlist, _PQ_CENTROIDS) if quantised else nlist
    return min(n_rows, _TRAINED_ROWS_PER_LIST * centroids)


def _estimate(n_rows: int, dim: int, sizes: _Sizes) -> dict[IndexKind, int]:
    """Return the bytes of each kind of index once it is loaded: vectors or codes, ids, links, centroids."""
    m = sizes.hnsw_m
    # Each vector has 2 M links on the ground floor and M on each floor above, of which it reaches
    # 1 / (M - 1) on average (Malkov and Yashunin, 2020, sec. 4.1); 4 bytes a link, 12 for offset and level.
    links = 4 * (2 * m + m / max(1, m - 1)) + 12
    return {
        "flat": 4 * n_rows * dim,
        "hnsw": round(n_rows * (4 * dim + links)),
        "ivf_flat": n_rows * (4 * dim + 8) + 4 * sizes.nlist * dim,
        "ivf_pq": n_rows * (sizes.pq_m + 8) + 4 * (sizes.nlist + _PQ_CENTROIDS) * sizes.padded_dim,
    }


def _choose(n_rows: int, config: IndexConfig, estimated: dict[IndexKind, int]) -> tuple[IndexKind, str]:
    """Return the kind and the reason; the rule stands in :class:`IndexConfig`."""
    if config.kind != "auto":
        return config.kind, f"kind: {config.kind} was asked for"
    budget = config.memory_budget_mb * 2**20 or math.inf
    limit = (
        f"memory_budget_mb = {config.memory_budget_mb:,}" if config.memory_budget_mb else "no budget is set"
    )
    wanted: IndexKind = "flat" if n_rows <= config.exact_up_to else "ivf_flat"
    side = "at most" if wanted == "flat" else "more than"
    rows = f"{n_rows:,} rows are {side} exact_up_to = {config.exact_up_to:,}"
    if estimated[wanted] <= budget:
        return wanted, f"{rows} and {wanted} takes {_mb(estimated[wanted])} ({limit})"
    if estimated["ivf_pq"] <= budget:
        return "ivf_pq", (
            f"{rows}, but {wanted} would take {_mb(estimated[wanted])} ({limit}); "
            f"ivf_pq takes {_mb(estimated['ivf_pq'])}"
        )
    raise IndexingError(
        f"no index over {n_rows:,} rows fits {limit}: ivf_pq would take {_mb(estimated['ivf_pq'])}, "
        f"{wanted} {_mb(estimated[wanted])}. Raise memory_budget_mb, or set it to 0 for no limit."
    )


def _refuse_impossible(n_rows: int, dim: int, kind: IndexKind, config: IndexConfig) -> None:
    inverted = kind in {"ivf_flat", "ivf_pq"}
    if inverted and config.nlist > n_rows:
        raise IndexingError(
            f"nlist is {config.nlist:,}, but there are only {n_rows:,} rows to make lists of. "
            "Leave nlist at 0, or choose kind: flat, which is exact and small at this size."
        )
    if kind == "ivf_pq" and n_rows < _PQ_CENTROIDS:
        raise IndexingError(
            f"ivf_pq learns {_PQ_CENTROIDS} centroids for each byte, but there are only {n_rows:,} rows. "
            "Choose kind: flat, which is exact and small at this size."
        )
    if kind == "ivf_pq" and config.pq_m > dim:
        raise IndexingError(
            f"pq_m is {config.pq_m} bytes a vector, but the vectors have {dim} dimensions; "
            f"expected at most {dim}, or 0 for an automatic choice."
        )
    if kind == "hnsw" and config.hnsw_m == 1:
        raise IndexingError(
            "hnsw_m is 1; a graph needs at least 2 links a vector, or 0 for an automatic choice."
        )


def _notes(n_rows: int, dim: int, kind: IndexKind, sizes: _Sizes, config: IndexConfig) -> list[str]:
    notes = []
    if kind in {"ivf_flat", "ivf_pq"}:
        if sizes.nlist > 1 and sizes.nlist * _ROWS_PER_LIST > n_rows:
            notes.append(
                f"{n_rows:,} rows are few for {sizes.nlist:,} lists; "
                f"k-means does well from {_ROWS_PER_LIST} rows a list"
            )
        if config.nprobe > sizes.nlist:
            notes.append(f"nprobe = {config.nprobe:,} was cut to the {sizes.nlist:,} lists there are")
    if kind == "ivf_pq":
        if sizes.padded_dim != dim:
            notes.append(
                f"vectors are padded from {dim} to {sizes.padded_dim} dimensions with zeros, "
                f"which {sizes.pq_m} bytes divide; similarities stay the same"
            )
        if n_rows < _ROWS_PER_LIST * _PQ_CENTROIDS:
            notes.append(
                f"{n_rows:,} rows are few for a product quantiser, which does well from "
                f"{_ROWS_PER_LIST * _PQ_CENTROIDS:,}"
            )
    if kind == "hnsw" and not config.reproducible:
        notes.append("built on all cores: equal vectors can give different graphs")
    return notes


def _factory(kind: IndexKind, dim: int, sizes: _Sizes, metric: Metric) -> str:
    """Return FAISS's description; ``L2norm`` normalises rows and queries inside the index."""
    steps = ["L2norm"] if metric == "cosine" else []
    if kind == "ivf_pq" and sizes.padded_dim != dim:
        steps.append(f"Pad{sizes.padded_dim}")
    if kind in {"ivf_flat", "ivf_pq"}:
        steps.append(f"IVF{sizes.nlist}")
    # np: without polysemous training, which makes it a hundred times longer and only serves a filter on
    # Hamming distances that nobody here asks for.
    quantised = f"PQ{sizes.pq_m}np"
    stored = {"flat": "Flat", "ivf_flat": "Flat", "hnsw": f"HNSW{sizes.hnsw_m}", "ivf_pq": quantised}
    steps.append(stored[kind])
    return ",".join(steps)


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.1f} MiB"
