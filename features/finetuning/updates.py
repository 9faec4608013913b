"""One update after the other: rate, gradient, clipping, what is noted of it, and the optimiser's state."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from features.contrastive import warmup_cosine
from features.errors import FeatureError
from features.finetuning.config import OptimizerConfig
from features.finetuning.objectives import BatchReport
from features.finetuning.optimizer import make_optimizer, temperature_limits


class Updates:
    """The optimiser of a fine-tuning, with its schedule.

    Args:
        trainable: Name -> parameter, in an order that stays.
        factors: The rate of each, in times `learning_rate`.
        config: The constants.
        n_updates: In all, which the schedule is laid over.
        precision: What gradients are computed in; those of float16 are scaled.
    """

    def __init__(
        self,
        trainable: Mapping[str, nn.Parameter],
        factors: Mapping[str, float],
        config: OptimizerConfig,
        *,
        n_updates: int,
        precision: str,
    ) -> None:
        self._trainable, self._config, self._precision = trainable, config, precision
        self._optimizer = make_optimizer(trainable, factors, config)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._limits = temperature_limits(trainable, config)
        device = next(iter(trainable.values())).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
        self.n_updates = n_updates
        self.done = 0
        """Updates so far, those of which nothing could be read included."""

    def share(self, update: int) -> float:
        """Of each rate, in an update counted from 0."""
        return warmup_cosine(update, self.n_updates, self._config.warmup_share)

    def start(self) -> None:
        """Set the rates of the next update and forget the last gradient."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.share(self.done)
        self._optimizer.zero_grad(set_to_none=True)

    def finish(self, reports: Sequence[BatchReport]) -> dict[str, float]:
        """Step along the gradients that have been added up.

        Args:
            reports: Of the batches; none where nothing could be read, and then nothing changes.

        Returns:
            What the history keeps of this update: losses, gradient norms.

        Raises:
            FeatureError: A loss or the gradient is not finite; the weights stay as they were.
        """
        self.done += 1
        if not reports:
            return {}
        self._stop_if_not_finite(reports)
        self.scaler.unscale_(self._optimizer)
        norm = self._clip()
        self.scaler.step(self._optimizer)
        self.scaler.update()
        with torch.no_grad():
            for name, limit in self._limits.items():
                self._trainable[name].clamp_(max=limit)
        noted: dict[str, float] = defaultdict(float)
        noted["gradient_norm"] = norm if math.isfinite(norm) else 0.0
        for report in reports:
            for name, value in report.losses.items():
                noted["loss" if name == "loss" else f"loss_{name}"] += value / len(reports)
            for name, value in report.gradient_norms.items():
                noted[f"gradient_norm_{name}"] += value / len(reports)
        return dict(noted)

    def state(self) -> dict[str, Tensor]:
        """Moments and counts of the optimiser, by ``<position>/<name>``."""
        states = self._optimizer.state_dict()["state"]
        return {f"{at}/{name}": value for at, state in states.items() for name, value in state.items()}

    def load_state(self, tensors: Mapping[str, Tensor], scaler: dict[str, Any], done: int) -> None:
        """Put back what `state`, ``scaler.state_dict()`` and `done` were."""
        state: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, value in tensors.items():
            position, _, kind = name.partition("/")
            state[int(position)][kind] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": dict(state), "param_groups": groups})
        self.scaler.load_state_dict(scaler)
        self.done = done

    def _clip(self) -> float:
        """Cut the gradient to its greatest length; its length before, which float16 may let be infinite.

        An infinite gradient of float16 is the scaler's to handle: it skips the update and scales less.
        """
        most = self._config.max_gradient_norm or math.inf
        norm = nn.utils.clip_grad_norm_(list(self._trainable.values()), most).item()
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            self._refuse("the gradient's norm", norm)
        return norm

    def _stop_if_not_finite(self, reports: Sequence[BatchReport]) -> None:
        for report in reports:
            for name, value in report.losses.items():
                if not math.isfinite(value):
                    self._refuse("the loss" if name == "loss" else f"the loss {name}", value)

    def _refuse(self, what: str, value: float) -> None:
        lengths = {name: parameter.detach().norm().item() for name, parameter in self._trainable.items()}
        longest = sorted(lengths, key=lambda name: (math.isfinite(lengths[name]), -lengths[name]))[:3]
        norms = ", ".join(f"{name} {lengths[name]:.3g}" for name in longest)
        config = self._config
        message = (
            f"{what} is {value} in update {self.done} of {self.n_updates}; expected a finite number. Longest "
            f"parameters: {norms}. Lower optimizer.learning_rate ({config.learning_rate:g}), raise "
            f"optimizer.warmup_share ({config.warmup_share:g}), or take precision float32 (it is "
            f"{self._precision})."
        )
        raise FeatureError(message)
