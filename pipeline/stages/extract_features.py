"""Stage: one dataset, one encoder and one modality in, one feature artefact out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from pydantic import BaseModel, Field

from features.catalogue import Catalogue, Modality, TextConfig
from features.encoders.base import Encoder, EncoderInfo, digest_json
from features.encoders.precomputed import open_precomputed
from features.encoders.registry import (
    ShuffledSpec,
    parse_shuffled,
    plain_spec,
)
from features.encoders.tfidf import FAMILY as TFIDF
from features.encoders.tfidf import TfidfEncoder, TfidfFit, fit_tfidf
from features.encoders.unit_length import UnitLengthEncoder
from features.extraction import ExtractionConfig, extract, recipe_digest, settle_precision
from features.feature_table import FeatureSet, StatusType, read_rows, shuffle_rows, write_features
from features.known import KnownVectors
from features.precision import precision_in_key
from features.precomputed import join_vectors
from pipeline.device import DeviceChoice, choose_device
from pipeline.encoder_specs import ResolvedEncoder, resolve_encoder
from pipeline.errors import ConfigError
from pipeline.peak_memory import forget_peak_memory, peak_memory
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
        config: What to encode with what; the encoder may be `store/<encoder artefact>`.
        reporter: Told of progress.
        force: Encode everything again.
        retry_failed: Encode the rows that are not ``ok`` again; the others keep their vectors.

    Raises:
        EncoderError: The encoder cannot be what its specification says.
        ConfigError: The encoder has no such modality, or the dataset brought no such features.
        StoreError: There is no such dataset, or no such encoder artefact.
    """
    source = store.get(dataset, "dataset")
    catalogue = read_catalogue(source)
    chosen = resolve_encoder(store, config.encoder)
    config = config.model_copy(update={"encoder": chosen.spec})
    if config.encoder == GIVEN:
        return _keep_given(store, source, catalogue, config, force=force)
    shuffled = parse_shuffled(config.encoder)
    if shuffled is not None:
        return _shuffle(store, source, config, chosen, shuffled, reporter=reporter, force=force)
    info = describe_for(config, chosen)
    if info.family == "precomputed":
        return _join_precomputed(store, source, catalogue, config, info, force=force)
    identity = features_identity(catalogue, config, info)

    def make(draft: Draft) -> None:
        device = torch.device(choose_device(config.device))
        forget_peak_memory(device)
        encoder, fitted = _open_encoder(config, chosen, catalogue)
        extraction, probed = settle_precision(
            encoder, catalogue, config.modality, config.extraction, text=config.text
        )
        if config.extraction.precision == "auto":
            reporter.say(f"  {probed.reason}")
        recipe = recipe_digest(encoder.info, config.modality, extraction)
        known = None if force and not retry_failed else known_vectors(store, recipe)
        with reporter.progress(f"{config.encoder} {config.modality}") as progress:
            report = extract(
                encoder,
                catalogue,
                config.modality,
                draft.folder,
                extraction,
                text=config.text,
                known=known,
                progress=progress,
                say=lambda note: reporter.say(f"  {note}"),
            )
        facts = json.loads(json.dumps(asdict(report)))
        draft.record(
            **facts,
            **fitted,
            recipe=recipe,
            precision_probe=asdict(probed),
            peak_memory_bytes=peak_memory(device),
            summary=summary_of(facts),
        )

    outcome = store.produce(
        "features",
        slug=features_slug(config, info),
        identity=identity,
        inputs=[source.as_input("catalogue"), *chosen.inputs],
        parameters=shown_parameters(config, info),
        make=make,
        resumable=True,
        force=force or retry_failed,
    )
    return StageResult.of(outcome)


