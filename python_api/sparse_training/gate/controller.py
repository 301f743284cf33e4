"""The PI controller of a gate's threshold as a module: the state of ``sparse_kernels.control`` in buffers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels import ControlState, control
from sparse_kernels.control_law import initial_state
from sparse_kernels.types import CONTROL_COUNTERS, CONTROL_VALUES
from sparse_training.arguments import check_fraction, check_number


class PIController(nn.Module):
    """Moves a threshold so that the fraction of rows above it meets a target rate.

    The state is two buffers, ``values`` (float32) and ``counters`` (int64), with the fields that
    ``sparse_kernels.types`` names. They move with the module and are saved with it, and nothing here waits for a
    device. Casting the module leaves their dtypes. States saved by version 1, with one buffer for each field, load
    exactly.

    Args:
        target: target rate, in (0, 1]; 1 fixes the threshold at -inf.
        threshold: initial threshold, finite; None (the default) keeps the whole first batch and starts from its rows.
        temperature: temperature of the gate that uses the threshold, at least 0. Default 0.
        p_min: least probability of keeping a row, of the same gate, in [0, 1). Default 0.

    Attributes:
        target: float32 buffer of one element, not saved: the setting comes from the constructor.

    Raises:
        UserError: the rate is out of range, or the threshold is not a finite number.
    """

    _version = 2
    values: Tensor
    counters: Tensor
    target: Tensor

    def __init__(
        self, target: float, *, threshold: float | None = None, temperature: float = 0.0, p_min: float = 0.0
    ) -> None:
        super().__init__()
        if threshold is not None:
            check_number("threshold", threshold, "None (automatic) or a finite number", math.isfinite)
        self.temperature, self.p_min = temperature, p_min
        self.register_buffer(
            "target", torch.tensor(check_fraction("rate", target), dtype=torch.float32), persistent=False
        )
        automatic = threshold is None or target == 1.0
        state = initial_state(torch.tensor(-math.inf if automatic else threshold, dtype=torch.float32))
        self.register_buffer("values", state.values)
        self.register_buffer("counters", state.counters)

    def state(self) -> ControlState:
        """The buffers themselves, not copies."""
        return ControlState(self.values, self.counters)

    @property
    def threshold(self) -> Tensor:
        """Threshold: float32, one element, a view of the state."""
        return self.values[0]

    @property
    def rate(self) -> Tensor:
        """Smoothed rate of the batches: float32, one element; NaN before the first."""
        return self.state().value("rate")

    @property
    def steps(self) -> Tensor:
        """Number of batches: int64, one element."""
        return self.counters[0]

    @property
    def saturated(self) -> Tensor:
        """Number of batches in which the target was out of reach: int64, one element."""
        return self.state().counter("saturated")

    def set_target(self, target: float) -> None:
        """Set the target rate from the next update on; nothing waits for the device.

        Args:
            target: target rate, in (0, 1].

        Raises:
            UserError: the rate is out of range.
        """
        self.target.fill_(check_fraction("rate", target))

    def update(
        self,
        significance: Tensor,
        labels: Tensor | None = None,
        *,
        ignore_index: int = 0,
        mass: Tensor | None = None,
        overflow: Tensor | None = None,
    ) -> None:
        """Move the threshold by one batch; a batch without a valid row counts as a step and moves nothing.

        Args:
            significance: significance of the rows, floating [rows], at least 0; NaN is not valid.
            labels: bool [rows], True for the rows that are valid, or integers [rows]; None (the default) for all.
            ignore_index: label of the rows that are not valid, for integer labels. Default 0.
            mass: gradient norm of each row, floating [rows], for a target that is a fraction of their sum; None (the
                default) for a rate.
            overflow: number of rows beyond the capacity, to be counted, integer of one element; None (the default) for
                0.

        Raises:
            ValueError: the tensors do not fit one another, as in ``sparse_kernels.control``.
        """
        control(
            ControlState(self.values, self.counters), significance, self.target,
            labels=labels, ignore_index=ignore_index, mass=mass, overflow=overflow,
            gate_temperature=self.temperature, p_min=self.p_min,
        )  # fmt: skip

    def saturation(self) -> Tensor:
        """Fraction of the batches in which the target was out of reach: float32, 0 to 1, on the device.

        Far above 0, the significance determines the rate, not the controller: most rows are equal, for example.
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
