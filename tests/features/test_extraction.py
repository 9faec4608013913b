from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from features.catalogue import Catalogue, Modality, TextConfig
from features.errors import EncoderError, FeatureError
from features.extraction import ExtractionConfig, recipe_digest
from features.feature_table import FeatureSet, read_rows
from features.images import open_image, read_picture
from features.known import KnownVectors
from tests.features.small_encoder import (
    DIM,
    SMALL,
    SmallEncoder,
    bytes_of,
    parts_of,
    run,
    sha256,
    small_catalogue,
    to_small_pixels,
    write_picture,
)


def encoded_alone(catalogue: Catalogue, modality: Modality) -> Tensor:
    """Each item by itself, through the encoder's own methods: the reference."""
    encoder = SmallEncoder().eval()
    rows = []
    for name, text in zip(catalogue.items["image"], catalogue.texts(), strict=True):
        pixels = to_small_pixels(open_image(read_picture(catalogue.image_root, name)))[None]
        tokens = encoder.tokenize([text or ""])
        rows.append(
            encoder.encode_images(pixels)
            if modality == "image"
            else encoder.encode_texts(tokens)
            if modality == "text"
            else encoder.encode_pairs(pixels, tokens)
        )
    return torch.cat(rows).detach()


@pytest.mark.parametrize("modality", ["image", "text", "fused"])
def test_each_item_gets_its_own_vector_in_the_catalogues_order(tmp_path: Path, modality: Modality) -> None:
    catalogue = small_catalogue(tmp_path / "pictures", 37)
    report = run(tmp_path / "out", catalogue, modality)
    features = FeatureSet.read(parts_of(tmp_path / "out"))
    assert features.item_ids.to_list() == catalogue.item_ids
    torch.testing.assert_close(features.vectors, encoded_alone(catalogue, modality))
    assert (report.rows, report.n_ok, report.encoded, report.parts) == (37, 37, 37, 4)
    assert (report.n_missing, report.n_unreadable, report.reused, report.duplicates) == (0, 0, 0, 0)
    assert report.device == "cpu"
    assert report.batch_size == 4
    assert 0 <= report.waiting_share <= 1
    assert report.items_per_s > 0
    assert (
        read_rows(parts_of(tmp_path / "out"))["content_hash"].to_list() == catalogue.contents(modality).hashes
    )


def test_float16_is_the_rounded_float32(tmp_path: Path) -> None:
    catalogue = small_catalogue(tmp_path / "pictures", 12)
    run(tmp_path / "half", catalogue, config=ExtractionConfig(batch_size=4))
    run(tmp_path / "full", catalogue, config=ExtractionConfig(batch_size=4, dtype="float32"))
    half, full = (FeatureSet.read(parts_of(tmp_path / name)).vectors for name in ("half", "full"))
    assert half.dtype == torch.float16
    assert torch.equal(half, full.half())


