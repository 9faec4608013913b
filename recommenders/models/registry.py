"""Every recommender by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

import numpy as np
from pydantic import BaseModel, ValidationError

from recommenders.errors import RecommenderError
from recommenders.feature_input import FeatureTable
from recommenders.interactions import Interactions
from recommenders.models import (
    bm3,
    bpr_mf,
    damrs,
    dragon,
    dualgnn,
    ease,
    freedom,
    grcn,
    item_knn,
    lattice,
    layergcn,
    lgmrec,
    lightgcn,
    mgcn,
    mmgcf,
    mmgcl,
    mmgcn,
    mvgae,
    pgl,
    selfcf,
    slmrec,
    smore,
    vbpr,
)
from recommenders.models.base import Recommender
from recommenders.models.bm3 import Bm3, Bm3Config
from recommenders.models.bpr_mf import BprMf, BprMfConfig
from recommenders.models.damrs import DaMrs, DaMrsConfig
from recommenders.models.dragon import Dragon, DragonConfig
from recommenders.models.dualgnn import DualGnn, DualGnnConfig
from recommenders.models.ease import Ease, EaseConfig
from recommenders.models.freedom import Freedom, FreedomConfig
from recommenders.models.grcn import Grcn, GrcnConfig
from recommenders.models.item_knn import ItemKnn, ItemKnnConfig, ItemKnnContent, ItemKnnContentConfig
from recommenders.models.lattice import Lattice, LatticeConfig
from recommenders.models.layergcn import LayerGcn, LayerGcnConfig
from recommenders.models.lgmrec import LgmRec, LgmRecConfig
from recommenders.models.lightgcn import LightGcn, LightGcnConfig
from recommenders.models.mgcn import Mgcn, MgcnConfig
from recommenders.models.mmgcf import Mmgcf, MmgcfConfig
from recommenders.models.mmgcl import Mmgcl, MmgclConfig
from recommenders.models.mmgcn import Mmgcn, MmgcnConfig
from recommenders.models.mvgae import Mvgae, MvgaeConfig
from recommenders.models.papers import PAPERS, Paper
from recommenders.models.pgl import Pgl, PglConfig
from recommenders.models.popularity import Popularity, PopularityConfig
from recommenders.models.random_scores import RandomScores, RandomScoresConfig
from recommenders.models.selfcf import SelfCf, SelfCfConfig
from recommenders.models.slmrec import Slmrec, SlmrecConfig
from recommenders.models.smore import Smore, SmoreConfig
from recommenders.models.vbpr import Vbpr, VbprConfig
from recommenders.ranges import Range

Setting = str | int | float | bool
"""What a setting's value may be as it comes from YAML or the command line."""


@dataclass(frozen=True)
class ModelEntry:
    """A model, the type of its settings, and the ranges in which they are searched."""

    config: type[BaseModel]
    model: type[Recommender]
    search: Mapping[str, Range] = field(default_factory=dict)
    """The model module's ``SEARCH``, where its source is named; nothing: there is nothing to search."""
    paper: Paper | None = None
    """Where it was published; None for floors that come from no paper."""


