"""How much of each modality a recommender really uses: the same run with a modality's features replaced.

Recommenders differ in it by an order of magnitude (arXiv 2508.07399 replaces both modalities by noise: VBPR,
SLMRec and BM3 lose under 7%, FREEDOM and its kin 18 to 63%), so that a comparison of encoders says little
without it. Settings stay as they are: the question is what the features give, not what noise could.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import polars as pl
from rich.table import Table

from features.encoders.base import EncoderInfo
from features.encoders.registry import describe_encoder
from features.errors import EncoderError
from pipeline.config import FeatureSetConfig, RunConfig, RunSearchConfig
from pipeline.errors import ConfigError
from pipeline.stages.extract_features import CONTROLS
from pipeline.stages.result import StageResult
from pipeline.two_stage import TwoStageResult
from recommenders.significance import PairedComparison, compare_paired, holm, mean_over_seeds

Describe = Callable[[str], EncoderInfo]
Replacement = Literal["noise", "shuffled", "constant", "left out"]
REPLACEMENTS: tuple[Replacement, ...] = get_args(Replacement)
_FITTED_ELSEWHERE = ("given",)
"""Encoders whose rows cannot be dealt out anew, as they encode nothing."""
_ALPHA = 0.05


@dataclass(frozen=True)
class Knockout:
    """One feature set with some of its modalities replaced."""

    modalities: tuple[str, ...]
    how: Replacement
    feature_set: FeatureSetConfig


@dataclass(frozen=True)
class KnockoutResult:
    """What a recommender loses by it, on the test part."""

    recommender: str
    """The model, with its place in the configuration where several are of one model."""
    modalities: tuple[str, ...]
    how: Replacement
    result: PairedComparison
    """Of the knocked-out run against the whole one, users paired, seeds averaged."""
    p_holm: float

    @property
    def change(self) -> float:
        """Relative change of the metric; NaN where the whole run is at 0."""
        whole = self.result.mean_b
        return self.result.mean_a / whole - 1 if whole else float("nan")


def knockouts(feature_set: FeatureSetConfig, describe: Describe = describe_encoder) -> list[Knockout]:
    """Each modality and, where there are several, all of them: by noise, shuffled, constant, or left out.

    Nothing is left out where nothing would remain, and vectors that came with a dataset are not shuffled.
    """
    encoders = _by_modality(feature_set)
    names = tuple(encoders)
    groups = [(name,) for name in names] + ([names] if len(names) > 1 else [])
    made = []
    for group in groups:
        for how in REPLACEMENTS:
            replaced = dict(encoders)
            if how == "left out":
                if len(group) == len(names):
                    continue
                for name in group:
                    del replaced[name]
            else:
                if how == "shuffled" and any(
                    one in _FITTED_ELSEWHERE for name in group for one in encoders[name]
                ):
                    continue
                for name in group:
                    replaced[name] = _distinct(
                        [_stand_in(one, name, how, describe) for one in encoders[name]]
                    )
            made.append(Knockout(group, how, FeatureSetConfig.model_validate(replaced)))
    return made


def knockout_config(
    config: RunConfig, describe: Describe = describe_encoder
) -> tuple[RunConfig, list[Knockout]]:
    """A run's configuration with its one feature set and all knock-outs of it, under a name of its own.

    Args:
        config: Of the run.
        describe: Says what a specification is; one that knows the store also knows its encoders.

    Raises:
        ConfigError: Several feature sets, or no recommender that reads features.
    """
    if len(config.feature_sets) != 1:
        raise ConfigError(
            f"a knock-out takes one feature set apart, and feature_sets lists {len(config.feature_sets)}; "
            "keep one of them, for example --set 'feature_sets=[{image: tiny, text: tiny}]'."
        )
    readers = tuple(one for one in config.recommenders if one.reads_features)
    if not readers:
        models = ", ".join(one.model for one in config.recommenders)
        raise ConfigError(
            f"none of the recommenders ({models}) reads features; name one that does, such as vbpr."
        )
    whole = config.feature_sets[0]
    for _, encoder in whole.encoders():
        if encoder.startswith(CONTROLS):
            raise ConfigError(f"{encoder} is noise already; knock out a feature set of real encoders.")
    found = knockouts(whole, describe)
    sets = (whole, *(knockout.feature_set for knockout in found))
    changes = {
        "feature_sets": sets,
        "recommenders": readers,
        "name": f"{config.name}-knockout",
        "search": RunSearchConfig(),
    }
    return config.model_copy(update=changes), found


def knockout_results(
    config: RunConfig, found: Sequence[Knockout], result: TwoStageResult
) -> list[KnockoutResult]:
    """Compare each knocked-out run with the whole one; all tests are one family for Holm's correction.

    Args:
        config: Of `knockout_config`.
        found: Of `knockout_config`.
        result: What `run_two_stage` made of it.
    """
    metric = config.comparison.metric
    tested: list[tuple[str, Knockout, PairedComparison]] = []
    for name, values in _user_values(config, found, result.runs, metric):
        for knockout, knocked in zip(found, values[1:], strict=True):
            label = f"{name} {knockout.modalities} {knockout.how}"
            seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8])
            rng = np.random.default_rng([config.comparison.seed, seed])
            compared = compare_paired(
                knocked,
                values[0],
                rng,
                n_permutations=config.comparison.n_permutations,
                n_resamples=config.comparison.n_resamples,
                level=config.comparison.level,
            )
            tested.append((name, knockout, compared))
    adjusted = holm([compared.sign_flip.p_value for _, _, compared in tested])
    return [
        KnockoutResult(name, knockout.modalities, knockout.how, compared, float(p))
        for (name, knockout, compared), p in zip(tested, adjusted, strict=True)
    ]


def _user_values(
    config: RunConfig, found: Sequence[Knockout], runs: Sequence[StageResult], metric: str
) -> Iterator[tuple[str, list[np.ndarray[tuple[int], np.dtype[np.float64]]]]]:
    """Each recommender's name, and by feature set (U,) the metric of each user, averaged over seeds."""
    n_sets, n_seeds = len(found) + 1, len(config.seeds)
    models = [recommender.model for recommender in config.recommenders]
    for number, model in enumerate(models):
        twins = models.count(model) > 1
        own = runs[number * n_sets * n_seeds : (number + 1) * n_sets * n_seeds]
        values = []
        for start in range(0, len(own), n_seeds):
            frames = [
                pl.read_parquet(run.artefact.path("per_user.parquet")) for run in own[start : start + n_seeds]
            ]
            values.append(mean_over_seeds([frame.sort("user_row")[metric].to_numpy() for frame in frames]))
        yield (f"{model} ({number + 1})" if twins else model), values


