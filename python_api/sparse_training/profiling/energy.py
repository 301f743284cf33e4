"""What a run cost: joules where there is a meter, floating-point operations always.

Joules are *measured*, by NVML for the GPU trained on and RAPL for the processor's packages and memory, through Zeus
(the extra ``energy``); without a counter to read there is no figure, for nothing is estimated from a nameplate. They
are all that the device used in that time, whoever used it.

Operations are *counted*, by PyTorch's own counter: matrix products, convolutions and attention, forwards and
backwards, two for each multiply-add, scoring included. Counting slows a step several times, so that of each kind of
step only the first are counted, until two numbers of rows are known; all others follow from those, for the operations
of a model are linear in its rows.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any, Protocol

import torch

RAPL_FOLDERS = ("/sys/class/powercap/intel-rapl", "/zeus_sys/class/powercap/intel-rapl")  # where Zeus looks


class Meter(Protocol):
    """Measures the joules between ``start`` and ``stop``."""

    source: str  # what is read, for the report

    def start(self) -> None: ...

    def stop(self) -> float: ...


class ZeusMeter:
    """NVML and RAPL counters through Zeus.

    Args:
        monitor: a ``zeus.monitor.ZeusMonitor``.

    Raises:
        ValueError: it has nothing to read.
    """

    def __init__(self, monitor: Any) -> None:
        self.monitor = monitor
        read = [f"NVML, GPU {index}" for index in monitor.gpu_indices]
        read += [f"RAPL, package {index}" for index in monitor.cpu_indices]
        if not read:
            raise ValueError("the monitor has neither a GPU nor a processor to read; wanted one")
        self.source = "; ".join(read)

    def start(self) -> None:
        self.monitor.begin_window("run", sync_execution=False, restart=True)

    def stop(self) -> float:
        found = self.monitor.end_window("run", sync_execution=False)
        kinds = (found.gpu_energy, found.cpu_energy, found.dram_energy)
        return float(sum(sum(energy.values()) for energy in kinds if energy))


def find_meter(device: torch.device) -> Meter | None:
    """What can be read here of the device trained on and the processor; None without Zeus or a counter."""
    gpus = [device.index or 0] if device.type == "cuda" else []
    if not gpus and not any(map(os.path.exists, RAPL_FOLDERS)):
        return None  # before Zeus is imported, which takes a second
    try:
        from zeus.monitor import ZeusMonitor
    except ImportError:
        return None
    with contextlib.suppress(Exception):  # no permission, no driver, a virtual machine: each of a kind of its own
        return ZeusMeter(ZeusMonitor(gpu_indices=gpus))
    return None


class Energy:
    """The joules of a run's stretches; None without a meter."""

    def __init__(self, meter: Meter | None) -> None:
        self.meter = meter
        self.joules: float | None = None if meter is None else 0.0
        self._running = False

    @property
    def source(self) -> str:
        return "no meter" if self.meter is None else self.meter.source

    def start(self) -> None:
        if self.meter is not None:
            self.meter.start()
            self._running = True

    def stop(self) -> None:
        if self.meter is not None and self._running:
            self.joules = (self.joules or 0.0) + self.meter.stop()
            self._running = False

    def state_dict(self) -> dict[str, Any]:
        return {"joules": self.joules}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there; what was only partly measured has no figure."""
        if state["joules"] is None or self.meter is None:
            self.meter, self.joules = None, None
        else:
            self.joules = float(state["joules"])
