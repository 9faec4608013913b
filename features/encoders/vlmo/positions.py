"""Where a VLMo's tokens are: rows of the shared bias table, and positions at another picture size."""

import numpy as np
import torch
from scipy.interpolate import RectBivariateSpline
from torch import Tensor
from torch.nn.functional import interpolate

from features.encoders.vlmo.config import VlmoConfig


def image_index(config: VlmoConfig) -> Tensor:
    """(P + 1, P + 1) rows of the bias table for (query, key) tokens of a picture, the class token first."""
    grid = config.grid
    side = 2 * grid - 1
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    down = rows[:, None] - rows[None, :] + grid - 1
    right = columns[:, None] - columns[None, :] + grid - 1
    return _with_first(down * side + right, config.image_rows - 3)


def text_index(config: VlmoConfig, length: int) -> Tensor:
    """(L, L) rows for tokens of a text; key minus query, the opposite sign of the picture's."""
    places = torch.arange(1, length)
    centre = config.image_rows + 2 + config.table_text_positions - 2
    return _with_first(centre + places[None, :] - places[:, None], config.table_rows - 3)


def joint_index(config: VlmoConfig, length: int) -> Tensor:
    """(L + P + 1, L + P + 1) rows for a text of L tokens, padding included, followed by a picture."""
    text, image = text_index(config, length), image_index(config)
    across = config.image_rows
    upper = torch.cat([text, torch.full((len(text), len(image)), across)], dim=1)
    lower = torch.cat([torch.full((len(image), len(text)), across + 1), image], dim=1)
    return torch.cat([upper, lower])


def _with_first(inner: Tensor, row: int) -> Tensor:
    """Put the class token in front: ``row`` from it, the next to it, the one after from it to itself."""
    n = len(inner) + 1
    index = torch.empty((n, n), dtype=torch.int64)
    index[1:, 1:] = inner
    index[0, :], index[:, 0], index[0, 0] = row, row + 1, row + 2
    return index


def resize_bias_table(table: Tensor, old: VlmoConfig, new: VlmoConfig) -> Tensor:
    """The bias table for another picture size, (R', N H) of (R, N H); rows of text stay as they are.

    Offsets between patches are put at unevenly spaced places (a geometric row, dense in the middle) and read
    at even ones through an interpolating cubic spline, as BEiT does when it is fine-tuned at another size.
    """
    if old.grid == new.grid:
        return table
    n_old = old.image_rows - 3
    side, wanted = 2 * old.grid - 1, 2 * new.grid - 1
    places, targets = _geometric_places(side // 2, wanted // 2), np.arange(-(wanted // 2), wanted // 2 + 1.0)
    targets = targets.clip(places[0], places[-1])
    grids = table[:n_old].double().numpy().T.reshape(-1, side, side)
    degree = min(3, side - 1)
    resized = np.stack(
        [
            RectBivariateSpline(places, places, grid, kx=degree, ky=degree, s=0)(targets, targets)
            for grid in grids
        ]
    )
    offsets = torch.from_numpy(resized.reshape(len(grids), -1).T.copy()).to(table.dtype)
    return torch.cat([offsets, table[n_old:]])


def _geometric_places(n_side: int, reach: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """0 and n places to each side whose gaps grow by a ratio q, the outermost near ``reach``."""
    low, high = 1.01, 1.5
    ratio = (low + high) / 2
    while high - low > 1e-6:  # the released code's bracket
        ratio = (low + high) / 2
        if sum(ratio**power for power in range(n_side)) > reach:
            high = ratio
        else:
            low = ratio
    steps = np.cumsum(ratio ** np.arange(n_side, dtype=np.float64))
    return np.concatenate([-steps[::-1], [0.0], steps])


def resize_positions(positions: Tensor, new: VlmoConfig) -> Tensor:
    """(1, P' + 1, D) absolute picture positions of (1, P + 1, D), bicubic; the class token's stays."""
    first, patches = positions[:, :1], positions[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    if side == new.grid:
        return positions
    image = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    resized = interpolate(image, size=(new.grid, new.grid), mode="bicubic", align_corners=False)
    return torch.cat([first, resized.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)], dim=1)
