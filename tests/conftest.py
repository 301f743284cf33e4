"""Before any test module: whoever imports triton first decides for the process whether its kernels are interpreted."""

import os

import pytest
import torch
from known import register

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    register(config)
