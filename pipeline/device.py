"""Which device a stage works on: chosen here, once, and nowhere below."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch

DeviceChoice = Literal["auto", "cpu", "cuda"]


def choose_device(choice: DeviceChoice) -> torch.device:
    """Return the device: ``auto`` takes the GPU where one works.

    Raises:
        ConfigError: ``cuda`` is asked for and there is none.
    """
    import torch  # noqa: PLC0415 - the configuration is read without torch

    if choice == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if choice == "cuda":
        raise ConfigError(
            "device is 'cuda', but torch sees no GPU; set device to auto or cpu (`tandem doctor`)."
        )
    return torch.device("cpu")
