"""States of a frozen encoder as an artefact: computed once, found again, never half there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor

from features.catalogue import Catalogue
from features.encoders.registry import load_encoder
from features.errors import EncoderError, FeatureError
from features.live import row_files
from features.live.building import LiveConfig, live_encoder
from features.live.pooled import PooledFile
from features.live.states import StateFile
from features.tuning.modes import TuningConfig, prepare_tuning
from features.tuning.side import SideConfig
from features.tuning.side_mode import prepare_side
from features.tuning.tower import Tower
from flows.cli import app
from pipeline.config import parse_config
from pipeline.console import EXIT_USER_ERROR, run_app
from pipeline.datasets.config import DatasetConfig
from pipeline.errors import ConfigError, StoreError
from pipeline.joint_way import JointResult, JointWayConfig, PlainJointStages, run_joint
from pipeline.paradigms.config import ParadigmsConfig
from pipeline.paradigms.costs import costs_of
from pipeline.paradigms.way import PlainParadigmStages, run_paradigms
from pipeline.progress import SilentReporter
from pipeline.reading import read_catalogue
from pipeline.stages import keep_states
from pipeline.stages.keep_states import ITEMS_FILE, StatesConfig, keep_encoder_states, open_states
from pipeline.stages.prepare_dataset import prepare_dataset
from pipeline.stages.train_jointly import RECOMMENDER_FILE, states_wanted, train_encoder_jointly
from pipeline.store import Artefact, Store
from recommenders.joint import TrainingLoop
from tests.pipeline.small_runs import SMALL_DATASET

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
RAW: dict[str, Any] = {
    "encoder": "tiny",
    "model": "vbpr",
    "settings": {"dim": 4},
    "modalities": ["image", "text"],
    "device": "cpu",
    "training": {"epochs": 2, "batch_size": 64, "learning_rate": 0.01, "patience": 0},
    "joint": {"warmup_epochs": 1, "learning_rate": 1e-3, "ramp_steps": 0, "negative_pool": 8},
    "live": {"chunk": 16},
    "tuning": {"mode": "last-n", "last_n": 1},
}
BELOW: dict[str, Any] = {"encoder": "tiny", "device": "cpu", "chunk": 16, "above": 1}


def way(**changes: Any) -> JointWayConfig:
    raw = dict(RAW)
    for key, value in changes.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    return parse_config(raw, JointWayConfig)


def states(**changes: Any) -> StatesConfig:
    return StatesConfig.model_validate(BELOW | changes)


def dataset_in(store: Store) -> Artefact:
    return prepare_dataset(store, DatasetConfig.model_validate(SMALL_DATASET)).artefact


def present_in(catalogue: Catalogue, modality: Any) -> dict[str, Tensor]:
    hashes = catalogue.contents(modality).hashes
    return {modality: torch.tensor([content is not None for content in hashes])}


class Shop:
    """A store with a small dataset and a joint training above kept states."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "store")
        self.dataset = dataset_in(self.store)
        self.made = self.joint()

    def joint(self, **changes: Any) -> JointResult:
        return run_joint(way(**changes), PlainJointStages(self.store), self.dataset.key)

    def keep(self, **changes: Any) -> Any:
        return keep_encoder_states(self.store, self.dataset.key, states(**changes))


