"""Learning rates of an optimizer's parameter groups, which follow a run's schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_training.errors import UserError


class LearningRates:
    """Sets each group's learning rate to a multiple of its first one, and notices where somebody else set it.

    Args:
        optimizer: the optimizer; a group's first rate is its ``initial_lr``, which a scheduler may have noted.

    Raises:
        UserError: a group without a learning rate.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            _note_first(group, optimizer)
        self._factor = 1.0
        self._note()

    def begin(self) -> None:
        """Take rates that were set by hand since the last run for the first ones of the next."""
        for group, _ in self._set_elsewhere():
            group["initial_lr"] = group["lr"]
        self._factor = 1.0
        self._note()

    def set(self, factor: float) -> None:
        """Set the rates to a multiple of the first ones.

        While the schedule is constant, a rate that a callback set since the last step takes the first one's place.

        Args:
            factor: the multiple.

        Raises:
            UserError: a rate was set elsewhere, and the schedule would overwrite it.
        """
        for group, number in self._set_elsewhere():
            if not factor == self._factor == 1.0:
                raise UserError(
                    f"the learning rate of parameter group {number} was set to {group['lr']:g} during the run, and "
                    '`schedule` would overwrite it; give schedule="constant" and lr_warmup=0 to set it yourself, or a '
                    "scheduler as `schedule`"
                )
            group["initial_lr"] = group["lr"]
        for group in self.optimizer.param_groups:
            _note_first(group, self.optimizer)  # a group that was added since
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(group["initial_lr"] * factor)
            else:
                group["lr"] = group["initial_lr"] * factor
        self._factor = factor
        self._note()

    def relative(self) -> float:
        """Return the first group's rate as a multiple of its first one."""
        group = self.optimizer.param_groups[0]
        return float(group["lr"]) / (float(group["initial_lr"]) or 1.0)

    def _note(self) -> None:
        self._groups = self.optimizer.param_groups
        self._rates = [group["lr"] for group in self._groups]

    def _set_elsewhere(self) -> list[tuple[dict[str, Any], int]]:
        """Return the groups with another rate than was set here, and their numbers; none after a state was loaded."""
        # A state that is loaded makes other groups. Of a group that was added nothing is known.
        pairs = zip(self._groups, self._rates)  # noqa: B905
        return [
            (group, number)
            for number, (group, rate) in enumerate(pairs)
            # A tensor is compared by identity alone: its value may be on a device, which a step does not wait for.
            if group["lr"] is not rate and (isinstance(group["lr"], Tensor) or group["lr"] != rate)
        ]


def _note_first(group: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Note a group's rate as its first one, unless one is noted."""
    rate = group.get("lr")
    if rate is None:
        raise UserError(
            f"`optimizer` must have a learning rate in each parameter group, which `schedule` sets, got "
            f"{type(optimizer).__name__} with none; give it lr="
        )
    group.setdefault("initial_lr", rate.clone() if isinstance(rate, Tensor) else rate)
