"""States of the global random generators that training may draw from."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the states of the global generators that training may draw from, as plain containers."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "xla":
        state["xla"] = sys.modules["torch_xla"].core.xla_model.get_rng_state(str(device))
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (kind, keys.tolist(), *rest)
    return state


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore ``rng_state``; generators that were not saved stay as they are."""
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    if "xla" in state and device.type == "xla":
        sys.modules["torch_xla"].core.xla_model.set_rng_state(int(state["xla"]), str(device))
    if "numpy" in state and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(state["numpy"])
