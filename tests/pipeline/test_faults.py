"""A full disk, a read-only store, a place out of reach: what is whole stays, and words tell what to do."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import StoreError
from pipeline.store import Draft, Store
from tests.pipeline.store_world import fill, is_right, produce, small

DISK_BYTES = 4 << 20


class Disk:
    """A tiny real disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def remount(self, mode: str) -> None:
        """Make the disk writable ("rw") or not ("ro")."""
        subprocess.run(["mount", "-o", f"remount,{mode}", str(self.root)], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk of 4 MiB in memory; skipped where mounting is not allowed."""
    root = tmp_path / "disk"
    root.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(root)],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs the right to mount a small disk ({error}); the simulated faults run everywhere")
    yield Disk(root)
    subprocess.run(["umount", "-l", str(root)], check=True, capture_output=True)


def write_plainly(draft: Draft) -> None:
    draft.path("big.bin").write_bytes(bytes(2 * DISK_BYTES))


def write_with_polars(draft: Draft) -> None:
    import polars as pl

    noise = np.random.default_rng(0).integers(0, 2**62, 2 * DISK_BYTES // 8)
    pl.DataFrame({"x": noise}).write_parquet(draft.path("big.parquet"))


def write_with_pyarrow(draft: Draft) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    noise = np.random.default_rng(0).integers(0, 2**62, 2 * DISK_BYTES // 8)
    parquet.write_table(pa.table({"x": noise}), draft.path("big.parquet"))


def write_with_safetensors(draft: Draft) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(2 * DISK_BYTES, dtype=np.uint8)}, draft.path("big.safetensors"))


WRITERS = [write_plainly, write_with_polars, write_with_pyarrow, write_with_safetensors]


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_told_with_its_free_space_and_what_to_do(
    disk: Disk, write: Callable[[Draft], None]
) -> None:
    store = Store(disk.root / "store")
    kept = produce(store, 1).artefact
    with pytest.raises(
        StoreError, match=r"No space is left in .* MB free.*`tandem gc`.*another --store.*run the"
    ):
        produce(store, 2, make=write)
    assert store.list() == [kept]
    assert is_right(kept)
    assert all(not problems for problems in store.verify_all().values())
    assert is_right(produce(store, 3).artefact), "the failed draft gave its space back"


def test_parts_written_before_the_disk_was_full_are_there_when_there_is_space_again(disk: Disk) -> None:
    store = Store(disk.root / "store")
    ballast = disk.root / "ballast"
    ballast.write_bytes(bytes(DISK_BYTES // 2))

    def make(draft: Draft) -> None:
        done = sorted(path.name for path in draft.folder.glob("*.bin"))
        for file in range(len(done), 4):
            part = draft.path(f"part-{file}.bin.tmp")
            part.write_bytes(bytes([file]) * (DISK_BYTES // 6))
            part.rename(draft.path(f"part-{file}.bin"))
        draft.record(found=", ".join(done))

    with pytest.raises(StoreError, match="What was whole is kept, and so are the finished parts"):
        produce(store, 1, make=make, resumable=True)
    ballast.unlink()
    artefact = produce(store, 1, make=make, resumable=True).artefact
    assert str(artefact.manifest.facts["found"]).startswith("part-0.bin")
    assert [path.read_bytes()[:1] for path in artefact.paths()] == [bytes([file]) for file in range(4)]


def test_a_disk_without_room_for_anything_refuses_in_words(disk: Disk) -> None:
    store = Store(disk.root / "store")
    kept = small(store, "kept")
    with suppress(OSError), (disk.root / "ballast").open("wb", buffering=0) as ballast:
        while ballast.write(bytes(4096)):
            pass
    assert shutil.disk_usage(disk.root).free == 0
    with pytest.raises(StoreError, match="No space is left"):
        small(store, "another")
    with pytest.raises(StoreError, match="No space is left"):
        store.name("kept", kept)
    with pytest.raises(StoreError, match="No space is left"):
        Store(disk.root / "second")
    assert store.get(kept.ref) == kept
    assert store.names() == {}


def test_a_read_only_store_is_read_as_ever_and_refuses_writes_in_words(disk: Disk) -> None:
    store = Store(disk.root / "store")
    artefact = produce(store, 1).artefact
    store.name("kept", artefact)
    disk.remount("ro")
    try:
        store = Store(disk.root / "store")
        assert produce(store, 1).reused
        assert is_right(store.get("kept"))
        assert store.list() == [artefact]
        assert store.verify_all() == {artefact.ref: []}
        assert store.lineage(artefact).artefact == artefact
        assert store.collect_garbage().artefacts == ()
        message = (
            r"cannot be written to \(Read-only file system.* MB free\).*can be read.*choose another --store"
        )
        for write in (
            lambda: produce(store, 2),
            lambda: produce(store, 1, force=True),
            lambda: store.name("other", artefact),
            lambda: store.unname("kept"),
            lambda: store.collect_garbage(dry_run=False),
            lambda: Store(disk.root / "new"),
        ):
            with pytest.raises(StoreError, match=message):
                write()
    finally:
        disk.remount("rw")
    assert is_right(produce(store, 2).artefact)


# -- simulated, so that they run everywhere --------------------------------------------------------------


def failing(number: int) -> Callable[..., Any]:
    def fail(*arguments: Any, **settings: Any) -> Any:
        raise OSError(number, os.strerror(number), str(arguments[0]))

    return fail


@pytest.mark.parametrize("function", ["fsync", "replace", "rename"])
@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "No space is left"), (errno.EROFS, "cannot be written")]
)
def test_a_fault_in_any_step_of_the_last_act_is_told_and_loses_nothing(
    local_store: Store, monkeypatch: pytest.MonkeyPatch, function: str, number: int, message: str
) -> None:
    old = produce(local_store, 1).artefact
    with monkeypatch.context() as patch:
        patch.setattr(os, function, failing(number))
        with pytest.raises(StoreError, match=message):
            produce(local_store, 1, force=True)
        with pytest.raises(StoreError, match=message):
            produce(local_store, 2)
    assert local_store.list() == [old]
    assert is_right(old)
    assert is_right(produce(local_store, 2).artefact)
    assert all(not problems for problems in local_store.verify_all().values())


def test_a_folder_of_another_user_is_told_in_words(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    artefact = produce(local_store, 1).artefact
    monkeypatch.setattr("pipeline.shelf.FileLock.acquire", failing(errno.EACCES))
    with pytest.raises(
        StoreError, match=r"cannot be written to \(Permission denied.*Make the folder writable"
    ):
        produce(local_store, 2)
    assert produce(local_store, 1).reused
    assert is_right(artefact)


def test_an_error_of_the_makers_own_files_passes_unchanged(local_store: Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"picture\.png"):
        produce(local_store, 1, make=lambda draft: (tmp_path / "picture.png").read_bytes())
    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "picture.png"))

    def make(draft: Draft) -> None:
        raise denied

    with pytest.raises(PermissionError, match=r"picture\.png"):
        produce(local_store, 1, make=make)


def test_a_permission_that_the_draft_lacks_is_the_stores_fault(local_store: Store) -> None:
    def make(draft: Draft) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(draft.folder / "x"))

    with pytest.raises(StoreError, match="cannot be written to"):
        produce(local_store, 1, make=make)


def test_a_full_disk_behind_another_error_is_found(local_store: Store) -> None:
    def make(draft: Draft) -> None:
        raise ValueError("the writer thread failed") from OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StoreError, match="No space is left"):
        produce(local_store, 1, make=make)


def test_a_makers_own_mistake_passes_unchanged(local_store: Store) -> None:
    def make(draft: Draft) -> None:
        raise ValueError("a NaN embedding")

    with pytest.raises(ValueError, match="a NaN embedding"):
        produce(local_store, 1, make=make)


class _CredentialsError(Exception):
    """What an object store's library raises: no kin of OSError."""


_CredentialsError.__module__ = "botocore.exceptions"


@pytest.mark.parametrize(
    "error",
    [
        _CredentialsError("Unable to locate credentials"),
        ConnectionError("no route to host"),
        TimeoutError("slow"),
    ],
)
def test_a_remote_store_out_of_reach_is_told_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    store = Store(f"memory://{tmp_path.name}/reach", cache=tmp_path / "cache")
    produce(store, 1)

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        for function in ("ls", "cat_file", "pipe_file", "put_file", "find"):
            patch.setattr(store._shelf.filesystem, function, fail)  # type: ignore[attr-defined]  # a remote one
        calls: list[Callable[[], object]] = [store.list, store.names, store.verify_all, store.collect_garbage]
        calls += [lambda: produce(store, 1), lambda: store.get("x"), lambda: Store(store.url, cache=tmp_path)]
        for call in calls:
            with pytest.raises(StoreError, match=rf"does not answer as it should .*{error}.*can be reached"):
                call()
    assert is_right(produce(store, 1).artefact)


def test_an_upload_that_breaks_off_leaves_no_artefact_and_the_old_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(f"objects://{tmp_path / 'bucket'}", cache=tmp_path / "cache")
    old = produce(store, 1).artefact
    filesystem = store._shelf.filesystem  # type: ignore[attr-defined]  # a remote one
    put = filesystem.put_file

    def break_off(lpath: str, rpath: str, **settings: Any) -> None:
        if "part-00002" in rpath:
            raise ConnectionResetError("reset by peer")
        put(lpath, rpath, **settings)

    monkeypatch.setattr(filesystem, "put_file", break_off)
    for call in (lambda: produce(store, 2), lambda: produce(store, 1, force=True)):
        with pytest.raises(StoreError, match="reset by peer"):
            call()
    monkeypatch.undo()
    assert store.list() == [old]
    assert is_right(Store(store.url, cache=tmp_path / "another").get(old.ref))
    assert len(list((tmp_path / "bucket").rglob("data-*"))) == 1, "what had arrived was taken back"
    assert is_right(produce(store, 2).artefact)


def test_a_programming_error_is_not_dressed_up_as_a_fault(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_store._shelf, "folders", lambda kind: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        local_store.list()


def test_a_killed_replacement_is_undone_by_the_next_look(local_store: Store) -> None:
    """As if killed between the two renames: the old folder is aside, the new one not yet in place."""
    artefact = produce(local_store, 1).artefact
    root = Path(local_store.url)
    aside = root / ".replaced" / f"features--{artefact.manifest.folder}"
    aside.parent.mkdir()
    for look in (
        lambda: Store(root).find("features", artefact.key),
        lambda: Store(root).get(artefact.ref),
        lambda: Store(root).list()[0],
        lambda: artefact if is_right(artefact) else None,
        lambda: produce(local_store, 1, make=lambda draft: pytest.fail("made again")).artefact,
    ):
        (root / "features" / artefact.manifest.folder).rename(aside)
        assert look() == artefact
        assert not aside.exists()


def test_a_replacement_whose_second_step_fails_gives_the_old_folder_back(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = produce(local_store, 1).artefact
    rename, calls = os.rename, []

    def fail_second(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail_second)
        with pytest.raises(StoreError, match="Input/output error"):
            produce(local_store, 1, force=True, make=fill(2))
    assert len(calls) == 2
    assert local_store.list() == [old]
    assert is_right(old)


def test_a_draft_that_was_stopped_just_before_its_last_step_is_finished(
    local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder holds a manifest already; that must not become a file of the artefact."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing(errno.EIO))
        with pytest.raises(StoreError, match="Input/output error"):
            produce(local_store, 1, resumable=True)
    (draft,) = (path for path in (Path(local_store.url) / ".drafts").iterdir() if path.is_dir())
    assert (draft / "manifest.json").exists()
    artefact = produce(local_store, 1, resumable=True).artefact
    assert "manifest.json" not in artefact.manifest.files
    assert local_store.verify(artefact) == []


def test_a_replacement_killed_before_its_clean_up_keeps_the_new_folder(local_store: Store) -> None:
    produce(local_store, 1)
    new = produce(local_store, 1, force=True, make=fill(2)).artefact
    root = Path(local_store.url)
    aside = root / ".replaced" / f"features--{new.manifest.folder}"
    aside.mkdir(parents=True, exist_ok=True)
    (aside / "manifest.json").write_text("the old one")
    assert local_store.list() == [new]
    assert is_right(new)
    assert not aside.exists()
