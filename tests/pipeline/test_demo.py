"""The demo: a pure function of its seed, whose two modalities each tell half of what users choose by."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image
from pydantic import ValidationError

from pipeline.datasets.base import RawDataset
from pipeline.datasets.demo import DemoConfig, demo_identity, demo_traits, demo_utilities, import_demo
from pipeline.datasets.demo_pairs import training_product
from pipeline.datasets.demo_rendering import render_label, render_product
from pipeline.datasets.demo_texts import BRANDS, LOOKS, MATERIALS, USES, write_caption, write_text
from pipeline.datasets.demo_traits import ALL_TRAITS, TEXT_TRAITS, VISUAL_TRAITS, Trait, draw_traits
from pipeline.datasets.demo_users import choose, utilities

SMALL = DemoConfig(n_items=120, n_users=60, image_size_px=48)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> RawDataset:
    return import_demo(SMALL, tmp_path_factory.mktemp("demo"))


def pixels(raw: RawDataset, row: int) -> bytes:
    return (Path(raw.image_root) / raw.items["image"][row]).read_bytes()


def test_equal_configurations_give_equal_bytes(small: RawDataset, tmp_path: Path) -> None:
    again = import_demo(SMALL, tmp_path)
    assert again.items.equals(small.items)
    assert again.interactions.equals(small.interactions)
    with_picture = [row for row, image in enumerate(small.items["image"]) if image is not None]
    assert all(pixels(again, row) == pixels(small, row) for row in with_picture)


def test_another_seed_is_another_world(small: RawDataset, tmp_path: Path) -> None:
    other_config = SMALL.model_copy(update={"seed": 1})
    other = import_demo(other_config, tmp_path)
    assert not other.items["title"].equals(small.items["title"])
    assert not other.interactions.equals(small.interactions)
    assert demo_identity(other_config) != demo_identity(SMALL)


def test_some_items_miss_a_picture_some_a_text_and_none_both(small: RawDataset) -> None:
    without_image = small.items["image"].is_null()
    without_text = small.items["title"].is_null()
    assert without_image.sum() == without_text.sum() == 5
    assert not (without_image & without_text).any()
    assert small.items["description"].is_null().equals(without_text)
    files = {path.name for path in Path(small.image_root).iterdir()}
    assert files == set(small.items["image"].drop_nulls())
    assert small.drops == {"items without a picture": 5, "items without a text": 5}


def test_every_text_is_different(small: RawDataset) -> None:
    texts = small.items.select("title", "description").drop_nulls()
    assert not texts.is_duplicated().any()
    assert texts["title"].str.len_chars().max() < 80  # type: ignore[operator]


def test_users_choose_different_items_in_the_order_of_time(small: RawDataset) -> None:
    pairs = small.interactions
    assert not pairs.select("user_id", "item_id").is_duplicated().any()
    counts = pairs.group_by("user_id").len()["len"]
    assert len(counts) == SMALL.n_users
    assert counts.min() >= SMALL.fewest_choices  # type: ignore[operator]
    assert counts.max() <= SMALL.most_choices  # type: ignore[operator]
    assert small.user_ids() == [f"user-{row:05d}" for row in range(SMALL.n_users)]
    sorted_by_time = pairs.select(pl.col("timestamp").is_sorted().over("user_id"))
    assert sorted_by_time["timestamp"].all()


def test_a_configuration_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValidationError, match="fewest_choices <= most_choices <= n_items"):
        DemoConfig(n_items=20)


def test_values_of_a_trait_are_equally_frequent_and_traits_independent() -> None:
    traits = draw_traits(4000, np.random.default_rng(0))
    for trait in ALL_TRAITS:
        counts = np.bincount(traits.values[trait.name])
        assert len(counts) == len(trait.values)
        assert counts.max() - counts.min() <= 1
    for first, second in itertools.combinations(ALL_TRAITS, 2):
        table = np.zeros((len(first.values), len(second.values)))
        np.add.at(table, (traits.values[first.name], traits.values[second.name]), 1)
        expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
        chi_square = ((table - expected) ** 2 / expected).sum()
        assert chi_square < 2 * table.size, (first.name, second.name)


def looks_words() -> set[str]:
    ignored = {"a", "on", "shaped", "background", "below"}
    phrases = [phrase for values in LOOKS.values() for names in values for phrase in names]
    return {word for phrase in phrases for word in re.findall(r"[a-z]+", phrase)} - ignored


def test_texts_name_brand_material_and_use_and_no_looks() -> None:
    traits = draw_traits(400, np.random.default_rng(1))
    forbidden = looks_words()
    for row in range(400):
        values = traits.of(row)
        text = write_text(values, np.random.default_rng(row))
        words = set(re.findall(r"[a-z]+", f"{text.title} {text.description}".lower()))
        assert not words & forbidden, text
        description = text.description.lower()
        assert BRANDS[values["brand"]].lower() in description
        assert any(name.lower() in description for name in MATERIALS[values["material"]])
        assert any(name.lower() in description for name in USES[values["use"]])
        others = [name for value, name in enumerate(BRANDS) if value != values["brand"]]
        assert not any(name.lower() in f"{text.title} {text.description}".lower() for name in others)


def test_a_text_does_not_depend_on_the_looks() -> None:
    same_words = {"brand": 1, "material": 2, "use": 3}
    first = write_text({**same_words, "shape": 0, "colour": 0}, np.random.default_rng(7))
    second = write_text({**same_words, "shape": 5, "colour": 6}, np.random.default_rng(7))
    assert first == second


def drawn(traits: dict[str, int], render: Callable[..., Image.Image] = render_product) -> np.ndarray:
    return np.asarray(render(traits, np.random.default_rng(3), 64)).astype(int)


PLAIN = {trait.name: 0 for trait in ALL_TRAITS}


@pytest.mark.parametrize("trait", VISUAL_TRAITS, ids=lambda trait: trait.name)
def test_every_look_changes_the_picture(trait: Trait) -> None:
    pictures = [drawn({**PLAIN, trait.name: value}) for value in range(len(trait.values))]
    for first, second in itertools.combinations(pictures, 2):
        changed = np.abs(first - second).max(axis=2) > 20
        assert changed.mean() > 0.02


@pytest.mark.parametrize("trait", TEXT_TRAITS, ids=lambda trait: trait.name)
def test_labels_show_the_text_traits_and_product_pictures_do_not(trait: Trait) -> None:
    values = range(len(trait.values))
    products = [drawn({**PLAIN, trait.name: value}) for value in values]
    assert all(np.array_equal(products[0], picture) for picture in products)
    labels = [drawn({**PLAIN, trait.name: value}, render_label) for value in values]
    for first, second in itertools.combinations(labels, 2):
        assert (np.abs(first - second).max(axis=2) > 50).mean() > 0.02


def test_labels_do_not_show_looks() -> None:
    label = drawn(PLAIN, render_label)
    for trait in VISUAL_TRAITS:
        assert np.array_equal(label, drawn({**PLAIN, trait.name: 1}, render_label))


@pytest.mark.parametrize("size_px", [16, 33, 96, 224])
def test_pictures_of_any_size_are_drawn(size_px: int) -> None:
    picture = render_product(PLAIN, np.random.default_rng(0), size_px)
    assert picture.size == (size_px, size_px)
    assert picture.mode == "RGB"


def test_a_picture_looks_the_same_in_another_size() -> None:
    traits = {**PLAIN, "shape": 3, "colour": 5, "pattern": 1, "background": 2}
    large = render_product(traits, np.random.default_rng(0), 128)
    small = render_product(traits, np.random.default_rng(0), 64)
    halved = np.asarray(large.resize((64, 64), Image.Resampling.BOX)).astype(int)
    assert np.abs(halved - np.asarray(small).astype(int)).mean() < 3


def test_captions_name_what_they_are_told_to() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        caption = write_caption(PLAIN, {"colour", "brand"}, rng).lower()
        assert "red" in caption or "crimson" in caption
        assert BRANDS[0].lower() in caption
        assert not any(name in caption for name in MATERIALS[0])


def test_a_training_product_is_a_pure_function_of_seed_and_row() -> None:
    first, again = training_product(5, 3, 48), training_product(5, 3, 48)
    assert first.traits == again.traits
    assert first.picture.tobytes() == again.picture.tobytes()
    assert training_product(5, 4, 48).picture.tobytes() != first.picture.tobytes()
    captions = {first.caption(np.random.default_rng(seed)) for seed in range(20)}
    assert len(captions) > 15


def modality_part(traits: tuple[str, ...], scores: np.ndarray, values: dict[str, np.ndarray]) -> np.ndarray:
    """What an additive model of some traits, fitted per user, explains of the utilities: (U, I)."""
    columns = [np.ones(scores.shape[1])]
    for name in traits:
        columns += [(values[name] == value).astype(float) for value in range(values[name].max() + 1)]
    design = np.stack(columns, axis=1)
    weights, *_ = np.linalg.lstsq(design, scores.T, rcond=None)
    fitted: np.ndarray = (design @ weights).T
    return fitted


def test_looks_and_texts_explain_about_half_of_the_utilities_each() -> None:
    traits = draw_traits(1000, np.random.default_rng(0))
    scores = utilities(traits, 300, np.random.default_rng(1))
    total = scores.var(axis=1).mean()
    looks = (
        modality_part(tuple(trait.name for trait in VISUAL_TRAITS), scores, traits.values).var(axis=1).mean()
    )
    texts = (
        modality_part(tuple(trait.name for trait in TEXT_TRAITS), scores, traits.values).var(axis=1).mean()
    )
    both = modality_part(tuple(trait.name for trait in ALL_TRAITS), scores, traits.values).var(axis=1).mean()
    assert 0.4 < looks / total < 0.6
    assert 0.4 < texts / total < 0.6
    assert both / total > 0.95


def test_choices_follow_the_softmax_of_the_utilities() -> None:
    scores = np.log(np.array([[1.0, 2.0, 5.0]], dtype=np.float32)).repeat(20_000, axis=0)
    first = choose(scores, 1, 1, np.random.default_rng(0))
    shares = np.bincount(first.item_rows, minlength=3) / len(first.item_rows)
    np.testing.assert_allclose(shares, [1 / 8, 2 / 8, 5 / 8], atol=0.012)
    # Without replacement: the chance of {0, 2} is 1/8 * 5/7 + 5/8 * 1/3.
    two = choose(scores, 2, 2, np.random.default_rng(1))
    pairs = two.item_rows[np.lexsort((two.item_rows, two.user_rows))].reshape(-1, 2)
    share = (pairs == [0, 2]).all(axis=1).mean()
    assert abs(share - (1 / 8 * 5 / 7 + 5 / 8 * 1 / 3)) < 0.012


def test_choices_do_not_depend_on_the_block_size() -> None:
    scores = np.random.default_rng(0).standard_normal((50, 30)).astype(np.float32)
    one = choose(scores, 3, 6, np.random.default_rng(2), block_users=50)
    many = choose(scores, 3, 6, np.random.default_rng(2), block_users=7)
    np.testing.assert_array_equal(one.item_rows, many.item_rows)
    np.testing.assert_array_equal(one.timestamps, many.timestamps)


def test_the_right_answer_ranks_what_users_chose_far_above_chance(small: RawDataset) -> None:
    scores = demo_utilities(SMALL)
    users, items = small.user_and_item_rows()
    assert scores.shape == (SMALL.n_users, SMALL.n_items)
    assert len(demo_traits(SMALL)) == SMALL.n_items
    places = (scores[users] > scores[users, items][:, None]).mean(axis=1)
    assert places.mean() < 0.15  # 0.5 by chance
