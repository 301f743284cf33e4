"""PyTorch's current device and stream, without the objects that its own functions make in every call."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

_already: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a GPU is the current one; nothing changes for a CPU.

    Args:
        device: of the tensors of a call.
    """
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _already
    return torch.cuda.device(device)


def _stream_address(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


# Private, and so perhaps gone in another release. The public one makes a Stream, and takes several times as long.
stream_address = getattr(torch._C, "_cuda_getCurrentRawStream", _stream_address)
