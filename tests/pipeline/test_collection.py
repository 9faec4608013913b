"""Garbage collection: what goes, what stays, and why."""

import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.artefact import Artefact
from pipeline.collection import descendants_first
from pipeline.errors import StoreError
from pipeline.lineage import with_ancestors
from pipeline.store import Draft, Store
from tests.pipeline.store_world import is_right, produce, small

NOW = timedelta(0)
"""Everything is older than this."""


def collect(store: Store, **settings: object) -> set[str]:
    """Collect for good; return what is left."""
    store.collect_garbage(older_than=NOW, dry_run=False, **settings)  # type: ignore[arg-type]  # keep only
    return {artefact.ref for artefact in store.list()}


def test_a_dry_run_is_the_default_and_deletes_nothing(any_store: Store) -> None:
    artefact = produce(any_store, 1).artefact
    collected = any_store.collect_garbage(older_than=NOW)
    assert collected.dry_run
    assert collected.artefacts == (artefact,)
    assert collected.bytes == artefact.manifest.bytes
    assert is_right(any_store.get(artefact.ref))


def test_what_nobody_keeps_goes_with_all_its_files(
    any_store: Store, open_place: Callable[..., Store]
) -> None:
    artefact = produce(any_store, 1).artefact
    collected = any_store.collect_garbage(older_than=NOW, dry_run=False)
    assert collected.artefacts == (artefact,)
    assert any_store.list() == []
    again = open_place(cache="another")
    assert again.list() == []
    assert again.collect_garbage(older_than=NOW).bytes == 0
    assert not produce(any_store, 1).reused


def test_a_named_artefact_keeps_all_it_was_made_from(any_store: Store) -> None:
    dataset = small(any_store, "baby", kind="dataset")
    image = small(any_store, "image", made_from=[dataset])
    text = small(any_store, "text", made_from=[dataset])
    run = small(any_store, "run", kind="run", made_from=[dataset, image])
    any_store.name("best", run)
    collected = any_store.collect_garbage(older_than=NOW)
    assert collected.artefacts == (text,)
    assert dict(collected.kept) == {
        run.ref: "named best",
        image.ref: "a kept artefact was made from it",
        dataset.ref: "a kept artefact was made from it",
    }
    assert collect(any_store) == {run.ref, image.ref, dataset.ref}


def test_an_artefact_that_is_asked_for_is_kept(any_store: Store) -> None:
    dataset = small(any_store, "baby", kind="dataset")
    image = small(any_store, "image", made_from=[dataset])
    other = small(any_store, "other")
    assert collect(any_store, keep=[image.ref]) == {image.ref, dataset.ref}
    with pytest.raises(StoreError, match="is not in the store"):
        any_store.collect_garbage(keep=[other.ref])


def test_a_typing_mistake_in_keep_deletes_nothing(any_store: Store) -> None:
    artefact = small(any_store, "image")
    with pytest.raises(StoreError, match="'imgae' is not in the store"):
        any_store.collect_garbage(keep=["imgae"], older_than=NOW, dry_run=False)
    assert any_store.list() == [artefact]


def test_what_is_young_stays_and_keeps_what_it_was_made_from(local_store: Store) -> None:
    dataset = small(local_store, "baby", kind="dataset")
    old, young = (small(local_store, label, made_from=[dataset]) for label in ("old", "young"))
    for artefact in (dataset, old):
        os.utime(Path(artefact.folder_url) / "manifest.json", (0, 0))
    collected = local_store.collect_garbage(dry_run=False)
    assert collected.artefacts == (old,)
    assert collected.kept == {
        young.ref: "made or used recently",
        dataset.ref: "a kept artefact was made from it",
    }


def test_an_old_artefact_that_was_used_lately_stays(local_store: Store) -> None:
    artefact = produce(local_store, 1).artefact
    os.utime(Path(artefact.folder_url) / "manifest.json", (0, 0))
    assert local_store.collect_garbage().artefacts == (artefact,)
    assert produce(local_store, 1).reused
    assert local_store.collect_garbage().artefacts == ()


def test_the_inputs_of_a_draft_in_the_making_stay(any_store: Store) -> None:
    dataset = small(any_store, "baby", kind="dataset")
    source = small(any_store, "source", made_from=[dataset])
    other = small(any_store, "other")

    def make(draft: Draft) -> None:
        draft.path("half").write_text("half")
        collected = any_store.collect_garbage(older_than=NOW, dry_run=False)
        assert collected.artefacts == (other,)
        assert collected.leftovers == ()
        assert "which is being written" in collected.kept[source.ref]
        assert draft.path("half").read_text() == "half"

    inputs = [source.as_input()]
    made = any_store.produce("index", slug="index", identity={"x": 1}, inputs=inputs, make=make).artefact
    assert {artefact.ref for artefact in any_store.list()} == {dataset.ref, source.ref, made.ref}
    assert collect(any_store) == set()


