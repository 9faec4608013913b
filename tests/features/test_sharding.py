import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from features.catalogue import Catalogue, Modality
from features.encoding import ExtractionConfig
from features.errors import EncoderError, FeatureError
from features.extraction import ExtractionReport, recipe_digest
from features.known import KnownVectors
from features.parts import PartFile
from features.sharding import (
    BlocksMissingError,
    Settled,
    Shard,
    ShardReport,
    assemble,
    block_name,
    count_parts,
    encode_shard,
    missing_parts,
    settle,
    shard_of,
    shards_of,
)
from tests.features.small_encoder import SMALL, SmallEncoder, bytes_of, parts_of, run, small_catalogue


def one_shard(folder: Path, catalogue: Catalogue, shard: str, **options: Any) -> ShardReport:
    return encode_shard(
        options.pop("encoder", SmallEncoder()),
        catalogue,
        options.pop("modality", "image"),
        folder / "blocks",
        config=options.pop("config", SMALL),
        shard=Shard.parse(shard),
        **options,
    )


def put_together(folder: Path, catalogue: Catalogue, n_shards: int, **options: Any) -> ExtractionReport:
    return assemble(
        SmallEncoder().info,
        catalogue,
        options.pop("modality", "image"),
        folder / "blocks",
        folder / "parts",
        config=options.pop("config", SMALL),
        n_shards=n_shards,
        **options,
    )


