import hashlib

import polars as pl
import pytest

from features.catalogue import Catalogue, TextConfig, leaves_folder
from features.errors import FeatureError

HASH = "a" * 64
OTHER = "b" * 64


def items(**columns: list[object]) -> pl.DataFrame:
    n_rows = len(next(iter(columns.values())))
    ids: list[object] = [f"item-{row}" for row in range(n_rows)]
    return pl.DataFrame({"item_id": ids} | columns, strict=False)


def titles(*texts: str | None, **config: object) -> list[str | None]:
    frame = items(title=pl.Series(texts, dtype=pl.String).to_list()).with_columns(
        pl.col("title").cast(pl.String)
    )
    return Catalogue(frame).texts(TextConfig(fields=("title",), **config))


def test_fields_are_cleaned_and_joined_in_the_order_asked_for() -> None:
    frame = items(title=["Mug &amp; lid", "Cup"], description=["  blue\n", None], tags=[["a", "b"], []])
    assert Catalogue(frame).texts() == ["Mug & lid blue", "Cup"]
    config = TextConfig(fields=("tags", "title"), separator=" | ")
    assert Catalogue(frame).texts(config) == ["a, b | Mug & lid", "Cup"]


def test_a_text_of_which_nothing_is_left_is_none() -> None:
    assert titles("", " \n", "\x00", "&nbsp;", None, "ok") == [None, None, None, None, None, "ok"]


def test_long_texts_emoji_and_nul_bytes_are_taken() -> None:
    long, emoji, nul = titles("lamp " * 20_000, "🪑 chair 👩‍🚀", "de\x00sk", max_chars=50)
    assert long == ("lamp " * 10).strip()
    assert emoji == "🪑 chair 👩‍🚀"
    assert nul == "desk"


def test_a_misspelt_field_is_an_error_that_names_the_near_one() -> None:
    with pytest.raises(FeatureError, match=r"'descripton' is no column .* did you mean 'description'\?"):
        Catalogue(items(description=["a"])).texts(TextConfig(fields=("descripton",)))


def test_a_field_of_numbers_is_an_error() -> None:
    with pytest.raises(FeatureError, match="'year' holds Int64; columns of text are item_id, title"):
        Catalogue(items(title=["a"], year=[1995])).texts(TextConfig(fields=("year",)))


def test_categories_count_as_text() -> None:
    frame = items(kind=["cup", "mug"]).with_columns(pl.col("kind").cast(pl.Categorical))
    assert Catalogue(frame).texts(TextConfig(fields=("kind",))) == ["cup", "mug"]


def test_an_item_without_a_picture_is_missing_and_one_without_a_hash_unreadable() -> None:
    frame = items(image=["a.jpg", None, "", "gone.jpg"], image_hash=[HASH, None, None, None])
    contents = Catalogue(frame, "/pictures").contents("image")
    assert contents.hashes == [HASH, None, None, None]
    assert contents.presence == ["present", "missing", "missing", "unreadable"]
    assert contents.reasons == [
        None,
        "no picture",
        "no picture",
        "the picture could not be read when the dataset was imported",
    ]


def test_a_text_is_known_by_the_hash_of_its_cleaned_form() -> None:
    frame = items(title=["caf&eacute;", "café ", None])
    contents = Catalogue(frame).contents("text", TextConfig(fields=("title",)))
    assert contents.hashes == [hashlib.sha256("café".encode()).hexdigest()] * 2 + [None]
    assert contents.presence[2] == "missing"


def test_a_fused_content_needs_both_and_changes_with_either() -> None:
    frame = items(
        title=["cup", "cup", "mug", None, "cup", None],
        image=["a.jpg", "b.jpg", "a.jpg", "a.jpg", None, None],
        image_hash=[HASH, OTHER, HASH, HASH, None, None],
    )
    contents = Catalogue(frame, "/p").contents("fused", TextConfig(fields=("title",)))
    assert len({contents.hashes[row] for row in (0, 1, 2)}) == 3
    assert contents.presence[3:] == ["missing"] * 3
    assert contents.reasons[3:] == ["no text", "no picture", "no picture and no text"]