def test_a_draft_that_another_thread_writes_is_seen(any_store: Store) -> None:
    source = small(any_store, "source")
    began, go_on = threading.Event(), threading.Event()

    def make(draft: Draft) -> None:
        began.set()
        assert go_on.wait(20)
        draft.path("x").write_text("x")

    def work() -> None:
        any_store.produce("index", slug="index", identity={}, inputs=[source.as_input()], make=make)

    thread = threading.Thread(target=work)
    thread.start()
    assert began.wait(20)
    try:
        assert collect(any_store) == {source.ref}
    finally:
        go_on.set()
        thread.join()
    assert len(any_store.list()) == 2


def abandon_draft(store: Store, source: Artefact) -> None:
    def fail(draft: Draft) -> None:
        draft.path("part-00000.bin").write_bytes(b"x" * 1000)
        (draft.scratch / "checkpoint").write_bytes(b"y" * 500)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        store.produce(
            "index", slug="index", identity={}, inputs=[source.as_input()], make=fail, resumable=True
        )


def test_an_abandoned_draft_stays_while_it_is_young_and_goes_when_it_is_old(local_store: Store) -> None:
    source = small(local_store, "source")
    os.utime(Path(source.folder_url) / "manifest.json", (0, 0))
    abandon_draft(local_store, source)
    young = local_store.collect_garbage(dry_run=False)
    assert young.artefacts == ()
    assert young.leftovers == ()
    assert "being written" in young.kept[source.ref]

    old = local_store.collect_garbage(older_than=NOW, dry_run=True)
    assert old.artefacts == (source,)
    assert sorted(leftover.bytes for leftover in old.leftovers) == [500, 1000]
    assert old.bytes == 1500 + source.manifest.bytes
    assert collect(local_store) == set()
    assert list((Path(local_store.url) / ".drafts").iterdir()) == []


def test_a_remote_draft_and_its_inputs_stay_for_a_day_whatever_is_asked(tmp_path: Path) -> None:
    """Another machine may be writing it, and nobody here can tell."""
    url = f"memory://{tmp_path.name}/{datetime.now(UTC).timestamp()}"
    store = Store(url, cache=tmp_path / "a")
    source = small(store, "source")
    abandon_draft(store, source)
    assert {artefact.ref for artefact in Store(url, cache=tmp_path / "b").list()} == {source.ref}
    assert collect(Store(url, cache=tmp_path / "b")) == {source.ref}


