"""The configuration of a dataset: which importer, what it reads, what is kept, how it is split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, Field, model_validator

from pipeline.datasets.demo import DemoConfig
from pipeline.datasets.filters import FilterConfig
from pipeline.datasets.lattice import LatticeConfig
from pipeline.datasets.mmrec import MmrecConfig
from pipeline.datasets.pictures import PictureLimits
from pipeline.datasets.tables import TablesConfig
from recommenders.splitting import SplitConfig

ImporterName = Literal["demo", "tables", "mmrec", "lattice"]


class DatasetConfig(BaseModel, frozen=True, extra="forbid"):
    """From the files people have to one dataset. Only the section of the chosen importer is read.

    A source that brings its own published split (``mmrec``, ``lattice``) keeps it unless ``split`` is set:
    numbers on another split could not be compared with those in papers.
    """

    importer: ImporterName = Field("demo", description="Kind of source; its own section says where it lies.")
    demo: DemoConfig = Field(default_factory=DemoConfig, description="The rendered catalogue.")
    tables: TablesConfig = Field(
        default_factory=TablesConfig,
        description="Parquet, CSV or JSON Lines tables of items and interactions.",
    )
    mmrec: MmrecConfig = Field(
        default_factory=MmrecConfig, description="`.inter` file and `.npy` features of MMRec."
    )
    lattice: LatticeConfig = Field(default_factory=LatticeConfig, description="JSON files of LATTICE.")
    filters: FilterConfig = Field(default_factory=FilterConfig, description="What is kept.")
    pictures: PictureLimits = Field(
        default_factory=PictureLimits, description="How pictures are checked while they are hashed."
    )
    split: SplitConfig = Field(
        default_factory=SplitConfig, description="What is trained on, chosen on and measured on."
    )

    @model_validator(mode="before")
    @classmethod
    def _keep_published_split(cls, raw: object) -> object:
        if isinstance(raw, Mapping) and raw.get("importer") in {"mmrec", "lattice"} and "split" not in raw:
            return {**raw, "split": {"rule": "given"}}
        return raw
