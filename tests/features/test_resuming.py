import errno
from pathlib import Path
from typing import Any

import pytest

from features import assembling
from features.catalogue import Modality
from features.extraction import ExtractionConfig
from features.parts import PartFile
from tests.features.small_encoder import SMALL, SmallEncoder, bytes_of, parts_of, run, small_catalogue


@pytest.mark.parametrize("modality", ["image", "text"])
def test_what_is_resumed_equals_what_was_never_interrupted(tmp_path: Path, modality: Modality) -> None:
    catalogue = small_catalogue(tmp_path / "pictures", 60, repeat_every=5)
    run(tmp_path / "out", catalogue, modality)
    whole = bytes_of(tmp_path / "out")
    for lost in ((5,), (2, 3), (0, 4), (0, 1, 2, 3, 4, 5)):
        for part in lost:
            parts_of(tmp_path / "out")[0].with_name(f"part-{part:05d}.parquet").unlink()
        (tmp_path / "out" / ".part-00002.parquet.partial").write_bytes(b"half")
        encoder = SmallEncoder()
        report = run(tmp_path / "out", catalogue, modality, encoder=encoder)
        assert bytes_of(tmp_path / "out") == whole
        assert report.kept_rows == 60 - 10 * len(lost)
        assert encoder.n_encoded <= 10 * len(lost)
        assert (report.n_ok, report.notes) == (60, ())


def test_unreadable_rows_survive_a_resume(tmp_path: Path) -> None:
    catalogue = small_catalogue(tmp_path / "pictures", 40, repeat_every=5)
    for name in ("27.png", "34.png"):
        (tmp_path / "pictures" / name).unlink()
    run(tmp_path / "out", catalogue)
    whole = bytes_of(tmp_path / "out")
    (tmp_path / "out" / "part-00003.parquet").unlink()
    report = run(tmp_path / "out", catalogue)
    assert bytes_of(tmp_path / "out") == whole
    assert report.n_unreadable == 2


@pytest.mark.parametrize("damage", ["cut", "bit"])
def test_a_damaged_part_is_thrown_away_encoded_again_and_said_so(tmp_path: Path, damage: str) -> None:
    catalogue = small_catalogue(tmp_path / "pictures", 30)
    run(tmp_path / "out", catalogue)
    whole = bytes_of(tmp_path / "out")
    path = tmp_path / "out" / "part-00001.parquet"
    data = bytearray(whole[path.name])
    if damage == "bit":
        offset = PartFile(path).vectors_offset
        assert offset is not None
        data[offset + 33] ^= 1
    path.write_bytes(data[:-9] if damage == "cut" else data)
    said: list[str] = []
    encoder = SmallEncoder()
    report = run(tmp_path / "out", catalogue, encoder=encoder, say=said.append)
    assert bytes_of(tmp_path / "out") == whole
    assert encoder.n_encoded == 10
    assert said == list(report.notes) == ["part-00001.parquet is damaged; its 10 rows are encoded again"]


@pytest.mark.parametrize(
    "change", [{"batch_size": 5}, {"dtype": "float16"}, {"rows_per_part": 8}, {"precision": "bfloat16"}]
)
def test_parts_of_another_extraction_are_not_mixed_in(tmp_path: Path, change: dict[str, Any]) -> None:
    catalogue = small_catalogue(tmp_path / "pictures", 30)
    run(tmp_path / "out", catalogue)
    config = ExtractionConfig(**(SMALL.model_dump() | change))
    report = run(tmp_path / "out", catalogue, config=config)
    run(tmp_path / "fresh", catalogue, config=config)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "fresh")
    assert report.kept_rows == 0
    assert "part-00000.parquet was left by an extraction with other settings" in report.notes[0]


def test_parts_of_a_larger_catalogue_are_removed(tmp_path: Path) -> None:
    run(tmp_path / "out", small_catalogue(tmp_path / "pictures", 30))
    smaller = small_catalogue(tmp_path / "pictures", 15)
    report = run(tmp_path / "out", smaller)
    run(tmp_path / "fresh", smaller)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "fresh")
    assert report.kept_rows == 0


def test_a_full_disk_stops_the_run_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = small_catalogue(tmp_path / "pictures", 60)
    written: list[str] = []

    def until_full(path: Path, *arguments: Any) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path.name)
        real(path, *arguments)

    real = assembling.write_part
    with monkeypatch.context() as patch:
        patch.setattr(assembling, "write_part", until_full)
        with pytest.raises(OSError, match="No space left on device"):
            run(tmp_path / "out", catalogue)
    assert [path.name for path in parts_of(tmp_path / "out")] == written
    assert run(tmp_path / "out", catalogue).kept_rows == 20
    run(tmp_path / "fresh", catalogue)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "fresh")


def test_an_error_of_the_last_part_surfaces_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(assembling, "write_part", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "out", small_catalogue(tmp_path / "pictures", 5))


def test_parts_under_each_others_names_are_encoded_again(tmp_path: Path) -> None:
    catalogue = small_catalogue(tmp_path / "pictures", 30)
    run(tmp_path / "out", catalogue)
    whole = bytes_of(tmp_path / "out")
    (tmp_path / "out" / "part-00000.parquet").write_bytes(whole["part-00001.parquet"])
    report = run(tmp_path / "out", catalogue)
    assert bytes_of(tmp_path / "out") == whole
    assert report.notes == ("part-00000.parquet holds other items; it is encoded again",)
