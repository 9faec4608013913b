"""How runs are compared."""

from pydantic import BaseModel, Field, PositiveInt


class ComparisonConfig(BaseModel, frozen=True, extra="forbid"):
    """Which figures a comparison shows and how it tests them."""

    metric: str = Field(
        "recall@20", description="Metric that choices are made on (validation) and that is tested (test)."
    )
    more_metrics: tuple[str, ...] = Field(("ndcg@20",), description="Further metrics to show, untested.")
    reference: str = Field(
        "",
        description="Row that every other row is tested against, such as `vbpr / random image+text`; "
        "empty: the floors, and the best feature set of each recommender against its others.",
    )
    alpha: float = Field(
        0.05, gt=0, lt=1, description="Chance of any false claim in the table; intervals are at 1 - alpha."
    )
    seed: int = Field(0, ge=0, description="Of the permutation tests and the bootstrap.")
    n_permutations: PositiveInt = Field(10_000, description="Random sign flips of each paired test.")
    n_resamples: PositiveInt = Field(2_000, description="Bootstrap resamples of each difference's interval.")

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics shown, the one that decides first, each once."""
        return tuple(dict.fromkeys((self.metric, *self.more_metrics)))

    @property
    def level(self) -> float:
        """Of the intervals."""
        return 1 - self.alpha
