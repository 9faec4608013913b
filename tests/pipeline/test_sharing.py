"""The folder that several workers share until an artefact is whole: seen by all, outlived by nobody."""

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipeline.errors import StoreError
from pipeline.manifest import InputRef
from pipeline.sharing import SharedFolder
from pipeline.shelf import Leftover
from pipeline.store import Store
from tests.pipeline.store_world import produce, small

NOW = timedelta(0)


def share(
    store: Store, worker: str = "shard 0 of 2", inputs: tuple[InputRef, ...] = ()
) -> AbstractContextManager[SharedFolder]:
    return store.share("features", slug="number 1", identity={"number": 1}, inputs=inputs, worker=worker)


def leave(shared: SharedFolder, name: str, data: bytes) -> None:
    (shared.folder / name).write_bytes(data)
    shared.publish(name)


def test_what_one_worker_publishes_another_machine_fetches(open_place: Callable[..., Store]) -> None:
    with share(open_place("cache-a")) as shared:
        leave(shared, "block-00001.parquet", b"one")
        leave(shared, "block-00000.parquet", b"zero")
    with share(open_place("cache-b"), "shard 1 of 2") as shared:
        assert shared.names() == ["block-00000.parquet", "block-00001.parquet"]
        shared.fetch(shared.names())
        assert (shared.folder / "block-00001.parquet").read_bytes() == b"one"
        shared.remove()
        assert shared.names() == []
        assert not any(shared.folder.iterdir())


def test_the_first_worker_settles_for_all(open_place: Callable[..., Store]) -> None:
    asked: list[str] = []

    def answer(name: str) -> Callable[[], bytes]:
        def find_out() -> bytes:
            asked.append(name)
            return name.encode()

        return find_out

    with share(open_place("cache-a")) as shared:
        assert shared.settle("settled.json", answer("a")) == b"a"
    with share(open_place("cache-b"), "shard 1 of 2") as shared:
        assert shared.settle("settled.json", answer("b")) == b"a"
    assert asked == ["a"]


def test_of_many_answers_at_once_all_workers_get_one(local_store: Store) -> None:
    """They all find nothing settled, and answer at the same moment."""
    barrier = threading.Barrier(8)
    got: list[bytes] = []

    def work(number: int) -> None:
        with share(local_store, f"shard {number} of 8") as shared:

            def find_out() -> bytes:
                barrier.wait(20)
                return str(number).encode()

            got.append(shared.settle("settled.json", find_out))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(got) == 8
    assert len(set(got)) == 1


def test_two_workers_of_one_name_wait_for_each_other(local_store: Store) -> None:
    said: list[str] = []
    second = Store(local_store.url, say=said.append)
    order: list[str] = []

    def work() -> None:
        with share(second):
            order.append("second")

    with share(local_store):
        thread = threading.Thread(target=work)
        thread.start()
        while not said:
            pass
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert said == ["Another process works on shard 0 of 2 of it; waiting until that is done."]


def test_an_input_that_is_gone_is_refused(local_store: Store) -> None:
    gone = InputRef(kind="dataset", key="0" * 64, role="catalogue")
    with (
        pytest.raises(StoreError, match=r"features/number-1-.* is to be made from dataset 000000000000"),
        share(local_store, inputs=(gone,)),
    ):
        pass


def grow_old(store: Store) -> None:
    """Make what is shared look as if nobody had touched it for long."""
    for path in Path(store.url).rglob("*"):
        os.utime(path, (0, 0))


def test_garbage_collection_takes_what_is_abandoned_and_nothing_else(local_store: Store) -> None:
    source = small(local_store, "source", kind="dataset")
    with share(local_store, inputs=(source.as_input(),)) as shared:
        leave(shared, "block-00000.parquet", b"x" * 1000)
        grow_old(local_store)
        in_use = local_store.collect_garbage(older_than=NOW, dry_run=False)
        assert (in_use.artefacts, in_use.leftovers) == ((), ())
        assert "being written" in in_use.kept[source.ref]
        assert shared.names() == ["block-00000.parquet"]
    with share(local_store, "shard 1 of 2", (source.as_input(),)) as shared:  # another worker is still at it
        assert local_store.collect_garbage(older_than=NOW, dry_run=False).leftovers == ()
        leave(shared, "block-00000.parquet", b"x" * 1000)
    young = local_store.collect_garbage(dry_run=False)
    assert young.leftovers == ()
    assert source.ref in young.kept, "it is to go on this week"
    old = local_store.collect_garbage(older_than=NOW, dry_run=False)
    assert [leftover.bytes for leftover in old.leftovers] == [1000]
    assert old.artefacts == (source,)
    assert list((Path(local_store.url) / ".shards").iterdir()) == []


def test_what_a_worker_takes_up_again_is_not_deleted(local_store: Store) -> None:
    with share(local_store) as shared:
        leave(shared, "block-00000.parquet", b"x")
    leftovers: tuple[Leftover, ...] = local_store.collect_garbage(older_than=NOW).leftovers
    assert len(leftovers) == 1
    with share(local_store) as shared:
        for leftover in leftovers:
            local_store._shelf.delete_leftover(leftover)
        assert shared.names() == ["block-00000.parquet"]


def test_a_remote_folder_stays_for_a_day_and_goes_with_its_copies(tmp_path: Path) -> None:
    store = Store(f"memory://{tmp_path.name}/{datetime.now(UTC).timestamp()}", cache=tmp_path / "cache")
    with share(store) as shared:
        leave(shared, "block-00000.parquet", b"x" * 1000)
    assert store.collect_garbage(older_than=NOW, dry_run=False).leftovers == ()
    store._shelf.leftover_grace = NOW
    with share(store):
        assert store.collect_garbage(older_than=NOW, dry_run=False).leftovers == ()
    gone = store.collect_garbage(older_than=NOW, dry_run=False).leftovers
    assert [leftover.bytes for leftover in gone] == [1000, 1000]
    with share(store) as shared:
        assert shared.names() == []
        assert not any(shared.folder.iterdir())


def test_a_draft_beside_it_is_made_as_ever(any_store: Store) -> None:
    with share(any_store) as shared:
        leave(shared, "block-00000.parquet", b"x")
        assert not produce(any_store, 1).reused
        assert shared.names() == ["block-00000.parquet"]
        shared.remove()
    assert all(not problems for problems in any_store.verify_all().values())
