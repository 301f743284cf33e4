"""The current device and stream, as kernels are launched on them; the GPUs here are names alone."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from sparse_kernels.backends import current


@pytest.fixture
def switches(monkeypatch):
    """The devices that were made current, where the first GPU is the current one."""
    made = []

    @contextlib.contextmanager
    def device(one):
        made.append(one)
        yield
        made.append(None)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    return made


@pytest.mark.parametrize("name", ["cpu", "cuda:0"])
def test_where_a_call_s_device_is_the_current_one_nothing_changes(name, switches):
    with current.on(torch.device(name)):
        assert not switches


def test_another_gpu_is_the_current_one_for_a_call_alone(switches):
    with current.on(torch.device("cuda:1")):
        assert switches == [torch.device("cuda:1")]
    assert switches[1:] == [None]


def test_the_stream_without_the_private_function(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=100 + index))
    assert current._stream_address(1) == 101
