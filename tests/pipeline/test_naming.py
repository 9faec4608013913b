"""Names, and what a person may type to mean an artefact."""

from collections.abc import Callable

import pytest

from pipeline.errors import StoreError
from pipeline.store import Store
from tests.pipeline.store_world import produce, small


def test_a_name_means_its_artefact_alone_and_after_its_kind(any_store: Store) -> None:
    artefact = small(any_store, "tiny image")
    any_store.name("clip-baby", artefact)
    assert any_store.get("clip-baby") == artefact
    assert any_store.get("features/clip-baby") == artefact
    assert any_store.get("clip-baby", kind="features") == artefact
    assert any_store.names()["clip-baby"].ref == artefact.ref


def test_every_way_to_refer_to_an_artefact_finds_it(any_store: Store) -> None:
    artefact = small(any_store, "tiny image")
    small(any_store, "other")
    folder = f"tiny-image-{artefact.key[:12]}"
    for ref in (
        folder,
        f"features/{folder}",
        artefact.key,
        f"features/{artefact.key}",
        artefact.key[:6],
        artefact.key[:30],
    ):
        assert any_store.get(ref) == artefact
        assert any_store.get(f" {ref}/ ", kind="features") == artefact


def test_a_name_moves_to_another_artefact_in_one_step(
    any_store: Store, open_place: Callable[..., Store]
) -> None:
    first, second = small(any_store, "first"), small(any_store, "second")
    any_store.name("best", first)
    any_store.name("best", second)
    assert open_place(cache="another").get("best") == second
    assert list(any_store.names()) == ["best"]


def test_a_name_still_means_the_artefact_after_it_was_made_again(any_store: Store) -> None:
    any_store.name("best", produce(any_store, 1).artefact)
    again = produce(any_store, 1, force=True).artefact
    assert any_store.get("best") == again


def test_unname_takes_the_name_away_and_leaves_the_artefact(any_store: Store) -> None:
    artefact = small(any_store, "first")
    any_store.name("best", artefact)
    any_store.unname("best")
    assert any_store.names() == {}
    assert any_store.get(artefact.ref) == artefact
    with pytest.raises(StoreError, match=r"has no name 'best'; known names: none"):
        any_store.unname("best")


def test_a_name_of_one_kind_is_not_taken_for_another(any_store: Store) -> None:
    features, run = small(any_store, "first"), small(any_store, "second", kind="run")
    any_store.name("best", features)
    with pytest.raises(StoreError, match=r"belongs to features/first-.*cannot name run/second-"):
        any_store.name("best", run)
    assert any_store.get("best") == features


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../../etc/passwd",
        "a/b",
        "/abs",
        ".hidden",
        "-dash",
        "Upper",
        "x" * 65,
        "a\0b",
        "a b",
        "x.json",
        "x.",
        "ünï",
    ],
)
def test_a_name_cannot_leave_the_folder_of_names(any_store: Store, name: str) -> None:
    artefact = small(any_store, "first")
    with pytest.raises(StoreError, match=r"cannot be named"):
        any_store.name(name, artefact)
    with pytest.raises(StoreError):
        any_store.get(name)
    with pytest.raises(StoreError, match=r"has no name"):
        any_store.unname(name)
    assert any_store.names() == {}


@pytest.mark.parametrize("name", ["abcdef", "0123456789", "f" * 64, "tiny-image-0123456789ab"])
def test_a_name_that_reads_like_a_key_or_a_folder_is_refused(any_store: Store, name: str) -> None:
    with pytest.raises(StoreError, match=r"could be read as an artefact's key or folder"):
        any_store.name(name, small(any_store, "first"))


def test_an_unknown_reference_lists_near_matches(any_store: Store) -> None:
    artefact = small(any_store, "tiny image")
    any_store.name("clip-baby", artefact)
    with pytest.raises(StoreError, match=r"'clip-bay' is not in the store .*; did you mean clip-baby\?"):
        any_store.get("clip-bay")
    with pytest.raises(StoreError, match=rf"did you mean {artefact.manifest.folder}\? `tandem ls features`"):
        any_store.get("tiny-imag", kind="features")
    with pytest.raises(StoreError, match=r"'zzz' is not in the store [^;]*\. `tandem ls` lists"):
        any_store.get("zzz")


def test_a_reference_of_the_wrong_kind_says_which_kind_it_is(any_store: Store) -> None:
    artefact = small(any_store, "tiny image")
    any_store.name("clip-baby", artefact)
    for ref in ("clip-baby", artefact.key, artefact.ref, artefact.manifest.folder):
        with pytest.raises(StoreError, match=r"is features/tiny-image-.*a dataset artefact was expected"):
            any_store.get(ref, kind="dataset")
    with pytest.raises(StoreError, match=r"is features/tiny-image-.*a run artefact was expected"):
        any_store.get("run/clip-baby")
    with pytest.raises(StoreError, match=r"'model' is no kind; known kinds: dataset, encoder"):
        any_store.get("model/clip-baby")


def test_fewer_than_six_digits_of_a_key_are_no_reference(any_store: Store) -> None:
    artefact = small(any_store, "tiny image")
    assert any_store.get(artefact.key[:6]) == artefact
    with pytest.raises(StoreError, match=r"is not in the store"):
        any_store.get(artefact.key[:5])


def test_a_name_whose_artefact_is_gone_says_so(any_store: Store) -> None:
    artefact = small(any_store, "tiny image")
    any_store.name("clip-baby", artefact)
    any_store._shelf.remove("features", artefact.manifest.folder)
    with pytest.raises(
        StoreError, match=r"'clip-baby' stands for features/tiny-image-.*no longer in the store"
    ):
        any_store.get("clip-baby")
    with pytest.raises(StoreError, match=r"no longer in the store .*, so it cannot be named"):
        any_store.name("other", artefact)
    assert [str(problem) for problem in any_store.verify_all()["names/clip-baby"]] == [
        f"names/clip-baby: it stands for {artefact.ref}, which is not in the store"
    ]


def test_a_damaged_name_says_so_and_can_be_given_again(any_store: Store) -> None:
    artefact = small(any_store, "tiny image")
    any_store.name("clip-baby", artefact)
    any_store._shelf.write_document("names/clip-baby.json", b'{"kind": "features"')
    with pytest.raises(StoreError, match=r"names/clip-baby.json is damaged .*name the artefact again"):
        any_store.get("clip-baby")
    any_store.name("clip-baby", artefact)
    assert any_store.get("clip-baby") == artefact


def test_files_that_are_no_names_are_left_alone(local_store: Store) -> None:
    local_store._shelf.write_document("names/README.txt", b"these are names")
    local_store._shelf.write_document("names/.best.json.123.tmp", b"half")
    assert local_store.names() == {}


def test_a_path_into_the_store_means_the_artefact_it_ends_with(any_store: Store) -> None:
    made = small(any_store, "tiny image")
    assert any_store.get(f".tandem/{made.ref}/") == made
    assert any_store.get(f"/elsewhere/store/{made.ref}") == made  # the key in its name is the same anywhere
    with pytest.raises(StoreError, match="'model' is no kind"):
        any_store.get(f".tandem/model/{made.manifest.folder}")
