"""Cached features in the layouts that other tools read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
import polars as pl

from features.feature_table import FeatureSet
from pipeline.errors import ConfigError
from pipeline.store import Store


class Exported(TypedDict):
    """What an export wrote."""

    rows: int
    dim: int
    files: list[str]


def export_features(
    store: Store, features: str, output: Path, layout: Literal["lists", "npy", "mmrec"]
) -> Exported:
    """Write a feature artefact for another tool; rows stay in item order, absent ones are NaN.

    Args:
        store: Where the features lie.
        features: Name, key or folder of a feature artefact.
        output: A file for ``lists`` and ``npy``, a folder for ``mmrec``.
        layout: ``lists``: Parquet with item_id, status, embedding as a list of float32. ``npy``: a (I, F) float32 array
            and ``<output>.items.csv`` with the ids. ``mmrec``: ``image_feat.npy`` or ``text_feat.npy``, absent rows as
            the mean of the others (MMRec reads no mask), and ``i_id_mapping.csv``.

    Raises:
        ConfigError: ``output`` cannot be written.
    """
    artefact = store.get(features, "features")
    table = FeatureSet.read(artefact.paths("part-*.parquet"))
    vectors, present = table.align(table.item_ids)
    array = vectors.float().numpy()
    array[~present.numpy()] = np.nan
    modality = str(artefact.manifest.parameters["modality"])
    try:
        files = _write(layout, output, array, present.numpy(), table.item_ids.to_list(), modality)
    except OSError as error:
        raise ConfigError(f"{output} cannot be written ({error}); name another --output.") from error
    return Exported(rows=len(array), dim=array.shape[1], files=[str(file) for file in files])


def _write(
    layout: str, output: Path, array: np.ndarray, present: np.ndarray, item_ids: list[str], modality: str
) -> list[Path]:
    ids = pl.DataFrame({"item_id": item_ids, "row": np.arange(len(item_ids))})
    if layout == "lists":
        output.parent.mkdir(parents=True, exist_ok=True)
        embedding = pl.Series("embedding", array, dtype=pl.Array(pl.Float32, array.shape[1])).cast(pl.List(pl.Float32))
        status = pl.Series("present", present)
        ids.select("item_id").with_columns(status, embedding).write_parquet(output)
        return [output]
    if layout == "npy":
        output.parent.mkdir(parents=True, exist_ok=True)
        beside = output.with_suffix(".items.csv")
        with output.open("wb") as file:  # np.save would append .npy to another suffix
            np.save(file, array)
        ids.write_csv(beside)
        return [output, beside]
    output.mkdir(parents=True, exist_ok=True)
    filled = array.copy()
    filled[~present] = array[present].mean(axis=0) if present.any() else 0
    vectors_file, mapping_file = output / f"{modality}_feat.npy", output / "i_id_mapping.csv"
    np.save(vectors_file, filled)
    ids.rename({"item_id": "asin", "row": "itemID"}).write_csv(mapping_file, separator="\t")
    return [vectors_file, mapping_file]
