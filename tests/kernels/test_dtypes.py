"""Every dtype with every operation on every backend: served as the reference serves it, or refused in one line."""

import os
import re

import pytest
import torch

import sparse_kernels as sk
from sparse_kernels.backends import cpp as cpp_backend
from sparse_kernels.control_law import initial_state
from sparse_kernels.types import WEIGHABLE

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BUILT = not cpp_backend.unavailable_reason()
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore:.*encountered in:RuntimeWarning")
# Not quantised tensors, which have scales beside their bytes, nor int1 to int7, of which PyTorch itself makes int8.
DTYPES = sorted(
    {
        value
        for value in vars(torch).values()
        if isinstance(value, torch.dtype) and not re.fullmatch(r"torch\.(q.*|u?int[1-7])", str(value))
    },
    key=str,
)
LOGITS = {torch.float32, torch.bfloat16, torch.float16, torch.float64}
MOVES = [None, "torch", *(["cpp"] if BUILT else [])]
SCORES = [*MOVES, *(["triton"] if INTERPRETED else [])]


@pytest.fixture(autouse=True)
def memory_that_pytorch_can_fill(request, poisoned_memory):
    """PyTorch cannot fill new memory of some types, so there it must not be asked to."""
    dtype = getattr(request.node, "callspec", None) and request.node.callspec.params.get("dtype")
    try:
        torch.empty(64, dtype=dtype)  # one element is filled by another function
    except (NotImplementedError, RuntimeError):
        torch.use_deterministic_algorithms(False)


def tensor_of(dtype, rows, columns):
    """Random bytes as numbers of this type, and the bytes."""
    g = torch.Generator().manual_seed(0)
    if dtype is torch.bool:
        raw = torch.randint(0, 2, (rows, columns), generator=g, dtype=torch.uint8)
    else:
        raw = torch.randint(0, 256, (rows, columns * dtype.itemsize), generator=g, dtype=torch.uint8)
    return raw.view(dtype), raw


def same_bytes(tensor, raw):
    return torch.equal(tensor.contiguous().view(torch.uint8), raw)


