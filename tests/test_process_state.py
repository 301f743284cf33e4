"""A test that leaves the state of its process changed fails, and the next one finds it as it was."""

import os
import signal
from collections.abc import Callable

import process_state
import pytest
import torch

CHANGES: dict[str, Callable[[], object]] = {
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "default device": lambda: torch.set_default_device("meta"),
    "number of threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "gradients": lambda: torch.set_grad_enabled(False),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True),
    "precision of float32 products": lambda: torch.set_float32_matmul_precision("medium"),
    "anomalies of gradients": lambda: torch.autograd.set_detect_anomaly(True),
    "current folder": lambda: os.chdir("/"),
    "environment": lambda: os.environ.update(SPARSE_KERNELS_BACKEND="torch"),
    "handlers of signals": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
}


@pytest.mark.parametrize("name", process_state.PARTS)
def test_a_change_is_named_and_put_back(name):
    before = process_state.read()
    assert process_state.put_back(before) == []
    CHANGES[name]()
    assert any(said.startswith(f"{name}: ") for said in process_state.put_back(before))
    assert process_state.read() == before


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "SPARSE_KERNELS_CPU"])
def test_a_variable_that_is_gone_is_put_back(name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, "passive")
        before = process_state.read()
        del os.environ[name]
        assert len(process_state.put_back(before)) == 1
        assert os.environ[name] == "passive"


def test_every_test_is_looked_after(request):
    assert "nothing_left_behind" in request.fixturenames
