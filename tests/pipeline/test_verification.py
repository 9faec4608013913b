"""Damage of every kind is found, and repaired by making the artefact again."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.artefact import Artefact
from pipeline.errors import StoreError
from pipeline.store import Store
from tests.pipeline.store_world import content, fill, is_right, produce, small


@pytest.fixture(params=["local", "objects"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store whose stored bytes a test can reach and damage."""
    url = str(tmp_path / "store") if request.param == "local" else f"objects://{tmp_path / 'bucket'}"
    return Store(url, cache=tmp_path / "cache")


def stored(artefact: Artefact, name: str) -> Path:
    """Return where a file of an artefact really lies."""
    folder = Path(artefact.folder_url.removeprefix("objects://"))
    return folder / name if name == "manifest.json" else folder / artefact.manifest.data_folder / name


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def found(store: Store, target: Artefact | str) -> list[str]:
    return [f"{problem.file}: {problem.what}" for problem in store.verify(target)]


def test_an_untouched_store_has_no_problems(any_store: Store) -> None:
    made = [produce(any_store, number).artefact for number in range(3)]
    steps: list[tuple[int, int]] = []
    problems = any_store.verify_all(lambda done, total: steps.append((done, total)))
    assert problems == {artefact.ref: [] for artefact in made}
    assert steps == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("position", [0, 12345, -1])
def test_a_flipped_byte_is_found(store: Store, position: int) -> None:
    artefact = produce(store, 1).artefact
    flip(stored(artefact, "part-00001.bin"), position)
    (problem,) = found(store, artefact)
    assert problem.startswith("part-00001.bin: its bytes have changed: SHA-256 ")


def test_a_missing_a_cut_and_an_extra_file_are_found(store: Store) -> None:
    artefact = produce(store, 1).artefact
    stored(artefact, "part-00000.bin").unlink()
    stored(artefact, "part-00001.bin").write_bytes(b"short")
    stored(artefact, "note.txt").write_text("mine")
    stored(artefact, ".hidden").write_text("mine")
    assert found(store, artefact) == [
        ".hidden: the manifest does not list this file; move it away",
        "note.txt: the manifest does not list this file; move it away",
        "part-00000.bin: it is missing",
        f"part-00001.bin: it has 5 bytes instead of {len(content(1, 1)):,}",
    ]


def test_a_damaged_manifest_is_found_by_reference(store: Store) -> None:
    artefact = produce(store, 1).artefact
    flip(stored(artefact, "manifest.json"), 200)
    for target in (artefact, artefact.ref, artefact.manifest.folder, artefact.key[:12]):
        (problem,) = store.verify(target)
        assert problem.file == "manifest.json"
        assert "is damaged" in problem.what
    assert list(store.verify_all()) == [artefact.ref]


def test_a_damaged_manifest_is_an_error_and_never_a_hit_or_a_silent_miss(store: Store) -> None:
    artefact = produce(store, 1).artefact
    flip(stored(artefact, "manifest.json"), 200)
    message = rf"manifest of .*{artefact.ref} is damaged: .*--force, which replaces the folder"
    with pytest.raises(StoreError, match=message):
        store.find("features", artefact.key)
    with pytest.raises(StoreError, match=message):
        store.get(artefact.ref)
    with pytest.raises(StoreError, match=message):
        produce(store, 1, make=lambda draft: pytest.fail("made without being asked to replace the damage"))


def test_a_damaged_manifest_hides_no_other_artefact_from_a_listing(tmp_path: Path) -> None:
    said: list[str] = []
    store = Store(tmp_path / "store", say=said.append)
    damaged, whole = produce(store, 1).artefact, produce(store, 2).artefact
    flip(stored(damaged, "manifest.json"), 200)
    assert store.list() == [whole]
    assert len(said) == 1
    assert damaged.ref in said[0]
    assert list(store.survey()[1]) == [damaged.ref]


