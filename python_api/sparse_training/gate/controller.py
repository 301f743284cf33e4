"""The controller as a module: ``sparse_kernels.control``'s state in buffers, and what it steers to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels import ControlState, control
from sparse_kernels.control_law import initial_state
from sparse_kernels.types import CONTROL_COUNTERS, CONTROL_VALUES
from sparse_training.errors import UserError


class PIController(nn.Module):
    """Moves a threshold so that the fraction of rows above it meets a target rate.

    The state is two buffers, ``values`` (float32) and ``counters`` (int64), with the fields that
    ``sparse_kernels.types`` names: they move with the module, are saved with it, and nothing here waits
    for a device. Casting the module leaves their dtypes. States saved by version 1, one buffer a field,
    load exactly.

    Args:
        target: the rate wanted, in (0, 1]; 1 fixes the threshold at -inf.
        threshold: where to start; None selects the whole first batch and starts from what it holds.
        temperature, p_min: of the gate that uses the threshold, as in ``sparse_kernels.gate_rows``.

    Attributes:
        target: float32 buffer, one element, not saved: what is wanted comes from who makes the controller.

    Raises:
        UserError: a rate out of range, a threshold that is not a finite number.
    """

    _version = 2
    values: Tensor
    counters: Tensor
    target: Tensor

    def __init__(
        self, target: float, *, threshold: float | None = None, temperature: float = 0.0, p_min: float = 0.0
    ) -> None:
        super().__init__()
        if threshold is not None and not (_is_number(threshold) and math.isfinite(threshold)):
            raise UserError(f"threshold={threshold!r}; wanted None (automatic) or a finite number")
        self.temperature, self.p_min = temperature, p_min
        self.register_buffer("target", torch.tensor(_checked(target), dtype=torch.float32), persistent=False)
        automatic = threshold is None or target == 1.0
        state = initial_state(torch.tensor(-math.inf if automatic else threshold, dtype=torch.float32))
        self.register_buffer("values", state.values)
        self.register_buffer("counters", state.counters)

    def state(self) -> ControlState:
        """The buffers themselves, not copies."""
        return ControlState(self.values, self.counters)

    @property
    def threshold(self) -> Tensor:
        """float32, one element: a view of the state."""
        return self.values[0]

    @property
    def rate(self) -> Tensor:
        """float32, one element: the smoothed rate observed; NaN before the first batch."""
        return self.state().value("rate")

    @property
    def steps(self) -> Tensor:
        """int64, one element: batches seen."""
        return self.counters[0]

    @property
    def saturated(self) -> Tensor:
        """int64, one element: batches in which the target was out of reach."""
        return self.state().counter("saturated")

    def set_target(self, target: float) -> None:
        """Another rate from the next update on; written to the device, without waiting for it."""
        self.target.fill_(_checked(target))

    def update(
        self,
        significance: Tensor,
        labels: Tensor | None = None,
        *,
        ignore_index: int = 0,
        mass: Tensor | None = None,
        overflow: Tensor | None = None,
    ) -> None:
        """Moves the threshold by one batch: ``sparse_kernels.control``'s arguments.

        Args:
            significance: floating [rows].
            labels: optional [rows], bool for the rows that are valid, or integers and their ``ignore_index``.

        A batch of no row, or of NaN alone, counts as a step and moves nothing.
        """
        control(
            ControlState(self.values, self.counters), significance, self.target,
            labels=labels, ignore_index=ignore_index, mass=mass, overflow=overflow,
            gate_temperature=self.temperature, p_min=self.p_min,
        )  # fmt: skip

    def saturation(self) -> Tensor:
        """Share of the batches in which the target was out of reach: float32, 0 to 1, on the device.

        Far above 0, the rate is not the controller's but the significance's: most rows are equal, say.
        """
        return self.saturated / self.steps.clamp(min=1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PIController:
        # A threshold in half precision would select by its rounding: take fn's device, keep the dtype.
        def moved(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            return out if out.dtype == tensor.dtype else tensor.to(out.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        # Version 1 is known by its names: a plain dictionary of tensors carries no version.
        if f"{prefix}threshold" in state_dict:
            for packed, names, like in (
                ("values", CONTROL_VALUES, self.values),
                ("counters", CONTROL_COUNTERS, self.counters),
            ):
                fields = {name: state_dict.pop(f"{prefix}{name}", None) for name in names}
                for name in ("invalid", "overflow"):  # it did not have them
                    if name in fields and fields[name] is None:
                        fields[name] = torch.zeros((), dtype=like.dtype)
                missing_keys += [f"{prefix}{name}" for name, value in fields.items() if value is None]
                if all(value is not None for value in fields.values()):
                    state_dict[f"{prefix}{packed}"] = torch.stack([value.to(like) for value in fields.values()])
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _checked(target: float) -> float:
    if not _is_number(target) or not 0.0 < target <= 1.0:
        raise UserError(f"rate={target!r}; wanted a fraction above 0 and at most 1")
    return target


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
