"""What flows between the blocks of a tower: states, and what else the blocks above need to go on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Hidden:
    """The state of a batch before or after some block. All of it is tensors, so that it can be stored.

    Args:
        states: (B, L, W), or (B, C, H, W) in a convolutional tower.
        mask: (B, L) bool, true where there is a token that others may look at; (B, 0) for maps.
        at: (B,) int64, the token whose state becomes the vector, where one token's does; else 0.
    """

    states: Tensor
    mask: Tensor
    at: Tensor

    def __len__(self) -> int:
        return len(self.states)

    @property
    def is_map(self) -> bool:
        """Whether the states are (B, C, H, W)."""
        return self.states.ndim == 4

    def rows(self, index: Tensor | slice) -> "Hidden":
        """Some rows of the batch, by number, by mask or by slice."""
        return Hidden(self.states[index], self.mask[index], self.at[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Hidden":
        """The same on another device; ``dtype`` is that of the states."""
        return Hidden(
            self.states.to(device=device, dtype=dtype), self.mask.to(device=device), self.at.to(device=device)
        )

    def detach(self) -> "Hidden":
        """The same, cut off from what made it: no gradient goes further down."""
        return Hidden(self.states.detach(), self.mask, self.at)

    def with_states(self, states: Tensor) -> "Hidden":
        """The same batch one block later."""
        return Hidden(states, self.mask, self.at)

    def padded(self, length: int) -> "Hidden":
        """(B, length, W): zeros behind the last token, hidden by the mask.

        Raises:
            ValueError: The states are maps, or longer already.
        """
        missing = length - self.states.shape[1]
        if self.is_map or missing < 0:
            what = "maps have no length" if self.is_map else f"it has {self.states.shape[1]} tokens"
            raise ValueError(f"hidden states cannot be padded to {length} tokens: {what}.")
        return Hidden(pad(self.states, (0, 0, 0, missing)), pad(self.mask, (0, missing)), self.at)

    def trimmed(self) -> "Hidden":
        """Without the padding behind the longest row; maps, and masks without padding, stay as they are."""
        if self.is_map or not len(self):
            return self
        places = torch.arange(1, self.mask.shape[1] + 1, device=self.mask.device)
        longest = int((self.mask * places).max())
        return Hidden(self.states[:, :longest], self.mask[:, :longest], self.at)

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a file of tensors; `from_tensors` reads it."""
        return {"states": self.states, "mask": self.mask, "at": self.at}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Hidden":
        """What `tensors` gave."""
        return cls(tensors["states"], tensors["mask"], tensors["at"])

    @classmethod
    def concatenate(cls, parts: "Sequence[Hidden]") -> "Hidden":
        """The rows of several, in order; sequences are padded to the longest.

        Towers that see padding give all texts one length, so that nothing is padded there; the others look
        through ``mask`` or only backwards, and a row's vector stays as it was.

        Raises:
            ValueError: There are none.
        """
        if not parts:
            raise ValueError("there are no hidden states to concatenate.")
        if not parts[0].is_map:
            longest = max(part.states.shape[1] for part in parts)
            parts = [part.padded(longest) for part in parts]
        return cls(*(torch.cat(list(column)) for column in zip(*map(_fields, parts), strict=True)))


def _fields(hidden: Hidden) -> tuple[Tensor, Tensor, Tensor]:
    return hidden.states, hidden.mask, hidden.at


def sequence(states: Tensor) -> Hidden:
    """Tokens that are all real and whose first stands for all: a picture's (B, L, W)."""
    mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    return Hidden(states, mask, torch.zeros(len(states), dtype=torch.int64, device=states.device))