def base_frame() -> pl.DataFrame:
    return items(
        title=["cup", "mug"],
        price=[1, 2],
        image=["a.jpg", "b.jpg"],
        image_hash=[HASH, OTHER],
        note=["x", "y"],
    )


TITLE = TextConfig(fields=("title",))


@pytest.mark.parametrize("modality", ["image", "text", "fused"])
def test_the_fingerprint_ignores_what_is_not_encoded(modality: str) -> None:
    frame = base_frame()
    same = frame.with_columns(
        price=pl.lit(9), note=pl.lit("z"), image=pl.col("image").str.replace("jpg", "jpeg")
    )
    expected = Catalogue(frame, "/one").fingerprint(modality, TITLE)
    assert Catalogue(same, "/another").fingerprint(modality, TITLE) == expected
    assert len(expected) == 64


@pytest.mark.parametrize(
    "change",
    [
        pl.col("item_id") + "!",
        pl.col("image_hash").reverse(),
        pl.lit(None, pl.String).alias("image_hash"),
        pl.lit(None, pl.String).alias("image"),
    ],
)
def test_the_image_fingerprint_follows_ids_and_pictures(change: pl.Expr) -> None:
    frame = base_frame()
    before = Catalogue(frame, "/p").fingerprint("image")
    assert Catalogue(frame.with_columns(change), "/p").fingerprint("image") != before


def test_the_fingerprint_follows_the_order_and_the_texts() -> None:
    frame = base_frame()
    before = Catalogue(frame, "/p").fingerprint("text", TITLE)
    assert Catalogue(frame.reverse(), "/p").fingerprint("text", TITLE) != before
    assert Catalogue(frame.with_columns(title=pl.lit("pot")), "/p").fingerprint("text", TITLE) != before
    assert Catalogue(frame, "/p").fingerprint("text", TextConfig(fields=("title", "note"))) != before


def test_ids_and_hashes_cannot_be_mixed_up_in_the_fingerprint() -> None:
    one = pl.DataFrame({"item_id": ["a=missing;1:b"]})
    two = pl.DataFrame({"item_id": ["a", "b"]})
    assert Catalogue(one).fingerprint("image") != Catalogue(two).fingerprint("image")


def test_an_empty_catalogue_is_a_catalogue() -> None:
    catalogue = Catalogue(pl.DataFrame(schema={"item_id": pl.String}))
    assert len(catalogue) == 0
    assert catalogue.item_ids == catalogue.contents("image").hashes == []


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pl.DataFrame({"id": ["a"]}), "no column item_id, only id"),
        (pl.DataFrame({"item_id": [1]}), "holds Int64; expected strings"),
        (pl.DataFrame({"item_id": ["a", None, ""]}), "2 of 3 items have no id"),
        (pl.DataFrame({"item_id": ["a", "b", "a"]}), "1 item ids are there more than once, first 'a'"),
        (pl.DataFrame({"item_id": ["a"], "image": [3]}), "image holds Int64"),
        (
            pl.DataFrame({"item_id": ["a"], "image": ["x"], "image_hash": ["ABC"]}),
            "is 'ABC'; expected SHA-256",
        ),
    ],
)
def test_what_would_make_rows_ambiguous_is_refused(frame: pl.DataFrame, message: str) -> None:
    with pytest.raises(FeatureError, match=message):
        Catalogue(frame, "/p")


def test_pictures_without_a_folder_are_refused() -> None:
    with pytest.raises(FeatureError, match="has no image_root"):
        Catalogue(items(image=["a.jpg"], image_hash=[HASH]))


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../a.jpg", "a/../../b.jpg", "a\\..\\..\\b.jpg", "C:\\a.jpg", "s3://other/a.jpg", "a\0b"],
)
def test_a_path_that_leaves_the_folder_is_refused(path: str) -> None:
    assert leaves_folder(path)
    with pytest.raises(FeatureError, match="leaves the pictures' folder"):
        Catalogue(items(image=[path], image_hash=[HASH]), "/p")


def test_an_ordinary_path_stays_inside() -> None:
    assert not leaves_folder("images/a b/ü..jpg")