@pytest.fixture(name="shop", scope="module")
def _shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    torch.set_num_threads(1)
    return Shop(tmp_path_factory.mktemp("states"))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The first block of every run of a tower: 0 where the frozen part runs."""
    ran: list[int] = []
    run = Tower.run

    def counting(self: Tower, hidden: Any, start: int = 0, stop: int | None = None) -> Any:
        ran.append(start)
        return run(self, hidden, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Tower, "run", counting)
        yield ran


def test_a_joint_training_leaves_states_and_names_them(shop: Shop) -> None:
    kept = [stage.artefact for stage in shop.made.states]
    assert [artefact.slug for artefact in kept] == ["tiny-image-below-last-1", "tiny-text-below-last-1"]
    assert [stage.reused for stage in shop.made.states] == [False, False]
    assert shop.made.encoder is not None
    encoder = shop.made.encoder.artefact
    roles = {ref.key: ref.role for ref in encoder.manifest.inputs}
    assert [roles[artefact.key] for artefact in kept] == ["image states", "text states"]
    drawn = "\n".join(shop.store.lineage(encoder).lines())
    assert all(f"{artefact.ref}  ({roles[artefact.key]})" in drawn for artefact in kept)
    assert f"{shop.dataset.ref}  (catalogue)" in "\n".join(shop.store.lineage(kept[0]).lines())
    for artefact, start in zip(kept, shop.made.start, strict=True):
        facts = artefact.manifest.facts
        for name in ("n_ok", "n_missing", "n_unreadable"):
            assert facts[name] == start.artefact.manifest.facts[name]
        assert facts["n_items"] == 40
        assert int(str(facts["peak_memory_bytes"])) > 0
        assert facts["n_blocks_run"] == int(str(facts["n_blocks"])) - 1
        assert shop.store.verify(artefact) == []
    facts = encoder.manifest.facts
    assert facts["states_bytes"] == sum(artefact.manifest.bytes for artefact in kept)
    assert facts["states_seconds"] == sum(artefact.manifest.seconds for artefact in kept)


def test_another_seed_and_another_recommender_find_them(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    for changes in ({"seed": 1}, {"model": "freedom", "settings": {"dim": 4, "k": 3}}):
        with counted(monkeypatch) as ran:
            start = [stage.artefact.key for stage in shop.made.start]
            config = way(**changes).training_alone()
            trained = train_encoder_jointly(shop.store, shop.dataset.key, start, config)
        assert not trained.reused
        assert ran
        assert min(ran) > 0  # nothing below the kept states
        inputs = {ref.key for ref in trained.artefact.manifest.inputs}
        assert {stage.artefact.key for stage in shop.made.states} < inputs
    again = shop.joint(seed=1)
    assert [stage.reused for stage in again.states] == [True, True]


def test_nothing_is_done_twice_and_nothing_is_made_for_what_is_there(shop: Shop) -> None:
    again = shop.joint()
    assert all(stage.reused for stage in again.all())
    assert len(again.all()) == len(shop.made.all()) == 9
    # The states gone, the encoder is still found, without anybody making them again.
    kept = shop.made.states[0].artefact
    place = Path(kept.folder_url)
    place.rename(place.with_name(f".{place.name}"))
    try:
        start = [stage.artefact.key for stage in shop.made.start]
        found = train_encoder_jointly(shop.store, shop.dataset.key, start, way().training_alone())
        assert found.reused
        assert not place.exists()
    finally:
        place.with_name(f".{place.name}").rename(place)


def test_without_kept_states_there_are_none(shop: Shop) -> None:
    made = shop.joint(live={"keep_states": False})
    assert made.states == []
    assert made.encoder is not None
    assert {ref.kind for ref in made.encoder.artefact.manifest.inputs} == {"dataset", "features"}
    assert shop.made.encoder is not None
    assert made.encoder.artefact.key != shop.made.encoder.artefact.key


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tuning": {"mode": "full"}}, [None, None]),
        ({"tuning": {"mode": "lora"}}, [None, None]),
        ({"tuning": {"mode": "last-n", "last_n": 2}}, [2, 2]),
        ({"tuning": {"mode": "full", "frozen_towers": ["image"]}}, [0, None]),
        ({"tuning": {"mode": "last-n", "last_n": 1, "frozen_towers": ["text"]}}, [1, 0]),
    ],
)
def test_settings_say_which_states_are_wanted(changes: Any, expected: list[int | None]) -> None:
    config = way(**changes)
    found = [states_wanted(config, modality, config.text) for modality in ("image", "text")]
    assert [each and each.above for each in found] == expected


def test_side_networks_want_pooled_states_of_their_towers() -> None:
    config = way(trained="side", side={"every_nth": 3, "towers": ["text"]}, live={"side_states": "float32"})
    assert states_wanted(config, "image", config.text) is None
    wanted = states_wanted(config, "text", config.text)
    assert wanted is not None
    assert (wanted.above, wanted.every_nth, wanted.dtype) == (None, 3, "float32")


def test_the_key_holds_what_can_change_the_states_and_nothing_else(shop: Shop) -> None:
    same = shop.keep()
    assert same.reused
    assert same.artefact.key == shop.made.states[0].artefact.key
    assert shop.keep(n_workers=1, every_nth=5, dtype="float32", text={"fields": ["title"]}).reused
    others = [
        shop.keep(above=2),
        shop.keep(above=None),
        shop.keep(above=None, dtype="float32"),
        shop.keep(above=None, every_nth=1),
        shop.keep(modality="text"),
        shop.keep(modality="text", text={"fields": ["title"]}),
        shop.keep(chunk=8),
        shop.keep(limits={"max_pixels": 10_000}),
    ]
    keys = [same.artefact.key, *(each.artefact.key for each in others)]
    assert len(set(keys)) == len(keys)
    assert others[4].reused  # the joint training made it


def test_another_encoder_gives_another_key_and_another_split_the_same(shop: Shop, tmp_path: Path) -> None:
    seen: set[str] = set()
    for raw in (SMALL_DATASET, SMALL_DATASET | {"split": {"rule": "leave_one_out", "seed": 3}}):
        dataset = prepare_dataset(shop.store, DatasetConfig.model_validate(raw)).artefact
        seen.add(dataset.key)
        found = keep_encoder_states(shop.store, dataset.key, states())
        assert found.artefact.key == shop.made.states[0].artefact.key
    assert len(seen) == 2
    assert shop.made.encoder is not None
    trained = f"store/{shop.made.encoder.artefact.manifest.folder}"
    other = keep_encoder_states(shop.store, shop.dataset.key, states(encoder=trained))
    assert not other.reused  # a saved encoder is known by its own files, whatever epoch was best
    assert other.artefact.key != shop.made.states[0].artefact.key


@pytest.mark.parametrize("mode", ["last-n", "side"])
@pytest.mark.parametrize("modality", ["image", "text"])
def test_vectors_and_gradients_are_those_of_states_computed_in_place(
    mode: str, modality: Any, shop: Shop, tmp_path: Path
) -> None:
    catalogue = read_catalogue(shop.dataset)
    artefact = shop.keep(above=1 if mode == "last-n" else None, modality=modality).artefact
    kept = open_states(artefact, catalogue.item_ids)
    assert isinstance(kept, StateFile if mode == "last-n" else PooledFile)
    present = present_in(catalogue, modality)
    assert modality == "text" or not present["image"].all()  # the rows are not the places
    rows = present[modality].nonzero().squeeze(1)[torch.tensor([3, 30, 0, 17])]
    weights = torch.randn(4, load_encoder("tiny").info.dims[modality])
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for given in ({}, {modality: kept}):
        tuned: Any
        if mode == "last-n":
            tuned = prepare_tuning(load_encoder("tiny"), TuningConfig(mode="last-n", last_n=1))
        else:
            tuned = prepare_side(load_encoder("tiny"), SideConfig())
        with live_encoder(
            tuned,
            catalogue,
            (modality,),
            present,
            LiveConfig(chunk=16),
            folder=tmp_path / str(bool(given)),
            states=given,
        ) as live:
            vectors = live.encode(modality, rows)
            live.backward(modality, weights)
            gradients = {
                name: value.grad.clone()
                for name, value in live.named_parameters().items()
                if value.grad is not None
            }
        found.append((vectors, gradients))
        assert (tmp_path / str(bool(given))).exists() == (not given)
    (in_place, before), (from_store, after) = found
    assert torch.equal(in_place, from_store)
    assert before.keys() == after.keys()
    assert before
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_damaged_file_is_told_with_what_to_do(shop: Shop, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    dataset = dataset_in(store)
    artefact = keep_encoder_states(store, dataset.key, states(modality="text")).artefact
    ids = read_catalogue(dataset).item_ids
    with pytest.raises(StoreError, match=r"has states of 40 items, which are not the 39 of the dataset"):
        open_states(artefact, ids[1:])
    path = artefact.path("places.npy")
    whole = path.read_bytes()
    path.write_bytes(b"X" * len(whole))
    assert [problem.file for problem in store.verify(artefact)] == ["places.npy"]
    with pytest.raises(StoreError, match=rf"{artefact.ref} is damaged: .*tandem verify .*--force"):
        open_states(artefact, ids)
    path.write_bytes(whole[:-1])
    with pytest.raises(StoreError, match=r"places\.npy has .* bytes instead of"):
        open_states(artefact, ids)
    remade = keep_encoder_states(store, dataset.key, states(modality="text"), force=True)
    assert store.verify(remade.artefact) == []
    assert len(open_states(remade.artefact, ids)) == 40


def test_states_in_any_kind_of_store_are_read_back(any_store: Store, shop: Shop) -> None:
    dataset = dataset_in(any_store)
    artefact = keep_encoder_states(any_store, dataset.key, states(modality="text")).artefact
    catalogue = read_catalogue(dataset)
    rows = present_in(catalogue, "text")["text"].nonzero().squeeze(1)
    found, expected = (
        open_states(each, catalogue.item_ids) for each in (artefact, shop.keep(modality="text").artefact)
    )
    assert isinstance(found, StateFile)
    assert isinstance(expected, StateFile)
    assert torch.equal(found.read(rows, CPU).states, expected.read(rows, CPU).states)


def test_states_go_with_what_needed_them_as_features_do(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    store, made = shop.store, shop.made
    assert made.run is not None
    loose = shop.keep(modality="text", above=2).artefact
    store.name("mine", made.run.artefact)
    gone = {each.ref for each in store.collect_garbage(older_than=timedelta(0), dry_run=True).artefacts}
    assert loose.ref in gone
    start_and_states = [stage.artefact for stage in (*made.start, *made.states)]
    assert not gone & {each.ref for each in start_and_states}
    store.unname("mine")
    gone = {each.ref for each in store.collect_garbage(older_than=timedelta(0), dry_run=True).artefacts}
    assert {each.ref for each in start_and_states} < gone


def test_the_commands_know_the_kind(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    kept = shop.made.states[0].artefact
    assert run_app(app, ["ls", "states", "--store", shop.store.url]) == 0
    assert kept.ref in capsys.readouterr().out.replace("\n", "")
    assert run_app(app, ["show", kept.ref, "--store", shop.store.url]) == 0
    shown = capsys.readouterr().out
    assert "above" in shown
    assert "n_blocks_run" in shown
    assert run_app(app, ["verify", kept.ref, "--store", shop.store.url]) == 0
    wrong = ["joint", shop.dataset.key, "--store", shop.store.url, "--mode", "last-n"]
    assert run_app(app, [*wrong, "--set", "tuning.last_n=99"]) == EXIT_USER_ERROR
    assert "last_n is 99" in capsys.readouterr().err


def test_what_cannot_be_is_refused(shop: Shop) -> None:
    with pytest.raises(EncoderError, match="last_n is 99, but the image tower"):
        shop.keep(above=99)
    with pytest.raises(ConfigError, match="encodes text, not image"):
        shop.keep(encoder="tfidf")
    assert not [path for path in Path(shop.store.url).glob(".drafts/*") if any(path.rglob("*.npy"))]


def test_states_of_something_else_are_refused(shop: Shop, tmp_path: Path) -> None:
    catalogue = read_catalogue(shop.dataset)
    below, pooled = (open_states(shop.keep(above=above).artefact, catalogue.item_ids) for above in (1, None))
    everything = present_in(catalogue, "image")

    def ask(tuned: Any, kept: Any, items: Catalogue = catalogue) -> None:
        with live_encoder(
            tuned, items, ("image",), everything, LiveConfig(), folder=tmp_path, states={"image": kept}
        ):
            pass

    last_2 = prepare_tuning(load_encoder("tiny"), TuningConfig(mode="last-n", last_n=2))
    with pytest.raises(
        FeatureError, match=r"those before block \d+; expected others, as block \d+ is trained"
    ):
        ask(last_2, below)
    full = prepare_tuning(load_encoder("tiny"), TuningConfig(mode="full"))
    with pytest.raises(FeatureError, match="as its stem is trained"):
        ask(full, below)
    with pytest.raises(FeatureError, match="are pooled; expected whole ones"):
        ask(last_2, pooled)
    with pytest.raises(FeatureError, match="are whole; expected pooled ones"):
        ask(prepare_side(load_encoder("tiny"), SideConfig()), below)
    with pytest.raises(FeatureError, match=r"those after \("):
        ask(prepare_side(load_encoder("tiny"), SideConfig(every_nth=1)), pooled)
    with pytest.raises(FeatureError, match="are of 40 items, the catalogue has 39"):
        ask(last_2, below, Catalogue(catalogue.items[1:], catalogue.image_root))


def test_rows_that_cannot_be_had_are_told_apart(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    dataset = dataset_in(store)
    catalogue = read_catalogue(dataset)
    has = present_in(catalogue, "image")["image"]
    n_missing, gone = int((~has).sum()), int(has.nonzero()[4])
    assert n_missing
    contents = catalogue.contents("image")
    (Path(catalogue.image_root) / str(contents.images[gone])).unlink()
    artefact = keep_encoder_states(store, dataset.key, states()).artefact
    facts = artefact.manifest.facts
    counts = [facts[f"n_{status}"] for status in ("ok", "missing", "unreadable")]
    assert counts == [39 - n_missing, n_missing, 1]
    told = pl.read_parquet(artefact.path(ITEMS_FILE))
    absent = int((~has).nonzero()[0])
    assert (told["status"][absent], told["reason"][absent]) == ("missing", "no picture")
    assert told["status"][gone] == "unreadable"
    assert told["reason"][gone]
    kept = open_states(artefact, catalogue.item_ids)
    tuned = prepare_tuning(load_encoder("tiny"), TuningConfig(mode="last-n", last_n=1))
    config, given = LiveConfig(), {"image": kept}
    lost = rf"lack 1 of {40 - n_missing} items that have features, first '{catalogue.item_ids[gone]}'"
    with (
        pytest.raises(FeatureError, match=lost),
        live_encoder(tuned, catalogue, ("image",), {"image": has}, config, folder=tmp_path, states=given),
    ):
        pass
    has[gone] = False
    with live_encoder(
        tuned, catalogue, ("image",), {"image": has}, config, folder=tmp_path, states=given
    ) as live:
        assert len(live.encode("image", has.nonzero().squeeze(1))) == 39 - n_missing
        assert len(live.encode("image", torch.tensor([], dtype=torch.int64))) == 0


def test_a_study_computes_states_once_for_all_its_seeds(shop: Shop) -> None:
    raw = {name: RAW[name] for name in ("training", "joint", "live", "tuning", "device")}
    recommenders = [{"model": "vbpr", "settings": {"dim": 4}}]
    more = {"dataset": SMALL_DATASET, "recommenders": recommenders, "seeds": [3, 4], "controls": False}
    study = parse_config({**raw, **more, "paradigms": ["pretrained", "joint"]}, ParadigmsConfig)
    result = run_paradigms(study, PlainParadigmStages(shop.store))
    kept = [stage for stage in result.stages if stage.artefact.kind == "states"]
    assert [stage.artefact.key for stage in kept] == [stage.artefact.key for stage in shop.made.states]
    frozen, joint = result.contenders
    for run in joint.runs:
        assert [stage.artefact.key for stage in run.features.states] == [one.artefact.key for one in kept]
        encoded = [*run.features.before, *run.features.states, *run.features.made]
        costs = costs_of([run])
        assert costs.encode_s == pytest.approx(sum(one.artefact.manifest.seconds for one in encoded))
        assert costs.stored_bytes > sum(one.artefact.manifest.bytes for one in encoded)
    assert all(not run.features.states for run in frozen.runs)


class Killed(BaseException):
    """As a kill would: nothing catches it."""


class Stopping(SilentReporter):
    """Ends the work after some items."""

    def __init__(self, after: int) -> None:
        self.after = after

    @contextmanager
    def progress(self, description: str) -> Iterator[Callable[[int, int], None]]:
        def stop(done: int, of: int) -> None:
            if done >= self.after:
                raise Killed

        yield stop


@pytest.mark.parametrize("above", [1, None])
def test_killed_and_started_again_equals_uninterrupted(
    above: int | None, shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "_MARK_EVERY_S", 0.0)
    store = Store(tmp_path / "store")
    dataset = dataset_in(store)
    for modality in ("image", "text"):
        config = states(modality=modality, above=above, chunk=8)
        with pytest.raises(Killed):
            keep_encoder_states(store, dataset.key, config, reporter=Stopping(24))
        assert store.list("states") == [] or modality == "text"
        with counted(monkeypatch) as ran:
            again = keep_encoder_states(store, dataset.key, config)
        assert len([start for start in ran if start == 0]) <= 2 * 2  # two of five chunks were left
        whole = keep_encoder_states(shop.store, shop.dataset.key, config)
        assert {name: file.sha256 for name, file in again.artefact.manifest.files.items()} == {
            name: file.sha256 for name, file in whole.artefact.manifest.files.items()
        }
    assert not list((tmp_path / "store").rglob(".written*"))
    assert not list(Path(store.url).glob(".drafts/states*"))


def test_a_resumed_training_uses_the_same_states(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    dataset = dataset_in(store)
    save = TrainingLoop.save

    def killed_after_one(self: Any, *args: Any) -> None:
        save(self, *args)
        if self.epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "save", killed_after_one)
        with pytest.raises(KeyboardInterrupt):
            run_joint(way(), PlainJointStages(store), dataset.key)
    with monkeypatch.context() as patch:
        patch.setattr(keep_states, "_compute", None)  # whoever computed states now would fail
        made = run_joint(way(), PlainJointStages(store), dataset.key)
    assert [stage.reused for stage in made.states] == [True, True]
    assert made.encoder is not None
    assert shop.made.encoder is not None
    trained, expected = made.encoder.artefact.manifest, shop.made.encoder.artefact.manifest
    assert trained.facts["resumed_after"] == 1
    for file in ("model.safetensors", RECOMMENDER_FILE):
        assert trained.files[file].sha256 == expected.files[file].sha256