def test_every_row_says_whether_and_why_it_has_no_vector(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    outside = write_picture(tmp_path / "outside.png", 99)
    (pictures / "sub").mkdir(parents=True)
    (pictures / "link.png").symlink_to("../outside.png")
    (pictures / "page.jpg").write_bytes(b"<!DOCTYPE html><p>not here")
    (pictures / "empty.jpg").write_bytes(b"")
    good = write_picture(pictures / "good.png", 1)
    cut = (pictures / "good.png").read_bytes()[:-100]
    (pictures / "cut.png").write_bytes(cut)
    changed = write_picture(pictures / "changed.png", 2)
    write_picture(pictures / "changed.png", 3)
    rows = [
        ("good", "good.png", good, "ok", None),
        ("none", None, None, "missing", "no picture"),
        ("import", "x.png", None, "unreadable", "could not be read when the dataset was imported"),
        ("html", "page.jpg", sha256(b"<!DOCTYPE html><p>not here"), "unreadable", "HTML page"),
        ("empty", "empty.jpg", sha256(b""), "unreadable", "0 bytes"),
        ("cut", "cut.png", sha256(cut), "unreadable", "truncated"),
        ("changed", "changed.png", changed, "unreadable", "changed since import"),
        ("gone", "gone.png", "a" * 64, "unreadable", "no file"),
        ("link", "link.png", outside, "unreadable", "out of the folder"),
    ]
    items = pl.DataFrame(
        {"item_id": [r[0] for r in rows], "image": [r[1] for r in rows], "image_hash": [r[2] for r in rows]}
    )
    report = run(tmp_path / "out", Catalogue(items, str(pictures)))
    read = read_rows(parts_of(tmp_path / "out"))
    assert read["status"].to_list() == [row[3] for row in rows]
    for (name, *_, expected), reason in zip(rows, read["reason"], strict=True):
        assert (reason is None) == (expected is None), name
        assert expected is None or expected in reason, name
    features = FeatureSet.read(parts_of(tmp_path / "out"))
    assert features.vectors[0].any()
    assert not features.vectors[1:].any()
    assert (report.n_ok, report.n_missing, report.n_unreadable, report.encoded) == (1, 1, 7, 1)
    assert report.reasons["changed since import"] == 1


def test_an_item_without_text_is_missing_and_a_huge_text_is_not(tmp_path: Path) -> None:
    items = pl.DataFrame({"item_id": ["a", "b", "c"], "title": ["\x00 \n", "word " * 20_000, "🪑"]})
    config = TextConfig(fields=("title",))
    report = run(tmp_path / "out", Catalogue(items), "text", text=config)
    assert (report.n_missing, report.n_ok, report.reasons) == (1, 2, {"no text": 1})


def test_a_fused_row_needs_both(tmp_path: Path) -> None:
    catalogue = small_catalogue(tmp_path / "pictures", 6)
    items = catalogue.items.with_columns(
        title=pl.when(pl.int_range(6) == 2).then(None).otherwise("title"),
        image=pl.when(pl.int_range(6) == 4).then(None).otherwise("image"),
    )
    run(tmp_path / "out", Catalogue(items, catalogue.image_root), "fused")
    read = read_rows(parts_of(tmp_path / "out"))
    assert read["reason"].to_list() == [None, None, "no text", None, "no picture", None]
    assert (read["status"] == "ok").sum() == 4


def test_texts_are_encoded_in_batches_of_like_length(tmp_path: Path) -> None:
    catalogue = small_catalogue(tmp_path / "pictures", 20)
    encoder = SmallEncoder()
    run(tmp_path / "out", catalogue, "text", encoder=encoder)
    lengths = [length for _, length in encoder.batches]
    assert len(lengths) == 6
    assert lengths[:3] == sorted(lengths[:3])
    assert lengths[3:] == sorted(lengths[3:])
    assert lengths[0] < lengths[2]


def test_equal_content_is_encoded_once_across_parts_too(tmp_path: Path) -> None:
    catalogue = small_catalogue(tmp_path / "pictures", 40, repeat_every=5)
    hashes = catalogue.contents("image").hashes
    assert len(set(hashes)) == 33
    assert hashes[19] == hashes[12]  # 19 lies in the same part
    assert hashes[34] == hashes[27]  # 34 does not
    encoder = SmallEncoder()
    report = run(tmp_path / "out", catalogue, encoder=encoder)
    assert encoder.n_encoded == report.encoded == 33
    assert report.duplicates == 7
    features = FeatureSet.read(parts_of(tmp_path / "out"))
    torch.testing.assert_close(features.vectors, encoded_alone(catalogue, "image"))


def test_a_picture_that_changed_is_read_from_another_item_that_had_the_same(tmp_path: Path) -> None:
    catalogue = small_catalogue(tmp_path / "pictures", 40, repeat_every=5)
    write_picture(tmp_path / "pictures" / "27.png", 1234)
    report = run(tmp_path / "out", catalogue)
    assert report.n_ok == 40
    features = FeatureSet.read(parts_of(tmp_path / "out"))
    assert torch.equal(features.vectors[27], features.vectors[34])
    write_picture(tmp_path / "pictures" / "34.png", 1234)
    assert run(tmp_path / "again", catalogue).reasons == {"changed since import": 2}


def test_vectors_of_earlier_artefacts_are_reused_by_content(tmp_path: Path) -> None:
    old, grown = small_catalogue(tmp_path / "pictures", 25), small_catalogue(tmp_path / "pictures", 40)
    run(tmp_path / "old", old)
    recipe = recipe_digest(SmallEncoder().info, "image", SMALL)
    known = KnownVectors(parts_of(tmp_path / "old"), recipe)
    assert len(known) == 25
    encoder = SmallEncoder()
    report = run(tmp_path / "new", grown, encoder=encoder, known=known)
    assert (report.reused, report.encoded, encoder.n_encoded) == (25, 15, 15)
    new = FeatureSet.read(parts_of(tmp_path / "new"))
    before = FeatureSet.read(parts_of(tmp_path / "old"))
    assert torch.equal(new.vectors[:25], before.vectors)
    torch.testing.assert_close(new.vectors, encoded_alone(grown, "image"))
    everything = KnownVectors([*parts_of(tmp_path / "old"), *parts_of(tmp_path / "new")], recipe)
    report = run(tmp_path / "all", grown, encoder=encoder, known=everything)
    assert (report.reused, report.encoded, encoder.n_encoded) == (40, 0, 15)
    assert report.items_per_s == report.waiting_share == 0


def test_only_ok_rows_of_the_same_recipe_in_whole_parts_are_known(tmp_path: Path) -> None:
    catalogue = small_catalogue(tmp_path / "pictures", 30)
    (tmp_path / "pictures" / "3.png").unlink()
    run(tmp_path / "old", catalogue)
    paths = parts_of(tmp_path / "old")
    recipe = recipe_digest(SmallEncoder().info, "image", SMALL)
    paths[2].write_bytes(paths[2].read_bytes()[:500])
    known = KnownVectors(paths, recipe)
    assert len(known) == 19
    assert known.left_out == [paths[2]]
    other = recipe_digest(SmallEncoder(seed=1).info, "image", SMALL)
    assert len(KnownVectors(paths, other)) == 0
    assert len(KnownVectors([], recipe)) == 0


def test_a_recipe_is_what_makes_vectors_interchangeable() -> None:
    info = SmallEncoder().info
    recipe = recipe_digest(info, "image", SMALL)
    renamed = info.model_copy(update={"spec": "other", "name": "other"})
    assert recipe_digest(renamed, "image", SMALL.model_copy(update={"batch_size": 99})) == recipe
    assert recipe_digest(info, "text", SMALL) != recipe
    assert recipe_digest(info, "image", ExtractionConfig(dtype="float16")) != recipe
    assert recipe_digest(info, "image", ExtractionConfig(dtype="float32", precision="bfloat16")) != recipe
    assert recipe_digest(info.model_copy(update={"preprocessing_sha256": "x"}), "image", SMALL) != recipe


def test_a_nan_is_refused_by_the_items_name_and_whole_parts_stay(tmp_path: Path) -> None:
    class Broken(SmallEncoder):
        def encode_images(self, pixels: Tensor) -> Tensor:
            vectors = super().encode_images(pixels)
            return torch.where(torch.tensor(len(self.batches) == 5), vectors * torch.nan, vectors)

    catalogue = small_catalogue(tmp_path / "pictures", 30)
    with pytest.raises(FeatureError, match=r"embedding of item 'item-14' holds NaN \(4 of 4 rows"):
        run(tmp_path / "out", catalogue, encoder=Broken())
    assert list(bytes_of(tmp_path / "out")) == ["part-00000.parquet"]
    run(tmp_path / "fresh", catalogue)
    assert run(tmp_path / "out", catalogue).kept_rows == 10
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "fresh")


