"""Search of settings: points of a space tried one by one, the best on validation chosen.

What is tried is scored by an objective that was handed training and validation pairs and nothing else: no
argument here, and none of a trial's, could carry the test part.

Every point and what came of it is a file in a folder, so that a search that was killed goes on where it was,
and several processes can share one. A point is a function of the seed, its number and what was known when it
was drawn. So one process repeats a search exactly, killed or not; and several do for ``grid`` and ``random``
without pruning. Optuna draws the points of ``random`` and ``tpe`` and decides which trials end early.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import optuna
import polars as pl
from filelock import FileLock, Timeout
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel

from recommenders.errors import RecommenderError, SearchError
from recommenders.ranges import Between, Range
from recommenders.search_space import Choice, SearchConfig, Space, all_points, n_points

REDRAWS = 50
"""Draws before a point that was tried before is taken again, or the next of the grid where there is one."""
HALVING_FACTOR = 3

Watch = Callable[[int, float], bool]
"""Called with an epoch and its validation value; True: end the trial there."""


@dataclass(frozen=True)
class Measured:
    """What came of trying one point."""

    value: float
    """Best validation value of all epochs, higher is better."""
    epochs: int
    best_epoch: int
    seconds: float


Objective = Callable[[Choice, Watch, Path], Measured]
"""A point, whom to tell of each evaluation, and a folder for checkpoints -> what came of it."""


class Trial(BaseModel, frozen=True, extra="forbid"):
    """One point that was tried."""

    number: int
    """Counted from 0, in the order the points were drawn."""
    choice: Choice
    state: Literal["complete", "pruned", "failed"]
    value: float | None = None
    """Best validation value; None for a failed trial."""
    epochs: int = 0
    best_epoch: int = 0
    seconds: float = 0.0
    curve: dict[int, float] = {}
    """Epoch -> validation value."""
    marks: dict[str, float] = {}
    """What successive halving notes of the rungs that the trial reached."""
    reason: str = ""
    """Why it failed."""


class Claim(BaseModel, frozen=True, extra="forbid"):
    """A point that was drawn."""

    number: int
    choice: Choice


def best_trial(trials: Sequence[Trial]) -> Trial:
    """Return the finished trial with the best validation value, of equal ones the first.

    Raises:
        SearchError: No trial was finished.
    """
    finished = [trial for trial in trials if trial.state == "complete"]
    if not finished:
        reasons = {trial.reason: trial for trial in trials if trial.reason}
        told = "; ".join(f"trial {trial.number} {trial.choice}: {why}" for why, trial in reasons.items())
        raise SearchError(
            f"None of {len(trials)} trials could be finished, so there is nothing to choose from. {told}"
        )
    return min(finished, key=lambda trial: (-(trial.value or 0.0), trial.number))


def trials_frame(trials: Sequence[Trial]) -> pl.DataFrame:
    """Return a row for each trial, in their order: state, value, epochs, seconds, and a column a setting.

    A setting whose values are of several types is a column of texts.
    """
    names = list(trials[0].choice) if trials else []
    columns: dict[str, pl.Series] = {}
    for name in ("number", "state", "value", "epochs", "best_epoch", "seconds", "reason"):
        columns[name] = pl.Series(name, [getattr(trial, name) for trial in trials], strict=False)
    for name in names:
        values = [trial.choice[name] for trial in trials]
        kinds = {type(value) for value in values}
        if kinds <= {int, float} and float in kinds:
            values = [float(value) for value in values]
        elif len(kinds) > 1:
            values = [str(value) for value in values]
        columns[name] = pl.Series(name, values)
    curves = [[{"epoch": epoch, "value": value} for epoch, value in trial.curve.items()] for trial in trials]
    curve_type = pl.List(pl.Struct({"epoch": pl.Int64(), "value": pl.Float64()}))
    columns["curve"] = pl.Series("curve", curves, dtype=curve_type)
    return pl.DataFrame(columns).with_columns(pl.col("value").cast(pl.Float64))


class TrialFolder:
    """The files of a search: a point is claimed, tried, and written down, each by one process only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def finished(self) -> list[Trial]:
        """Return what was tried, in the order of numbers."""
        files = sorted(self.folder.glob("trial-*.json"))
        return [Trial.model_validate_json(file.read_bytes()) for file in files]

    def claims(self) -> dict[int, Choice]:
        """Return every point drawn so far, tried or not, by number."""
        files = sorted(self.folder.glob("claim-*.json"))
        claims = [Claim.model_validate_json(file.read_bytes()) for file in files]
        return {claim.number: claim.choice for claim in claims}

    def claim(self, claim: Claim) -> None:
        """Write down that a point is going to be tried."""
        self._write(f"claim-{claim.number:05}.json", claim)

    def finish(self, trial: Trial) -> None:
        """Write down what came of a trial, and drop its checkpoints."""
        self._write(f"trial-{trial.number:05}.json", trial)
        shutil.rmtree(self._checkpoints(trial.number), ignore_errors=True)

    def is_finished(self, number: int) -> bool:
        """Whether a trial's outcome is written down."""
        return (self.folder / f"trial-{number:05}.json").exists()

    def checkpoints(self, number: int) -> Path:
        """Return a folder for a trial's checkpoints."""
        folder = self._checkpoints(number)
        folder.mkdir(exist_ok=True)
        return folder

    def forget(self) -> None:
        """Remove every point and trial."""
        for file in [*self.folder.glob("claim-*.json"), *self.folder.glob("trial-*.json")]:
            file.unlink(missing_ok=True)

    def drawing(self) -> FileLock:
        """Return the lock of drawing points."""
        return FileLock(self.folder / "drawing.lock")

    def trying(self, number: int) -> FileLock:
        """Return the lock of one trial; the system takes it from a process that dies."""
        return FileLock(self.folder / f"trying-{number:05}.lock")

    def _checkpoints(self, number: int) -> Path:
        return self.folder / f"checkpoints-{number:05}"

    def _write(self, name: str, content: BaseModel) -> None:
        half = self.folder / f"{name}.tmp"
        half.write_text(content.model_dump_json(), encoding="utf-8")
        half.replace(self.folder / name)


