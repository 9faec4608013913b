"""Stage: a dataset and an encoder in, the encoder fine-tuned on the dataset's items out."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, Field, NonNegativeInt

from features.catalogue import TextConfig
from features.finetuning.co_purchases import CoPurchases
from features.finetuning.config import CoPurchaseConfig, FinetuningConfig
from features.finetuning.loop import FinetuningResult, finetune
from features.finetuning.objectives import needed_modality
from pipeline.device import DeviceChoice, choose_device
from pipeline.encoder_specs import resolve_encoder, store_encoder
from pipeline.peak_memory import forget_peak_memory, peak_memory
from pipeline.progress import SILENT, Reporter
from pipeline.reading import read_catalogue, read_for_choosing
from pipeline.stages.extract_features import encoder_label
from pipeline.stages.result import StageResult
from recommenders.co_occurrence import co_occurrence_neighbours

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pydantic import JsonValue

    from pipeline.store import Artefact, Draft, Store
    from recommenders.interactions import Int64Array

_SUFFIX = "-finetuned"
HISTORY_FILE = "history.parquet"
"""In the encoder's folder: an epoch a row, epoch 0 being the encoder as it came."""


class FinetuneSettings(BaseModel, frozen=True, extra="forbid"):
    """Which encoder is fine-tuned how, on which texts."""

    encoder: str = Field("tiny", description="Specification of the encoder, as listed by `tandem encoders`.")
    text: TextConfig = Field(default_factory=TextConfig)
    finetuning: FinetuningConfig = Field(default_factory=FinetuningConfig)
    seed: NonNegativeInt = Field(0, description="Of held-out items, order, augmentation and dropout.")
    device: DeviceChoice = Field("auto", description="`auto` takes the GPU where there is one.")


def finetune_encoder(
    store: Store,
    dataset: str,
    config: FinetuneSettings,
    *,
    reporter: Reporter = SILENT,
    force: bool = False,
) -> StageResult:
    """Fine-tune an encoder on a dataset's pictures and texts, and keep it as an encoder artefact.

    Its epoch is chosen by retrieval among items that were held out. Of the interactions only the training
    part counts, and that only for the co-purchase objective. Stopped or killed, the same call goes on from
    the last checkpoint.

    Args:
        store: Where the dataset lies and the encoder goes.
        dataset: Name, key or folder of a dataset artefact.
        config: Encoder, which may be `store/<encoder artefact>`, texts, objectives, training, seed.
        reporter: Told of updates.
        force: Do it again although the store has the encoder.

    Raises:
        EncoderError: The encoder cannot be what its specification says, be tuned so, or be saved.
        StoreError: There is no such dataset, or no such encoder artefact.
        FeatureError: Too few items, objectives the encoder cannot serve, a loss that is not finite.
    """
    source = store.get(dataset, "dataset")
    catalogue = read_catalogue(source)
    chosen = resolve_encoder(store, config.encoder)
    config = config.model_copy(update={"encoder": chosen.spec})
    info = chosen.describe()
    device = choose_device(config.device)
    objectives = config.finetuning.objectives
    bought = co_purchases_of(source, objectives.pairs) if objectives.co_purchase else None
    modality = needed_modality(objectives)
    name = finetuned_name(encoder_label(config.encoder, info))

    def make(draft: Draft) -> None:
        encoder = chosen.load(device=device)
        forget_peak_memory(device)
        with reporter.progress(f"fine-tuning {config.encoder}") as progress:
            result = finetune(
                encoder,
                catalogue,
                config.finetuning,
                rng=np.random.default_rng(config.seed),
                text=config.text,
                co_purchases=bought,
                checkpoint_folder=draft.scratch,
                progress=progress,
            )
        peak = peak_memory(device)
        store_encoder(
            draft,
            encoder.cpu(),
            name=name,
            provenance={
                "made_by": "finetune-encoder",
                "encoder": config.encoder,
                "dataset": source.key,
                "finetuning": config.finetuning.model_dump(mode="json"),
                "seed": config.seed,
                "best_epoch": result.best_epoch,
            },
        )
        result.history_frame().write_parquet(draft.path(HISTORY_FILE))
        draft.record(**facts_of(result), peak_memory_bytes=peak)

    outcome = store.produce(
        "encoder",
        slug=name,
        identity={
            "catalogue": catalogue.fingerprint(modality, config.text),
            "interactions": digest_of(bought) if bought is not None else "",
            "encoder": {"weights": info.weights_sha256, "preprocessing": info.preprocessing_sha256},
            "finetuning": config.finetuning.identity(),
            "seed": config.seed,
            "device": device.type,
        },
        inputs=[source.as_input("catalogue"), *chosen.inputs],
        parameters={
            **config.model_dump(mode="json", exclude={"device"}),
            "label": encoder_label(config.encoder, info),
            "info": info.model_dump(mode="json"),
        },
        make=make,
        resumable=True,
        force=force,
    )
    return StageResult.of(outcome)


def finetuned_name(label: str) -> str:
    """What the result is called; an encoder that is fine-tuned twice says so once."""
    return f"{label.removesuffix(_SUFFIX)}{_SUFFIX}"


def co_purchases_of(dataset: Artefact, config: CoPurchaseConfig) -> CoPurchases:
    """Pairs of items that the same users interacted with in training; the other parts are not looked at.

    For each item its ``config.neighbours`` heaviest partners, weighed by common users / (popularity x
    popularity)^damping; a pair that both ends name counts once.
    """
    train = read_for_choosing(dataset).train
    matrix = train.csr()
    popularity = np.asarray(matrix.sum(axis=0)).ravel()

    def weigh(common: NDArray[np.float32], rows: Int64Array, columns: Int64Array) -> NDArray[np.float64]:
        both = popularity[rows].astype(np.float64) * popularity[columns]
        weights: NDArray[np.float64] = common / both**config.damping
        return weights

    neighbours, weights = co_occurrence_neighbours(matrix.T.tocsr(), config.neighbours, weigh)
    items, places = np.nonzero(weights)
    ends = np.sort(np.stack([items, neighbours[items, places]], axis=1), axis=1)
    pairs, first = np.unique(ends, axis=0, return_index=True)
    heavy = weights[items, places][first].astype(np.float64)
    return CoPurchases(pairs, heavy, train.user_rows, train.item_rows, train.n_items)


def digest_of(bought: CoPurchases) -> str:
    """SHA-256 in hex of all that co-purchases say, whatever the order of the interactions."""
    digest = hashlib.sha256()
    order = np.lexsort((bought.item_rows, bought.user_rows))
    for array in (bought.pairs, bought.weights, bought.user_rows[order], bought.item_rows[order]):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def facts_of(result: FinetuningResult) -> dict[str, JsonValue]:
    """What the manifest keeps of a fine-tuning."""
    before, best = (result.history[at].get("retrieval") for at in (0, result.best_epoch))
    summary: dict[str, JsonValue] = {"best epoch": result.best_epoch}
    if before is not None:
        summary |= {"retrieval before": before, "retrieval after": best}
    return {
        "epochs": len(result.history) - 1,
        "best_epoch": result.best_epoch,
        "retrieval_before": before,
        "retrieval_after": best,
        "stopped_early": result.stopped_early,
        "resumed_after": result.resumed_after,
        "finetune_seconds": result.seconds,
        "n_trained": result.n_trained,
        "n_items": dict(result.counts),
        "unreadable_reasons": dict(result.reasons),
        "precision": result.precision,
        "summary": {**summary, "unreadable": result.counts["unreadable"]},
    }
