"""Stage: a dataset and feature artefacts in, one trained and measured recommender out."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from pydantic import BaseModel, Field, model_validator
from safetensors.torch import save_file

from features.feature_table import FeatureSet, StatusType
from features.parts import PartRows, write_part
from pipeline.device import DeviceChoice, choose_device
from pipeline.errors import ConfigError
from pipeline.progress import SILENT, Reporter
from pipeline.reading import Dataset, ReadingConfig, read_dataset, read_feature_table
from pipeline.stages.build_index import ITEM_EMBEDDINGS
from pipeline.stages.result import StageResult
from recommenders.evaluation import Evaluation, EvaluationConfig, evaluate_part
from recommenders.feature_input import FeatureTable
from recommenders.models.registry import MODELS, build_model, model_config
from recommenders.training import TrainingConfig, train

if TYPE_CHECKING:
    from pydantic import JsonValue

    from pipeline.store import Artefact, Draft, Store
    from recommenders.models.base import Recommender

Scalar = bool | int | float | str
USER_EMBEDDINGS = "user_embeddings.parquet"
NO_FEATURES = "-"
"""Feature set of a model that reads none."""


class RunSettings(BaseModel, frozen=True, extra="forbid"):
    """One recommender, how it reads features, how it is trained and measured, and its seed."""

    model: str = Field("vbpr", description="Name of the recommender; `tandem recommenders` lists them.")
    settings: dict[str, Scalar] = Field(
        default_factory=dict, description="Settings of this recommender that differ from its defaults."
    )
    reading: ReadingConfig = Field(default_factory=ReadingConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    seed: int = Field(0, description="Of initial parameters, of sampling and of the order of training.")
    device: DeviceChoice = Field("auto", description="`auto` takes the GPU where there is one.")

    @model_validator(mode="after")
    def _known(self) -> RunSettings:
        model_config(self.model, self.settings)  # raises for a name or a key that does not exist
        return self