def blocks_of(folder: Path) -> dict[str, int]:
    """Blocks and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in sorted((folder / "blocks").glob("block-*"))}


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    """60 items in 6 parts: repeats across parts, a missing picture, an unreadable one that two share."""
    made = small_catalogue(tmp_path / "pictures", 60, repeat_every=5)
    (tmp_path / "pictures" / "12.png").unlink()  # item 12's, and item 19's, which repeats it
    (tmp_path / "pictures" / "19.png").unlink()
    items = made.items.with_columns(
        pl.when(pl.col("item_id") == "item-31").then(None).otherwise(pl.col(name)).alias(name)
        for name in ("image", "image_hash", "title")
    )
    return Catalogue(items, made.image_root)


@pytest.mark.parametrize("modality", ["image", "text", "fused"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_shards_in_any_order_give_what_one_process_gives(
    tmp_path: Path, catalogue: Catalogue, modality: Modality, order: tuple[int, ...]
) -> None:
    whole = run(tmp_path / "whole", catalogue, modality)
    reports = [one_shard(tmp_path, catalogue, f"{shard}/3", modality=modality) for shard in order]
    report = put_together(tmp_path, catalogue, 3, modality=modality)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")
    same = (
        "rows",
        "n_ok",
        "n_missing",
        "n_unreadable",
        "encoded",
        "reused",
        "duplicates",
        "parts",
        "reasons",
    )
    assert {name: getattr(report, name) for name in same} == {name: getattr(whole, name) for name in same}
    assert report.n_missing == 1
    assert report.duplicates > 0
    assert (report.n_unreadable > 0) == (modality != "text")
    assert [each.blocks for each in reports] == [2, 2, 2]
    assert sum(each.encoded for each in reports) == whole.encoded


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_many_shards_of_odd_batches_too(tmp_path: Path, batch_size: int) -> None:
    catalogue = small_catalogue(tmp_path / "pictures", 45, repeat_every=4)
    config = ExtractionConfig(batch_size=batch_size, rows_per_part=4)
    run(tmp_path / "whole", catalogue, config=config)
    for shard in range(15):  # more shards than parts
        one_shard(tmp_path, catalogue, f"{shard}/15", config=config)
    put_together(tmp_path, catalogue, 15, config=config)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


def test_a_catalogue_without_items_has_one_empty_block(tmp_path: Path) -> None:
    catalogue = small_catalogue(tmp_path / "pictures", 0)
    run(tmp_path / "whole", catalogue)
    for shard in ("0/2", "1/2"):
        one_shard(tmp_path, catalogue, shard)
    put_together(tmp_path, catalogue, 2)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


def test_known_vectors_are_taken_over_by_the_shards(tmp_path: Path, catalogue: Catalogue) -> None:
    run(tmp_path / "earlier", small_catalogue(tmp_path / "pictures-2", 25))
    recipe = recipe_digest(SmallEncoder().info, "image", SMALL)
    known = KnownVectors(parts_of(tmp_path / "earlier"), recipe)
    whole = run(tmp_path / "whole", catalogue, known=known)
    for shard in ("0/2", "1/2"):
        one_shard(tmp_path, catalogue, shard, known=known)
    report = put_together(tmp_path, catalogue, 2)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")
    assert report.reused == whole.reused > 0
    assert report.encoded == whole.encoded > 0


def test_what_a_killed_unsharded_run_left_is_kept_by_the_assembly(
    tmp_path: Path, catalogue: Catalogue
) -> None:
    run(tmp_path / "whole", catalogue)
    for shard in ("0/2", "1/2"):
        one_shard(tmp_path, catalogue, shard)
    put_together(tmp_path, catalogue, 2)
    for part in (1, 4):
        parts_of(tmp_path / "parts")[0].with_name(f"part-{part:05d}.parquet").unlink()
    put_together(tmp_path, catalogue, 2)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


def test_a_killed_worker_s_shard_goes_on_where_it_was(tmp_path: Path) -> None:
    catalogue = small_catalogue(tmp_path / "pictures-0", 60, repeat_every=5)
    run(tmp_path / "whole", catalogue)
    command = [sys.executable, "-m", "tests.features.sharding_worker", str(tmp_path), "0/1"]
    with subprocess.Popen([*command, "0.15"]) as worker:
        while len(blocks_of(tmp_path)) < 2:
            assert worker.poll() is None
            time.sleep(0.01)
        os.kill(worker.pid, signal.SIGKILL)
    before = blocks_of(tmp_path)
    assert 2 <= len(before) < 6
    subprocess.run([*command, "0"], check=True)
    after = blocks_of(tmp_path)
    assert before.items() <= after.items(), "whole blocks are not made again"
    assert (tmp_path / "kept").read_text() == str(len(before))
    put_together(tmp_path, catalogue, 1)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


def test_two_workers_of_the_same_shard_at_once_leave_whole_blocks(
    tmp_path: Path, catalogue: Catalogue
) -> None:
    run(tmp_path / "whole", catalogue)
    workers = [threading.Thread(target=one_shard, args=(tmp_path, catalogue, "0/1")) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert {path.name for path in (tmp_path / "blocks").iterdir()} == {block_name(part) for part in range(6)}
    put_together(tmp_path, catalogue, 1)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "bit"])
def test_a_damaged_block_is_refused_and_made_again(tmp_path: Path, catalogue: Catalogue, damage: str) -> None:
    run(tmp_path / "whole", catalogue)
    for shard in ("0/2", "1/2"):
        one_shard(tmp_path, catalogue, shard)
    path = tmp_path / "blocks" / block_name(3)
    data = bytearray(path.read_bytes())
    if damage == "bit":
        offset = PartFile(path).vectors_offset
        assert offset is not None
        data[offset + 33] ^= 1
    path.write_bytes(data[:-9] if damage == "cut" else data)
    mine = shard_of(3, 6, 2)
    with pytest.raises(BlocksMissingError, match=f"block-00003.parquet is damaged.*run the shards {mine}/2"):
        put_together(tmp_path, catalogue, 2)
    said: list[str] = []
    report = one_shard(tmp_path, catalogue, f"{mine}/2", say=said.append)
    assert (report.blocks, report.kept) == (3, 2)
    assert said == ["block-00003.parquet is damaged; it is encoded again"] == list(report.notes)
    put_together(tmp_path, catalogue, 2)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


def test_missing_shards_are_named_and_nothing_is_written(tmp_path: Path, catalogue: Catalogue) -> None:
    one_shard(tmp_path, catalogue, "1/3")
    with pytest.raises(
        BlocksMissingError, match=r"4 of 6 blocks .*; run the shards 0/3, 2/3 again"
    ) as raised:
        put_together(tmp_path, catalogue, 3)
    assert raised.value.shards == (0, 2)
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 5}, {"dtype": "float16"}, {"precision": "bfloat16"}, {"limits": {"max_pixels": 10_000}}],
)
def test_blocks_of_other_settings_are_refused_and_made_again(
    tmp_path: Path, catalogue: Catalogue, change: dict[str, Any]
) -> None:
    one_shard(tmp_path, catalogue, "0/1")
    config = ExtractionConfig.model_validate(SMALL.model_dump() | change)
    with pytest.raises(BlocksMissingError, match=r"block-00000.parquet was made with other settings, \.\.\."):
        put_together(tmp_path, catalogue, 1, config=config)
    assert one_shard(tmp_path, catalogue, "0/1", config=config).kept == 0
    put_together(tmp_path, catalogue, 1, config=config)


def test_blocks_of_another_encoder_catalogue_or_purpose_are_made_again(
    tmp_path: Path, catalogue: Catalogue
) -> None:
    one_shard(tmp_path, catalogue, "0/1")
    other = SmallEncoder(seed=1)
    assert one_shard(tmp_path, catalogue, "0/1", encoder=other).kept == 0
    assert one_shard(tmp_path, catalogue, "0/1", encoder=other, purpose="again").kept == 0
    assert one_shard(tmp_path, catalogue, "0/1", encoder=other, purpose="again").kept == 6
    changed = Catalogue(catalogue.items.reverse(), catalogue.image_root)
    assert one_shard(tmp_path, changed, "0/1", encoder=other, purpose="again").kept == 0


def test_another_number_of_shards_takes_over_whole_blocks(tmp_path: Path, catalogue: Catalogue) -> None:
    one_shard(tmp_path, catalogue, "0/2")
    kept = [one_shard(tmp_path, catalogue, f"{shard}/3").kept for shard in range(3)]
    assert sum(kept) == 3
    put_together(tmp_path, catalogue, 3)


@pytest.mark.parametrize(("n_parts", "n_shards"), [*itertools.product([1, 6, 61, 1000], [1, 2, 3, 7, 64])])
def test_shards_split_the_parts_evenly_and_always_alike(n_parts: int, n_shards: int) -> None:
    shares = [Shard(index, n_shards).parts(n_parts) for index in range(n_shards)]
    assert sorted(itertools.chain(*shares)) == list(range(n_parts))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert all(shards_of(share, n_parts, n_shards) in {(), (index,)} for index, share in enumerate(shares))


def test_the_deal_is_the_same_in_every_version() -> None:
    """Workers of two versions may share a folder; Python's own hash would differ between two processes."""
    assert [shard_of(part, 8, 4) for part in range(8)] == [2, 0, 2, 0, 1, 3, 1, 3]