def test_remote_data_that_no_manifest_names_goes_once_it_is_a_day_old(tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    store = Store(f"objects://{bucket}", cache=tmp_path / "cache")
    artefact = produce(store, 1).artefact
    store.name("kept", artefact)
    folder = bucket / "features" / artefact.manifest.folder
    for stamp in ("20200101T000000", datetime.now(UTC).strftime("%Y%m%dT%H%M%S")):
        for orphan in (folder, bucket / "run" / "given-up-0123456789ab"):
            (orphan / f"data-{stamp}-0123456789ab").mkdir(parents=True)
            (orphan / f"data-{stamp}-0123456789ab" / "x").write_bytes(b"x" * 10)
    collected = store.collect_garbage(older_than=NOW, dry_run=False)
    assert [leftover.bytes for leftover in collected.leftovers] == [10, 10]
    assert all("data-20200101T000000" in leftover.address for leftover in collected.leftovers)
    assert not list(bucket.rglob("data-2020*"))
    assert len(list(bucket.rglob("x"))) == 2
    assert is_right(artefact)
    assert store.verify(artefact) == []


def test_the_data_that_a_manifest_names_is_no_leftover_however_old(tmp_path: Path) -> None:
    store = Store(f"objects://{tmp_path / 'bucket'}", cache=tmp_path / "cache")
    store._shelf.leftover_grace = NOW
    artefact = produce(store, 1).artefact
    store.name("kept", artefact)
    assert store.collect_garbage(older_than=NOW, dry_run=False).leftovers == ()
    assert store.verify(artefact) == []


def test_a_remote_removal_that_breaks_off_leaves_no_artefact_without_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(f"objects://{tmp_path / 'bucket'}", cache=tmp_path / "cache")
    artefact = produce(store, 1).artefact
    data = tmp_path / "bucket" / "features" / artefact.manifest.folder / artefact.manifest.data_folder

    def break_off(*_: object, **__: object) -> None:
        (data / "part-00000.bin").unlink()
        raise ConnectionResetError("reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(store._shelf.filesystem, "rm", break_off)  # type: ignore[attr-defined]  # a remote one
        with pytest.raises(StoreError, match="reset by peer"):
            store.collect_garbage(older_than=NOW, dry_run=False)
    assert store.survey() == ([], {})
    store._shelf.leftover_grace = NOW
    store.collect_garbage(older_than=NOW, dry_run=False)
    assert not data.exists()


def test_copies_of_replaced_and_deleted_remote_artefacts_go(tmp_path: Path) -> None:
    store = Store(f"objects://{tmp_path / 'bucket'}", cache=tmp_path / "cache")
    old = produce(store, 1).artefact
    new = produce(store, 1, force=True).artefact
    assert old.manifest.data_folder != new.manifest.data_folder
    store.name("kept", new)
    for folder in tmp_path.rglob("data-*"):
        for path in [*folder.iterdir(), folder]:
            os.utime(path, (0, 0))
    collected = store.collect_garbage(older_than=NOW, dry_run=False)
    assert [Path(leftover.address).name for leftover in collected.leftovers] == [old.manifest.data_folder]
    assert is_right(new)


def test_what_an_interrupted_removal_left_goes(local_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    produce(local_store, 1)
    monkeypatch.setattr("pipeline.local_shelf.shutil.rmtree", lambda *_, **__: None)
    assert collect(local_store) == set()
    monkeypatch.undo()
    trash = Path(local_store.url) / ".trash"
    assert len(list(trash.iterdir())) == 1
    assert len(local_store.collect_garbage(older_than=NOW, dry_run=False).leftovers) == 1
    assert list(trash.iterdir()) == []


def test_nothing_is_collected_while_a_manifest_is_damaged(local_store: Store) -> None:
    """What the damaged artefact was made from is unknown, so anything might be needed."""
    dataset = small(local_store, "baby", kind="dataset")
    image = small(local_store, "image", made_from=[dataset])
    (Path(image.folder_url) / "manifest.json").write_text("{")
    with pytest.raises(
        StoreError, match=rf"Nothing is collected: what {image.ref} was made from cannot be read"
    ):
        local_store.collect_garbage(older_than=NOW, dry_run=False)
    assert local_store.list() == [dataset]


def test_a_draft_taken_up_again_is_not_deleted(local_store: Store) -> None:
    """Between the listing of leftovers and their deletion a process may resume one."""
    source = small(local_store, "source")
    abandon_draft(local_store, source)
    leftovers = local_store.collect_garbage(older_than=NOW).leftovers
    assert leftovers

    def resume(draft: Draft) -> None:
        for leftover in leftovers:
            local_store._shelf.delete_leftover(leftover)
        assert draft.path("part-00000.bin").stat().st_size == 1000

    local_store.produce(
        "index", slug="index", identity={}, inputs=[source.as_input()], make=resume, resumable=True
    )


# -- properties ----------------------------------------------------------------------------------------

GRAPHS = st.lists(st.lists(st.integers(0, 100), max_size=3), min_size=1, max_size=9)
"""For each artefact the numbers of its inputs; taken modulo its own number, so that they are earlier ones."""


def parents_of(graph: list[list[int]]) -> dict[int, list[int]]:
    return {
        node: sorted({choice % node for choice in choices}) if node else []
        for node, choices in enumerate(graph)
    }


@given(GRAPHS, st.sets(st.integers(0, 8)))
def test_descendants_go_before_what_they_were_made_from(graph: list[list[int]], left_out: set[int]) -> None:
    parents = {("run", str(n)): [("run", str(p)) for p in ps] for n, ps in parents_of(graph).items()}
    nodes = {node for node in parents if int(node[1]) not in left_out}
    order = descendants_first(nodes, parents)  # type: ignore[arg-type]  # keys are numbers here
    assert sorted(order) == sorted(nodes)
    for position, node in enumerate(order):
        assert not set(order[:position]) & set(parents[node])


@given(GRAPHS, st.sets(st.integers(0, 8)))
def test_ancestors_are_what_a_plain_recursion_finds(graph: list[list[int]], roots: set[int]) -> None:
    parents = parents_of(graph)

    def plain(node: int) -> set[int]:
        return {node}.union(*(plain(parent) for parent in parents.get(node, [])))

    assert with_ancestors(roots, parents) == set().union(*(plain(root) for root in roots))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    graph=GRAPHS, named=st.sets(st.integers(0, 8), max_size=3), kept=st.sets(st.integers(0, 8), max_size=2)
)
def test_collection_keeps_exactly_the_roots_and_what_they_were_made_from(
    tmp_path: Path, graph: list[list[int]], named: set[int], kept: set[int]
) -> None:
    """On a real store with a random lineage: nothing needed goes, nothing unneeded stays."""
    store = Store(f"memory://{tmp_path.name}/{datetime.now(UTC).timestamp()}", cache=tmp_path / "cache")
    parents = parents_of(graph)
    made: list[Artefact] = []
    for node, inputs in parents.items():
        made.append(small(store, f"node {node}", made_from=[made[parent] for parent in inputs]))
    for node in named & parents.keys():
        store.name(f"name-{node}", made[node])
    roots = (named | kept) & parents.keys()
    keep = [made[node].ref for node in kept & parents.keys()]
    assert collect(store, keep=keep) == {made[node].ref for node in with_ancestors(roots, parents)}
    assert all(not problems for problems in store.verify_all().values())
