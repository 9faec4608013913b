"""Side networks: small, trained, and fed by the states of a frozen encoder's blocks.

Source: Fu et al., "IISAN: Efficiently Adapting Multimodal Representation for Sequential Recommendation with
Decoupled PEFT", SIGIR 2024 (arXiv 2404.02059): its intra-modal side network. As nothing of the encoder is
inside the trained part, neither its activations nor its gradients are needed, and its states can be kept.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm


class SideConfig(BaseModel, frozen=True, extra="forbid"):
    """What the side networks of an encoder look like."""

    adapter_width: PositiveInt = Field(64, description="Numbers in the middle of an adapter.")
    every_nth: PositiveInt = Field(
        2, description="Blocks from one whose state is read to the next, counted from the last; 1: all."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Of what an adapter has in its middle.")
    normalize_states: bool = Field(
        True, description="Whether each state is first brought to mean 0 and variance 1."
    )
    towers: tuple[Literal["image", "text"], ...] = Field(
        (), description="Towers that get a side network; empty: all. Other vectors stay as they are."
    )


def states_read(n_blocks: int, every_nth: int) -> tuple[int, ...]:
    """Which of a tower's n_blocks + 1 states are read: the one before all blocks, and every nth from the top.

    Leaving blocks out is the paper's LayerDrop.
    """
    return (0, *sorted(range(n_blocks, 0, -every_nth)))


class Adapter(nn.Module):
    """(B, W) -> (B, W): down, GELU, up, and what came in is added."""

    def __init__(self, width: int, adapter_width: int, dropout: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, adapter_width)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(adapter_width, width)

    def forward(self, states: Tensor) -> Tensor:
        """(B, W) -> (B, W)."""
        adapted: Tensor = states + self.up(self.dropout(gelu(self.down(states))))
        return adapted


class SideTower(nn.Module):
    """States of one frozen tower, and its vector -> the vector that is learnt.

    With s_i the i-th state that is read, h_0 = s_0 and h_i = adapter_i(mu_i s_i + (1 - mu_i) h_{i-1}), mu_i
    learnt within 0 and 1; the result is the frozen vector plus ``output``(h_n).

    Where this differs from the paper: its item vector is a projection of the last h alone; here ``output``
    starts at zero and is added to the frozen vector, so that training starts at exactly the pre-trained
    vectors, and until the first step only ``output`` has a gradient. There is no network between modalities,
    as each keeps vectors of its own, which the recommender joins. States of another width than the last get
    a linear map; states are normalised, without parameters, where the setting says so.

    Args:
        widths: Of the states that are read, in order.
        dim: D, of the vectors.
        config: Its shape.
    """

    def __init__(self, widths: Sequence[int], dim: int, config: SideConfig) -> None:
        super().__init__()
        self.widths, self.dim, self.config = tuple(widths), dim, config
        width = self.widths[-1]
        self.maps = nn.ModuleList(
            nn.Identity() if each == width else nn.Linear(each, width, bias=False) for each in self.widths
        )
        self.gates = nn.Parameter(torch.zeros(len(self.widths) - 1))
        """Before the sigmoid: every mu starts at a half."""
        self.adapters = nn.ModuleList(
            Adapter(width, config.adapter_width, config.dropout) for _ in self.widths[1:]
        )
        self.output = nn.Linear(width, dim)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights anew: ``output`` and biases are zero, matrices as `nn.Linear` starts.

        Args:
            generator: On the CPU; torch's own stream is not drawn from.
        """
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                fresh = torch.zeros(parameter.shape)
                if parameter.ndim == 2 and not name.startswith("output."):
                    nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
                parameter.copy_(fresh)

    def forward(self, states: Sequence[Tensor], vectors: Tensor) -> Tensor:
        """Move frozen vectors by what the states say.

        Args:
            states: (B, W) each, in the order and of the widths of ``widths``.
            vectors: (B, D) float32 of the frozen encoder.

        Returns:
            (B, D) float32.

        Raises:
            ValueError: The states are others.
        """
        found = tuple(state.shape[1] for state in states)
        if found != self.widths:
            raise ValueError(f"the side network was given states of widths {found}; expected {self.widths}.")
        first, *others = (self._mapped(number, state) for number, state in enumerate(states))
        side = first
        for mu, state, adapter in zip(torch.sigmoid(self.gates), others, self.adapters, strict=True):
            side = adapter(mu * state + (1 - mu) * side)
        moved: Tensor = vectors + self.output(side).float()
        return moved

    def _mapped(self, number: int, state: Tensor) -> Tensor:
        state = state.float()
        if self.config.normalize_states:
            state = layer_norm(state, state.shape[1:])
        mapped: Tensor = self.maps[number](state)
        return mapped
