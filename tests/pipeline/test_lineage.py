"""Where an artefact comes from."""

from pipeline.lineage import trace, with_ancestors
from pipeline.manifest import InputRef
from pipeline.store import Store
from tests.pipeline.store_world import small


def test_the_lineage_of_a_run_shows_every_input_with_its_role(any_store: Store) -> None:
    dataset = small(any_store, "baby", kind="dataset")
    image = small(any_store, "tiny image", made_from=[dataset])
    text = small(any_store, "tiny text", made_from=[dataset])
    run = small(any_store, "vbpr", kind="run", made_from=[dataset, image, text])
    tree = any_store.lineage(run)
    assert tree.artefact == run
    assert [child.artefact for child in tree.inputs] == [dataset, image, text]
    assert [child.artefact for child in tree.inputs[1].inputs] == [dataset]
    assert tree.lines() == [
        run.ref,
        f"├─ {dataset.ref}  (input 0)",
        f"├─ {image.ref}  (input 1)",
        f"│  └─ {dataset.ref}  (input 0)",
        f"└─ {text.ref}  (input 2)",
        f"   └─ {dataset.ref}  (input 0)",
    ]


def test_a_subtree_that_was_drawn_is_not_drawn_again(any_store: Store) -> None:
    dataset = small(any_store, "baby", kind="dataset")
    image = small(any_store, "tiny image", made_from=[dataset])
    runs = [small(any_store, f"seed {seed}", kind="run", made_from=[image]) for seed in range(2)]
    report = small(any_store, "report", kind="comparison", made_from=runs)
    assert any_store.lineage(report).lines() == [
        report.ref,
        f"├─ {runs[0].ref}  (input 0)",
        f"│  └─ {image.ref}  (input 0)",
        f"│     └─ {dataset.ref}  (input 0)",
        f"└─ {runs[1].ref}  (input 1)",
        f"   └─ {image.ref}  (input 0)  (as above)",
    ]


def test_an_input_that_is_gone_stays_visible(any_store: Store) -> None:
    dataset = small(any_store, "baby", kind="dataset")
    image = small(any_store, "tiny image", made_from=[dataset])
    any_store._shelf.remove("dataset", dataset.manifest.folder)
    assert any_store.lineage(image).lines() == [
        image.ref,
        f"└─ dataset/?-{dataset.key[:12]}  (input 0)  (no longer in this store)",
    ]


def test_a_forged_circle_ends(local_store: Store) -> None:
    """A key cannot contain itself; a forged manifest can name itself as its own input."""
    artefact = small(local_store, "ring")
    forged = artefact.manifest.model_copy(update={"inputs": (InputRef(kind="features", key=artefact.key),)})
    ring = type(artefact)(forged, artefact.shelf)
    tree = trace(ring.as_input(), lambda source: ring)
    assert tree.inputs[0].inputs == ()


def test_shared_ancestors_are_looked_up_once(local_store: Store) -> None:
    """A comparison of many runs must not read the manifest of their dataset once for each path to it."""
    dataset = small(local_store, "baby", kind="dataset")
    layers = [dataset]
    for depth in range(12):  # 2 ** 12 paths lead down
        layers = [small(local_store, f"{depth} {side}", made_from=layers) for side in range(2)]
    asked: list[InputRef] = []

    def find(source: InputRef) -> object:
        asked.append(source)
        return local_store.find(source.kind, source.key)

    trace(layers[0].as_input(), find)  # type: ignore[arg-type]  # an artefact or None
    assert len(asked) == 24


def test_ancestors_of_nothing_are_nothing() -> None:
    assert with_ancestors([], {"a": ["b"]}) == set()
    assert with_ancestors(["a"], {"a": ["b"], "b": ["c", "a"], "x": ["y"]}) == {"a", "b", "c"}
