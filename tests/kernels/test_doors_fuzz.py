"""Legal calls of every kind, drawn at random: the compiled kernels and the reference differ in none."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_kernels as sk
from sparse_kernels.backends import cpp as cpp_backend
from sparse_kernels.types import WEIGHABLE

pytestmark = pytest.mark.skipif(cpp_backend.unavailable_reason() is not None, reason="the C++ backend is not built")

LOGITS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MOVED = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


def laid_out(tensor, layout):
    """The same values in another layout of memory."""
    if layout == "strided":
        return torch.stack([tensor, tensor], -1)[..., 0]
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "offset":
        return (
            torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].reshape(tensor.shape) if tensor.numel() else tensor
        )
    return tensor


LAYOUTS = st.sampled_from(["plain", "strided", "transposed", "offset"])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_scores_and_decisions_agree(data):
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dims = draw(st.lists(st.integers(0, 9), min_size=0, max_size=3))
    classes, dtype = draw(st.integers(1, 70)), draw(st.sampled_from(LOGITS))
    dim = draw(st.integers(0, len(dims)))
    shape = [*dims[:dim], classes, *dims[dim:]]
    logits = (torch.randn(shape, generator=generator) * draw(st.sampled_from([0.1, 3.0, 30.0]))).to(dtype)
    targets = torch.randint(classes, dims, generator=generator)
    ignored = torch.rand(dims, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
    targets = targets.masked_fill(ignored, -100).to(draw(st.sampled_from([torch.int64, torch.int32])))
    logits, targets = laid_out(logits, draw(LAYOUTS)), laid_out(targets, draw(LAYOUTS))
    scoring = {
        "temperature": draw(st.sampled_from([1.0, 0.5, 3.0])),
        "softcap": draw(st.sampled_from([0.0, 5.0])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "dim": draw(st.sampled_from([dim, dim - len(shape)])),
    }
    close = {"rtol": 1e-4, "atol": 1e-4, "equal_nan": True}
    stats = [sk.row_stats(logits, targets, outputs=sk.STATISTICS, backend=b, **scoring) for b in ("cpp", "torch")]
    torch.testing.assert_close(*(tuple(s)[:6] + tuple(s)[7:] for s in stats), **close)
    weights = draw(st.dictionaries(st.sampled_from(WEIGHABLE), st.sampled_from([1.0, 0.3, -0.5]), min_size=1))
    offset = torch.randn(dims, generator=generator) if draw(st.booleans()) else None
    gates = [
        sk.gate_rows(logits, targets, 0.7, weights=weights, offset=offset, backend=b, **scoring)
        for b in (None, "cpp", "torch")
    ]
    for gate in gates[:2]:
        torch.testing.assert_close(gate.significance, gates[2].significance, **close)
        near = (gates[2].significance - 0.7).abs() < 1e-3
        assert torch.equal(gate.mask | near, gates[2].mask | near)
        assert int(gate.invalid) == int(gates[2].invalid)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_rows_are_moved_alike(data):
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n, share = draw(st.integers(0, 200)), draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    mask = laid_out(torch.rand(n, generator=generator) < share, draw(LAYOUTS))
    weight = torch.rand(n, generator=generator) if draw(st.booleans()) else None
    capacity = draw(st.one_of(st.none(), st.integers(0, 220)))
    tree = {}
    for i in range(draw(st.integers(0, 3))):
        shape = [n, *draw(st.lists(st.integers(0, 5), max_size=3))]
        values = torch.randint(-50, 50, shape, generator=generator).to(draw(st.sampled_from(MOVED)))
        tree[i] = laid_out(values, draw(LAYOUTS))
    results = []
    for backend in (None, "cpp", "torch"):
        selection = sk.compact(mask, weight=weight, capacity=capacity, backend=backend)
        packed = sk.gather_rows(tree, selection, backend=backend)
        results.append((tuple(selection), packed, sk.scatter_rows(packed, selection, backend=backend)))
    for result in results[:2]:
        torch.testing.assert_close(result, results[2], rtol=0.0, atol=0.0)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_controllers_agree(data):
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n = draw(st.integers(1, 300))
    setpoint, start = draw(st.sampled_from([0.05, 0.3, 1.0])), draw(st.sampled_from([0.5, float("-inf")]))
    masses, labelled = draw(st.booleans()), draw(st.booleans())
    states = [sk.initial_state(start) for _ in range(2)]
    for _ in range(draw(st.integers(1, 4))):
        significance = torch.rand(n, generator=generator)
        mass = torch.rand(n, generator=generator) if masses else None
        labels = torch.randint(0, 2, (n,), generator=generator) - 100 * 1 if labelled else None
        overflow = torch.tensor(draw(st.integers(0, 3)), dtype=torch.int32)
        for state, backend in zip(states, ("cpp", "torch"), strict=True):
            sk.control(state, significance, setpoint, mass=mass, labels=labels, overflow=overflow, backend=backend)
        assert torch.equal(states[0].counters, states[1].counters)
        torch.testing.assert_close(states[0].values, states[1].values, rtol=2e-3, atol=2e-3, equal_nan=True)
