"""Stage: files of items and interactions in, one canonical dataset with its split out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from pipeline.datasets.config import DatasetConfig
from pipeline.datasets.registry import IMPORTERS, import_dataset
from pipeline.progress import SILENT, Reporter
from pipeline.reading import OWN_IMAGES, SPLIT_LABELS, given_features_file
from pipeline.stages.result import StageResult
from recommenders.interactions import Int64Array, Interactions
from recommenders.splitting import split_by_labels, split_labels

if TYPE_CHECKING:
    from pydantic import JsonValue

    from pipeline.datasets.base import RawDataset
    from pipeline.store import Draft, Store


def prepare_dataset(
    store: Store, config: DatasetConfig, *, reporter: Reporter = SILENT, force: bool = False
) -> StageResult:
    """Import, filter, hash the pictures, split, and keep the result.

    Args:
        store: Where the dataset goes.
        config: Which importer with which settings, filters and split.
        reporter: Told of progress and of every kind of drop.
        force: Import again although the store has it.

    Raises:
        DatasetError: The source is not what its configuration says, or nothing of it is left.
        SplitError: The interactions cannot be split as asked.
    """
    importer = IMPORTERS[config.importer]
    identity: dict[str, JsonValue] = {
        "importer": config.importer,
        "source": importer.identity(config),
        "filters": config.filters.model_dump(mode="json"),
        "split": config.split.model_dump(mode="json"),
    }

    def make(draft: Draft) -> None:
        with reporter.progress(f"dataset {config.importer}") as progress:
            raw = import_dataset(config, draft.folder / OWN_IMAGES, progress)
        _write(draft, raw, config)
        for what, count in raw.drops.items():
            if count:
                reporter.say(f"  {count:,} {what}")

    outcome = store.produce(
        "dataset",
        slug=config.importer,
        identity=identity,
        parameters=_shown_parameters(config),
        make=make,
        force=force,
    )
    return StageResult.of(outcome)


def _write(draft: Draft, raw: RawDataset, config: DatasetConfig) -> None:
    users, items = raw.user_and_item_rows()
    interactions = Interactions(
        user_rows=users,
        item_rows=items,
        n_users=len(raw.user_ids()),
        n_items=len(raw.items),
        timestamps=_column(raw.interactions, "timestamp"),
    )
    labels = split_labels(interactions, config.split, _given_labels(raw))
    split = split_by_labels(interactions, labels, config.split.rule)
    raw.items.write_parquet(draft.path("items.parquet"))
    pl.DataFrame({"user_id": raw.user_ids()}).write_parquet(draft.path("users.parquet"))
    table = pl.DataFrame({"user_row": users, "item_row": items}).with_columns(
        pl.Series("split", [SPLIT_LABELS[label] for label in labels], dtype=pl.Categorical),
        *(raw.interactions[name] for name in ("rating", "timestamp") if name in raw.interactions.columns),
    )
    table.write_parquet(draft.path("interactions.parquet"))
    for modality, vectors in raw.given_features.items():
        np.save(draft.path(given_features_file(modality)), vectors, allow_pickle=False)
    own_images = (draft.folder / OWN_IMAGES).is_dir() and any((draft.folder / OWN_IMAGES).iterdir())
    summary = {
        "items": len(raw.items),
        "users": interactions.n_users,
        "train": len(split.train),
        "valid": len(split.valid),
        "test": len(split.test),
    }
    draft.record(
        image_root=OWN_IMAGES if own_images else raw.image_root,
        drops=dict(raw.drops),
        split_rule=config.split.rule,
        split_fingerprint=split.fingerprint,
        split=dict(split.summary()),
        items_without_image=_without(raw.items, "image"),
        items_without_description=_without(raw.items, "description"),
        summary=dict(summary),
    )


def _given_labels(raw: RawDataset) -> Int64Array | None:
    """The split that came with the file, as numbers of ``SPLIT_LABELS``."""
    if not raw.has_split:
        return None
    numbers = {label: number for number, label in enumerate(SPLIT_LABELS)}
    return raw.interactions["split"].replace_strict(numbers, return_dtype=pl.Int64).to_numpy()


def _column(table: pl.DataFrame, name: str) -> Int64Array | None:
    return table[name].to_numpy() if name in table.columns and not table[name].null_count() else None


def _without(items: pl.DataFrame, column: str) -> int:
    """Items that lack a value in a column of texts; all of them where there is no such column."""
    if column not in items.columns or items.schema[column] != pl.String:
        return len(items)
    return int((items[column].fill_null("").str.strip_chars() == "").sum())


def _shown_parameters(config: DatasetConfig) -> dict[str, JsonValue]:
    """The settings that were used: the sections of other importers are left out."""
    return config.model_dump(
        mode="json", include={"importer", config.importer, "filters", "pictures", "split"}
    )
