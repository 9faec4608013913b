"""Stage: the same as ``extract_features``, in shards that several processes or machines encode."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING

from features.encoders.registry import describe_encoder, load_encoder, parse_shuffled
from features.extraction import recipe_digest
from features.precision import Precision, in_precision
from features.sharding import (
    BlocksMissingError,
    Settled,
    Shard,
    ShardReport,
    assemble,
    block_name,
    count_parts,
    encode_shard,
    missing_parts,
    settle,
    shards_of,
)
from pipeline.device import choose_device
from pipeline.encoder_specs import ResolvedEncoder, is_stored, resolve_encoder
from pipeline.errors import ConfigError, StoreError
from pipeline.manifest import folder_name
from pipeline.progress import SILENT, Reporter
from pipeline.reading import read_catalogue
from pipeline.stages.extract_features import (
    GIVEN,
    FeaturesConfig,
    describe_for,
    features_identity,
    features_slug,
    is_fitted,
    known_vectors,
    shown_parameters,
    summary_of,
)
from pipeline.stages.result import StageResult
from pipeline.store import artefact_key

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from pydantic import JsonValue

    from features.catalogue import Catalogue
    from features.encoders.base import Encoder, EncoderInfo
    from pipeline.sharing import SharedFolder
    from pipeline.store import Artefact, Draft, InputRef, Store

SETTLED = "settled.json"


@dataclass(frozen=True)
class ShardsMissing:
    """How far an extraction is that other workers have to go on with."""

    ref: str
    """The artefact that is going to be."""
    n_shards: int
    missing: tuple[int, ...]
    """Shards with blocks that nobody has finished."""
    report: ShardReport | None = None
    """What this worker did."""

    def to_json(self) -> dict[str, JsonValue]:
        """What ``--json`` prints."""
        whole: list[JsonValue] = [shard for shard in range(self.n_shards) if shard not in self.missing]
        document: dict[str, JsonValue] = {
            "kind": "features",
            "ref": self.ref,
            "shards": self.n_shards,
            "whole": whole,
            "missing": list(self.missing),
        }
        if self.report is not None:
            document["shard"] = json.loads(json.dumps(asdict(self.report)))
        return document

    def line(self) -> str:
        """One line for a person."""
        did = ""
        if self.report is not None:
            did = f"shard {self.report.shard}: {self.report.encoded} encoded, {self.report.seconds:.1f} s; "
        missing = ", ".join(str(shard) for shard in self.missing)
        n_whole = self.n_shards - len(self.missing)
        return f"{did}{n_whole} of {self.n_shards} shards are whole; missing: {missing}"


def can_shard(config: FeaturesConfig) -> bool:
    """Whether features are encoded content by content, so that workers can share the contents out."""
    if config.encoder == GIVEN or parse_shuffled(config.encoder) is not None or is_fitted(config.encoder):
        return False
    return is_stored(config.encoder) or describe_encoder(config.encoder).family != "precomputed"


def extract_shard(
    store: Store,
    dataset: str,
    config: FeaturesConfig,
    shard: Shard,
    *,
    reporter: Reporter = SILENT,
    force: bool = False,
    retry_failed: bool = False,
) -> StageResult | ShardsMissing:
    """Encode one shard and, if it was the last one, put the feature artefact together.

    Run it once for each shard, in any order, at once or not, on machines that reach the same store; run it
    again for a shard whose worker was killed.

    Args:
        store: Where the dataset lies and the features go.
        dataset: Name, key or folder of a dataset artefact.
        config: What to encode with what; the same for all shards.
        shard: Which share.
        reporter: Told of progress.
        force: Encode everything again; the same for all shards.
        retry_failed: Encode the rows that are not ``ok`` again; the same for all shards.

    Raises:
        EncoderError: The encoder cannot be what its specification says.
        ConfigError: The encoder has no such modality, or cannot be shared out.
    """
    job = _Job.of(store, dataset, config, force=force, retry_failed=retry_failed)
    made = job.found()
    if made is not None:
        return made
    try:
        with job.share(f"shard {shard.index} of {shard.count}") as shared:
            report = _encode(job, shared, shard, reporter)
            outcome = _put_together(job, shared, shard.count, reporter)
    except (OSError, StoreError):  # perhaps because another worker was done and cleared the folder away
        made = job.found()
        if made is None:
            raise
        return made
    if isinstance(outcome, ShardsMissing):
        return ShardsMissing(outcome.ref, outcome.n_shards, outcome.missing, report)
    return outcome


def find_features(store: Store, dataset: str, config: FeaturesConfig) -> StageResult | None:
    """The features, if the store has them.

    Raises:
        EncoderError, ConfigError: As for ``extract_shard``.
    """
    return _Job.of(store, dataset, config, force=False, retry_failed=False).found()


def encode_one_shard(
    store: Store,
    dataset: str,
    config: FeaturesConfig,
    shard: Shard,
    *,
    reporter: Reporter = SILENT,
    force: bool = False,
    retry_failed: bool = False,
) -> ShardReport | None:
    """Encode one shard and leave the rest to ``assemble_shards``; None where the store has the features.

    Arguments and errors are those of ``extract_shard``. The encoder stays loaded for the next shard.
    """
    job = _Job.of(store, dataset, config, force=force, retry_failed=retry_failed)
    if job.found() is not None:
        return None
    with job.share(f"shard {shard.index} of {shard.count}") as shared:
        return _encode(job, shared, shard, reporter)


def assemble_shards(
    store: Store,
    dataset: str,
    config: FeaturesConfig,
    n_shards: int,
    *,
    reporter: Reporter = SILENT,
    force: bool = False,
    retry_failed: bool = False,
) -> StageResult:
    """Put together what ``encode_one_shard`` left of all shards.

    Raises:
        BlocksMissingError: Some shard is not whole; it says which.
    """
    loaded_encoder.cache_clear()
    job = _Job.of(store, dataset, config, force=force, retry_failed=retry_failed)
    made = job.found()
    if made is not None:
        return made
    with job.share("assembly") as shared:
        outcome = _put_together(job, shared, n_shards, reporter)
    if isinstance(outcome, StageResult):
        return outcome
    them = ", ".join(f"{each}/{n_shards}" for each in outcome.missing)
    raise BlocksMissingError(f"{outcome.ref}: {outcome.line()}; run {them} again.", (), outcome.missing)


@lru_cache(maxsize=1)
def loaded_encoder(spec: str, weights_sha256: str, device: str, precision: Precision) -> Encoder:  # noqa: ARG001 - a name's weights may change
    """The encoder that this process loaded last, so that a worker of many shards loads it once."""
    return in_precision(load_encoder(spec, device=device), precision)


@dataclass(frozen=True)
class _Job:
    """One sharded extraction, as each of its workers sees it."""

    store: Store
    source: Artefact
    catalogue: Catalogue
    config: FeaturesConfig
    chosen: ResolvedEncoder
    info: EncoderInfo
    force: bool
    retry_failed: bool
    began: datetime

    @classmethod
    def of(
        cls, store: Store, dataset: str, config: FeaturesConfig, *, force: bool, retry_failed: bool
    ) -> _Job:
        if not can_shard(config):
            raise ConfigError(
                f"{config.encoder} does not encode item by item, so that there is nothing to share out; "
                "extract it without shards (of shuffled:... , shard what is shuffled)."
            )
        source = store.get(dataset, "dataset")
        catalogue = read_catalogue(source)
        chosen = resolve_encoder(store, config.encoder)
        config = config.model_copy(update={"encoder": chosen.spec})
        info = describe_for(config, chosen)
        began = datetime.now(UTC)
        return cls(store, source, catalogue, config, chosen, info, force, retry_failed, began)

    @property
    def identity(self) -> dict[str, JsonValue]:
        return features_identity(self.catalogue, self.config, self.info)

    @property
    def inputs(self) -> list[InputRef]:
        return [self.source.as_input("catalogue"), *self.chosen.inputs]

    @property
    def slug(self) -> str:
        return features_slug(self.config, self.info)

    @property
    def ref(self) -> str:
        return f"features/{folder_name(self.slug, artefact_key('features', self.identity))}"

    @property
    def makes_again(self) -> bool:
        """Whether features that exist are made once more."""
        return self.force or self.retry_failed

    @property
    def purpose(self) -> str:
        """Blocks made with known vectors do not serve where all is to be encoded again."""
        return "retry" if self.retry_failed else "force" if self.force else ""

    @property
    def n_parts(self) -> int:
        contents = self.catalogue.contents(self.config.modality, self.config.text)
        return count_parts(contents, self.config.extraction)

    def share(self, worker: str) -> AbstractContextManager[SharedFolder]:
        return self.store.share(
            "features",
            slug=self.slug,
            identity=self.identity,
            inputs=self.inputs,
            worker=worker,
        )

    def found(self) -> StageResult | None:
        """The features if the store has them; where they are to be made again, only those made since."""
        artefact = self.store.find("features", artefact_key("features", self.identity))
        if artefact is None or (self.makes_again and artefact.manifest.created_at < self.began):
            return None
        return StageResult.reusing(artefact)

    def encoder(self, precision: Precision) -> Encoder:
        device = choose_device(self.config.device)
        return loaded_encoder(self.chosen.local, self.info.weights_sha256, str(device), precision)

    def settled(self, shared: SharedFolder, reporter: Reporter) -> Settled:
        """What the first worker settled."""

        def find_out() -> bytes:
            config = self.config
            settled = settle(
                self.encoder("float32"), self.catalogue, config.modality, config.extraction, text=config.text
            )
            return settled.model_dump_json().encode()

        settled = Settled.model_validate_json(shared.settle(SETTLED, find_out))
        if self.config.extraction.precision == "auto":
            reporter.say(f"  {settled.reason}")
        return settled


def _encode(job: _Job, shared: SharedFolder, shard: Shard, reporter: Reporter) -> ShardReport:
    """Make the blocks of a shard that nobody has made yet."""
    config = job.config
    mine = {block_name(part) for part in shard.parts(job.n_parts)}
    shared.fetch(mine.intersection(shared.names()))
    settled = job.settled(shared, reporter)
    extraction, encoder = settled.applied_to(config.extraction), job.encoder(settled.precision)
    everything_again = job.force and not job.retry_failed
    recipe = recipe_digest(job.info, config.modality, extraction)
    with reporter.progress(f"{config.encoder} {config.modality} shard {shard}") as progress:
        report = encode_shard(
            encoder,
            job.catalogue,
            config.modality,
            shared.folder,
            config=extraction,
            shard=shard,
            text=config.text,
            known=None if everything_again else known_vectors(job.store, recipe),
            purpose=job.purpose,
            written=shared.publish,
            progress=progress,
            say=lambda note: reporter.say(f"  {note}"),
        )
    for name in sorted(mine.difference(shared.names())):  # a worker was killed before it could publish it
        shared.publish(name)
    return report


def _put_together(
    job: _Job, shared: SharedFolder, n_shards: int, reporter: Reporter
) -> StageResult | ShardsMissing:
    """Make the artefact if all blocks are there; of several workers that find them all, one makes it."""
    config, n_parts = job.config, job.n_parts
    data = shared.read(SETTLED)
    missing = missing_parts(shared.names(), n_parts)
    if missing or data is None:
        return job.found() or ShardsMissing(job.ref, n_shards, shards_of(missing, n_parts, n_shards))
    settled = Settled.model_validate_json(data)
    extraction = settled.applied_to(config.extraction)

    def make(draft: Draft) -> None:
        shared.fetch(block_name(part) for part in range(n_parts))
        with reporter.progress(f"{config.encoder} {config.modality}: {n_parts} blocks") as progress:
            report = assemble(
                job.info,
                job.catalogue,
                config.modality,
                shared.folder,
                draft.folder,
                config=extraction,
                n_shards=n_shards,
                text=config.text,
                purpose=job.purpose,
                settled=settled,
                progress=progress,
                say=lambda note: reporter.say(f"  {note}"),
            )
        facts = json.loads(json.dumps(asdict(report)))
        recipe = recipe_digest(job.info, config.modality, extraction)
        probe = asdict(settled.probed)
        draft.record(
            **facts, recipe=recipe, precision_probe=probe, shards=n_shards, summary=summary_of(facts)
        )

    try:
        outcome = job.store.produce(
            "features",
            slug=job.slug,
            identity=job.identity,
            inputs=job.inputs,
            parameters=shown_parameters(config, job.info),
            make=make,
            force=job.makes_again,
        )
    except BlocksMissingError as error:
        if (made := job.found()) is not None:  # another worker was faster, and cleared the folder away
            return made
        reporter.say(f"  {error}")
        return ShardsMissing(job.ref, n_shards, error.shards)
    shared.remove()
    return StageResult.of(outcome)
