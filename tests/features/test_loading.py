import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from torch import Tensor

from features import loading
from features.catalogue import Catalogue
from features.errors import FeatureError
from features.extraction import ExtractionConfig, extract
from features.images import ImageLimits
from features.loading import Loader, Source, Workers, choose_workers, prefetched
from tests.features.small_encoder import SmallEncoder, small_catalogue, to_small_pixels

PROCESSES = ExtractionConfig(batch_size=4, rows_per_part=8, workers="processes", n_workers=2)
ROOT = Path(__file__).parents[2]


def test_processes_and_threads_give_the_same_bytes(tmp_path: Path) -> None:
    catalogue = small_catalogue(tmp_path / "pictures", 24)
    (tmp_path / "pictures" / "5.png").unlink()
    for kind in ("threads", "processes"):
        config = ExtractionConfig(**(PROCESSES.model_dump() | {"workers": kind}))
        report = extract(SmallEncoder(), catalogue, "fused", tmp_path / kind, config)
        assert report.workers == f"2 {kind}"
        assert report.n_unreadable == 1
    for path in (tmp_path / "threads").iterdir():
        assert path.read_bytes() == (tmp_path / "processes" / path.name).read_bytes()


def test_taking_turns_changes_no_byte(tmp_path: Path) -> None:
    catalogue = small_catalogue(tmp_path / "pictures", 50)
    (tmp_path / "pictures" / "5.png").unlink()
    for kind, expected in (("threads", "1 threads"), ("auto", "3 turns")):
        config = ExtractionConfig(batch_size=20, rows_per_part=30, workers=kind, n_workers=int(expected[0]))
        report = extract(SmallEncoder(), catalogue, "fused", tmp_path / kind, config)
        assert report.workers == expected
        assert (report.n_unreadable, report.encoded) == (1, 49)
    for path in (tmp_path / "threads").iterdir():
        assert path.read_bytes() == (tmp_path / "auto" / path.name).read_bytes()


def test_a_turn_is_decoded_when_it_is_asked_for_and_files_are_read_ahead() -> None:
    events: list[str] = []

    class Noting:
        def read(self, sources: Sequence[Source]) -> list[bytes]:
            events.append(f"read {sources[0].text}")
            return []

        def prepare(self, sources: Sequence[Source], files: Sequence[bytes]) -> str:
            events.append(f"decode {sources[0].text}")
            return sources[0].text

    requests = [(number, [Source(text=str(number))]) for number in range(9)]
    workers = Workers("turns", 2)
    with prefetched(Noting(), requests, workers, lambda number: number % 3 == 2) as loaded:
        assert next(loaded) == (0, "0")
        assert [next(loaded) for _ in range(2)] == [(1, "1"), (2, "2")]
        decoded = {event for event in events if event.startswith("decode")}
        assert decoded == {"decode 0", "decode 1", "decode 2"}
        deadline = time.monotonic() + 5
        while "read 8" not in events and time.monotonic() < deadline:
            time.sleep(0.01)
        assert {"read 3", "read 4", "read 5", "read 8"} <= set(events)
        assert list(loaded) == [(number, str(number)) for number in range(3, 9)]


def die(image: Image.Image) -> Tensor:
    os._exit(9)


def test_a_loader_process_that_dies_is_a_clear_error(tmp_path: Path) -> None:
    encoder = SmallEncoder()
    encoder.image_transform = die
    with pytest.raises(FeatureError, match=r"one of 2 loader processes died.*whole parts are kept"):
        extract(encoder, small_catalogue(tmp_path / "pictures", 4), "image", tmp_path / "out", PROCESSES)


def test_an_error_of_a_loader_ends_the_run(tmp_path: Path) -> None:
    def fail(texts: Sequence[str]) -> list[list[int]]:
        raise ZeroDivisionError("in the tokenizer")

    encoder = SmallEncoder()
    encoder.tokenizer = fail
    with pytest.raises(ZeroDivisionError, match="in the tokenizer"):
        extract(encoder, small_catalogue(tmp_path / "pictures", 4), "text", tmp_path / "out")


def test_no_more_is_loaded_ahead_than_two_requests_a_worker() -> None:
    taken: list[int] = []

    def requests() -> Iterator[tuple[int, Sequence[Source]]]:
        for number in range(50):
            taken.append(number)
            yield number, [Source(text="a")]

    loader = Loader("", ImageLimits(), None, lambda texts: [[1] for _ in texts])
    with prefetched(loader, requests(), Workers("threads", 2)) as loaded:
        assert next(loaded)[0] == 0
        assert len(taken) <= 6
        assert [number for number, _ in loaded] == list(range(1, 50))


