"""Vectors of other tools are joined by item id, whatever their order, and bad files say what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features import precomputed
from features.encoders.precomputed import open_precomputed
from features.encoders.registry import describe_encoder, load_encoder
from features.errors import EncoderError, FeatureError
from features.feature_table import FeatureSet, read_rows
from features.precomputed import AMAZON_DIM, JoinCounts, join_vectors, read_ids

CATALOGUE = ["b", "a", "nowhere", "c"]
IDS = ["c", "foreign", "a", "b"]
VECTORS = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)


def join(spec: str, folder: Path, modality: Any = "image", items: list[str] = CATALOGUE) -> JoinCounts:
    folder.mkdir(exist_ok=True)
    counts = join_vectors(open_precomputed(spec), modality, items, folder, folder)
    assert not list(folder.glob("*.bin"))
    return counts


def rows_of(folder: Path) -> dict[str, np.ndarray]:
    features = FeatureSet.read(sorted(folder.glob("part-*.parquet")))
    assert features.item_ids.to_list() == CATALOGUE
    status = dict(zip(features.item_ids, features.status, strict=True))
    return {
        item_id: row
        for item_id, row in zip(features.item_ids, features.vectors.numpy(), strict=True)
        if status[item_id] == "ok"
    }


def npy_file(folder: Path, vectors: np.ndarray = VECTORS) -> Path:
    np.save(folder / "image.npy", vectors)
    (folder / "ids.txt").write_text("\n".join(IDS))
    return folder / "image.npy"


def npy_spec(folder: Path) -> str:
    return f"precomputed/npy:{npy_file(folder)}+ids={folder}/ids.txt"


def list_spec(folder: Path) -> str:
    pl.DataFrame({"asin": IDS, "vector": VECTORS.tolist()}).write_parquet(folder / "x.parquet")
    return f"precomputed/parquet:{folder}/x.parquet"


def array_spec(folder: Path) -> str:
    table = pl.DataFrame({"key": IDS, "v": pl.Series(VECTORS, dtype=pl.Array(pl.Float32, 3))})
    table[:2].write_parquet(folder / "0.parquet")
    table[2:].write_parquet(folder / "1.parquet")
    return f"precomputed/parquet:{folder}+id=key+vector=v"


def bytes_spec(folder: Path) -> str:
    rows = [row.tobytes() for row in VECTORS]
    pq.write_table(pa.table({"id": IDS, "embedding": rows}), folder / "x.parquet")
    return f"precomputed/parquet:{folder}/x.parquet"


def ducho_spec(folder: Path) -> str:
    for item_id, row in zip(IDS, VECTORS, strict=True):
        np.save(folder / f"{item_id}.npy", row[None])
    return f"precomputed/ducho:{folder}"


def clip_retrieval_spec(folder: Path) -> str:
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir()
    for shard in range(2):
        some = slice(2 * shard, 2 * shard + 2)
        np.save(folder / "img_emb" / f"img_emb_{shard}.npy", VECTORS[some])
        paths = [f"/pictures/{item_id}.jpg" for item_id in IDS[some]]
        pl.DataFrame({"image_path": paths}).write_parquet(folder / "metadata" / f"metadata_{shard}.parquet")
    return f"precomputed/clip-retrieval:{folder}"


SPECS = [npy_spec, list_spec, array_spec, bytes_spec, ducho_spec, clip_retrieval_spec]


@pytest.mark.parametrize("make", SPECS)
def test_rows_are_joined_by_item_id(make: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    spec = make(tmp_path / "data")
    counts = join(spec, tmp_path / "out")
    got = rows_of(tmp_path / "out")
    assert sorted(got) == ["a", "b", "c"]
    for item_id, row in got.items():
        np.testing.assert_array_equal(row, VECTORS[IDS.index(item_id)])
    assert (counts.n_ok, counts.n_missing, counts.n_unreadable, counts.unused) == (3, 1, 0, 1)
    assert counts.reasons == {"the file has no row of it": 1}
    info = describe_encoder(spec)
    assert info.dims["image"] == 3
    assert info.family == "precomputed"
    assert describe_encoder(f"shuffled:{spec}").dims == info.dims
    with pytest.raises(EncoderError, match="made and encodes nothing; run `tandem extract"):
        load_encoder(spec)
    with pytest.raises(
        FeatureError,
        match=r"none of the ids of .* is in the catalogue: the file has '\w+', the catalogue 'z'",
    ):
        join(spec, tmp_path / "out", items=["z"])


def test_amazon_records_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precomputed, "BLOCK_ROWS", 2)
    vectors = np.random.default_rng(1).standard_normal((5, AMAZON_DIM)).astype("<f4")
    ids = [f"B00000000{number}" for number in range(5)]
    path = tmp_path / "image_features_Baby.b"
    path.write_bytes(b"".join(i.encode() + v.tobytes() for i, v in zip(ids, vectors, strict=True)))
    spec = f"precomputed/amazon:{path}"
    counts = join(spec, tmp_path / "out", items=["B000000003", "x", "B000000000"])
    features = FeatureSet.read(sorted((tmp_path / "out").glob("part-*.parquet")))
    np.testing.assert_array_equal(features.vectors.numpy()[[0, 2]], vectors[[3, 0]])
    assert (counts.n_ok, counts.n_missing, counts.unused) == (2, 1, 3)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EncoderError, match=r"81,969 bytes; expected records of 16,394 .*cut short"):
        describe_encoder(spec)


def test_vectors_that_are_not_finite_are_unreadable_with_a_reason(tmp_path: Path) -> None:
    vectors = VECTORS.copy()
    vectors[0, 1], vectors[2, 0] = np.nan, np.inf
    npy_file(tmp_path, vectors)
    counts = join(f"precomputed/npy:{tmp_path}/image.npy+ids={tmp_path}/ids.txt", tmp_path / "out")
    rows = read_rows(sorted((tmp_path / "out").glob("part-*.parquet")))
    assert rows["status"].to_list() == ["ok", "unreadable", "missing", "unreadable"]
    assert rows["reason"].to_list() == [
        None,
        "its vector holds infinity",
        "the file has no row of it",
        "its vector holds NaN",
    ]
    assert (counts.n_ok, counts.n_missing, counts.n_unreadable) == (1, 1, 2)


def test_a_repeated_id_is_an_error_only_if_its_vectors_differ(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("a\nb\na\nc")
    spec = f"precomputed/npy:{tmp_path}/x.npy+ids={tmp_path}/ids.txt"
    np.save(tmp_path / "x.npy", VECTORS[[0, 1, 0, 2]])
    assert join(spec, tmp_path / "out").n_ok == 3
    np.save(tmp_path / "x.npy", VECTORS)
    with pytest.raises(FeatureError, match="item 'a' has two rows with different vectors"):
        join(spec, tmp_path / "out")


def test_half_precision_stays_and_other_numbers_become_float32(tmp_path: Path) -> None:
    for dtype, stored in (("float16", "float16"), ("float64", "float32"), ("int32", "float32")):
        np.save(tmp_path / "x.npy", np.arange(12).reshape(4, 3).astype(dtype))
        (tmp_path / "x.ids.json").write_text(json.dumps(IDS))
        assert open_precomputed(f"precomputed/npy:{tmp_path}/x.npy").dtype == stored


def test_the_digest_follows_files_and_ids(tmp_path: Path) -> None:
    spec = npy_spec(tmp_path)
    before = describe_encoder(spec)
    (tmp_path / "ids.txt").write_text("\n".join(reversed(IDS)))
    after = describe_encoder(spec)
    assert after.weights_sha256 != before.weights_sha256
    np.save(tmp_path / "image.npy", VECTORS + 1)
    assert describe_encoder(spec).weights_sha256 != after.weights_sha256


def test_ids_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array(IDS))
    pl.DataFrame({"item_id": IDS, "row": [0, 1, 2, 3]}).write_csv(tmp_path / "b.csv")
    pl.DataFrame({"anything": IDS}).write_parquet(tmp_path / "c.parquet")
    (tmp_path / "d.json").write_text(json.dumps(IDS))
    (tmp_path / "e.txt").write_text("\n".join(IDS) + "\n")
    mapping = pl.DataFrame({"asin": IDS, "itemID": [2, 0, 3, 1]})
    mapping.write_csv(tmp_path / "i_id_mapping.csv", separator="\t")
    for name in ("a.npy", "b.csv", "c.parquet", "d.json", "e.txt"):
        assert read_ids(tmp_path / name) == IDS
    assert read_ids(tmp_path / "i_id_mapping.csv") == ["foreign", "b", "c", "a"]


@pytest.mark.parametrize(
    ("spec", "answer"),
    [
        ("precomputed/npz:x", r"with a format of npy, parquet, .*did you mean precomputed/npy:<path>"),
        ("precomputed/npy", "expected precomputed/<format>:<path>"),
        ("precomputed/npy:{0}/none.npy", "there is no '.*none.npy'; check the path"),
        ("precomputed/npy:{0}/x.npy", r"joined by id and never by position; .*ids=<file>"),
        ("precomputed/npy:{0}/x.npy+ids={0}/none.txt", "there is no file of ids"),
        ("precomputed/npy:{0}/x.npy+ids={0}/short.txt", "has 4 rows, but .* 2 ids"),
        ("precomputed/npy:{0}/x.npy+ids={0}/x.zip", "ends in '.zip'; expected one of .txt"),
        ("precomputed/npy:{0}/x.npy+id=asin", "has no option 'id'; did you mean 'ids'"),
        ("precomputed/npy:{0}/objects.npy+ids={0}/ids.txt", "holds Python objects, which are not unpickled"),
        ("precomputed/npy:{0}/flat.npy+ids={0}/ids.txt", r"of shape \(3,\); expected \(items, numbers\)"),
        ("precomputed/npy:{0}/garbage.npy+ids={0}/ids.txt", "garbage.npy cannot be read"),
        ("precomputed/parquet:{0}/x.npy", "cannot be read as Parquet"),
        ("precomputed/parquet:{0}/t.parquet+id=itm", "has no column 'itm'; did you mean 'item'"),
        ("precomputed/parquet:{0}/t.parquet+id=item", "has no column embedding or vector; name one of"),
        ("precomputed/parquet:{0}/t.parquet+id=item+vector=word", "holds (large_)?string"),
        ("precomputed/parquet:{0}/t.parquet+id=item+vector=ragged", "does not hold lists of one length"),
        ("precomputed/parquet:{0}/empty", "holds no .parquet file"),
        ("precomputed/ducho:{0}/empty", "holds no .npy file"),
        ("precomputed/clip-retrieval:{0}/empty", "has neither img_emb/ nor text_emb/"),
        ("precomputed/amazon:{0}/x.npy", "expected records of 16,394"),
    ],
)
def test_each_bad_input_has_its_line(spec: str, answer: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", VECTORS)
    np.save(tmp_path / "flat.npy", VECTORS[0])
    np.save(tmp_path / "objects.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    (tmp_path / "garbage.npy").write_bytes(b"no array")
    (tmp_path / "ids.txt").write_text("\n".join(IDS))
    (tmp_path / "short.txt").write_text("a\nb")
    (tmp_path / "x.zip").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    table = {"item": ["a", "b"], "word": ["x", "y"], "ragged": [[1.0], [1.0, 2.0]]}
    pl.DataFrame(table).write_parquet(tmp_path / "t.parquet")
    with pytest.raises(EncoderError, match=answer):
        describe_encoder(spec.format(tmp_path))


def test_a_pickled_row_and_a_row_of_another_length_are_refused(tmp_path: Path) -> None:
    spec = ducho_spec(tmp_path)
    np.save(tmp_path / "b.npy", np.zeros(7, np.float32))
    with pytest.raises(FeatureError, match=r"b.npy holds 7 numbers, but a.npy 3"):
        join(spec, tmp_path / "out")
    np.save(tmp_path / "b.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(FeatureError, match=r"b.npy cannot be read .*nothing is unpickled"):
        join(spec, tmp_path / "out")


def test_clip_retrieval_needs_its_metadata_row_for_row(tmp_path: Path) -> None:
    spec = clip_retrieval_spec(tmp_path)
    pl.DataFrame({"image_path": ["x.jpg"]}).write_parquet(tmp_path / "metadata" / "metadata_1.parquet")
    with pytest.raises(
        FeatureError, match=r"has 2 rows, but .*metadata_1.parquet 1; expected the files of one"
    ):
        join(spec, tmp_path / "out")
    (tmp_path / "metadata" / "metadata_1.parquet").unlink()
    with pytest.raises(EncoderError, match=r"has no .*metadata_1.parquet beside it"):
        describe_encoder(spec)


def test_own_parts_can_be_read_again(tmp_path: Path) -> None:
    join(npy_spec(tmp_path), tmp_path / "out")
    counts = join(f"precomputed/parquet:{tmp_path}/out", tmp_path / "again")
    assert (counts.n_ok, counts.n_missing) == (3, 1)
    assert rows_of(tmp_path / "again").keys() == rows_of(tmp_path / "out").keys()
