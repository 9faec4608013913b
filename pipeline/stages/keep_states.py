"""Stage: one dataset and the frozen part of one encoder's tower in, the states it gives every item out."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

import polars as pl
import torch
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt

from features.catalogue import Contents, TextConfig
from features.errors import FeatureFileError
from features.feature_table import StatusType
from features.images import ImageLimits
from features.live.inputs import RowInputs
from features.live.keeping import block_after, keep_pooled, keep_states
from features.live.kept import Kept
from features.live.pooled import PooledFile, StateType
from features.live.states import STATES_HEAD, StateFile
from features.tuning.towers import tower_of
from pipeline.device import DeviceChoice, choose_device
from pipeline.encoder_specs import resolve_encoder
from pipeline.errors import ConfigError, StoreError
from pipeline.peak_memory import forget_peak_memory, peak_memory
from pipeline.progress import SILENT, Progress, Reporter
from pipeline.reading import read_catalogue
from pipeline.stages.extract_features import encoder_label
from pipeline.stages.result import StageResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic import JsonValue

    from features.catalogue import Catalogue
    from features.encoders.base import Encoder, EncoderInfo
    from pipeline.store import Artefact, Draft, Store

ITEMS_FILE = "items.parquet"
"""item_id, status and reason of every item, in the catalogue's order, which is that of the states."""


class StatesConfig(BaseModel, frozen=True, extra="forbid"):
    """Which states of which encoder over which modality."""

    encoder: str = Field("tiny", description="Specification of the encoder, as listed by `tandem encoders`.")
    modality: Literal["image", "text"] = Field("image", description="Whose tower is run.")
    text: TextConfig = Field(default_factory=TextConfig)
    above: NonNegativeInt | None = Field(
        2,
        description="Uppermost blocks that are not run: the whole states below them are kept, as float16. "
        "None: pooled states of many blocks, and the vectors, as side networks read them.",
    )
    every_nth: PositiveInt = Field(
        2, description="Of pooled states: blocks from one to the next, counted from the last."
    )
    dtype: StateType = Field("float16", description="Of pooled states: the numbers they are kept in.")
    chunk: PositiveInt = Field(64, description="Items run at a time.")
    limits: ImageLimits = Field(ImageLimits(), description="Larger pictures count as unreadable.")
    n_workers: NonNegativeInt = Field(0, description="Threads that decode pictures; 0: two.")
    device: DeviceChoice = Field("auto", description="`auto` takes the GPU where there is one.")


def keep_encoder_states(
    store: Store,
    dataset: str,
    config: StatesConfig,
    *,
    reporter: Reporter = SILENT,
    force: bool = False,
) -> StageResult:
    """Run the frozen part of a tower once over all items, for every joint training above it.

    Killed, the same call goes on from what is on the disk.

    Args:
        store: Where the dataset lies and the states go.
        dataset: Name, key or folder of a dataset artefact.
        config: Which states of which encoder.
        reporter: Told of progress.
        force: Compute them although the store has them.

    Raises:
        ConfigError: The encoder has no such modality.
        EncoderError: The encoder cannot be had, shows no blocks, or has fewer than are left out.
        FeatureError: No item has the modality, or a state is no number.
    """
    source = store.get(dataset, "dataset")
    catalogue = read_catalogue(source)
    chosen = resolve_encoder(store, config.encoder)
    config = config.model_copy(update={"encoder": chosen.spec})
    info = chosen.describe()

    def make(draft: Draft) -> None:
        device = torch.device(choose_device(config.device))
        forget_peak_memory(device)
        encoder = chosen.load(device=str(device))
        started = time.perf_counter()
        with reporter.progress(f"states of {config.encoder} {config.modality}") as progress:
            reasons = _compute(encoder, catalogue, config, draft, progress)
        seconds = time.perf_counter() - started
        contents = catalogue.contents(config.modality, config.text)
        items = _items(contents, reasons)
        items.write_parquet(draft.path(ITEMS_FILE))
        counts = {name: items.filter(pl.col("status") == name).height for name in StatusType.categories}
        speed = counts["ok"] / max(seconds, 1e-9)
        tower = tower_of(encoder, config.modality)
        draft.record(
            **{f"n_{name}": count for name, count in counts.items()},
            n_items=len(catalogue),
            n_blocks=tower.n_blocks,
            n_blocks_run=tower.n_blocks - (config.above or 0),
            compute_seconds=seconds,
            items_per_s=speed,
            peak_memory_bytes=peak_memory(device),
            summary={**counts, "blocks run": tower.n_blocks - (config.above or 0), "items/s": speed},
        )

    outcome = store.produce(
        "states",
        slug=f"{encoder_label(chosen.spec, info)}-{config.modality}-{_what(config)}",
        identity=states_identity(catalogue, config, info),
        inputs=[source.as_input("catalogue"), *chosen.inputs],
        parameters={
            **config.model_dump(mode="json", exclude={"device", "n_workers"}),
            "label": encoder_label(chosen.spec, info),
            "info": info.model_dump(mode="json"),
        },
        make=make,
        resumable=True,
        force=force,
    )
    return StageResult.of(outcome)