def describe_for(config: FeaturesConfig, encoder: ResolvedEncoder) -> EncoderInfo:
    """What is known of the configuration's encoder before it is loaded.

    Raises:
        EncoderError: It cannot be what its specification says.
        ConfigError: It has no such modality.
    """
    info = encoder.describe()
    if config.modality not in info.modalities:
        raise ConfigError(
            f"{config.encoder} encodes {' and '.join(info.modalities)}, not {config.modality}; "
            "choose another modality or another encoder (`tandem encoders`)."
        )
    return info


def features_identity(
    catalogue: Catalogue, config: FeaturesConfig, info: EncoderInfo
) -> dict[str, JsonValue]:
    """All that can change the vectors. Not the dataset's key: another split of the same items shares them."""
    precision = precision_in_key(config.extraction.precision, torch.device(choose_device(config.device)))
    return {
        "catalogue": catalogue.fingerprint(config.modality, config.text),
        "encoder": {"weights": info.weights_sha256, "preprocessing": info.preprocessing_sha256},
        "modality": config.modality,
        "extraction": config.extraction.identity() | {"precision": precision},
    }


def restore_encoder(store: Store, features: Artefact) -> Encoder:
    """Return the encoder that made features, on the CPU; one that was fitted is fitted again.

    Raises:
        ConfigError: It was fitted on a dataset that is no longer in the store.
        StoreError: It is an encoder artefact that is no longer in the store.
        EncoderError: It cannot be had, or the features were not encoded here.
    """
    shown = features.manifest.parameters
    config = FeaturesConfig.model_validate(
        {name: shown[name] for name in ("encoder", "modality", "text", "extraction")} | {"device": "cpu"}
    )
    chosen = resolve_encoder(store, config.encoder)
    if not is_fitted(config.encoder):
        return chosen.load()
    reference = next(source for source in features.manifest.inputs if source.kind == "dataset")
    dataset = store.find("dataset", reference.key)
    if dataset is None:
        raise ConfigError(
            f"{features.ref} was made by {config.encoder}, fitted on a dataset that is no longer in the "
            "store; prepare the dataset again, or ask by --item."
        )
    return _open_encoder(config, chosen, read_catalogue(dataset))[0].eval()


def _open_encoder(
    config: FeaturesConfig, chosen: ResolvedEncoder, catalogue: Catalogue
) -> tuple[Encoder, dict[str, JsonValue]]:
    """The encoder on its device, fitted first where it needs that, and what fitting it gave."""
    if not is_fitted(config.encoder):
        return chosen.load(device=choose_device(config.device)), {}
    plain, unit_length = plain_spec(config.encoder)
    texts = [text for text in catalogue.texts(config.text) if text]
    fitted = fit_tfidf(texts, plain)
    facts: dict[str, JsonValue] = {"fitted": _fit_facts(fitted, catalogue, config)}
    if unit_length:
        return UnitLengthEncoder(config.encoder, fitted), facts
    fitted.info = fitted.info.model_copy(update={"spec": config.encoder})
    return fitted, facts


def is_fitted(spec: str) -> bool:
    """Whether an encoder is fitted on the catalogue that it encodes."""
    return plain_spec(spec)[0].partition("+")[0] == TFIDF


def _fit_facts(fitted: TfidfEncoder, catalogue: Catalogue, config: FeaturesConfig) -> dict[str, JsonValue]:
    fit: TfidfFit = fitted.fitted
    return {
        "texts": fit.n_texts,
        "vocabulary": len(fit.words),
        "explained_variance": fit.explained_variance,
        "weights_sha256": fitted.info.weights_sha256,
        "catalogue": catalogue.fingerprint(config.modality, config.text),
    }