def test_a_local_folder_that_lost_its_manifest_is_damaged(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    artefact = produce(store, 1).artefact
    stored(artefact, "manifest.json").unlink()
    with pytest.raises(StoreError, match="is damaged: it is missing or empty"):
        produce(store, 1)
    assert "missing or empty" in store.verify(artefact)[0].what


def damage_manifest(artefact: Artefact) -> None:
    stored(artefact, "manifest.json").write_bytes(b"{")


def damage_file(artefact: Artefact) -> None:
    flip(stored(artefact, "part-00000.bin"), 5)


def delete_file(artefact: Artefact) -> None:
    stored(artefact, "part-00000.bin").unlink()


@pytest.mark.parametrize("damage", [damage_manifest, damage_file, delete_file])
def test_force_repairs_what_is_damaged(
    store: Store, damage: Callable[[Artefact], None], tmp_path: Path
) -> None:
    artefact = produce(store, 1).artefact
    damage(artefact)
    assert store.verify(artefact) != []
    repaired = produce(store, 1, force=True).artefact
    assert store.verify(repaired) == []
    assert is_right(repaired)
    assert repaired.ref == artefact.ref
    assert produce(store, 1).reused
    another = Store(store.url, cache=tmp_path / "another").get(artefact.ref)
    assert is_right(another)


def test_a_damaged_folder_of_another_label_is_replaced_too(store: Store) -> None:
    artefact = produce(store, 1).artefact
    damage_manifest(artefact)
    new = store.produce("features", slug="another", identity={"number": 1}, make=fill(1), force=True).artefact
    assert new.ref == artefact.ref
    assert store.list() == [new]


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_bytes(b"cut")])
def test_reading_a_missing_or_cut_file_says_which_and_what_to_do(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    store = Store(tmp_path / "store")
    artefact = produce(store, 1).artefact
    change(stored(artefact, "part-00000.bin"))
    with pytest.raises(StoreError, match=r"part-00000.bin .*tandem verify features/number-1-.*--force"):
        artefact.path("part-00000.bin")


def test_a_planted_link_does_not_lead_a_reader_away(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    artefact = produce(store, 1).artefact
    secret = tmp_path / "secret"
    secret.write_bytes(content(1, 0))  # even with the right bytes
    stored(artefact, "part-00000.bin").unlink()
    stored(artefact, "part-00000.bin").symlink_to(secret)
    with pytest.raises(StoreError, match="is a link that leaves the folder"):
        artefact.path("part-00000.bin")
    assert len(store.verify(artefact)) == 1


def test_a_store_reached_through_a_link_is_fine(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").symlink_to(tmp_path / "disk")
    artefact = produce(Store(tmp_path / "store"), 1).artefact
    assert is_right(artefact)


def test_a_file_that_arrives_damaged_is_not_handed_out(tmp_path: Path) -> None:
    store = Store(f"objects://{tmp_path / 'bucket'}", cache=tmp_path / "cache")
    artefact = produce(store, 1).artefact
    flip(stored(artefact, "part-00000.bin"), 5)
    assert is_right(artefact), "the copy that was uploaded is still here"
    elsewhere = Store(store.url, cache=tmp_path / "another").get(artefact.ref)
    with pytest.raises(
        StoreError, match=r"part-00000.bin arrived with another checksum.*--force makes it again"
    ):
        elsewhere.path("part-00000.bin")
    assert not [path for path in (tmp_path / "another").rglob("part-*") if path.is_file()]
    stored(artefact, "part-00001.bin").unlink()
    with pytest.raises(
        StoreError, match=r"part-00001.bin is missing: the artefact is damaged or was deleted"
    ):
        elsewhere.path("part-00001.bin")


def test_a_manifest_whose_own_sums_are_wrong_is_found(local_store: Store) -> None:
    from pipeline.manifest import encode_manifest

    artefact = small(local_store, "x")
    forged = artefact.manifest.model_copy(update={"bytes": 99, "identity": {"label": "y"}})
    stored(artefact, "manifest.json").write_bytes(encode_manifest(forged))
    assert [problem.what for problem in local_store.verify(artefact)] == [
        "the bytes of its files do not add up to its total",
        "its key is not the hash of its identity",
    ]


def test_verify_of_an_unknown_reference_is_an_error(any_store: Store) -> None:
    with pytest.raises(StoreError, match="'nothing' is not in the store"):
        any_store.verify("nothing")


def test_an_artefact_that_was_deleted_meanwhile_is_said_to_be_gone(any_store: Store) -> None:
    artefact = small(any_store, "x")
    any_store._shelf.remove("features", artefact.manifest.folder)
    assert [problem.what for problem in any_store.verify(artefact)] == ["it is not in the store"]
