"""Devices: find one, wait for it, and mark the end of a step.

XLA records operations and runs them on request as one program. torch_xla is imported where such a device is named, and
not before.
"""

from __future__ import annotations

from typing import Any

import torch

from sparse_training.errors import UserError, one_line


def find(name: torch.device | str) -> torch.device:
    """Find a device and make it ready for use.

    Args:
        name: PyTorch device, such as "cuda:0".

    Returns:
        The device.

    Raises:
        UserError: PyTorch has no such device here, or no operations for it, or it holds no values.
    """
    try:
        device = torch.device(name)
        if device.type == "xla":
            _xla()
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:  # each kind of device has its own
        raise UserError(f"device {str(name)!r} cannot be used: {one_line(error)}") from None
    if device.type == "meta":
        raise UserError(f"device {str(name)!r} cannot be used: its tensors have no values")
    return device


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work; no effect on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    elif device.type == "xla":
        # The end of a program advances the generator, and waiting must not change later draws.
        model = _xla().core.xla_model
        seed = model.get_rng_state()
        _xla().sync(wait=True)
        model.set_rng_state(seed)


def end_step(device: torch.device) -> None:
    """Mark the end of a step: on XLA, run the operations recorded since the last one. Waits for nothing."""
    if device.type == "xla":
        _xla().sync()


def _xla() -> Any:
    import torch_xla  # type: ignore[import-not-found,unused-ignore]

    return torch_xla