def _join_precomputed(
    store: Store,
    source: Artefact,
    catalogue: Catalogue,
    config: FeaturesConfig,
    info: EncoderInfo,
    *,
    force: bool,
) -> StageResult:
    """Join vectors that another tool made to the catalogue's items, by id."""
    plain, unit_length = plain_spec(config.encoder)

    def make(draft: Draft) -> None:
        files = open_precomputed(plain)
        counts = join_vectors(
            files,
            config.modality,
            catalogue.item_ids,
            draft.folder,
            draft.scratch,
            unit_length=unit_length,
        )
        facts: dict[str, JsonValue] = json.loads(json.dumps(asdict(counts)))
        draft.record(**facts, rows=len(catalogue), dim=info.dims[config.modality])
        draft.record(summary={**summary_of(facts), "unused": counts.unused})

    outcome = store.produce(
        "features",
        slug=features_slug(config, info),
        identity={
            "precomputed": {"files": info.weights_sha256, "reading": info.preprocessing_sha256},
            "items": digest_json({"item_ids": list(catalogue.item_ids)}),
            "modality": config.modality,
        },
        inputs=[source.as_input("catalogue")],
        parameters=shown_parameters(config, info),
        make=make,
        force=force,
    )
    return StageResult.of(outcome)


def known_vectors(store: Store, recipe: str) -> KnownVectors | None:
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
        slug=f"{GIVEN}-{config.modality}",
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
    chosen: ResolvedEncoder,
    shuffled: ShuffledSpec,
    *,
    reporter: Reporter,
    force: bool,
) -> StageResult:
    """Deal the rows of another encoder's features to other items: a control."""
    plain = extract_features(
        store, source.key, config.model_copy(update={"encoder": shuffled.inner}), reporter=reporter
    ).artefact
    info = chosen.describe()

    def make(draft: Draft) -> None:
        features = FeatureSet.read(plain.paths("part-*.parquet"))
        write_features(draft.folder, shuffle_rows(features, np.random.default_rng(shuffled.seed)))
        counts = read_rows(plain.paths("part-*.parquet"))["status"].cast(str).value_counts().rows()
        draft.record(**_status_counts(counts), summary={"items": len(features), "dim": features.dim})

    outcome = store.produce(
        "features",
        slug=features_slug(config, info),
        identity={"shuffled": plain.key, "seed": shuffled.seed},
        inputs=[plain.as_input("rows")],
        parameters=shown_parameters(config, info),
        make=make,
        force=force,
    )
    return StageResult.of(outcome)


def shown_parameters(config: FeaturesConfig, info: EncoderInfo) -> dict[str, JsonValue]:
    """What the manifest shows of the settings."""
    return {
        **config.model_dump(mode="json", exclude={"device"}),
        "label": encoder_label(config.encoder, info),
        "info": info.model_dump(mode="json"),
    }


def encoder_label(spec: str, info: EncoderInfo) -> str:
    """What an encoder is called in slugs and tables: a control as it was typed, others by their short name.

    No path gets in, a word, and no word that a control begins with.
    """
    shuffled = parse_shuffled(spec)
    if shuffled is not None:
        seed = f"@{shuffled.seed}" if shuffled.seed else ""
        plain = info.model_copy(update={"name": info.name.removeprefix(f"shuffled-{shuffled.seed}-")})
        return f"shuffled:{encoder_label(shuffled.inner, plain)}{seed}"
    if spec.startswith(CONTROLS):
        return spec
    name = re.sub(r"[\s,]+", "-", info.name)
    return f"{info.family}-{name}" if name.startswith(("random", "constant", "shuffled")) else name


def features_slug(config: FeaturesConfig, info: EncoderInfo) -> str:
    """The readable part of the artefact's name."""
    return f"{encoder_label(config.encoder, info)}-{config.modality}"


def _status_counts(counts: list[tuple[str, int]]) -> dict[str, JsonValue]:
    by_status = dict(counts)
    return {f"n_{status}": int(by_status.get(status, 0)) for status in ("ok", "missing", "unreadable")}


def summary_of(facts: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """The numbers a person wants first."""
    names = {"n_ok": "ok", "n_missing": "missing", "n_unreadable": "unreadable", "items_per_s": "items/s"}
    return {short: facts[name] for name, short in names.items() if name in facts}
