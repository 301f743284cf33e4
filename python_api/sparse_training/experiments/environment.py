"""The machine and the versions that a result was made with."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

import sparse_kernels


def environment(device: torch.device) -> dict[str, Any]:
    """Collect the versions, the machine and the backends that serve the kernels."""
    backends = {
        op: f"{served['active']} ({served['detail']})" if served.get("detail") else str(served["active"])
        for op, served in sparse_kernels.backend_info().items()
    }
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sparse_kernels": sparse_kernels.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "backends": backends,
    }


def _cpu_name() -> str:
    """Name of the processor and number of its cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.processor() or platform.machine())}, {os.cpu_count()} cores"