def test_an_overflow_of_float16_is_refused_and_float32_advised(tmp_path: Path) -> None:
    class Large(SmallEncoder):
        def encode_images(self, pixels: Tensor) -> Tensor:
            return super().encode_images(pixels) * 1e6

    catalogue = small_catalogue(tmp_path / "pictures", 4)
    with pytest.raises(FeatureError, match="holds infinity"):
        run(tmp_path / "half", catalogue, encoder=Large(), config=ExtractionConfig(batch_size=4))
    run(tmp_path / "full", catalogue, encoder=Large())


def test_progress_counts_rows_and_never_goes_back(tmp_path: Path) -> None:
    catalogue = small_catalogue(tmp_path / "pictures", 40, repeat_every=5)
    run(tmp_path / "out", catalogue)
    (tmp_path / "out" / "part-00002.parquet").unlink()
    seen: list[tuple[int, int]] = []
    run(tmp_path / "out", catalogue, progress=lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {40}
    counts = [done for done, _ in seen]
    assert counts == sorted(counts)
    assert counts[0] == 30
    assert counts[-1] == 40


@pytest.mark.parametrize("modality", ["image", "text"])
def test_an_empty_catalogue_and_one_without_contents_are_extracted(
    tmp_path: Path, modality: Modality
) -> None:
    report = run(tmp_path / "empty", small_catalogue(tmp_path / "pictures", 0), modality)
    assert (report.rows, report.parts, report.encoded) == (0, 1, 0)
    assert FeatureSet.read(parts_of(tmp_path / "empty")).vectors.shape == (0, DIM)
    bare = Catalogue(pl.DataFrame({"item_id": ["a"], "title": [None], "description": [None]}))
    report = run(tmp_path / "bare", bare, modality)
    assert (report.n_missing, report.encoded) == (1, 0)


def test_the_encoder_runs_without_dropout_and_is_left_as_it_was(tmp_path: Path) -> None:
    encoder = SmallEncoder().train()
    encoder.dropout.eval()
    catalogue = small_catalogue(tmp_path / "pictures", 8)
    run(tmp_path / "out", catalogue, encoder=encoder)
    assert encoder.training
    assert not encoder.dropout.training
    vectors = FeatureSet.read(parts_of(tmp_path / "out")).vectors
    torch.testing.assert_close(vectors, encoded_alone(catalogue, "image"))


def test_a_modality_the_encoder_lacks_is_refused(tmp_path: Path) -> None:
    encoder = SmallEncoder()
    encoder.info = encoder.info.model_copy(update={"modalities": ("image", "text")})
    with pytest.raises(EncoderError, match="no modality 'fused'; it has image, text"):
        run(tmp_path, small_catalogue(tmp_path / "pictures", 1), "fused", encoder=encoder)


def test_vectors_that_are_not_as_the_info_says_are_refused(tmp_path: Path) -> None:
    encoder = SmallEncoder()
    encoder.info = encoder.info.model_copy(update={"dims": {"image": 3}})
    with pytest.raises(EncoderError, match=r"shape \(2, 16\), expected \(2, 3\)"):
        run(tmp_path / "out", small_catalogue(tmp_path / "pictures", 2), encoder=encoder)


def test_mixed_precision_is_close_to_full_precision(tmp_path: Path) -> None:
    catalogue = small_catalogue(tmp_path / "pictures", 8)
    config = ExtractionConfig(**(SMALL.model_dump() | {"precision": "bfloat16"}))
    run(tmp_path / "out", catalogue, config=config)
    vectors, exact = FeatureSet.read(parts_of(tmp_path / "out")).vectors, encoded_alone(catalogue, "image")
    assert not torch.equal(vectors, exact)
    np.testing.assert_allclose(vectors, exact, rtol=0.05, atol=0.2)


def test_the_identity_holds_what_changes_vectors_and_not_what_changes_speed() -> None:
    identity = ExtractionConfig().identity()
    assert ExtractionConfig(workers="processes", n_workers=3).identity() == identity
    for change in ({"dtype": "float32"}, {"batch_size": 3}, {"limits": {"max_pixels": 5}}):
        assert ExtractionConfig.model_validate(change).identity() != identity
