"""Flow ``joint-training``: an encoder and a recommender trained together, from features to a measured run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prefect import State, flow
from prefect.states import Completed

from features.indexing import IndexConfig
from flows.build_index import build_index_flow
from flows.extract_features import extract_features_flow
from flows.history import show_history
from flows.reporting import TERMINAL, NextStep, name_run
from flows.subflows import run_subflow
from flows.tasks import CACHED, failed, run_stage, store_address
from pipeline.device import DeviceChoice
from pipeline.encoder_specs import stored_spec
from pipeline.errors import USER_ERRORS
from pipeline.joint_way import JointResult, JointWayConfig, run_joint
from pipeline.selecting import listed
from pipeline.settings import inputs_of, merged, read_settings, stage_config
from pipeline.stages.extract_features import FeaturesConfig
from pipeline.stages.keep_states import StatesConfig, keep_encoder_states
from pipeline.stages.measure_joint import measure_joint
from pipeline.stages.result import StageResult
from pipeline.stages.train_jointly import JointSettings, train_encoder_jointly
from pipeline.store import Store

NAME = "joint-training"
KEEP = "keep-states"
TRAIN = "train-jointly"
MEASURE = "measure-joint"


@flow(name=NAME, flow_run_name="{encoder} with {model} seed {seed}", persist_result=False)
def joint_training_flow(
    dataset: str,
    *,
    encoder: str = "tiny",
    model: str = "freedom",
    mode: str = "full",
    features: str = "",
    seed: int = 0,
    name: str = "",
    settings: str = "",
    force: bool = False,
    store: str = "",
) -> State[JointResult]:
    """Train an encoder and a recommender together, and leave the encoder, its features, a run and an index.

    Cancelled or killed, the next run with these inputs goes on from the last whole epoch.
    """
    try:
        config = joint_config(settings, mode, encoder=encoder, model=model, seed=seed)
        opened = Store(store_address(store))
        stages = SubflowJointStages(opened, store_address(store), force=force)
        result = run_joint(
            config,
            stages,
            dataset,
            beside=listed(features),
            done=lambda stage: TERMINAL.get().say(stage.line()),
        )
        if name and result.encoder is not None:
            opened.name(name, result.encoder.artefact)
    except USER_ERRORS as error:
        return failed(error)
    every = result.all()
    n_reused = sum(stage.reused for stage in every)
    message = f"{len(every)} stages, {n_reused} reused"
    if n_reused == len(every):
        name_run(config.encoder, reused=True)
        return Completed(name=CACHED, message=message, data=result)
    return Completed(message=message, data=result)


def joint_config(settings: str, mode: str, **inputs: Any) -> JointWayConfig:
    """Put the form together; `mode` is "side", or says what of the encoder is trained.

    Raises:
        ConfigError: A key or value is not right.
    """
    deeper = read_settings(settings)
    how: dict[str, Any] = {"trained": "side"} if mode == "side" else {"tuning": {"mode": mode}}
    return stage_config(JointWayConfig, merged(deeper, how), **inputs)


def joint_inputs(config: JointWayConfig) -> dict[str, Any]:
    """Return the form of joint-training for this configuration."""
    mode = "side" if config.trained == "side" else config.tuning.mode
    return {**inputs_of(config, "encoder", "model", "seed"), "mode": mode}


@flow(name=KEEP, flow_run_name="{config.encoder} {config.modality}", persist_result=False)
def keep_states_flow(
    dataset: str, *, config: StatesConfig, store: str = "", force: bool = False
) -> State[str]:
    """Run the frozen part of an encoder once over all items, for every joint training above it.

    Args:
        dataset: Name, reference or key of a dataset artefact.
        config: Which states of which encoder.
        store: Folder or address of the store; empty for the one that `tandem up` was started with.
        force: Compute them although the store has them.
    """
    return run_stage(
        KEEP,
        store,
        lambda opened, reporter: keep_encoder_states(opened, dataset, config, reporter=reporter, force=force),
    )


@flow(name=TRAIN, flow_run_name="{config.model} seed {config.seed}", persist_result=False)
def train_jointly_flow(
    dataset: str, features: list[str], *, config: JointSettings, store: str = "", force: bool = False
) -> State[str]:
    """Train encoder and recommender together, the epoch chosen on validation.

    Args:
        dataset: Name, reference or key of a dataset artefact.
        features: The features to start from; those made by the encoder become live.
        config: Encoder, recommender, how each is trained, and the seed.
        store: Folder or address of the store; empty for the one that `tandem up` was started with.
        force: Train again although the store has it.
    """

    def following(result: StageResult) -> list[NextStep]:
        show_history(TRAIN, result)
        given = {"dataset": dataset, "encoder": stored_spec(result.artefact), "store": store}
        return [NextStep("Encode the dataset with it", "extract-features", given)]

    return run_stage(
        TRAIN,
        store,
        lambda opened, reporter: train_encoder_jointly(
            opened, dataset, features, config, reporter=reporter, force=force
        ),
        following=following,
    )


@flow(name=MEASURE, flow_run_name="{encoder}", persist_result=False)
def measure_joint_flow(
    encoder: str, features: list[str], *, device: DeviceChoice = "auto", store: str = "", force: bool = False
) -> State[str]:
    """Measure the recommender that was trained with an encoder, on that encoder's features.

    Args:
        encoder: The encoder artefact of train-jointly.
        features: Its features, and those it was trained beside.
        device: Where scores are made.
        store: Folder or address of the store; empty for the one that `tandem up` was started with.
        force: Measure again although the store has it.
    """
    return run_stage(
        MEASURE,
        store,
        lambda opened, reporter: measure_joint(
            opened, encoder, features, device=device, reporter=reporter, force=force
        ),
    )


@dataclass(frozen=True)
class SubflowJointStages:
    """The stages of ``pipeline.joint_way.JointStages``, each a subflow."""

    store: Store
    address: str
    force: bool = False

    def extract(self, dataset: str, config: FeaturesConfig) -> StageResult:
        """Encode one modality with one encoder."""
        return self._run(extract_features_flow, dataset=dataset, **inputs_of(config, "encoder", "modality"))

    def keep_states(self, dataset: str, config: StatesConfig) -> StageResult:
        """Run the frozen part of an encoder once over all items."""
        return self._run(keep_states_flow, dataset=dataset, config=config)

    def train_jointly(self, dataset: str, features: Sequence[str], config: JointSettings) -> StageResult:
        """Train encoder and recommender together."""
        return self._run(train_jointly_flow, dataset=dataset, features=list(features), config=config)

    def measure(self, encoder: str, features: Sequence[str], device: DeviceChoice) -> StageResult:
        """Measure the recommender on the trained encoder's features."""
        return self._run(measure_joint_flow, encoder=encoder, features=list(features), device=device)

    def index(self, source: str, config: IndexConfig) -> StageResult:
        """Index a feature artefact or a run's items."""
        return self._run(build_index_flow, source=source, **inputs_of(config, "kind", "metric"))

    def _run(self, subflow: Callable[..., State[State[str]]], **parameters: Any) -> StageResult:
        return run_subflow(self.store, subflow, store=self.address, force=self.force, **parameters)
