"""Cached features in the layouts that other tools read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
import numpy.typing as npt
import polars as pl

from features.feature_table import FeatureSet
from pipeline.errors import ConfigError
from pipeline.store import Store

FloatArray = npt.NDArray[np.float32]


class Exported(TypedDict):
    """What an export wrote."""

    rows: int
    dim: int
    files: list[str]


@dataclass(frozen=True)
class _Rows:
    """What is written: rows in item order, NaN where an item has no vector."""

    item_ids: list[str]
    vectors: FloatArray
    present: npt.NDArray[np.bool_]
    modality: str


def export_features(
    store: Store, features: str, output: Path, layout: Literal["lists", "npy", "mmrec"]
) -> Exported:
    """Write a feature artefact for another tool; rows stay in item order, absent ones are NaN.

    Args:
        store: Where the features lie.
        features: Name, key or folder of a feature artefact.
        output: A file for ``lists`` and ``npy``, a folder for ``mmrec``.
        layout: ``lists``: Parquet with item_id, present and embedding, a list of float32. ``npy``: a (I, F)
            float32 array and ``<output>.items.csv`` with the ids. ``mmrec``: ``image_feat.npy`` or
            ``text_feat.npy``, absent rows as the mean of the others (MMRec reads no mask), and
            ``i_id_mapping.csv``.

    Raises:
        ConfigError: ``output`` cannot be written.
    """
    artefact = store.get(features, "features")
    table = FeatureSet.read(artefact.paths("part-*.parquet"))
    aligned, has = table.align(table.item_ids)
    vectors, present = aligned.numpy(), has.numpy()
    vectors[~present] = np.nan
    rows = _Rows(table.item_ids.to_list(), vectors, present, str(artefact.manifest.parameters["modality"]))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        files = _WRITERS[layout](output, rows)
    except OSError as error:
        raise ConfigError(f"{output} cannot be written ({error}); name another --output.") from error
    return Exported(rows=len(vectors), dim=vectors.shape[1], files=[str(file) for file in files])


def _write_lists(output: Path, rows: _Rows) -> list[Path]:
    width = rows.vectors.shape[1]
    embedding = pl.Series(rows.vectors, dtype=pl.Array(pl.Float32, width)).cast(pl.List(pl.Float32))
    columns = {"item_id": rows.item_ids, "present": rows.present, "embedding": embedding}
    pl.DataFrame(columns).write_parquet(output)
    return [output]


def _write_npy(output: Path, rows: _Rows) -> list[Path]:
    with output.open("wb") as file:  # given a name, np.save would append .npy to another suffix
        np.save(file, rows.vectors, allow_pickle=False)
    beside = output.with_suffix(".items.csv")
    _numbered(rows).write_csv(beside)
    return [output, beside]


def _write_mmrec(output: Path, rows: _Rows) -> list[Path]:
    output.mkdir(exist_ok=True)
    filled = rows.vectors.copy()
    filled[~rows.present] = rows.vectors[rows.present].mean(axis=0) if rows.present.any() else 0
    vectors_file, mapping_file = output / f"{rows.modality}_feat.npy", output / "i_id_mapping.csv"
    np.save(vectors_file, filled, allow_pickle=False)
    _numbered(rows).rename({"item_id": "asin", "row": "itemID"}).write_csv(mapping_file, separator="\t")
    return [vectors_file, mapping_file]


def _numbered(rows: _Rows) -> pl.DataFrame:
    return pl.DataFrame({"item_id": rows.item_ids, "row": np.arange(len(rows.item_ids))})


_WRITERS: dict[str, Callable[[Path, _Rows], list[Path]]] = {
    "lists": _write_lists,
    "npy": _write_npy,
    "mmrec": _write_mmrec,
}
