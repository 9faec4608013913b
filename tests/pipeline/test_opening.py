"""Which folder is a store, and which must not become one."""

import json
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from pipeline.errors import StoreError
from pipeline.opening import default_cache, default_url, printable
from pipeline.store import Store
from tests.pipeline.store_world import is_right, produce


def test_a_new_or_empty_folder_becomes_a_store(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "a" / "b" / "new"):
        assert Store(folder).url == str(folder)
        assert json.loads((folder / "tandem-store.json").read_text()) == {
            "format": "tandem-store",
            "layout": 1,
        }
        assert Store(folder).list() == []


def test_a_folder_with_other_things_is_not_taken_for_a_store(tmp_path: Path) -> None:
    for name in ("thesis.tex", "photos", ".bashrc", "taxes"):
        (tmp_path / name).touch()
    with pytest.raises(
        StoreError, match=r"is not a Tandem store and not empty \(it holds .bashrc, photos, taxes, ...\)"
    ):
        Store(tmp_path)
    assert not (tmp_path / "tandem-store.json").exists()


def test_other_objects_below_a_url_are_not_taken_for_a_store(tmp_path: Path) -> None:
    import fsspec

    url = f"memory://{uuid4().hex}"
    fsspec.filesystem("memory").pipe_file(f"{url}/data.csv", b"1,2")
    with pytest.raises(StoreError, match=r"is not a Tandem store and not empty \(it holds data.csv\)"):
        Store(url, cache=tmp_path)


def test_a_file_is_not_taken_for_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="Not a directory"):
        Store(tmp_path / "file")


def test_a_half_written_marker_of_another_process_does_not_count_as_content(tmp_path: Path) -> None:
    (tmp_path / ".tandem-store.json.0123.tmp").touch()
    assert Store(tmp_path).list() == []


def test_a_store_of_a_newer_layout_asks_for_an_upgrade(tmp_path: Path) -> None:
    Store(tmp_path)
    (tmp_path / "tandem-store.json").write_text('{"format": "tandem-store", "layout": 2}')
    with pytest.raises(StoreError, match="has layout 2, this Tandem knows 1; upgrade"):
        Store(tmp_path)


@pytest.mark.parametrize("marker", ["", "{", "[]", '{"layout": 1}', '{"format": "other", "layout": 1}'])
def test_a_damaged_marker_says_how_to_repair_it(tmp_path: Path, marker: str) -> None:
    Store(tmp_path)
    (tmp_path / "tandem-store.json").write_text(marker)
    with pytest.raises(StoreError, match=r'tandem-store.json is damaged; .*write \{"format": "tandem-store"'):
        Store(tmp_path)


def test_the_home_folder_is_expanded_and_relative_paths_are_fixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store("~/shop").url == str(tmp_path / "shop")
    monkeypatch.chdir(tmp_path)
    store = Store("relative")
    monkeypatch.chdir("/")
    assert is_right(produce(store, 1).artefact)


def test_a_file_url_is_the_local_folder(tmp_path: Path) -> None:
    made = produce(Store(f"file://{tmp_path}/store"), 1).artefact
    assert Store(tmp_path / "store").list() == [made]
    assert Path(made.folder_url).is_dir()


def test_the_store_is_named_by_variable_or_lies_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TANDEM_STORE", raising=False)
    assert default_url() == ".tandem"
    assert Store().url == str(tmp_path / ".tandem")
    monkeypatch.setenv("TANDEM_STORE", str(tmp_path / "named"))
    assert Store().url == str(tmp_path / "named")


def test_copies_of_remote_files_lie_in_the_users_cache_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TANDEM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "tandem"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache() == tmp_path / "xdg" / "tandem"
    monkeypatch.setenv("TANDEM_CACHE", "~/mine")
    assert default_cache() == tmp_path / "mine"
    made = produce(Store(f"memory://{uuid4().hex}"), 1).artefact
    assert made.path("part-00000.bin").is_relative_to(tmp_path / "mine")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/path/", "s3://bucket/path"),
        ("ftp://user:secret@host/path", "ftp://user:***@host/path"),
        ("ftp://user@host/path", "ftp://user@host/path"),
        ("sftp://host:22/path@x:y", "sftp://host:22/path@x:y"),
    ],
)
def test_a_password_in_the_url_is_not_shown(url: str, shown: str) -> None:
    assert printable(url) == shown


def test_an_unknown_protocol_says_what_to_install() -> None:
    with pytest.raises(StoreError, match=r"The store nosuch://x cannot be reached: .*extras `s3` and `gcs`"):
        Store("nosuch://x")


def test_a_local_store_opens_without_loading_what_it_does_not_need() -> None:
    """Every command pays for what the store imports; ``tandem --help`` must stay quick."""
    heavy = ["torch", "polars", "pyarrow", "numpy", "fsspec", "prefect", "transformers", "open_clip", "faiss"]
    code = f"import sys, pipeline.store; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_two_remote_stores_share_a_cache_without_mixing(tmp_path: Path) -> None:
    first, second = (Store(f"memory://{uuid4().hex}", cache=tmp_path) for _ in range(2))
    produce(first, 1)
    assert second.list() == []
    assert not produce(second, 1).reused
    assert is_right(first.list()[0])