@pytest.mark.parametrize("capacity", [None, 3, 5])
@pytest.mark.parametrize("backend", MOVES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_every_dtype_are_moved(dtype, backend, capacity):
    mask = torch.tensor([True, False, True, False, True, False])
    tensor, raw = tensor_of(dtype, 6, 5)
    selection = sk.compact(mask, capacity=capacity, backend=backend)
    index, kept = selection.index, int(selection.count)
    packed = sk.gather_rows(tensor, selection, backend=backend)
    assert packed.dtype is dtype
    assert same_bytes(packed, raw[index])
    placed = sk.scatter_rows(packed, selection, backend=backend)
    assert placed.dtype is dtype
    wanted = torch.zeros_like(raw).index_copy(0, index[:kept], raw[index[:kept]])
    assert same_bytes(placed, wanted)
    # Columns cut out, rows apart, planes in another order; and trees.
    every_other = tensor_of(dtype, 6, 10)[0].view(6, 5, 2)[:, :, 0]
    turned = tensor_of(dtype, 6, 10)[0].view(6, 2, 5).transpose(1, 2)
    tree = {"a": every_other, "b": [turned, tensor]}
    packed = sk.gather_rows(tree, selection, backend=backend)
    placed = sk.scatter_rows(packed, selection, backend=backend)
    for found, back, given in zip(
        (packed["a"], *packed["b"]), (placed["a"], *placed["b"]), (every_other, turned, tensor), strict=True
    ):
        given = given.contiguous().view(torch.uint8)
        assert same_bytes(found, given[index])
        assert same_bytes(back, torch.zeros_like(given).index_copy(0, index[:kept], given[index[:kept]]))
    empty = sk.compact(torch.zeros(6, dtype=torch.bool), capacity=capacity, backend=backend)
    assert not sk.scatter_rows(sk.gather_rows(tensor, empty), empty, backend=backend).view(torch.uint8).any()


@pytest.mark.parametrize("backend", MOVES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_select_packs_rows_of_every_dtype(dtype, backend):
    torch.manual_seed(0)
    tensor, raw = tensor_of(dtype, 6, 5)
    logits, targets = torch.randn(6, 3), torch.zeros(6, dtype=torch.int64)
    call = {"weights": {"loss": 1.0}, "backend": backend}
    selected = sk.select(logits, targets, torch.tensor(1.0), tree=(tensor, targets), **call)
    assert 0 < selected.selection.index.numel() < 6
    assert same_bytes(selected.packed[0], raw[selected.selection.index])
    assert same_bytes(selected.selection.take(tensor), raw[selected.selection.index])


def refused(function, *arguments, **keywords):
    with pytest.raises((TypeError, ValueError)) as error:
        function(*arguments, **keywords)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("`"), message
    return message


@pytest.mark.parametrize("backend", SCORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_every_dtype_are_scored_or_refused(dtype, backend):
    torch.manual_seed(0)
    given, targets = torch.randn(7, 6, dtype=torch.float64), torch.arange(7) % 6
    call = {"weights": {"loss": 1.0}, "outputs": WEIGHABLE, "backend": backend}
    if dtype not in LOGITS:
        logits = tensor_of(dtype, 7, 6)[0]
        for function in (sk.row_stats, sk.gate_rows, sk.select):
            arguments = () if function is sk.row_stats else (torch.tensor(1.0),)
            options = {"backend": backend} if function is sk.row_stats else {**call, "outputs": ()}
            if function is not sk.select or backend != "triton":
                assert str(dtype) in refused(function, logits, targets, *arguments, **options)
        return
    logits = given.to(dtype)
    for targets_of in (targets, targets.int()):
        gated = sk.gate_rows(logits, targets_of, torch.tensor(1.7), **call)
        stats = sk.row_stats(logits, targets_of, outputs=WEIGHABLE, backend=backend)
        exact = sk.gate_rows(logits.double(), targets, torch.tensor(1.7), **{**call, "backend": "torch"})
        assert torch.equal(gated.mask, exact.mask)
        for name in WEIGHABLE:
            found = getattr(gated.stats, name)
            assert found.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
            assert torch.equal(found, getattr(stats, name))
            torch.testing.assert_close(found.double(), getattr(exact.stats, name), rtol=1e-5, atol=1e-6)
        if backend != "triton":
            selected = sk.select(logits, targets_of, torch.tensor(1.7), **{**call, "outputs": ()})
            assert torch.equal(selected.gated.mask, exact.mask)
            assert torch.equal(selected.selection.index, exact.mask.nonzero()[:, 0])


@pytest.mark.parametrize("backend", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_threshold_and_offset_of_every_dtype(dtype, backend):
    torch.manual_seed(0)
    logits, targets = torch.randn(7, 6), torch.arange(7) % 6
    offset, threshold = torch.randn(7).to(dtype), torch.tensor(1.5, dtype=dtype)
    call = {"weights": {"loss": 1.0}, "backend": backend}
    for step in (torch.tensor(3), 3):
        gated = sk.gate_rows(
            logits, targets, threshold, offset=offset, gate_temperature=0.5, p_min=0.5, step=step, **call
        )
        wanted = sk.gate_rows(
            logits.double(), targets, threshold.double(), offset=offset.double(), gate_temperature=0.5, p_min=0.5,
            step=3, **{**call, "backend": "torch"},
        )  # fmt: skip
        torch.testing.assert_close(gated.significance.double(), wanted.significance, rtol=1e-5, atol=1e-5)
        assert torch.equal(gated.mask, wanted.mask)


@pytest.mark.parametrize("backend", MOVES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_of_every_other_dtype_are_refused(dtype, backend):
    """But for those that the operation takes."""
    value = tensor_of(dtype, 4, 1)[0][:, 0]
    mask = torch.tensor([True, False, True, True])
    if dtype is not torch.bool:
        refused(sk.compact, value, backend=backend)
    if dtype is not torch.float32:
        refused(sk.compact, mask, weight=value, backend=backend)
    logits, targets = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)
    call = {"weights": {"loss": 1.0}, "backend": backend}
    if not dtype.is_floating_point:
        refused(sk.gate_rows, logits, targets, torch.tensor(1.0), offset=value, **call)
        refused(sk.control, initial_state(torch.tensor(1.0)), value, torch.tensor(0.1), backend=backend)
    if dtype not in (torch.int32, torch.int64):
        refused(sk.gate_rows, logits, value, torch.tensor(1.0), **call)
        refused(sk.row_stats, logits, value, backend=backend)
    if dtype is not torch.float32:
        refused(sk.control, initial_state(torch.tensor(1.0)), torch.rand(4), value[:1], backend=backend)


@pytest.mark.parametrize("backend", MOVES)
@pytest.mark.parametrize("dtype", sorted(LOGITS, key=str), ids=str)
def test_a_controller_is_moved_by_significance_of_every_dtype(dtype, backend):
    torch.manual_seed(0)
    rows, mass = torch.rand(64).to(dtype), torch.rand(64).to(dtype)
    if backend == "cpp" and dtype is not torch.float32:
        with pytest.raises(sk.BackendUnavailable, match=r"serves float32"):
            sk.control(initial_state(torch.tensor(0.5)), rows, torch.tensor(0.1), backend=backend)
        return
    ours, wanted = initial_state(torch.tensor(0.5)), initial_state(torch.tensor(0.5))
    sk.control(ours, rows, torch.tensor(0.1), mass=mass, backend=backend)
    sk.control(wanted, rows.double(), torch.tensor(0.1), mass=mass.double(), backend="torch")
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 0.05  # sums in half precision
    torch.testing.assert_close(ours.values, wanted.values, rtol=tolerance, atol=tolerance)
