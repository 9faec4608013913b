"""A row encoder small enough to check by hand: each modality a linear map of what the items hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class LinearEncoder:
    """(I, C) contents by modality, times a matrix (C, E) each."""

    def __init__(self, contents: Mapping[str, Tensor], width: int = 4) -> None:
        generator = torch.Generator().manual_seed(3)
        self.contents = dict(contents)
        self.maps = {
            name: nn.Parameter(torch.randn(table.shape[1], width, generator=generator))
            for name, table in contents.items()
        }
        self.encoded: list[tuple[str, list[int]]] = []
        self._graphs: dict[str, Tensor] = {}

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.contents)

    def vectors(self, modality: str, rows: Tensor) -> Tensor:
        return torch.tanh(self.contents[modality][rows] @ self.maps[modality])

    def encode(self, modality: str, rows: Tensor) -> Tensor:
        self.encoded.append((modality, rows.tolist()))
        self._graphs[modality] = self.vectors(modality, rows)
        return self._graphs[modality].detach()

    def backward(self, modality: str, gradient: Tensor) -> None:
        self._graphs.pop(modality).backward(gradient)

    @torch.no_grad()
    def encode_all(self, modality: str, rows: Tensor) -> Tensor:
        return self.vectors(modality, rows)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.maps.values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {f"maps.{name}": matrix for name, matrix in self.maps.items()}

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {name: [matrix] for name, matrix in self.maps.items()}

    def state(self) -> dict[str, Tensor]:
        return {name: matrix.detach().clone() for name, matrix in self.named_parameters().items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, matrix in self.named_parameters().items():
            matrix.copy_(state[name])