def run_trials(
    space: Space,
    objective: Objective,
    config: SearchConfig,
    folder: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
    wait: bool = True,
) -> list[Trial]:
    """Try points until the budget is spent; what the folder holds counts.

    Args:
        space: What to search. Nothing: one trial, of no settings.
        objective: Tries a point.
        config: Method, budget, pruning, seed; the same for every process with this folder.
        folder: Where points and trials are written. Several processes may share it.
        progress: Called with the trials done and all there are to be.
        wait: Whether to wait for the trials of other processes, and take over those of dead ones.

    Returns:
        The trials so far in the order of their numbers; all of them, if ``wait``.
    """
    kept = TrialFolder(folder)
    budget = n_trials(space, config)
    while (mine := _claim(space, config, kept, wait=wait)) is not None:
        claim, lock = mine
        try:
            kept.finish(_try(claim, objective, space, config, kept))
        finally:
            lock.release()
        if progress:
            progress(len(kept.finished()), budget)
    return kept.finished()


def n_trials(space: Space, config: SearchConfig) -> int:
    """Return the trials to make: the budget, or all points where there are fewer."""
    points = n_points(space, config)
    return config.n_trials if points is None else min(config.n_trials, points)


def _claim(
    space: Space, config: SearchConfig, kept: TrialFolder, *, wait: bool
) -> tuple[Claim, FileLock] | None:
    """Take over what a dead process left, else draw the next point; None: nothing is left to do."""
    while True:
        with kept.drawing():
            trials, claims = kept.finished(), kept.claims()
            unfinished = [number for number in claims if number not in {trial.number for trial in trials}]
            for number in unfinished:
                lock = kept.trying(number)
                if _acquire(lock):
                    if not kept.is_finished(number):
                        return Claim(number=number, choice=claims[number]), lock
                    lock.release()  # its process wrote it down a moment ago
            if len(claims) < n_trials(space, config) and not _out_of_time(trials, config):
                number = len(claims)
                claim = Claim(number=number, choice=propose(space, config, number, trials, claims))
                lock = kept.trying(number)
                lock.acquire()
                kept.claim(claim)
                return claim, lock
        if not wait or not unfinished:
            return None
        with kept.trying(unfinished[0]):  # of a process that lives
            pass


