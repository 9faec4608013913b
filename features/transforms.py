"""What is done to cached vectors when they are read: truncate, center, normalise, project.

Everything that is fitted (means, spreads, components) is fitted on the rows that are present, so on items'
content alone; no interaction is known here. The work is done in float64, in blocks of rows: beside the
result, memory is one block and, for a projection of F numbers, F x F.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Self

import torch
from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, model_validator
from torch import Tensor

from features.errors import FeatureError

RowMap = Callable[[Tensor], Tensor]
"""(B, F) float64 -> (B, G) float64, each row by itself."""

_BLOCK_NUMBERS = 2**22
"""Numbers mapped at once in float64: 32 MiB."""
_FLAT = 1e-9
"""A column whose spread is smaller than this share of its values is constant but for rounding."""
_NO_VARIANCE = 1e-12
"""A component with less than this share of the largest variance is rounding: eigenvalues of an F x F matrix
are off by about F 2^-53 of the largest (Golub and Van Loan, Matrix Computations, sec. 8.1)."""


class TransformConfig(BaseModel, frozen=True, extra="forbid"):
    """What is done to each modality's present rows, in this order."""

    truncate_dim: NonNegativeInt = Field(
        0,
        description="Keep the first numbers of each vector (for encoders trained so, Matryoshka); 0: all.",
    )
    center: Literal["none", "mean"] = Field(
        "none",
        description="mean: subtract the modality's own mean before normalising, which closes the gap between "
        "the cones that pictures and texts lie in.",
    )
    normalise: Literal["none", "l2", "standardise"] = Field(
        "l2", description="Rows to unit length, columns to zero mean and unit variance, or nothing."
    )
    project: Literal["none", "pca", "whiten"] = Field(
        "none",
        description="pca: principal components, of unit length again where normalise is l2; whiten: those of "
        "unit variance.",
    )
    project_dim: NonNegativeInt = Field(0, description="Components kept; 0: as many as there are.")
    whiten_ridge: NonNegativeFloat = Field(
        1e-4,
        description="Added to each component's variance before whitening, as a share of their mean, so that "
        "components of noise are not blown up.",
    )

    @model_validator(mode="after")
    def _no_idle_dim(self) -> Self:
        if self.project_dim and self.project == "none":
            raise ValueError(
                f"project_dim is {self.project_dim}, but project is none; set project to pca or whiten, "
                "or project_dim to 0"
            )
        return self


