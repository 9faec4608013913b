"""Is one ranking better than another? Paired tests over users, Holm's correction, intervals.

The unit is the user. Two runs rank the items for the same users, so what is tested is each user's difference.
Seeds are averaged per user before a test (:func:`mean_over_seeds`): runs of one model under several seeds
share the user's history and held-out items, so their differences are copies of one another far more than new
evidence. Counting every (user, seed) as a pair would multiply the sample by the number of seeds and make any
difference significant with enough of them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

FloatArray = npt.NDArray[np.float64]

_BLOCK_NUMBERS = 2**20
"""Numbers of a block of flips or resamples: 8 MiB of float64."""


@dataclass(frozen=True)
class Interval:
    """A mean and where its true value lies; the ends are NaN where one value says nothing about spread."""

    mean: float
    low: float
    high: float
    level: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class SignFlipTest:
    """Result of :func:`sign_flip_test`."""

    p_value: float
    """Two-sided, never 0."""
    n_flips: int
    """Ways of flipping looked at: all of them if ``exact``."""
    exact: bool


@dataclass(frozen=True)
class PairedComparison:
    """How much better a is than b, over the same users."""

    mean_a: float
    mean_b: float
    difference: Interval
    """Of ``a - b``: its mean over users, with a bootstrap interval."""
    sign_flip: SignFlipTest
    p_wilcoxon: float
    n_better: int
    """Users for whom a is better."""
    n_worse: int
    n_users: int


def compare_paired(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    rng: np.random.Generator,
    *,
    n_permutations: int = 10_000,
    n_resamples: int = 2_000,
    level: float = 0.95,
) -> PairedComparison:
    """Compare two results over the same users in the same order.

    Args:
        a: (U,) a metric of each user, seeds already averaged.
        b: (U,) the same metric of the same users.
        rng: for the flips and the resamples.
        n_permutations: random flips of the permutation test.
        n_resamples: of the bootstrap.
        level: of the interval.

    Raises:
        ValueError: not the same users, none, or a value that is not finite.
    """
    first, second = _finite(a), _finite(b)
    if first.shape != second.shape:
        raise ValueError(f"a has {len(first)} users and b has {len(second)}; pairs need the same users.")
    differences = first - second
    flips_rng, resamples_rng = rng.spawn(2)
    return PairedComparison(
        mean_a=float(first.mean()),
        mean_b=float(second.mean()),
        difference=bootstrap_interval(differences, resamples_rng, level=level, n_resamples=n_resamples),
        sign_flip=sign_flip_test(differences, flips_rng, n_permutations=n_permutations),
        p_wilcoxon=wilcoxon_p(differences),
        n_better=int((differences > 0).sum()),
        n_worse=int((differences < 0).sum()),
        n_users=len(differences),
    )


def mean_over_seeds(per_seed: Sequence[npt.ArrayLike]) -> FloatArray:
    """Return (U,) the mean of each user over seeds: what a paired test takes; see the module for why.

    Args:
        per_seed: one (U,) metric for each seed, the same users in the same order.

    Raises:
        ValueError: no seeds, or seeds with different numbers of users.
    """
    arrays = [_finite(values) for values in per_seed]
    if len({len(values) for values in arrays}) != 1:
        raise ValueError(
            f"seeds have {[len(values) for values in arrays]} users; expected the same users in each."
        )
    mean: FloatArray = np.mean(arrays, axis=0)
    return mean


def sign_flip_test(
    differences: npt.ArrayLike, rng: np.random.Generator, *, n_permutations: int = 10_000
) -> SignFlipTest:
    """Test whether paired differences have mean zero, by exchanging the two sides of random pairs.

    If neither side were better, each difference would be as likely with the other sign. The p-value is the
    share of flips whose sum is at least as far from zero as what was seen. It is exact where all flips are
    no more than ``n_permutations`` (users without a difference do not count: flipping 0 changes nothing).
    Otherwise it is (b + 1) / (n + 1), which counts what was seen as one of the flips and so is never 0
    (Phipson and Smyth, 2010). Memory is a few blocks of 8 MiB, however many users there are.

    Args:
        differences: (U,) one for each user.
        rng: draws the flips.
        n_permutations: random flips, or the most that are enumerated.

    Raises:
        ValueError: no differences, one that is not finite, or ``n_permutations`` below 1.
    """
    values = _finite(differences)
    if n_permutations < 1:
        raise ValueError(f"n_permutations is {n_permutations}; expected at least 1.")
    values = values[values != 0]
    exact = 2 ** len(values) <= n_permutations
    # Sums of the same numbers in another order differ in the last bits; those count as equal.
    seen = abs(values.sum()) - 1e-12 * np.abs(values).sum()
    n_flips = 2 ** len(values) if exact else n_permutations
    blocks = _all_flips(len(values)) if exact else _random_flips(len(values), n_permutations, rng)
    # Flipping some differences takes each of them away from the sum twice.
    n_as_far = sum(int((np.abs(values.sum() - 2 * (flips @ values)) >= seen).sum()) for flips in blocks)
    p_value = n_as_far / n_flips if exact else (n_as_far + 1) / (n_flips + 1)
    return SignFlipTest(p_value, n_flips, exact)


def _all_flips(n: int) -> Iterator[FloatArray]:
    """Yield (2^n, n) in blocks, 1 where a difference is flipped: the bits of 0 ... 2^n - 1."""
    step = max(1, _BLOCK_NUMBERS // max(1, n))
    for start in range(0, 2**n, step):
        numbers = np.arange(start, min(start + step, 2**n), dtype=np.int64)
        yield ((numbers[:, None] >> np.arange(n)) & 1).astype(np.float64)


def _random_flips(n: int, n_flips: int, rng: np.random.Generator) -> Iterator[FloatArray]:
    """Yield (n_flips, n) in blocks, 1 where a difference is flipped; block sizes do not change the draws."""
    n_bytes = 8 * math.ceil(n / 64)  # whole words of the generator for each row
    step = max(1, _BLOCK_NUMBERS // n)
    for start in range(0, n_flips, step):
        rows = min(step, n_flips - start)
        drawn = np.frombuffer(rng.bytes(rows * n_bytes), dtype=np.uint8).reshape(rows, n_bytes)
        yield np.unpackbits(drawn, axis=1, count=n).astype(np.float64)


def wilcoxon_p(differences: npt.ArrayLike) -> float:
    """Return the two-sided p-value of Wilcoxon's signed-rank test; users without a difference do not count.

    Raises:
        ValueError: no differences, or one that is not finite.
    """
    values = _finite(differences)
    values = values[values != 0]
    if len(values) == 0:
        return 1.0
    return float(stats.wilcoxon(values).pvalue)


def holm(p_values: npt.ArrayLike) -> FloatArray:
    """Return (P,) p-values adjusted for a family of tests, in the order given.

    An adjusted value below alpha keeps the chance of any false claim in the family below alpha.

    Raises:
        ValueError: a value outside [0, 1].
    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    values = np.asarray(p_values, dtype=np.float64).reshape(-1)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"p-values are {values.tolist()}; expected numbers in [0, 1].")
    order = np.argsort(values, kind="stable")
    factors = np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * factors))
    return adjusted