def test_names_of_blocks_tell_which_are_missing(catalogue: Catalogue) -> None:
    n_parts = count_parts(catalogue.contents("image"), SMALL)
    assert n_parts == 6
    assert missing_parts({block_name(0), block_name(5)}, n_parts) == [1, 2, 3, 4]


@pytest.mark.parametrize("text", ["4/4", "1", "-1/2", "a/b", "0/0", "1/2/3"])
def test_no_shard_is_refused(text: str) -> None:
    with pytest.raises(FeatureError, match="such as 0/2 and 1/2"):
        Shard.parse(text)
    assert str(Shard.parse(" 3/4 ")) == "3/4"


def test_what_is_left_open_is_settled_once(tmp_path: Path, catalogue: Catalogue) -> None:
    config = ExtractionConfig(precision="auto", rows_per_part=10)
    settled = settle(SmallEncoder(), catalogue, "image", config)
    assert settled.precision == "float32"
    assert "no weights" in settled.reason
    assert Settled.model_validate_json(settled.model_dump_json()) == settled
    assert settled.probed.taken == "float32"
    assert settle(SmallEncoder(), catalogue, "image", SMALL).reason == "float32, as asked for"
    with pytest.raises(ValueError, match="are not settled"):
        put_together(tmp_path, catalogue, 2, config=config)
    applied = settled.applied_to(config)
    run(tmp_path / "whole", catalogue, config=config)
    for shard in ("0/2", "1/2"):
        one_shard(tmp_path, catalogue, shard, config=applied)
    report = put_together(tmp_path, catalogue, 2, config=applied, settled=settled)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")
    assert report.batch_size == settled.batch_size


def test_each_whole_block_and_the_progress_are_told(tmp_path: Path, catalogue: Catalogue) -> None:
    names: list[str] = []
    progress: list[tuple[int, int]] = []
    one_shard(
        tmp_path,
        catalogue,
        "1/2",
        written=names.append,
        progress=lambda done, total: progress.append((done, total)),
    )
    assert sorted(names) == [block_name(part) for part in Shard(1, 2).parts(6)]
    assert progress[-1][0] == progress[-1][1] > 0
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)


def test_a_modality_that_the_encoder_lacks_is_refused(tmp_path: Path, catalogue: Catalogue) -> None:
    encoder = SmallEncoder()
    encoder.info = encoder.info.model_copy(update={"modalities": ("image",)})
    with pytest.raises(EncoderError, match="no modality 'text'"):
        one_shard(tmp_path, catalogue, "0/2", encoder=encoder, modality="text")


def test_an_error_of_the_disk_stops_the_worker(
    tmp_path: Path, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("features.sharding.write_part", full)
    with pytest.raises(OSError, match="No space left"):
        one_shard(tmp_path, catalogue, "0/2")
    assert list((tmp_path / "blocks").iterdir()) == []
