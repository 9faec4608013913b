"""Stage: one dataset, one encoder and one modality in, one feature artefact out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from pydantic import BaseModel, Field

from features.catalogue import Catalogue, Modality, TextConfig
from features.encoders.base import EncoderInfo
from features.encoders.registry import ShuffledSpec, describe_encoder, load_encoder, parse_shuffled
from features.extraction import ExtractionConfig, extract, recipe_digest
from features.feature_table import FeatureSet, StatusType, read_rows, shuffle_rows, write_features
from features.known import KnownVectors
from pipeline.device import DeviceChoice, choose_device
from pipeline.errors import ConfigError
from pipeline.progress import SILENT, Reporter
from pipeline.reading import given_features_file, read_catalogue
from pipeline.stages.result import StageResult

if TYPE_CHECKING:
    from pydantic import JsonValue

    from pipeline.store import Artefact, Draft, Store

CONTROLS = ("random", "constant", "shuffled:")
"""How the specifications of encoders without meaning begin: they are compared with, never searched."""
GIVEN = "given"
"""Encoder name of the features that came with a dataset, such as MMRec's ``image_feat.npy``."""


class FeaturesConfig(BaseModel, frozen=True, extra="forbid"):
    """Which encoder over which modality, and how it reads and writes."""

    encoder: str = Field("tiny", description="Specification of the encoder, as listed by `tandem encoders`.")
    modality: Modality = Field(
        "image", description="What is encoded: the picture, the text, or both together."
    )
    text: TextConfig = Field(default_factory=TextConfig)
    extraction: ExtractionConfig = Field(default_factory=ExtractionConfig)
    device: DeviceChoice = Field("auto", description="`auto` takes the GPU where there is one.")


def extract_features(
    store: Store,
    dataset: str,
    config: FeaturesConfig,
    *,
    reporter: Reporter = SILENT,
    force: bool = False,
    retry_failed: bool = False,
) -> StageResult:
    """Encode what no artefact holds yet and keep the embeddings.

    Args:
        store: Where the dataset lies and the features go.
        dataset: Name, key or folder of a dataset artefact.
        config: What to encode with what.
        reporter: Told of progress.
        force: Encode everything again.
        retry_failed: Encode the rows that are not ``ok`` again; the others keep their vectors.

    Raises:
        EncoderError: The encoder cannot be what its specification says.
        ConfigError: The encoder has no such modality, or the dataset brought no such features.
    """
    source = store.get(dataset, "dataset")
    catalogue = read_catalogue(source)
    if config.encoder == GIVEN:
        return _keep_given(store, source, catalogue, config, force=force)
    shuffled = parse_shuffled(config.encoder)
    if shuffled is not None:
        return _shuffle(store, source, config, shuffled, reporter=reporter, force=force)
    info = describe_encoder(config.encoder)
    if config.modality not in info.modalities:
        raise ConfigError(
            f"{config.encoder} encodes {' and '.join(info.modalities)}, not {config.modality}; "
            "choose another modality or another encoder (`tandem encoders`)."
        )
    identity = _identity(catalogue, config, info)
    recipe = recipe_digest(info, config.modality, config.extraction)

    def make(draft: Draft) -> None:
        encoder = load_encoder(config.encoder, device=choose_device(config.device))
        known = None if force and not retry_failed else _known_vectors(store, recipe)
        with reporter.progress(f"{config.encoder} {config.modality}") as progress:
            report = extract(
                encoder,
                catalogue,
                config.modality,
                draft.folder,
                config.extraction,
                text=config.text,
                known=known,
                progress=progress,
                say=lambda note: reporter.say(f"  {note}"),
            )
        facts = json.loads(json.dumps(asdict(report)))
        draft.record(**facts, recipe=recipe, summary=_summary(facts))

    outcome = store.produce(
        "features",
        slug=_slug(config),
        identity=identity,
        inputs=[source.as_input("catalogue")],
        parameters=_parameters(config, info),
        make=make,
        resumable=True,
        force=force or retry_failed,
    )
    return StageResult.of(outcome)


