"""Every ``torch.empty`` in these tests is filled with NaN (or the largest integer), so that an output
that a kernel forgot to write shows."""

from collections.abc import Iterator

import pytest
import torch

from sparse_kernels import cpp_backend


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def instruction_sets() -> list[str]:
    """Those that this processor runs; empty without the compiled extension."""
    return [] if cpp_backend.unavailable() else cpp_backend._cpp.instruction_sets()


@pytest.fixture(params=["portable", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """The C++ backend forced to one instruction set, put back afterwards."""
    if cpp_backend.unavailable():
        pytest.skip(str(cpp_backend.unavailable()))
    if request.param not in instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    before = cpp_backend._cpp.instruction_set()
    cpp_backend._cpp.set_instruction_set(request.param)
    yield request.param
    cpp_backend._cpp.set_instruction_set(before)