@dataclass(frozen=True)
class Transform:
    """A fitted transform: each row by itself, whichever rows it was fitted on."""

    width: int
    """F, numbers read of each vector."""
    maps: list[RowMap] = field(default_factory=list)

    def blocks(self, vectors: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (B,) rows and their (B, G) float64 vectors, block after block."""
        step = max(1, _BLOCK_NUMBERS // self.width)
        for start in range(0, len(rows), step):
            block = rows[start : start + step]
            mapped = vectors[block, : self.width].double()
            for row_map in self.maps:
                mapped = row_map(mapped)
            yield block, mapped

    def map_rows(self, vectors: Tensor) -> Tensor:
        """Transform (R, F) rows to (R, G) float32 at once, so that gradients reach them."""
        mapped = vectors[:, : self.width].double()
        for row_map in self.maps:
            mapped = row_map(mapped)
        return mapped.float()

    def apply(self, vectors: Tensor, rows: Tensor) -> Tensor:
        """Transform some rows; the others become zeros.

        Args:
            vectors: (I, F) floats.
            rows: (I,) bool, or (R,) int64 rows.

        Returns:
            (I, G) float32.
        """
        if rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]
        probe = torch.zeros((1, self.width))
        _, mapped = next(self.blocks(probe, torch.zeros(1, dtype=torch.int64)))
        result = torch.zeros((len(vectors), mapped.shape[1]), dtype=torch.float32)
        for block, mapped in self.blocks(vectors, rows):
            result[block] = mapped.float()
        return result


def transform(vectors: Tensor, present: Tensor, config: TransformConfig, what: str = "the table") -> Tensor:
    """Fit on the present rows and transform them; absent rows become zeros.

    Args:
        vectors: (I, F) floats; absent rows may hold anything.
        present: (I,) bool.
        config: What is done.
        what: What the vectors are called in an error.

    Returns:
        (I, G) float32.

    Raises:
        FeatureError: More numbers or components are asked for than there are.
    """
    return fit_transform(vectors, present, config, what).apply(vectors, present)


def fit_transform(
    vectors: Tensor, present: Tensor, config: TransformConfig, what: str = "the table"
) -> Transform:
    """Fit truncation, centering, normalising and projection, each on what the one before leaves.

    Args:
        vectors: (I, F) floats.
        present: (I,) bool, the rows that are fitted on.
        config: What is done. After ``pca`` rows get unit length again where ``normalise`` is ``l2``, as a
            projection shortens them; whitened rows keep the lengths that unit variance gives them.
        what: What the vectors are called in an error.

    Raises:
        FeatureError: ``truncate_dim`` is beyond F, or ``project_dim`` beyond the smaller of the numbers in a
            vector and the present rows.

    Sources: truncation, Kusupati et al., "Matryoshka Representation Learning", NeurIPS 2022; the gap, Liang
    et al., "Mind the Gap", NeurIPS 2022; whitening, Su et al., "Whitening Sentence Representations for Better
    Semantics and Faster Retrieval", 2021 (arXiv 2103.15316).
    """
    width = vectors.shape[1]
    if config.truncate_dim > width:
        raise FeatureError(
            f"truncate_dim is {config.truncate_dim}, but a vector of {what} holds {width} numbers; "
            f"expected at most {width}; lower truncate_dim, or set it to 0 to keep all."
        )
    fitted = Transform(config.truncate_dim or width)
    rows = present.nonzero()[:, 0]
    if not len(rows):
        _check_components(config.project_dim, config.project, fitted.width, 0, what)
        return fitted

    def present_rows() -> Iterator[Tensor]:
        return (block for _, block in fitted.blocks(vectors, rows))

    if config.center == "mean":
        fitted.maps.append(_shift(_mean(present_rows())))
    if config.normalise == "l2":
        fitted.maps.append(unit_length)
    elif config.normalise == "standardise":
        fitted.maps.append(_standardiser(present_rows))
    if config.project != "none":
        _check_components(config.project_dim, config.project, fitted.width, len(rows), what)
        dim = config.project_dim or min(fitted.width, len(rows))
        ridge = config.whiten_ridge if config.project == "whiten" else None
        fitted.maps.append(_projection(present_rows, dim, ridge))
        if config.project == "pca" and config.normalise == "l2":
            fitted.maps.append(unit_length)
    return fitted


def unit_length(rows: Tensor) -> Tensor:
    """Return (B, F) rows of length 1; a row of zeros stays."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / lengths.masked_fill(lengths == 0, 1)


def _check_components(wanted: int, project: str, width: int, n_rows: int, what: str) -> None:
    most = min(width, n_rows)
    if project != "none" and (wanted > most or most == 0):
        raise FeatureError(
            f"{wanted or 'all'} components are asked for, but {what} has {width:,} numbers in a vector and "
            f"{n_rows:,} present rows; expected at most the smaller, {most:,}; lower the number of "
            "components, or set it to 0 for as many as there are."
        )


def _mean(blocks: Iterator[Tensor]) -> Tensor:
    """Return the (F,) mean over all rows of the blocks."""
    total, n_rows = torch.zeros((), dtype=torch.float64), 0
    for block in blocks:
        total = total + block.sum(dim=0)
        n_rows += len(block)
    return total / n_rows


def _shift(mean: Tensor) -> RowMap:
    return lambda rows: rows - mean.to(rows.device)


def _standardiser(blocks: Callable[[], Iterator[Tensor]]) -> RowMap:
    """Give each column mean 0 and population standard deviation 1; a constant column gets zeros."""
    mean = _mean(blocks())
    spread = _mean((block - mean).square() for block in blocks()).sqrt()
    largest = torch.stack([block.abs().amax(dim=0) for block in blocks()]).amax(dim=0)
    # Rounding leaves a constant column a spread that is tiny beside its values, and only that.
    divisor = spread.masked_fill(spread <= _FLAT * largest, torch.inf)
    return lambda rows: (rows - mean.to(rows.device)) / divisor.to(rows.device)


def _projection(blocks: Callable[[], Iterator[Tensor]], dim: int, ridge: float | None) -> RowMap:
    """Fit principal components on the covariance, which is summed block by block: F x F memory, never I x I.

    A component's sign is that which makes its largest entry positive. A component without variance beyond
    rounding gives zeros.

    Args:
        blocks: The rows to fit on, anew at each call.
        dim: Components kept, those of the largest variance.
        ridge: Whiten, with this share of the mean variance added to each; None: do not.
    """
    mean = _mean(blocks())
    width = len(mean)
    scatter, n_rows = torch.zeros((width, width), dtype=torch.float64), 0
    for block in blocks():
        centred = block - mean
        scatter.addmm_(centred.T, centred)
        n_rows += len(block)
    variances, components = torch.linalg.eigh(scatter / max(n_rows - 1, 1))  # ascending
    mean_variance = variances.clamp(min=0).mean()
    variances, components = variances.flip(0)[:dim], components.flip(1)[:, :dim]
    largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
    components = components * torch.where(largest < 0, -1.0, 1.0)
    rounding = max(_NO_VARIANCE * float(variances[0]), (_FLAT * float(mean.abs().max())) ** 2)
    scales = torch.ones_like(variances)
    if ridge is not None:
        scales = (variances.clamp(min=0) + ridge * mean_variance).rsqrt()
    components = components * scales.masked_fill(variances <= rounding, 0.0)
    return lambda rows: (rows - mean.to(rows.device)) @ components.to(rows.device)
