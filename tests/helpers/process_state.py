"""State of a process that tests share: a test that leaves it changed decides what the next one of its process sees."""

import os
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Part(NamedTuple):
    read: Callable[[], Any]
    put_back: Callable[[Any], object]


PREFIXES = ("OMP_", "SPARSE_", "TORCH", "TRITON_", "CUBLAS_")
OF_PYTORCH = "TORCHINDUCTOR_CACHE_DIR"  # set by PyTorch 2.6 itself, when it compiles


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(PREFIXES) and name != OF_PYTORCH}


def _set_variables(before: dict[str, str]) -> None:
    for name in _variables().keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def _device() -> torch.device:
    return torch.empty(0).device  # PyTorch 2.6's get_default_device() fails once a device was set and put back


def _set_device(before: torch.device) -> None:
    torch.set_default_device(None if before.type == "cpu" else before)  # a device that is set slows every function


def _handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}


def _set_handlers(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


PARTS = {
    "default dtype": Part(torch.get_default_dtype, torch.set_default_dtype),
    "default device": Part(_device, _set_device),
    "number of threads": Part(torch.get_num_threads, torch.set_num_threads),
    "gradients": Part(torch.is_grad_enabled, torch.set_grad_enabled),
    "deterministic algorithms": Part(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "precision of float32 products": Part(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "anomalies of gradients": Part(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "current folder": Part(os.getcwd, os.chdir),
    "environment": Part(_variables, _set_variables),
    "handlers of signals": Part(_handlers, _set_handlers),
}


def read() -> dict[str, Any]:
    """Return each part's value."""
    return {name: part.read() for name, part in PARTS.items()}


def put_back(before: dict[str, Any]) -> list[str]:
    """Put back what differs, and return what each of these parts was and is."""
    now = read()
    changed = [name for name in PARTS if now[name] != before[name]]
    for name in changed:
        PARTS[name].put_back(before[name])
    return [f"{name}: {now[name]}, before {before[name]}" for name in changed]
