"""The importers by name, and the way from a configuration to a filtered dataset with hashed pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import JsonValue

from pipeline.datasets.base import RawDataset
from pipeline.datasets.config import DatasetConfig, ImporterName
from pipeline.datasets.demo import demo_identity, import_demo
from pipeline.datasets.filters import apply_filters
from pipeline.datasets.lattice import import_lattice, lattice_identity
from pipeline.datasets.mmrec import import_mmrec, mmrec_identity
from pipeline.datasets.pictures import Progress, with_picture_hashes
from pipeline.datasets.tables import import_tables, tables_identity


@dataclass(frozen=True)
class Importer:
    """A kind of source."""

    identity: Callable[[DatasetConfig], JsonValue]
    """All that the import depends on: the settings, and the SHA-256 of the source files."""
    load: Callable[[DatasetConfig, Path], RawDataset]
    """Read the source. The folder takes the pictures that the importer writes itself (rendered or copied)."""


IMPORTERS: Final[dict[ImporterName, Importer]] = {
    "demo": Importer(
        lambda config: demo_identity(config.demo), lambda config, folder: import_demo(config.demo, folder)
    ),
    "tables": Importer(
        lambda config: tables_identity(config.tables),
        lambda config, folder: import_tables(config.tables, folder),
    ),
    "mmrec": Importer(
        lambda config: mmrec_identity(config.mmrec), lambda config, _folder: import_mmrec(config.mmrec)
    ),
    "lattice": Importer(
        lambda config: lattice_identity(config.lattice),
        lambda config, _folder: import_lattice(config.lattice),
    ),
}


def import_dataset(config: DatasetConfig, folder: Path, progress: Progress | None = None) -> RawDataset:
    """Import, filter, and hash the pictures of what is left.

    Args:
        config: What to import and what to keep.
        folder: Takes the pictures that the importer writes itself; then it is the dataset's ``image_root``.
        progress: Told of each picture hashed.

    Raises:
        DatasetError: The source is not what its configuration says, or nothing of it is left.
    """
    dataset = apply_filters(IMPORTERS[config.importer].load(config, folder), config.filters)
    return with_picture_hashes(dataset, config.pictures, progress)
