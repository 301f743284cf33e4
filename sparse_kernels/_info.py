"""Report of the backends: which serves each operation on a device, and why the others do not."""

from __future__ import annotations

from typing import Any

import torch

from sparse_kernels import _dispatch
from sparse_kernels._dispatch import BACKENDS, GPU, TABLE, Server
from sparse_kernels.self_check import proof
from sparse_kernels.self_check.cases import dtypes
from sparse_kernels.self_check.verdicts import AGREED


class BackendInfo(dict[str, dict[str, Any]]):
    """Active backends: ``{op: {"active": name, "detail": text, "others": {name: reason}}}``. Prints as a table."""

    def __str__(self) -> str:
        lines = []
        for op, entry in self.items():
            detail = f" ({entry['detail']})" if entry["detail"] else ""
            lines.append(f"{op:13} {entry['active']}{detail}")
            lines += [f"{'':13}   not {name}: {reason}" for name, reason in entry["others"].items()]
        return "\n".join(lines)


def backend_info(device: str | torch.device = "cpu") -> BackendInfo:
    """Return which backend serves each operation for plain tensors of a device, and why the others do not.

    Nothing is checked and nothing runs. On a GPU the kernels that no verdict speaks against are the active ones: their
    first use checks them.

    Args:
        device: a PyTorch device, such as ``cuda``. Default: the CPU.

    Raises:
        TypeError: neither a name nor a device.
        ValueError: no device of PyTorch's.

    Example:
        >>> print(sparse_kernels.backend_info())
        row_stats     cpp (avx512, 2 threads)
                        not torch: cpp comes first
    """
    where = with_index(named_device(device))
    info = BackendInfo()
    for op, servers in TABLE.items():
        if not any(server.backend == "torch" for server in servers):
            continue  # made of the others
        demand: str | None = _dispatch._forced
        preference: str | None = _dispatch._preferred
        order = servers if preference is None else _dispatch.preferring(op, preference)
        entry: dict[str, Any] = {"active": "none", "detail": "", "others": {}}
        for server in order:
            name = server.backend
            if name == entry["active"]:
                continue
            reason, detail = _standing(server, op, where)
            if reason is None and demand is not None and name not in _dispatch.members(demand):
                reason = f"SPARSE_KERNELS_BACKEND={demand}" if _reaches(op, demand, where) else None
            if reason is None and entry["active"] != "none":
                reason = f"{entry['active']} comes first"
            if reason is None and server.by_name and demand != name:
                reason = f"used only by name (backend={name!r})"
            if reason is None:
                entry |= {"active": name, "detail": detail}
                entry["others"].pop(name, None)
            else:
                entry["others"].setdefault(name, reason)
        info[op] = entry
    return info


def named_device(device: str | torch.device) -> torch.device:
    """Return the device of a name.

    Args:
        device: a name such as "cuda:0", or a device.

    Raises:
        TypeError: something else.
        ValueError: a name that PyTorch does not know.
    """
    if not isinstance(device, str | torch.device):
        raise TypeError(f"`device` must be a PyTorch device or its name, such as 'cuda:0', got {device!r}")
    try:
        return torch.device(device)
    except RuntimeError:
        raise ValueError(f"`device` must name a PyTorch device, such as 'cpu' or 'cuda:0', got {device!r}") from None


def with_index(device: torch.device) -> torch.device:
    """Return a device as tensors on it name it: a GPU without a number is the current one.

    Args:
        device: any.
    """
    index: int | None = device.index
    if device.type == "cuda" and index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _reaches(op: str, demand: str, device: torch.device) -> bool:
    return any(server.kinds is None or device.type in server.kinds for server in _dispatch.named(op, demand))


def _standing(server: Server, op: str, device: torch.device) -> tuple[str | None, str]:
    """Return why a backend does not serve an operation on a device, or None, and a detail."""
    backend = BACKENDS[server.backend]
    reason = backend.unavailable_reason()
    if reason is None and server.kinds is not None and device.type not in server.kinds:
        reason = f"for {', '.join(server.kinds)} tensors"
    if reason is not None:
        return reason, ""
    if server.backend not in GPU:
        return None, backend.detail()
    verdicts = {dtype: proof.known_reason(server.backend, op, dtype, device) for dtype in dtypes(op)}
    against = [reason for reason in verdicts.values() if reason]
    if len(against) == len(verdicts):
        return against[0], ""
    return None, f"{backend.detail()}; {_proved(verdicts)}"


def _proved(verdicts: dict[torch.dtype | None, str | None]) -> str:
    """Return in words for which dtypes a kernel is proved."""
    words = []
    for word, kind in (("proved", AGREED), ("not yet proved", None)):
        names = [str(dtype).removeprefix("torch.") for dtype, reason in verdicts.items() if reason == kind]
        if names:
            words.append(word if names == ["None"] else f"{word}: {', '.join(names)}")
    words += [
        f"not {str(dtype).removeprefix('torch.')}: {reason}"
        for dtype, reason in verdicts.items()
        if reason not in (AGREED, None)
    ]
    return "; ".join(words)
