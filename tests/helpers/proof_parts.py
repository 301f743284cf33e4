"""Parts of the tests of proof at first use: a process without verdicts, in which GPU kernels come first."""

import json

import torch

from sparse_kernels import _dispatch, _known
from sparse_kernels.self_check import proof


def forget(monkeypatch):
    """As in a new process."""
    _known._kinds.clear()
    for name, empty in (("_known", {}), ("_kept", {}), ("_spent", {}), ("_told", set()), ("_unfinished", set())):
        monkeypatch.setattr(proof, name, empty)
    monkeypatch.setattr(proof, "mode", "auto")
    monkeypatch.setattr(_dispatch, "_logged", set())


def unproved(monkeypatch, folder):
    """A process that prefers the GPU kernels, on a CPU too, and whose verdicts are kept in the folder."""
    monkeypatch.setenv("SPARSE_KERNELS_CACHE", str(folder))
    forget(monkeypatch)
    monkeypatch.setattr(_dispatch, "_preferred", "gpu")
    for op, servers in _dispatch.TABLE.items():  # as on a GPU: behind its kernels there is the reference
        monkeypatch.setitem(_dispatch.TABLE, op, tuple(server for server in servers if server.backend != "cpp"))


def kept(folder):
    """The verdicts on disk; empty without a file."""
    files = list(folder.glob("*.json"))
    assert len(files) <= 1
    return json.loads(files[0].read_text())["verdicts"] if files else {}


def warned(caplog):
    """The warnings, but for the one that a slow machine gives: that a check takes long."""
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    return [message for message in messages if "checking the" not in message]


def no_check(monkeypatch):
    """Whoever checks from here on fails."""
    monkeypatch.setattr(proof, "comparisons", lambda *_, **__: (_ for _ in ()).throw(AssertionError("checked again")))


def batch(dtype=torch.float32, rows=8, classes=10):
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, classes, generator=g).to(dtype), torch.arange(rows) % classes