MODELS: dict[str, ModelEntry] = {
    "popularity": ModelEntry(PopularityConfig, Popularity),
    "random": ModelEntry(RandomScoresConfig, RandomScores),
    "itemknn": ModelEntry(ItemKnnConfig, ItemKnn, item_knn.SEARCH, PAPERS["itemknn"]),
    "ease": ModelEntry(EaseConfig, Ease, ease.SEARCH, PAPERS["ease"]),
    "itemknn_content": ModelEntry(
        ItemKnnContentConfig, ItemKnnContent, item_knn.SEARCH_CONTENT, PAPERS["itemknn_content"]
    ),
    "bpr": ModelEntry(BprMfConfig, BprMf, bpr_mf.SEARCH, PAPERS["bpr"]),
    "lightgcn": ModelEntry(LightGcnConfig, LightGcn, lightgcn.SEARCH, PAPERS["lightgcn"]),
    "layergcn": ModelEntry(LayerGcnConfig, LayerGcn, layergcn.SEARCH, PAPERS["layergcn"]),
    "selfcf": ModelEntry(SelfCfConfig, SelfCf, selfcf.SEARCH, PAPERS["selfcf"]),
    "vbpr": ModelEntry(VbprConfig, Vbpr, vbpr.SEARCH, PAPERS["vbpr"]),
    "mgcn": ModelEntry(MgcnConfig, Mgcn, mgcn.SEARCH, PAPERS["mgcn"]),
    "smore": ModelEntry(SmoreConfig, Smore, smore.SEARCH, PAPERS["smore"]),
    "lgmrec": ModelEntry(LgmRecConfig, LgmRec, lgmrec.SEARCH, PAPERS["lgmrec"]),
    "dualgnn": ModelEntry(DualGnnConfig, DualGnn, dualgnn.SEARCH, PAPERS["dualgnn"]),
    "dragon": ModelEntry(DragonConfig, Dragon, dragon.SEARCH, PAPERS["dragon"]),
    "grcn": ModelEntry(GrcnConfig, Grcn, grcn.SEARCH, PAPERS["grcn"]),
    "pgl": ModelEntry(PglConfig, Pgl, pgl.SEARCH, PAPERS["pgl"]),
    "bm3": ModelEntry(Bm3Config, Bm3, bm3.SEARCH, PAPERS["bm3"]),
    "mmgcn": ModelEntry(MmgcnConfig, Mmgcn, mmgcn.SEARCH, PAPERS["mmgcn"]),
    "mmgcl": ModelEntry(MmgclConfig, Mmgcl, mmgcl.SEARCH, PAPERS["mmgcl"]),
    "slmrec": ModelEntry(SlmrecConfig, Slmrec, slmrec.SEARCH, PAPERS["slmrec"]),
    "lattice": ModelEntry(LatticeConfig, Lattice, lattice.SEARCH, PAPERS["lattice"]),
    "freedom": ModelEntry(FreedomConfig, Freedom, freedom.SEARCH, PAPERS["freedom"]),
    "mvgae": ModelEntry(MvgaeConfig, Mvgae, mvgae.SEARCH, PAPERS["mvgae"]),
    "damrs": ModelEntry(DaMrsConfig, DaMrs, damrs.SEARCH, PAPERS["damrs"]),
    "mmgcf": ModelEntry(MmgcfConfig, Mmgcf, mmgcf.SEARCH, PAPERS["mmgcf"]),
}


def model_entry(name: str) -> ModelEntry:
    """Return the entry of a model.

    Raises:
        RecommenderError: No model of that name; the message lists what exists.
    """
    if name not in MODELS:
        raise RecommenderError(f"model is {name!r}; known models: {', '.join(MODELS)}.{_guess(name, MODELS)}")
    return MODELS[name]


def model_config(name: str, settings: Mapping[str, Setting]) -> BaseModel:
    """Check a model's settings and fill in the defaults.

    Raises:
        RecommenderError: An unknown model, a setting it does not have, or a value the setting cannot take.
    """
    config = model_entry(name).config
    try:
        return config.model_validate(dict(settings))
    except ValidationError as error:
        problems = [_problem(name, config, problem["loc"], problem["msg"]) for problem in error.errors()]
        raise RecommenderError(" ".join(problems)) from error


def build_model(
    name: str,
    settings: Mapping[str, Setting],
    train: Interactions,
    features: FeatureTable,
    rng: np.random.Generator,
) -> Recommender:
    """Build an untrained model on the CPU; ``rng`` draws its first parameters.

    Raises:
        RecommenderError: As ``model_config``, or the features are not what the model needs.
    """
    return model_entry(name).model(train, features, model_config(name, settings), rng)


def _problem(name: str, config: type[BaseModel], location: tuple[int | str, ...], message: str) -> str:
    """Say what is wrong with one setting, or with several together, and what there is instead."""
    if not location:
        return f"{name}: {message.removeprefix('Value error, ')}."
    key = str(location[0])
    if key not in config.model_fields:
        known = ", ".join(config.model_fields) or "none"
        return f"{name} has no setting {key!r}; its settings: {known}.{_guess(key, config.model_fields)}"
    return f"{name}: {key}: {message}. What it means: {config.model_fields[key].description}"


def _guess(typed: str, known: Mapping[str, object]) -> str:
    """Return a hint when a known name is close to what was typed."""
    close = get_close_matches(typed, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
