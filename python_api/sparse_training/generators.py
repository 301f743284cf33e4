"""States of random generators: the global ones that training may draw from, and those of the training data."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

DEPTH, OBJECTS, ITEMS = 6, 2000, 100  # of the search for generators: levels, objects, and items of a container


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


def further_state(state: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the state of a torch generator for a process that was not there when a checkpoint was written.

    Args:
        state: state of the generator of a process that was.
        rank: number of the process; each gets a state of its own.
    """
    return torch.Generator().manual_seed(_further_seed(state, rank)).get_state()


def further_rng_state(state: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Return an ``rng_state`` for a process that was not there; an accelerator's generator is left as it is."""
    seed = _further_seed(state["torch"], rank)
    made: dict[str, Any] = {
        "torch": torch.Generator().manual_seed(seed).get_state(), "python": random.Random(seed).getstate()
    }  # fmt: skip
    if "numpy" in state and "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.RandomState(seed).get_state()
        made["numpy"] = (kind, keys.tolist(), *rest)
    return made


def _further_seed(state: torch.Tensor, rank: int) -> int:
    digest = hashlib.sha256(state.cpu().numpy().tobytes() + str(rank).encode())
    return int.from_bytes(digest.digest()[:4], "little")


def own_generators(data: Any) -> dict[str, Any]:
    """Find the random generators that an object and its parts hold, but for the global ones.

    Args:
        data: such as a DataLoader, whose sampler, data set and transforms may have generators.

    Returns:
        Generators of torch, ``random`` and NumPy by their path from the object, such as "sampler.generator".
    """
    found: dict[str, Any] = {}
    seen, level = {id(data)}, [("", data)]
    for _ in range(DEPTH):
        below = []
        for path, parent in level:
            for name, part in _parts(parent):
                if id(part) in seen or len(seen) > OBJECTS:
                    continue
                seen.add(id(part))
                where = f"{path}.{name}" if path else name
                if _is_generator(part):
                    found[where] = part
                else:
                    below.append((where, part))
        level = below
    return found


def _parts(parent: Any) -> Iterator[tuple[str, Any]]:
    """Return an object's attributes, or a small container's items, that may hold generators."""
    if isinstance(parent, (torch.Tensor, type)):
        return
    if isinstance(parent, (list, tuple)):
        items = dict(enumerate(parent[:ITEMS]))
    else:
        items = dict(parent if isinstance(parent, dict) else getattr(parent, "__dict__", {}))
    for name, part in list(items.items())[:ITEMS]:
        if _is_generator(part) or isinstance(part, (list, tuple, dict)) or hasattr(part, "__dict__"):
            yield str(name), part


def _is_generator(part: Any) -> bool:
    if isinstance(part, torch.Generator):
        return part is not torch.default_generator
    if isinstance(part, random.Random):
        return not isinstance(part, random.SystemRandom)
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return False
    return isinstance(part, (numpy.random.Generator, numpy.random.RandomState))


def generator_state(generator: Any) -> Any:
    """Return the state of a generator of torch, ``random`` or NumPy, as plain containers."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return _plain(_bit_generator(generator).state)


def set_generator_state(generator: Any, state: Any) -> None:
    """Restore ``generator_state``."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, random.Random):
        version, internal, gauss = state
        generator.setstate((version, tuple(internal), gauss))
    else:
        _bit_generator(generator).state = _arrays(state)


def _bit_generator(generator: Any) -> Any:
    """Return what holds the state of one of NumPy's generators."""
    return getattr(generator, "bit_generator", None) or generator._bit_generator


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return {"array": value.tolist(), "dtype": str(value.dtype)} if hasattr(value, "tolist") else value


def _arrays(value: Any) -> Any:
    if isinstance(value, dict) and "array" in value:
        return sys.modules["numpy"].array(value["array"], dtype=value["dtype"])
    return {name: _arrays(part) for name, part in value.items()} if isinstance(value, dict) else value
