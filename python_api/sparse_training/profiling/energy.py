"""Energy of a run, measured.

The counters are NVML's for the GPU trained on and RAPL's for the processor's packages and memory, read through Zeus
(the extra ``energy``). Without a counter energy is not measured, and nothing is estimated from rated power. A counter
holds all that the device used in that time, other users included.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any, Protocol

import torch

RAPL_FOLDERS = ("/sys/class/powercap/intel-rapl", "/zeus_sys/class/powercap/intel-rapl")  # where Zeus looks


class Meter(Protocol):
    """Measures the energy between ``start`` and ``stop``.

    Attributes:
        source: names of the counters, for the report.
    """

    source: str

    def start(self) -> None:
        """Begin a measurement."""

    def stop(self) -> float:
        """End the measurement; return its joules."""


class ZeusMeter:
    """Reads NVML and RAPL counters through Zeus.

    Args:
        monitor: a ``zeus.monitor.ZeusMonitor``.

    Raises:
        ValueError: the monitor has no counter to read.
    """

    def __init__(self, monitor: Any) -> None:
        self.monitor = monitor
        counters = [f"NVML, GPU {index}" for index in monitor.gpu_indices]
        counters += [f"RAPL, package {index}" for index in monitor.cpu_indices]
        if not counters:
            raise ValueError("`monitor` must have a GPU or a processor to read, got neither a GPU nor a processor")
        self.source = "; ".join(counters)

    def start(self) -> None:
        """Begin a measurement."""
        self.monitor.begin_window("run", sync_execution=False, restart=True)

    def stop(self) -> float:
        """End the measurement; return its joules."""
        measured = self.monitor.end_window("run", sync_execution=False)
        kinds = (measured.gpu_energy, measured.cpu_energy, measured.dram_energy)
        return float(sum(sum(energy.values()) for energy in kinds if energy))


def find_meter(device: torch.device) -> Meter | None:
    """Return a meter of the device and the processor; None without Zeus or without a counter to read."""
    gpus = [device.index or 0] if device.type == "cuda" else []
    if not gpus and not any(map(os.path.exists, RAPL_FOLDERS)):
        return None  # importing Zeus takes a second
    try:
        from zeus.monitor import ZeusMonitor
    except ImportError:
        return None
    with contextlib.suppress(Exception):  # no permission, no driver or a virtual machine each raise another kind
        return ZeusMeter(ZeusMonitor(gpu_indices=gpus))
    return None


class Energy:
    """Energy of a run, summed over its measured stretches.

    Args:
        meter: the energy meter; None where energy is not measured.

    Attributes:
        joules: energy of the finished stretches; None where energy is not measured.
    """

    def __init__(self, meter: Meter | None) -> None:
        self.meter = meter
        self.joules: float | None = None if meter is None else 0.0
        self._running = False

    @property
    def source(self) -> str:
        """Name of the meter, or "no meter", as recorded results have it."""
        return "no meter" if self.meter is None else self.meter.source

    def start(self) -> None:
        """Begin a stretch."""
        if self.meter is not None:
            self.meter.start()
            self._running = True

    def stop(self) -> None:
        """End a stretch; does nothing outside one."""
        if self.meter is not None and self._running:
            self.joules = (self.joules or 0.0) + self.meter.stop()
            self._running = False

    def state_dict(self) -> dict[str, Any]:
        """Return the joules, for a checkpoint."""
        return {"joules": self.joules}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``; a run that was not measured throughout has no energy."""
        if state["joules"] is None or self.meter is None:
            self.meter, self.joules = None, None
        else:
            self.joules = float(state["joules"])
