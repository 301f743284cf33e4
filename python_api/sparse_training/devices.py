"""What devices want done by hand: one is found, waited for, and told that a step ends.

XLA traces operations and runs them when told to, as one program; torch_xla is imported where such a device is named,
and not before.
"""

from __future__ import annotations

from typing import Any

import torch


def find(name: torch.device | str) -> torch.device:
    """The device of that name, ready for use.

    Raises:
        RuntimeError, AssertionError, NotImplementedError, ImportError: there is none, in PyTorch's words.
    """
    device = torch.device(name)
    if device.type == "xla":
        _xla()
    torch.empty(0, device=device)
    return device


def synchronize(device: torch.device) -> None:
    """Wait for an asynchronous device; nothing to wait for on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    elif device.type == "xla":
        # A program's end moves the generator on, and waiting must not change what is drawn.
        model = _xla().core.xla_model
        seed = model.get_rng_state()
        _xla().sync(wait=True)
        model.set_rng_state(seed)


def end_step(device: torch.device) -> None:
    """What was asked for since the last step's end is one step's work; waits for nothing."""
    if device.type == "xla":
        _xla().sync()


def _xla() -> Any:
    import torch_xla  # type: ignore[import-not-found,unused-ignore]

    return torch_xla
