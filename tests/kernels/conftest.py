"""Every ``torch.empty`` in these tests is filled with NaN (or the largest integer), and memory that C++ takes itself
with numbers, where the C library can, so that an output that a kernel forgot to write shows."""

import ctypes
import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch._dynamo
from emulated import each, forced

from sparse_kernels import _known
from sparse_kernels.backends.triton import backend as triton_backend
from sparse_kernels.backends.triton import launch

M_PERTURB = -6  # glibc's mallopt: freed bytes become the value, allocated ones its complement


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    mallopt(M_PERTURB, 0x3F)  # as float32 0.75 and -6
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    mallopt(M_PERTURB, 0)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Give the kernels what they divide their work among, also where `make test` has a thread a process."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    """Tests change what is the same for all calls of a process, such as the number of processors."""
    _known._kinds.clear()


@pytest.fixture(autouse=True, scope="session")
def dynamic_shapes() -> Iterator[None]:
    """Older PyTorch compiles ``compact`` without a capacity only where its user sets this; newer sets it by default."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


@pytest.fixture(autouse=True, scope="session")
def strict_interpreter() -> Iterator[None]:
    """Triton's interpreter, made stricter and quicker.

    It takes no notice of what a kernel claims of a pointer's alignment: here a false claim fails. And it puts its own
    functions in place of the language's anew at each call of a function from a kernel, half of its time: once a
    launch is enough.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        yield
        return
    import triton.language as tl  # not above: as it is imported, it asks the environment whether to interpret
    from triton.runtime import interpreter

    languages = {id(language): (language, language.load) for language in (tl, tl.core)}

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen = [languages[id(value)] for value in self.fn.__globals__.values() if id(value) in languages]
        if any(language.load is own for language, own in seen):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    def multiple_of(x: Any, value: Any) -> Any:
        assert x.dtype.is_ptr(), "a claim that is not looked into"
        assert (x.handle.data % int(value) == 0).all(), "a claim of alignment that a GPU would trap at"
        return x

    def patch_core(language: Any, *scope: Any) -> None:  # the scope: from Triton 3.6 on
        replace_core(language, *scope)
        (scope[0].set_attr if scope else setattr)(language, "multiple_of", multiple_of)

    replace_core = interpreter._patch_lang_core
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        patch.setattr(interpreter, "_patch_lang_core", patch_core)
        yield


@pytest.fixture
def many_processors(monkeypatch):
    """A device so large that every row of more than one block is cut into slices, which cost nothing."""
    monkeypatch.setattr(launch, "SECOND_LAUNCH", 0)
    monkeypatch.setattr(triton_backend, "processors", lambda device: 10_000)


@pytest.fixture(params=each())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """The C++ backend forced to one instruction set, put back afterwards; NEON is emulated on other processors."""
    with forced(request.param):
        yield request.param