def states_identity(catalogue: Catalogue, config: StatesConfig, info: EncoderInfo) -> dict[str, JsonValue]:
    """All that can change the states, as for features: another split of the same items shares them.

    Raises:
        ConfigError: The encoder has no such modality.
    """
    if config.modality not in info.modalities:
        raise ConfigError(
            f"{config.encoder} encodes {' and '.join(info.modalities)}, not {config.modality}; "
            "choose another modality or another encoder (`tandem encoders`)."
        )
    which: dict[str, JsonValue] = (
        {"above": config.above, "dtype": "float16"}
        if config.above is not None
        else {"every_nth": config.every_nth, "dtype": config.dtype}
    )
    limits: dict[str, JsonValue] = config.limits.model_dump(mode="json")
    return {
        "catalogue": catalogue.fingerprint(config.modality, config.text),
        "encoder": {"weights": info.weights_sha256, "preprocessing": info.preprocessing_sha256},
        "modality": config.modality,
        "states": which,
        "chunk": config.chunk,
        "precision": "float32",
        **({"limits": limits} if config.modality == "image" else {}),
    }


def open_states(states: Artefact, item_ids: Sequence[str]) -> Kept:
    """Open a states artefact for the items of a catalogue.

    Args:
        states: What `keep_encoder_states` made.
        item_ids: The catalogue's.

    Raises:
        StoreError: It is damaged, or of other items.
    """
    states.paths()  # of a remote store they are fetched
    folder = states.path(ITEMS_FILE).parent
    try:
        kept = StateFile(folder) if STATES_HEAD in states.manifest.files else PooledFile(folder)
        own = pl.read_parquet(states.path(ITEMS_FILE))["item_id"].to_list()
    except (FeatureFileError, OSError, pl.exceptions.PolarsError) as error:
        raise StoreError(
            f"{states.ref} is damaged: {error} `tandem verify {states.ref}` says which file it is; delete "
            f"the folder {states.folder_url}, or run the same command with --force, and it is made again."
        ) from error
    if own != list(item_ids):
        raise StoreError(
            f"{states.ref} has states of {len(own):,} items, which are not the {len(item_ids):,} of the "
            "dataset, or not in their order; make states of this dataset."
        )
    return kept


def _compute(
    encoder: Encoder,
    catalogue: Catalogue,
    config: StatesConfig,
    draft: Draft,
    progress: Progress,
) -> dict[int, str]:
    """Fill the draft; returns item row -> why it could not be read."""
    tower = tower_of(encoder, config.modality)
    start = block_after(tower, config.above or 0)
    inputs = RowInputs(
        catalogue,
        encoder,
        config.modality,
        config.text,
        cache_file=draft.scratch / "pixels.f16",
        cache_mb=0,  # each picture is decoded once
        limits=config.limits,
        n_workers=config.n_workers,
    )
    has = [content is not None for content in inputs.contents.hashes]
    rows = torch.tensor(has, dtype=torch.bool).nonzero().squeeze(1)
    try:
        if config.above is not None:
            return keep_states(
                tower,
                inputs,
                rows,
                start,
                folder=draft.folder,
                chunk=config.chunk,
                progress=progress,
                resume=True,
            )
        return keep_pooled(
            encoder,
            inputs,
            rows,
            every_nth=config.every_nth,
            folder=draft.folder,
            chunk=config.chunk,
            state_type=config.dtype,
            progress=progress,
            resume=True,
        )
    finally:
        inputs.close()


def _items(contents: Contents, reasons: dict[int, str]) -> pl.DataFrame:
    """Who has a state, and why others have none."""
    status = [
        "unreadable" if row in reasons else "ok" if presence == "present" else presence
        for row, presence in enumerate(contents.presence)
    ]
    why = [reasons.get(row, reason) for row, reason in enumerate(contents.reasons)]
    return pl.DataFrame(
        {
            "item_id": pl.Series(contents.item_ids, dtype=pl.String),
            "status": pl.Series(status, dtype=StatusType),
            "reason": pl.Series(why, dtype=pl.String),
        }
    )


def _what(config: StatesConfig) -> str:
    """Which states, in a slug."""
    if config.above is None:
        return f"side-{config.every_nth}"
    return f"below-last-{config.above}" if config.above else "below-head"