def test_a_run_given_up_does_not_load_what_is_left(tmp_path: Path) -> None:
    seen: list[str] = []

    def slow(texts: Sequence[str]) -> list[list[int]]:
        time.sleep(0.02)
        seen.extend(texts)
        return [[1]]

    requests = ((number, [Source(text=str(number))]) for number in range(1000))
    loader = Loader("", ImageLimits(), None, slow)
    with prefetched(loader, requests, Workers("threads", 1)) as loaded:
        next(loaded)
    assert len(seen) < 10


def test_a_loader_without_anything_readable_hands_over_reasons_only(tmp_path: Path) -> None:
    loader = Loader(str(tmp_path), ImageLimits(), to_small_pixels, lambda texts: [[1] for _ in texts])
    loaded = loader([Source(("a.png",), "0" * 64, "text"), Source((), "", "text")])
    assert loaded.readable == []
    assert loaded.pixels is None
    assert loaded.token_ids == []
    assert set(loaded.failures) == {0, 1}


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("n_cores", "device", "n_pictures", "free_bytes", "expected"),
    [
        (2, CPU, 10**6, 2**34, Workers("turns", 2)),
        (2, CPU, 0, 2**34, Workers("threads", 1)),
        (8, CPU, 10**6, 2**34, Workers("turns", 8)),
        (16, GPU, 100, 2**34, Workers("threads", 12)),
        (16, GPU, 10**6, 2**34, Workers("processes", 12)),
        (16, GPU, 10**6, 2**26, Workers("threads", 12)),
        (2, GPU, 10**6, 2**34, Workers("threads", 1)),
        (16, GPU, 0, 2**34, Workers("threads", 1)),
    ],
)
def test_workers_are_chosen_by_device_cores_work_and_shared_memory(
    monkeypatch: pytest.MonkeyPatch,
    n_cores: int,
    device: torch.device,
    n_pictures: int,
    free_bytes: int,
    expected: Workers,
) -> None:
    monkeypatch.setattr(loading, "_usable_cores", lambda: n_cores)
    usage = shutil.disk_usage("/")._replace(free=free_bytes)
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda _: usage)
    assert choose_workers("auto", 0, n_pictures, device) == expected


def test_what_was_asked_for_is_used() -> None:
    assert choose_workers("processes", 3, 0, CPU) == Workers("processes", 3)


SCRIPT = """
import sys
from pathlib import Path
from features.extraction import ExtractionConfig, extract
from tests.features.small_encoder import SmallEncoder, small_catalogue

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    config = ExtractionConfig(batch_size=4, rows_per_part=8, workers=sys.argv[2], n_workers=2)
    catalogue = small_catalogue(folder / "pictures", 80, repeat_every=5)
    extract(SmallEncoder(delay_s=0.05), catalogue, "image", folder / "out", config)
"""


@pytest.mark.parametrize("workers", ["threads", "processes"])
def test_after_kill_9_only_unfinished_parts_are_encoded_and_the_bytes_are_the_same(
    tmp_path: Path, workers: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path), workers], env=environment)
    out = tmp_path / "out"
    wait_until(lambda: len(list(out.glob("part-*"))) >= 3, process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert (len(children) >= 2) == (workers == "processes")
    process.send_signal(signal.SIGKILL)
    process.wait()
    n_whole = len(list(out.glob("part-*")))
    assert 3 <= n_whole < 10, "the run must have been killed halfway"
    catalogue = small_catalogue(tmp_path / "pictures", 80, repeat_every=5)
    config = ExtractionConfig(batch_size=4, rows_per_part=8)
    encoder = SmallEncoder()
    report = extract(encoder, catalogue, "image", out, config)
    assert report.kept_rows == 8 * n_whole
    assert encoder.n_encoded <= 80 - report.kept_rows
    extract(SmallEncoder(), catalogue, "image", tmp_path / "fresh", config)
    assert sorted(path.name for path in out.iterdir()) == [f"part-{part:05d}.parquet" for part in range(10)]
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "fresh" / path.name).read_bytes()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, "loader processes must end with the process they work for"


def wait_until(condition: object, process: subprocess.Popen[bytes], timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, "the extraction ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_catalogue_on_another_file_system_is_extracted(tmp_path: Path) -> None:
    import fsspec

    local = small_catalogue(tmp_path / "pictures", 5)
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "pictures").iterdir():
        memory.pipe(f"/shop/{path.name}", path.read_bytes())
    remote = Catalogue(local.items, "memory://shop")
    for name, catalogue in (("local", local), ("remote", remote)):
        assert extract(SmallEncoder(), catalogue, "image", tmp_path / name).n_ok == 5
    assert (tmp_path / "local" / "part-00000.parquet").read_bytes() == (
        tmp_path / "remote" / "part-00000.parquet"
    ).read_bytes()