def _identity(catalogue: Catalogue, config: FeaturesConfig, info: EncoderInfo) -> dict[str, JsonValue]:
    """All that can change the vectors. Not the dataset's key: another split of the same items shares them."""
    return {
        "catalogue": catalogue.fingerprint(config.modality, config.text),
        "encoder": {"weights": info.weights_sha256, "preprocessing": info.preprocessing_sha256},
        "modality": config.modality,
        "extraction": config.extraction.identity(),
    }


def _known_vectors(store: Store, recipe: str) -> KnownVectors | None:
    """What earlier artefacts of the same recipe hold, by content."""
    earlier = [a for a in store.list("features") if a.manifest.facts.get("recipe") == recipe]
    paths = [path for artefact in earlier for path in artefact.paths("part-*.parquet")]
    return KnownVectors(paths, recipe) if paths else None


def _keep_given(
    store: Store, source: Artefact, catalogue: Catalogue, config: FeaturesConfig, *, force: bool
) -> StageResult:
    """Keep the features that came with the dataset as a feature artefact like any other."""
    name = given_features_file(config.modality)
    if name not in source.manifest.files:
        has = [file for file in source.manifest.files if file.endswith(".npy")]
        raise ConfigError(
            f"{source.ref} brought no {config.modality} features; it has {', '.join(has) or 'none at all'}. "
            "Name an encoder, or import a dataset with features beside it."
        )

    def make(draft: Draft) -> None:
        vectors = np.load(source.path(name), allow_pickle=False)
        ok = np.isfinite(vectors).all(axis=1)
        status = pl.Series(["ok" if good else "unreadable" for good in ok], dtype=StatusType)
        ids = pl.Series("item_id", catalogue.item_ids, dtype=pl.String)
        write_features(
            draft.folder, FeatureSet(ids, torch.from_numpy(np.where(ok[:, None], vectors, 0)), status)
        )
        draft.record(
            **_status_counts(status.value_counts().rows()),
            summary={"items": len(ids), "dim": vectors.shape[1]},
        )

    outcome = store.produce(
        "features",
        slug=_slug(config),
        identity={
            "given": source.manifest.files[name].sha256,
            "items": catalogue.fingerprint(config.modality),
        },
        inputs=[source.as_input("catalogue")],
        parameters={"encoder": GIVEN, "modality": config.modality},
        make=make,
        force=force,
    )
    return StageResult.of(outcome)


def _shuffle(
    store: Store,
    source: Artefact,
    config: FeaturesConfig,
    shuffled: ShuffledSpec,
    *,
    reporter: Reporter,
    force: bool,
) -> StageResult:
    """Deal the rows of another encoder's features to other items: a control."""
    plain = extract_features(
        store, source.key, config.model_copy(update={"encoder": shuffled.inner}), reporter=reporter
    ).artefact
    info = describe_encoder(config.encoder)

    def make(draft: Draft) -> None:
        features = FeatureSet.read(plain.paths("part-*.parquet"))
        write_features(draft.folder, shuffle_rows(features, np.random.default_rng(shuffled.seed)))
        counts = read_rows(plain.paths("part-*.parquet"))["status"].cast(str).value_counts().rows()
        draft.record(**_status_counts(counts), summary={"items": len(features), "dim": features.dim})

    outcome = store.produce(
        "features",
        slug=_slug(config),
        identity={"shuffled": plain.key, "seed": shuffled.seed},
        inputs=[plain.as_input("rows")],
        parameters=_parameters(config, info),
        make=make,
        force=force,
    )
    return StageResult.of(outcome)


def _parameters(config: FeaturesConfig, info: EncoderInfo) -> dict[str, JsonValue]:
    return {**config.model_dump(mode="json", exclude={"device"}), "info": info.model_dump(mode="json")}


def _slug(config: FeaturesConfig) -> str:
    return f"{config.encoder.removeprefix('open_clip/')}-{config.modality}"


def _status_counts(counts: list[tuple[str, int]]) -> dict[str, JsonValue]:
    by_status = dict(counts)
    return {f"n_{status}": int(by_status.get(status, 0)) for status in ("ok", "missing", "unreadable")}


def _summary(facts: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """The numbers a person wants first."""
    names = {"n_ok": "ok", "n_missing": "missing", "n_unreadable": "unreadable", "items_per_s": "items/s"}
    return {short: facts[name] for name, short in names.items() if name in facts}