def t_interval(values: npt.ArrayLike, *, level: float = 0.95) -> Interval:
    """Return the mean of independent values with Student's interval.

    For seeds, which are few: three runs need 4.3 standard errors where many would need 2. One value has a
    mean and no interval.

    Raises:
        ValueError: no values, one that is not finite, or a level outside (0, 1).
    """
    numbers = _finite(values)
    _check_level(level)
    mean = float(numbers.mean())
    if len(numbers) == 1:
        return Interval(mean, math.nan, math.nan, level, 1)
    error = float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    reach = float(stats.t.ppf((1 + level) / 2, df=len(numbers) - 1)) * error
    return Interval(mean, mean - reach, mean + reach, level, len(numbers))


def bootstrap_interval(
    values: npt.ArrayLike, rng: np.random.Generator, *, level: float = 0.95, n_resamples: int = 2_000
) -> Interval:
    """Return the mean over users with the percentile interval of means of resampled users.

    Makes no assumption on the shape of differences, most of which are zero; for tens of users and fewer it is
    somewhat narrow (Efron and Tibshirani, 1993, ch. 13). Memory is a few blocks of 8 MiB, or of one
    resample.

    Raises:
        ValueError: no values, one that is not finite, a level outside (0, 1), or fewer than 1 resample.
    """
    numbers = _finite(values)
    _check_level(level)
    if n_resamples < 1:
        raise ValueError(f"n_resamples is {n_resamples}; expected at least 1.")
    mean = float(numbers.mean())
    if len(numbers) == 1:
        return Interval(mean, math.nan, math.nan, level, 1)
    step = max(1, _BLOCK_NUMBERS // len(numbers))
    means = np.concatenate(
        [
            numbers[rng.integers(len(numbers), size=(min(step, n_resamples - start), len(numbers)))].mean(
                axis=1
            )
            for start in range(0, n_resamples, step)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), level, len(numbers))


def _finite(values: npt.ArrayLike) -> FloatArray:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or len(numbers) == 0:
        raise ValueError(f"values are {numbers.shape}; expected (n,) with at least one.")
    if not np.isfinite(numbers).all():
        raise ValueError(f"value {int(np.argmin(np.isfinite(numbers)))} is not finite.")
    return numbers


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a share between 0 and 1, such as 0.95.")
