"""Asking for artefacts and making them, in a folder, in memory and in an object store."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import StoreError
from pipeline.store import Draft, InputRef, Store, artefact_key
from tests.pipeline.store_world import content, fill, is_right, produce, small


def test_an_artefact_is_made_once_and_then_reused(any_store: Store) -> None:
    calls = []

    def make(draft: Draft) -> None:
        calls.append(1)
        fill(1)(draft)

    first, second = produce(any_store, 1, make=make), produce(any_store, 1, make=make)
    assert (first.reused, second.reused, len(calls)) == (False, True, 1)
    assert first.artefact == second.artefact
    assert is_right(second.artefact)


def test_the_manifest_says_what_was_made_from_what_where_and_how(any_store: Store) -> None:
    import hashlib

    before = datetime.now(UTC)
    dataset = small(any_store, "items", kind="dataset")
    artefact = produce(
        any_store,
        7,
        inputs=[dataset.as_input("items")],
        parameters={"modality": "image", "fields": ("a", "b")},
    ).artefact
    manifest = artefact.manifest
    assert manifest.kind == "features"
    assert manifest.key == artefact_key("features", {"number": 7})
    assert manifest.inputs == (InputRef(kind="dataset", key=dataset.key, role="items"),)
    assert manifest.identity == {"number": 7}
    assert manifest.parameters == {"modality": "image", "fields": ["a", "b"]}
    assert manifest.facts == {"number": 7}
    assert {"python", "numpy", "torch", "tandem"} <= manifest.versions.keys()
    assert manifest.hardware.cores >= 1
    assert manifest.seconds > 0
    assert manifest.bytes == sum(len(content(7, file)) for file in range(3))
    assert before <= manifest.created_at <= datetime.now(UTC)
    assert manifest.created_at.utcoffset() == timedelta(0)
    assert {name: entry.sha256 for name, entry in manifest.files.items()} == {
        f"part-{file:05d}.bin": hashlib.sha256(content(7, file)).hexdigest() for file in range(3)
    }
    assert artefact.ref == f"features/number-7-{artefact.key[:12]}"


def test_another_process_with_an_own_cache_finds_the_artefact(
    any_store: Store, open_place: Callable[..., Store]
) -> None:
    made = produce(any_store, 1).artefact
    found = open_place(cache="another").find("features", made.key)
    assert found == made
    assert found is not None
    assert is_right(found)


def test_find_returns_none_for_a_key_that_is_not_there(any_store: Store) -> None:
    produce(any_store, 1)
    assert any_store.find("features", "0" * 64) is None
    assert any_store.find("run", artefact_key("features", {"number": 1})) is None


def test_the_label_is_not_part_of_the_key(any_store: Store) -> None:
    first = produce(any_store, 1).artefact
    again = any_store.produce("features", slug="another label", identity={"number": 1}, make=fill(1))
    assert again.reused
    forced = any_store.produce("features", slug="third", identity={"number": 1}, make=fill(1), force=True)
    assert forced.artefact.ref == first.ref
    assert len(any_store.list()) == 1


def test_force_replaces_an_artefact_with_a_new_whole_one(any_store: Store) -> None:
    old = produce(any_store, 1).artefact
    new = produce(any_store, 1, force=True, make=fill(2)).artefact
    assert new.ref == old.ref
    assert any_store.list() == [new]
    assert is_right(new)
    assert new.manifest.facts == {"number": 2}
    assert all(not problems for problems in any_store.verify_all().values())


def test_a_failed_force_leaves_the_old_artefact(any_store: Store) -> None:
    old = produce(any_store, 1).artefact

    def fail(draft: Draft) -> None:
        fill(2)(draft)
        raise RuntimeError("the encoder broke")

    with pytest.raises(RuntimeError, match=r"the encoder broke"):
        produce(any_store, 1, force=True, make=fail)
    assert any_store.list() == [old]
    assert is_right(old)


def test_a_failed_maker_leaves_nothing_behind(any_store: Store) -> None:
    def fail(draft: Draft) -> None:
        fill(1)(draft)
        (draft.scratch / "checkpoint").write_text("epoch 1")
        raise RuntimeError("the encoder broke")

    with pytest.raises(RuntimeError, match=r"the encoder broke"):
        produce(any_store, 1, make=fail)
    assert any_store.list() == []
    assert any_store.collect_garbage(older_than=timedelta(0)).leftovers == ()

    def check_empty(draft: Draft) -> None:
        assert list(draft.folder.iterdir()) == []
        assert list(draft.scratch.iterdir()) == []

    assert not produce(any_store, 1, make=check_empty).reused


def test_a_resumable_maker_finds_its_whole_parts_and_its_scratch(any_store: Store) -> None:
    def fail(draft: Draft) -> None:
        draft.path("part-00000.bin").write_bytes(content(1, 0))
        draft.path("part-00001.bin.tmp").write_bytes(b"half")
        (draft.scratch / "checkpoint").write_text("epoch 1")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match=r"stopped"):
        produce(any_store, 1, make=fail, resumable=True)
    assert any_store.list() == []

    def resume(draft: Draft) -> None:
        assert draft.path("part-00000.bin").read_bytes() == content(1, 0)
        assert (draft.scratch / "checkpoint").read_text() == "epoch 1"
        draft.path("part-00001.bin").write_bytes(content(1, 1))
        draft.record(number=1)

    artefact = produce(any_store, 1, make=resume, resumable=True).artefact
    assert is_right(artefact)
    assert sorted(artefact.manifest.files) == ["part-00000.bin", "part-00001.bin"]


def test_hidden_and_temporary_files_and_empty_folders_stay_out_of_the_artefact(any_store: Store) -> None:
    def make(draft: Draft) -> None:
        fill(1, n_files=1)(draft)
        (draft.folder / ".part-00001.bin.tmp").write_text("half")
        (draft.folder / "x.tmp").write_text("half")
        (draft.folder / "empty" / "er").mkdir(parents=True)
        (draft.folder / ".cache").mkdir()
        (draft.folder / ".cache" / "y").write_text("y")

    assert list(produce(any_store, 1, make=make).artefact.manifest.files) == ["part-00000.bin"]


@pytest.mark.parametrize("name", ["../x", "/etc/x", "manifest.json", ".hidden", "a/../../x"])
def test_a_draft_refuses_file_names_outside_its_folder(local_store: Store, name: str) -> None:
    with pytest.raises(StoreError, match=r"cannot hold this file|written by the store"):
        produce(local_store, 1, make=lambda draft: draft.path(name).write_text("x"))


def test_a_maker_cannot_write_the_manifest(local_store: Store) -> None:
    def make(draft: Draft) -> None:
        (draft.folder / "manifest.json").write_text("{}")

    with pytest.raises(StoreError, match=r"manifest.json is written by the store"):
        produce(local_store, 1, make=make)


def test_a_link_in_a_draft_is_refused(local_store: Store, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")

    def make(draft: Draft) -> None:
        (draft.folder / "link").symlink_to(tmp_path / "secret")

    with pytest.raises(StoreError, match=r"cannot hold the link 'link'"):
        produce(local_store, 1, make=make)
    assert local_store.list() == []


def test_a_fact_that_is_not_json_is_refused_when_it_is_recorded(local_store: Store) -> None:
    def make(draft: Draft) -> None:
        with pytest.raises(TypeError, match=r"The fact 'n_items' is not JSON"):
            draft.record(n_items=np.int64(3))  # type: ignore[arg-type]  # the mistake under test
        with pytest.raises(ValueError, match=r"The fact 'loss' is not JSON"):
            draft.record(loss=float("nan"))
        draft.record(n_items=3, loss=0.5)
        draft.record(loss=0.25)

    assert produce(local_store, 1, make=make).artefact.manifest.facts == {"n_items": 3, "loss": 0.25}


def test_an_artefact_without_files_is_an_artefact(any_store: Store) -> None:
    artefact = produce(any_store, 1, make=lambda draft: None).artefact
    assert any_store.find("features", artefact.key) == artefact
    assert artefact.paths() == []
    assert any_store.verify(artefact) == []


def test_files_below_folders_keep_their_names(any_store: Store, open_place: Callable[..., Store]) -> None:
    def make(draft: Draft) -> None:
        draft.path("images/a/1.png").write_bytes(b"1")
        draft.path("items.parquet").write_bytes(b"22")

    made = produce(any_store, 1, make=make).artefact
    found = open_place(cache="another").get(made.ref)
    assert sorted(found.manifest.files) == ["images/a/1.png", "items.parquet"]
    assert found.path("images/a/1.png").read_bytes() == b"1"
    assert [path.name for path in found.paths("images/*")] == ["1.png"]
    with found.open("items.parquet") as file:
        assert file.read() == b"22"


def test_a_file_that_an_artefact_lacks_is_refused_with_near_names(any_store: Store) -> None:
    artefact = produce(any_store, 1).artefact
    with pytest.raises(StoreError, match=r"has no file 'part-00000.parquet'; it has part-0000"):
        artefact.path("part-00000.parquet")
    with pytest.raises(StoreError, match=r"has no file '../x'"):
        artefact.path("../x")


def test_an_input_that_the_store_lacks_is_refused_before_work_begins(any_store: Store) -> None:
    with pytest.raises(StoreError, match=r"to be made from dataset aaaaaaaaaaaa, which is not in the store"):
        produce(any_store, 1, inputs=[InputRef(kind="dataset", key="a" * 64)])
    assert any_store.list() == []


def test_list_reads_manifests_only_and_sorts_by_time(
    any_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [produce(any_store, number).artefact for number in (3, 1, 2)]
    monkeypatch.setattr(type(any_store._shelf), "fetch", lambda *_: pytest.fail("a file was read"))
    assert any_store.list() == made
    assert any_store.list("features") == made
    assert any_store.list("run") == []


def test_two_keys_that_share_their_first_digits_and_label_are_told_apart(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = produce(local_store, 1).artefact
    clash = first.key[:12] + "0" * 52
    assert clash != first.key
    monkeypatch.setattr("pipeline.store.artefact_key", lambda kind, identity: clash)
    with pytest.raises(StoreError, match=r"exists with another key"):
        produce(local_store, 1)
    monkeypatch.setattr("pipeline.store.artefact_key", lambda kind, identity: clash)
    other = local_store.produce("features", slug="label 2", identity={"number": 9}, make=fill(9)).artefact
    assert local_store.find("features", first.key) == first
    assert local_store.find("features", clash) == other
    with pytest.raises(StoreError, match=r"could be features/.*, features/.*; type more of the key"):
        local_store.get(clash[:12])
    assert local_store.get(first.key) == first


def test_an_upgrade_of_a_format_version_makes_a_new_artefact(
    any_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = produce(any_store, 1).artefact
    monkeypatch.setitem(__import__("pipeline.manifest").manifest.FORMAT_VERSIONS, "features", 2)
    new = produce(any_store, 1)
    assert not new.reused
    assert new.artefact.key != old.key
    assert all(not problems for problems in any_store.verify_all().values())


def test_a_use_is_noted_so_that_what_is_used_counts_as_young(local_store: Store) -> None:
    import os

    artefact = produce(local_store, 1).artefact
    manifest = Path(artefact.folder_url) / "manifest.json"
    os.utime(manifest, (0, 0))
    local_store.list()
    assert manifest.stat().st_mtime == 0, "a listing is no use"
    produce(local_store, 1)
    assert manifest.stat().st_mtime > 0
    assert json.loads(manifest.read_text())["key"] == artefact.key