def _acquire(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def _out_of_time(trials: Sequence[Trial], config: SearchConfig) -> bool:
    return 0 < config.time_budget_s <= sum(trial.seconds for trial in trials)


def propose(
    space: Space,
    config: SearchConfig,
    number: int,
    trials: Sequence[Trial],
    claims: Mapping[int, Choice],
) -> Choice:
    """Return the point of a trial: one not drawn before, as long as there is one.

    Args:
        space: What to search.
        config: Method and seed.
        number: Of the trial.
        trials: What is known of earlier points.
        claims: All points drawn before, tried or not.
    """
    drawn = list(claims.values())
    if config.method == "grid":
        return _next_of_grid(space, config, [])[number]
    study = _study(space, config, trials, claims)
    choice: Choice = {}
    for attempt in range(REDRAWS):
        sequence = np.random.SeedSequence([config.seed, number, attempt])
        study.sampler = _sampler(config, int(sequence.generate_state(1)[0]))
        asked = study.ask(distributions(space))
        choice = {name: asked.params[name] for name in space}
        if choice not in drawn:
            return choice
        study.tell(asked, state=TrialState.FAIL)
    left = _next_of_grid(space, config, drawn)
    return left[0] if left else choice


def _next_of_grid(space: Space, config: SearchConfig, drawn: Sequence[Choice]) -> list[Choice]:
    """Return the points of the grid that were not drawn, in an order of the seed's."""
    points = all_points(space)
    order = np.random.default_rng(config.seed).permutation(len(points))
    return [points[place] for place in order if points[place] not in drawn]


def _sampler(config: SearchConfig, seed: int) -> optuna.samplers.BaseSampler:
    if config.method == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    startup = min(10, max(2, config.n_trials // 4))
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)


def _pruner(config: SearchConfig) -> optuna.pruners.BasePruner:
    if config.pruning == "median":
        return optuna.pruners.MedianPruner(
            n_startup_trials=config.warmup_trials, n_warmup_steps=config.warmup_epochs
        )
    if config.pruning == "halving":
        first_rung = max(1, config.warmup_epochs)
        return optuna.pruners.SuccessiveHalvingPruner(
            min_resource=first_rung, reduction_factor=HALVING_FACTOR
        )
    return optuna.pruners.NopPruner()


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Return the space in Optuna's words."""
    return {name: _distribution(values) for name, values in space.items()}


def _distribution(values: Range) -> BaseDistribution:
    if not isinstance(values, Between):
        return CategoricalDistribution(tuple(dict.fromkeys(values)))
    if values.is_whole:
        return IntDistribution(int(values.low), int(values.high), log=values.log)
    return FloatDistribution(float(values.low), float(values.high), log=values.log)


def _study(
    space: Space, config: SearchConfig, trials: Sequence[Trial], claims: Mapping[int, Choice]
) -> optuna.Study:
    """Return an Optuna study, in memory, that knows these trials, and of other claims that they run."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", pruner=_pruner(config))
    for trial in trials:
        study.add_trial(_frozen(space, trial, _STATES[trial.state]))
    for number, choice in claims.items():
        if number not in {trial.number for trial in trials}:
            running = Trial(number=number, choice=choice, state="failed")
            study.add_trial(_frozen(space, running, TrialState.RUNNING))
    return study


_STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


def _frozen(space: Space, trial: Trial, state: TrialState) -> FrozenTrial:
    return optuna.create_trial(
        state=state,
        params=dict(trial.choice),
        distributions=distributions(space),
        value=trial.value if state == TrialState.COMPLETE else None,
        intermediate_values=dict(trial.curve),
        system_attrs=dict(trial.marks),
    )


def _try(claim: Claim, objective: Objective, space: Space, config: SearchConfig, kept: TrialFolder) -> Trial:
    """Try a point; a mistake in it, such as a loss that is no number, fails this trial and no other."""
    number, choice = claim.number, claim.choice
    study = _study(space, config, kept.finished(), {})
    study.enqueue_trial(dict(choice))
    asked = study.ask(distributions(space))
    curve: dict[int, float] = {}
    pruned = False

    def watch(epoch: int, value: float) -> bool:
        nonlocal pruned
        curve[epoch] = value
        asked.report(value, epoch)
        pruned = asked.should_prune()
        return pruned

    try:
        measured = objective(choice, watch, kept.checkpoints(number))
    except RecommenderError as error:
        return Trial(number=number, choice=choice, state="failed", curve=curve, reason=str(error))
    if not math.isfinite(measured.value):
        reason = f"its value is {measured.value}"
        return Trial(number=number, choice=choice, state="failed", curve=curve, reason=reason)
    attributes = asked.study._storage.get_trial_system_attrs(asked._trial_id)
    return Trial(
        number=number,
        choice=choice,
        state="pruned" if pruned else "complete",
        value=measured.value,
        epochs=measured.epochs,
        best_epoch=measured.best_epoch,
        seconds=measured.seconds,
        curve=curve,
        marks={name: float(mark) for name, mark in attributes.items() if name.startswith("completed_rung")},
    )
