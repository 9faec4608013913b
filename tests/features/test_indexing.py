"""FAISS indexes: which one is built, what it finds, and what its file survives."""

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import numpy.typing as npt
import pytest
from pydantic import ValidationError

from features import faiss_backend as backend_module
from features import indexing
from features.errors import IndexingError
from features.faiss_backend import FaissBackend, faiss_backend
from features.index_plan import IndexKind, plan_index
from features.indexing import IndexConfig, build_index, load_index, save_index, search
from features.knn import Metric, knn_graph

FloatArray = npt.NDArray[np.float32]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    n_threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(n_threads)


def clustered(n_rows: int, dim: int, seed: int = 0) -> FloatArray:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(2, n_rows // 20), dim))
    rows = centres[rng.integers(len(centres), size=n_rows)] + 0.4 * rng.standard_normal((n_rows, dim))
    return np.asarray(rows * rng.uniform(0.5, 2, (n_rows, 1)), dtype=np.float32)


def cpu(**settings: object) -> IndexConfig:
    return IndexConfig.model_validate({"device": "cpu", "recall_k": 10, "recall_sample": 200, **settings})


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# ---------------------------------------------------------------------------------------- which index


@pytest.mark.parametrize(
    ("n_rows", "dim", "settings", "kind"),
    [
        (1_682, 512, {}, "flat"),
        (1_000_000, 512, {}, "flat"),
        (1_000_001, 512, {}, "ivf_flat"),
        (50_000_000, 512, {}, "ivf_pq"),
        (50_000_000, 512, {"memory_budget_mb": 0}, "ivf_flat"),
        (100_000, 512, {"memory_budget_mb": 50}, "ivf_pq"),
        (5_000, 64, {"exact_up_to": 4_999}, "ivf_flat"),
    ],
)
def test_auto_is_exact_up_to_a_size_and_smaller_when_memory_does_not_suffice(
    n_rows: int, dim: int, settings: dict[str, int], kind: IndexKind
) -> None:
    plan = plan_index(n_rows, dim, IndexConfig.model_validate(settings))
    assert plan.kind == kind
    assert f"{n_rows:,} rows" in plan.reason


def test_auto_says_how_much_would_be_needed_when_nothing_fits() -> None:
    with pytest.raises(IndexingError, match=r"memory_budget_mb = 100: ivf_pq would take 1,\d\d\d.*Raise"):
        plan_index(10_000_000, 512, IndexConfig(memory_budget_mb=100))


@pytest.mark.parametrize(
    ("kind", "dim"), [("flat", 24), ("hnsw", 24), ("ivf_flat", 24), ("ivf_pq", 24), ("ivf_pq", 23)]
)
@pytest.mark.parametrize("metric", ["cosine", "inner_product"])
def test_estimated_bytes_are_those_of_the_index_that_is_built(
    kind: IndexKind, dim: int, metric: Metric
) -> None:
    built = build_index(clustered(2_000, dim), cpu(kind=kind, metric=metric, recall_sample=0), rng())
    actual = faiss.serialize_index(built.index).nbytes
    assert built.report.estimated_bytes[kind] == pytest.approx(actual, rel=0.03)


@pytest.mark.parametrize("n_rows", [1, 2, 38, 39, 1_000, 1_000_000, 10_000_000])
def test_automatic_lists_have_enough_rows_each_and_probes_are_not_more_than_lists(n_rows: int) -> None:
    plan = plan_index(n_rows, 64, IndexConfig(kind="ivf_flat"))
    assert 1 <= plan.nprobe <= plan.nlist
    assert plan.nlist == 1 or plan.nlist * 39 <= n_rows
    assert plan.n_training_rows <= n_rows
    assert not plan.notes


def test_given_parameters_are_used_as_they_are() -> None:
    vectors = clustered(1_200, 16)
    ivf = build_index(vectors, cpu(kind="ivf_pq", metric="inner_product", nlist=7, nprobe=3, pq_m=8), rng())
    assert ivf.report.factory == "IVF7,PQ8np"
    assert (ivf.index.nlist, ivf.index.nprobe, ivf.index.pq.M) == (7, 3, 8)
    hnsw = build_index(
        vectors,
        cpu(kind="hnsw", metric="inner_product", hnsw_m=5, ef_construction=21, ef_search=17),
        rng(),
    )
    assert hnsw.report.factory == "HNSW5"
    assert hnsw.index.hnsw.nb_neighbors(1) == 5
    assert (hnsw.index.hnsw.efConstruction, hnsw.index.hnsw.efSearch) == (21, 17)


def test_dimensions_that_bytes_do_not_divide_are_padded_and_said() -> None:
    vectors = clustered(1_000, 13)
    report = build_index(vectors, cpu(kind="ivf_pq"), rng()).report
    assert report.factory == "L2norm,Pad16,IVF25,PQ4np"
    assert any("padded from 13 to 16" in note for note in report.notes)
    prime = plan_index(1_000_000, 509, IndexConfig(kind="ivf_pq"))
    assert (prime.pq_m, prime.factory) == (128, "L2norm,Pad512,IVF4000,PQ128np")


def test_more_probes_than_lists_and_few_rows_for_the_lists_are_said() -> None:
    report = build_index(clustered(400, 8), cpu(kind="ivf_flat", nlist=20, nprobe=50), rng()).report
    assert report.nprobe == 20
    assert any("few for 20 lists" in note for note in report.notes)
    assert any("nprobe = 50 was cut" in note for note in report.notes)
    few = plan_index(300, 8, IndexConfig(kind="ivf_pq"))
    assert any("few for a product quantiser" in note for note in few.notes)


@pytest.mark.parametrize(
    ("n_rows", "settings", "message"),
    [
        (0, {}, "there are 0 vectors"),
        (100, {"kind": "ivf_flat", "nlist": 101}, "nlist is 101, but there are only 100 rows.*kind: flat"),
        (255, {"kind": "ivf_pq"}, "only 255 rows.*kind: flat"),
        (300, {"kind": "ivf_pq", "pq_m": 9}, "pq_m is 9 bytes .* 8 dimensions"),
        (300, {"kind": "hnsw", "hnsw_m": 1}, "hnsw_m is 1"),
    ],
)
def test_parameters_that_the_rows_cannot_have_are_refused(
    n_rows: int, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(IndexingError, match=message):
        build_index(np.ones((n_rows, 8), dtype=np.float32), cpu(**settings), rng())


def test_a_misspelt_setting_is_refused() -> None:
    with pytest.raises(ValidationError, match="n_list"):
        IndexConfig.model_validate({"n_list": 5})


# ------------------------------------------------------------------------------------------ searching


@pytest.mark.parametrize("metric", ["cosine", "inner_product"])
def test_a_flat_index_finds_what_the_plain_loop_finds(metric: Metric) -> None:
    vectors, queries = clustered(300, 10), clustered(7, 10, seed=1)
    index = build_index(vectors, cpu(kind="flat", metric=metric), rng()).index
    rows, similarities = search(index, queries, 5)
    for query, found, found_similarities in zip(queries, rows, similarities, strict=True):
        scored = []
        for row, vector in enumerate(vectors):
            length = np.linalg.norm(query) * np.linalg.norm(vector) if metric == "cosine" else 1.0
            scored.append((float(np.dot(query, vector)) / length, row))
        expected = sorted(scored, reverse=True)[:5]
        assert found.tolist() == [row for _, row in expected]
        np.testing.assert_allclose(found_similarities, [score for score, _ in expected], rtol=1e-5)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf_flat", "ivf_pq"])
@pytest.mark.parametrize("metric", ["cosine", "inner_product"])
def test_every_kind_is_close_to_exact_search(kind: IndexKind, metric: Metric) -> None:
    built = build_index(clustered(1_500, 16), cpu(kind=kind, metric=metric), rng())
    least = {"flat": 1.0, "hnsw": 0.97, "ivf_flat": 0.9, "ivf_pq": 0.5}[kind]
    assert built.report.recall is not None
    assert least <= built.report.recall <= 1
    assert (built.report.kind, built.report.recall_sample, built.report.recall_k) == (kind, 200, 10)


def test_reported_recall_is_the_share_of_true_neighbours_found() -> None:
    vectors = clustered(1_000, 16)
    built = build_index(vectors, cpu(kind="ivf_flat", nlist=20, nprobe=1, recall_sample=1_000), rng())
    truth = knn_graph(vectors, 10).neighbours.numpy()
    hits = 0
    for row, vector in enumerate(vectors):
        found = [other for other in search(built.index, vector[None], 11)[0][0] if other != row][:10]
        hits += len(set(found) & set(truth[row].tolist()))
    assert built.report.recall == hits / 10_000
    assert built.report.recall < 1, "one list of twenty finds everything: the premise is gone"


def test_equal_vectors_do_not_count_against_recall() -> None:
    vectors = np.repeat(clustered(40, 8), 30, axis=0)
    assert build_index(vectors, cpu(kind="flat"), rng()).report.recall == 1.0


def test_recall_is_not_measured_when_not_asked_for_or_when_there_is_nothing_to_find() -> None:
    for vectors, sample in [(clustered(50, 4), 0), (clustered(1, 4), 10)]:
        report = build_index(vectors, cpu(recall_sample=sample), rng()).report
        assert (report.recall, report.recall_sample, report.milliseconds_per_query) == (None, 0, None)
    assert build_index(clustered(5, 4), cpu(), rng()).report.recall_k == 4


def test_more_neighbours_than_rows_leave_empty_places() -> None:
    index = build_index(np.eye(3, dtype=np.float32), cpu(kind="flat"), rng()).index
    rows, similarities = search(index, np.ones((2, 3)), 5)
    assert (rows.shape, similarities.shape) == ((2, 5), (2, 5))
    assert rows[:, 3:].tolist() == [[-1, -1], [-1, -1]]
    assert similarities[:, 3:].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_places_that_the_probed_lists_cannot_fill_are_empty() -> None:
    vectors = clustered(400, 6)
    index = build_index(vectors, cpu(kind="ivf_flat", nlist=10, nprobe=1), rng()).index
    rows, similarities = search(index, vectors[:1], 400)
    empty = rows[0] == -1
    assert 0 < empty.sum() < 400
    assert bool((similarities[0][empty] == 0).all())


def test_rows_of_zeros_are_counted_and_similar_to_nothing() -> None:
    vectors = clustered(30, 4)
    vectors[[3, 8]] = 0
    built = build_index(vectors, cpu(kind="flat"), rng())
    assert built.report.n_zero_vectors == 2
    assert search(built.index, vectors[:1], 30)[1].min() <= 0


def test_float16_rows_and_queries_are_searched_as_the_numbers_they_are() -> None:
    vectors = clustered(200, 8).astype(np.float16)
    half = build_index(vectors, cpu(kind="flat"), rng()).index
    whole = build_index(vectors.astype(np.float32), cpu(kind="flat"), rng()).index
    np.testing.assert_array_equal(search(half, vectors[:9], 4)[0], search(whole, vectors[:9], 4)[0])


def test_what_cannot_be_searched_is_refused() -> None:
    index = build_index(clustered(30, 4), cpu(), rng()).index
    with pytest.raises(IndexingError, match=r"queries are \(2, 5\).*4 dimensions"):
        search(index, np.ones((2, 5)), 3)
    with pytest.raises(IndexingError, match="k is 0"):
        search(index, np.ones((2, 4)), 0)
    with pytest.raises(IndexingError, match="query 1 holds NaN"):
        search(index, np.array([[1.0] * 4, [np.nan] * 4]), 3)


def test_what_faiss_itself_refuses_is_one_clear_error() -> None:
    class Refusing:
        """An index on a GPU, which can return 2,048 neighbours."""

        d, ntotal = 4, 10_000

        def search(self, queries: FloatArray, k: int) -> None:
            raise RuntimeError("k must be <= 2048")

    with pytest.raises(IndexingError, match="cannot search for 5000 neighbours: k must be <= 2048"):
        search(Refusing(), np.ones((1, 4)), 5_000)  # type: ignore[arg-type]  # the stand-in only refuses


def test_rows_that_are_not_numbers_are_refused_by_their_row() -> None:
    vectors = clustered(50, 4)
    vectors[[17, 30], 2] = np.nan, np.inf
    with pytest.raises(IndexingError, match=r"2 of 50 vectors .* first in row 17"):
        build_index(vectors, cpu(), rng())
    with pytest.raises(IndexingError, match=r"vectors are \(50,\)"):
        build_index(vectors[:, 0], cpu(), rng())


def test_progress_counts_rows_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    build_index(clustered(30, 4), cpu(), rng(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(30, 30)]


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf_flat", "ivf_pq"])
def test_equal_seeds_give_equal_indexes_and_other_seeds_other_training(kind: IndexKind) -> None:
    vectors = clustered(300, 8)
    faiss.omp_set_num_threads(2)
    bytes_of = [
        faiss.serialize_index(build_index(vectors, cpu(kind=kind), np.random.default_rng(seed)).index)
        for seed in (0, 0, 1)
    ]
    assert np.array_equal(bytes_of[0], bytes_of[1])
    if kind != "flat":
        assert not np.array_equal(bytes_of[0], bytes_of[2])
    assert faiss.omp_get_max_threads() == 2


def test_a_graph_built_on_all_cores_says_that_it_is_not_reproducible() -> None:
    report = build_index(clustered(100, 4), cpu(kind="hnsw", reproducible=False), rng()).report
    assert any("all cores" in note for note in report.notes)


def test_a_report_is_json() -> None:
    report = build_index(clustered(100, 4), IndexConfig(), rng()).report
    facts = json.loads(json.dumps(dataclasses.asdict(report)))
    assert (facts["kind"], facts["requested"], facts["recall"]) == ("flat", "auto", 1.0)


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf_flat", "ivf_pq"])
def test_a_saved_index_answers_as_the_one_in_memory_and_plain_faiss_reads_it(
    kind: IndexKind, tmp_path: Path
) -> None:
    vectors = clustered(600, 10)
    index = build_index(vectors, cpu(kind=kind), rng()).index
    save_index(index, tmp_path / "index.faiss")
    assert [path.name for path in tmp_path.iterdir()] == ["index.faiss"]
    expected = search(index, vectors[:20], 5)
    for loaded in (load_index(tmp_path / "index.faiss"), faiss.read_index(str(tmp_path / "index.faiss"))):
        rows, similarities = search(loaded, vectors[:20], 5)
        np.testing.assert_array_equal(rows, expected[0])
        np.testing.assert_array_equal(similarities, expected[1])


def test_any_damage_to_an_index_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "index.faiss"
    save_index(build_index(clustered(60, 5), cpu(kind="hnsw"), rng()).index, path)
    whole = path.read_bytes()
    damaged = [whole[:n] for n in (0, 5, 19, 20, 21, len(whole) // 2, len(whole) - 1)]
    for place in range(0, len(whole), 97):
        flipped = bytearray(whole)
        flipped[place] ^= 0xFF
        damaged.append(bytes(flipped))
    damaged += [whole + b"x", b"<html>" * 1000]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(IndexingError, match=r"damaged.*again"):
            load_index(path)


def test_a_missing_file_and_one_of_plain_faiss_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IndexingError, match=r"No such file.*Build the index again"):
        load_index(tmp_path / "nowhere.faiss")
    index = build_index(clustered(60, 5), cpu(), rng()).index
    faiss.write_index(index, str(tmp_path / "plain.faiss"))
    with pytest.raises(IndexingError, match="was not written here"):
        load_index(tmp_path / "plain.faiss")


def test_a_whole_file_that_faiss_does_not_know_is_refused(tmp_path: Path) -> None:
    class Unknown:
        """Writes what no FAISS wrote, through the same door."""

        def write_index(self, index: object, writer: "Unknown") -> None:
            writer.write(b"abcd" * 100)

        def PyCallbackIOWriter(self, write: object, size: int) -> SimpleNamespace:  # FAISS's own name
            return SimpleNamespace(write=write)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("features.index_file.import_faiss", Unknown)
        save_index(object(), tmp_path / "index.faiss")  # type: ignore[arg-type]  # the stand-in takes anything
    with pytest.raises(IndexingError, match=r"cannot be read by this FAISS \(\d"):
        load_index(tmp_path / "index.faiss")


def test_a_full_disk_leaves_the_old_index_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "index.faiss"
    index = build_index(clustered(60, 5), cpu(), rng()).index
    save_index(index, path)
    before = path.read_bytes()
    opened = Path.open

    def full(self: Path, mode: str = "r") -> object:
        return opened(Path("/dev/full") if mode == "wb" else self, mode)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left"):
        save_index(index, path)
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["index.faiss"]
    assert path.read_bytes() == before


# ------------------------------------------------------------------------------------- CPU or GPU


@pytest.fixture
def fresh_backend() -> Iterator[None]:
    faiss_backend.cache_clear()
    yield
    faiss_backend.cache_clear()


def fake_faiss(n_gpus: int) -> SimpleNamespace:
    return SimpleNamespace(__version__="9.9", StandardGpuResources=object, get_num_gpus=lambda: n_gpus)


@pytest.mark.usefixtures("fresh_backend")
def test_backend_tells_a_build_without_gpu_from_one_that_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_only = SimpleNamespace(__version__="9.9", get_num_gpus=lambda: 0)
    monkeypatch.setattr(backend_module, "import_faiss", lambda: cpu_only)
    backend = faiss_backend()
    assert backend == FaissBackend("9.9", gpu_build=False, n_gpus=0, gpu=False, probe=backend.probe)
    assert "no GPU support" in backend.probe
    faiss_backend.cache_clear()
    monkeypatch.setattr(backend_module, "import_faiss", lambda: fake_faiss(0))
    backend = faiss_backend()
    assert (backend.gpu_build, backend.gpu, backend.probe) == (True, False, "FAISS sees no GPU")


@pytest.mark.usefixtures("fresh_backend")
@pytest.mark.parametrize(
    ("probe", "works", "text"),
    [
        ("pass", True, "a search ran on GPU 0"),
        ("import os; os.abort()", False, "failed: exit status -6"),
        ("raise RuntimeError('no kernel image is available')", False, "failed: .*no kernel image"),
        ("import sys, time; print('starting'); time.sleep(60)", False, "failed: no answer within"),
    ],
)
def test_a_gpu_counts_only_when_a_search_ran_in_a_process_of_its_own(
    probe: str, works: bool, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "import_faiss", lambda: fake_faiss(1))
    monkeypatch.setattr(backend_module, "_PROBE", probe)
    monkeypatch.setattr(backend_module, "_PROBE_TIMEOUT_S", 3)
    backend = faiss_backend()
    assert (backend.gpu_build, backend.n_gpus, backend.gpu) == (True, 1, works)
    assert re.search(text, backend.probe)


def test_a_probe_that_cannot_start_counts_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "could not be started" in backend_module._run_probe("pass")


@pytest.mark.parametrize("error", [ImportError("no module"), RuntimeError("the CUDA runtime is missing")])
def test_faiss_that_cannot_be_imported_is_one_clear_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(backend_module.importlib, "import_module", fail)
    with pytest.raises(IndexingError, match=rf"{error}.*tandem-recsys\[cpu\]"):
        backend_module.import_faiss()


def test_where_the_gpu_does_not_work_auto_builds_on_the_cpu_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = FaissBackend("9.9", gpu_build=True, n_gpus=1, gpu=False, probe="failed: no kernel image")
    monkeypatch.setattr(indexing, "faiss_backend", lambda: broken)
    report = build_index(clustered(60, 4), cpu(device="auto"), rng()).report
    assert (report.device, report.device_reason) == ("cpu", "failed: no kernel image")
    with pytest.raises(IndexingError, match=r"gpu was asked for, but failed: no kernel image.*device: auto"):
        build_index(clustered(60, 4), cpu(device="gpu"), rng())


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU that is the CPU, so that the way there and back is walked; what was moved is listed."""
    moved: list[str] = []

    def there(index: faiss.Index) -> faiss.Index:
        moved.append(f"{type(index).__name__} with {index.ntotal}")
        return faiss.clone_index(index)

    def back(index: faiss.Index) -> faiss.Index:
        moved.append(f"back with {index.ntotal}")
        return faiss.clone_index(index)

    works = FaissBackend("9.9", gpu_build=True, n_gpus=1, gpu=True, probe="a search ran on GPU 0")
    monkeypatch.setattr(indexing, "faiss_backend", lambda: works)
    monkeypatch.setattr(indexing, "to_gpu", there)
    monkeypatch.setattr(indexing, "to_cpu", back)
    return moved


def test_a_gpu_trains_fills_and_answers_and_the_index_comes_back(pretended_gpu: list[str]) -> None:
    vectors = clustered(700, 8)
    built = build_index(vectors, cpu(kind="ivf_flat", metric="inner_product", device="auto"), rng())
    assert pretended_gpu == ["IndexFlatIP with 0", "IndexIVFFlat with 0", "back with 700"]
    assert (built.report.device, built.report.device_reason) == ("gpu", "a search ran on GPU 0")
    same = build_index(vectors, cpu(kind="ivf_flat", metric="inner_product"), rng())
    np.testing.assert_array_equal(search(built.index, vectors, 5)[0], search(same.index, vectors, 5)[0])


def test_a_graph_index_stays_on_the_cpu_and_says_why(pretended_gpu: list[str]) -> None:
    report = build_index(clustered(60, 4), cpu(kind="hnsw", device="auto"), rng()).report
    assert (report.device, report.device_reason, pretended_gpu) == ("cpu", "FAISS has no HNSW for GPUs", [])


def test_a_gpu_that_fails_on_the_way_hands_over_to_the_cpu(
    pretended_gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(index: faiss.Index) -> faiss.Index:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(indexing, "to_gpu", out_of_memory)
    report = build_index(clustered(700, 8), cpu(kind="ivf_flat", device="auto"), rng()).report
    assert report.device == "cpu"
    assert "could not build L2norm,IVF17,Flat, so the CPU did: out of memory" in report.device_reason
    with pytest.raises(IndexingError, match=r"cannot build .*out of memory"):
        build_index(clustered(700, 8), cpu(kind="ivf_flat", device="gpu"), rng())


def test_an_index_goes_to_the_first_gpu_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_faiss(1)
    module.index_cpu_to_gpu = lambda resources, number, index: (type(resources), number, index)
    module.index_gpu_to_cpu = lambda index: index[2]
    monkeypatch.setattr(backend_module, "import_faiss", lambda: module)
    index = object()
    on_gpu = backend_module.to_gpu(index)  # type: ignore[arg-type]  # any object goes there and back
    assert on_gpu == (object, 0, index)
    assert backend_module.to_cpu(on_gpu) is index


@pytest.mark.gpu
def test_a_real_gpu_finds_what_the_cpu_finds() -> None:
    if not faiss_backend().gpu:
        pytest.skip(f"FAISS cannot use a GPU here: {faiss_backend().probe}")
    vectors = clustered(20_000, 64)
    for kind in ("flat", "ivf_flat", "ivf_pq"):
        built = build_index(vectors, IndexConfig(kind=kind, device="gpu"), rng())
        same = build_index(vectors, cpu(kind=kind), rng())
        assert built.report.device == "gpu"
        assert built.report.recall == pytest.approx(same.report.recall, abs=0.05)