def to_table(results: Sequence[KnockoutResult], config: RunConfig) -> Table:
    """For a terminal: what each recommender loses."""
    metric, level = config.comparison.metric, config.comparison.level
    made = Table(title=f"Knock-outs: test {metric}", title_justify="left", box=None, pad_edge=False)
    for column in ("recommender", "replaced", "by"):
        made.add_column(column, no_wrap=True)
    for column in ("whole", "without", "change", f"{level:.0%} interval of the difference", "Holm's p"):
        made.add_column(column, justify="right", no_wrap=True)
    for row in _cells(results):
        made.add_row(*row)
    return made


def to_markdown(results: Sequence[KnockoutResult], config: RunConfig) -> str:
    """The same for a file."""
    metric, level = config.comparison.metric, config.comparison.level
    interval = f"{level:.0%} interval of the difference"
    head = ["recommender", "replaced", "by", f"whole {metric}", "without", "change", interval, "Holm's p"]
    lines = [head, ["---"] * len(head), *_cells(results)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def to_json(results: Sequence[KnockoutResult]) -> list[dict[str, object]]:
    """The same for a program."""
    return [
        {
            "recommender": one.recommender,
            "replaced": list(one.modalities),
            "by": one.how,
            "whole": one.result.mean_b,
            "without": one.result.mean_a,
            "change": one.change,
            "interval": [one.result.difference.low, one.result.difference.high],
            "p_holm": one.p_holm,
        }
        for one in results
    ]


def _cells(results: Sequence[KnockoutResult]) -> Iterator[list[str]]:
    for one in results:
        difference = one.result.difference
        yield [
            one.recommender,
            "+".join(one.modalities),
            one.how,
            f"{one.result.mean_b:.4f}",
            f"{one.result.mean_a:.4f}",
            f"{one.change:+.1%}",
            f"[{difference.low:+.4f}, {difference.high:+.4f}]",
            f"{one.p_holm:.4f}{'*' if one.p_holm < _ALPHA else ''}",
        ]


def _by_modality(feature_set: FeatureSetConfig) -> dict[str, tuple[str, ...]]:
    encoders: dict[str, tuple[str, ...]] = {}
    for modality, encoder in feature_set.encoders():
        encoders[modality] = (*encoders.get(modality, ()), encoder)
    return encoders


def _distinct(encoders: Sequence[str]) -> tuple[str, ...]:
    """Encoders without repetition: two of one dimension have one stand-in."""
    return tuple(dict.fromkeys(encoders))


def _stand_in(encoder: str, modality: str, how: Replacement, describe: Describe) -> str:
    """What replaces an encoder: as many numbers a vector, and none of the meaning."""
    if how == "shuffled":
        return f"shuffled:{encoder}"
    dims: Mapping[str, int] = {}
    if encoder not in _FITTED_ELSEWHERE:
        try:
            dims = {str(name): dim for name, dim in describe(encoder).dims.items()}
        except EncoderError as error:
            raise ConfigError(
                f"the knock-out needs to know the length of {encoder}'s vectors: {error}"
            ) from error
    kind = "random" if how == "noise" else "constant"
    return f"{kind}:{dims[modality]}" if dims.get(modality) else kind
