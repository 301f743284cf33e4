"""Before any test module: whoever imports triton first decides for the process whether its kernels are interpreted."""

import gc
import os

import pytest
import torch
from known import register

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    register(config)


def pytest_collection_finish() -> None:
    """Spare what is imported from garbage collection: hosts collect after each training, which took up to a second."""
    gc.collect()
    gc.freeze()
