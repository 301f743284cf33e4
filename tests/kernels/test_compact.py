"""compact, gather_rows and scatter_rows: every backend, against the definitions."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import sparse_kernels as sk

BACKENDS = ["cpp", "torch"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    reason = sk.backends.BACKENDS[request.param].unavailable()
    if reason:
        pytest.skip(reason)
    return request.param


def masks(rows, density, seed=0):
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < density


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 1000, 700_001])  # a word, and above it several threads
def test_exact_form_is_nonzero(backend, rows, density):
    mask = masks(rows, density)
    selection = sk.compact(mask, backend=backend)
    assert torch.equal(selection.index, mask.nonzero().squeeze(-1))
    assert (selection.weight == 1).all()
    assert selection.count == mask.sum()
    assert selection.overflow == 0
    assert selection.size == rows
    assert selection.index.dtype == torch.int64
    assert selection.count.dtype == selection.overflow.dtype == torch.int32


@pytest.mark.parametrize("capacity", [0, 1, 50, 100, 1000, 2000])
@pytest.mark.parametrize("rows", [0, 1, 1000, 700_001])
def test_capacity_form(backend, rows, capacity):
    mask = masks(rows, 0.1)
    weight = torch.arange(rows) + 1.0
    selection = sk.compact(mask, weight=weight, capacity=capacity, backend=backend)
    wanted = mask.nonzero().squeeze(-1)[:capacity]
    kept = len(wanted)
    assert selection.index.shape == selection.weight.shape == (capacity,)
    assert torch.equal(selection.index[:kept], wanted)
    assert torch.equal(selection.weight[:kept], weight[wanted])
    assert (selection.index[kept:] == 0).all()
    assert (selection.weight[kept:] == 0).all()
    assert selection.count == kept
    assert selection.overflow == int(mask.sum()) - kept
    assert torch.equal(selection.valid(), torch.arange(capacity) < kept)


@hypothesis.settings(max_examples=80, deadline=None)
@hypothesis.given(
    flags=st.lists(st.booleans(), max_size=300),
    capacity=st.none() | st.integers(0, 320),
    stride=st.sampled_from([1, 2]),
)
def test_backends_are_identical(flags, capacity, stride):
    mask = torch.tensor([f for f in flags for _ in range(stride)], dtype=torch.bool)[::stride]
    results = [sk.compact(mask, capacity=capacity, backend=name) for name in BACKENDS]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("shape", [(), (1,), (3,), (8,), (3, 32, 32), (0,), (5, 7)])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8, torch.complex64]
)
def test_gather_takes_rows(backend, dtype, shape):
    tensor = (100 * torch.rand(40, *shape)).to(dtype)
    selection = sk.compact(masks(40, 0.3), backend=backend)
    taken = sk.gather_rows(tensor, selection, backend=backend)
    assert torch.equal(taken, tensor[selection.index])
    assert taken.dtype == dtype


def test_gather_of_other_memory_formats(backend):
    selection = sk.compact(masks(20, 0.5), capacity=15, backend=backend)
    images = torch.randn(20, 3, 5, 6).to(memory_format=torch.channels_last)
    taken = sk.gather_rows(images, selection, backend=backend)
    assert torch.equal(taken, images[selection.index])
    if backend == "cpp":  # bytes are bytes; index_select would lay it out anew
        assert taken.is_contiguous(memory_format=torch.channels_last)
    transposed = torch.randn(7, 20).t()
    assert torch.equal(sk.gather_rows(transposed, selection, backend=backend), transposed[selection.index])


def test_gather_of_a_tree_keeps_its_structure(backend):
    batch = {"x": torch.randn(10, 3), "meta": (torch.arange(10), [torch.ones(10, 2, 2)]), "name": "batch"}
    selection = sk.compact(masks(10, 0.5), backend=backend)
    taken = selection.take(batch)
    assert taken["name"] == "batch"
    assert torch.equal(taken["x"], batch["x"][selection.index])
    assert torch.equal(taken["meta"][0], selection.index)
    assert taken["meta"][1][0].shape == (len(selection.index), 2, 2)


def test_gather_of_large_rows_with_several_threads(backend):
    tensor = torch.randn(500, 3000)
    selection = sk.compact(masks(500, 0.5), backend=backend)
    assert torch.equal(sk.gather_rows(tensor, selection, backend=backend), tensor[selection.index])


@pytest.mark.parametrize("capacity", [None, 4, 30])
def test_gather_and_scatter_are_transposes(backend, capacity):
    tensor = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    selection = sk.compact(masks(12, 0.5), capacity=capacity, backend=backend)

    def gather(t):
        return sk.gather_rows(t, selection, backend=backend)

    if capacity is None:
        assert torch.autograd.gradcheck(gather, (tensor,))
        assert torch.autograd.gradgradcheck(gather, (tensor,))
    rows = gather(tensor)
    ones = torch.randn_like(rows)
    (gradient,) = torch.autograd.grad(rows, tensor, ones)
    # Padding repeats row 0 in the gather and adds nothing in the backward.
    wanted = torch.zeros_like(tensor)
    for slot in range(int(selection.count)):
        wanted[selection.index[slot]] += ones[slot]
    assert torch.equal(gradient, wanted)
    assert torch.equal(sk.scatter_rows(ones, selection, backend=backend), wanted)


def test_scatter_is_differentiable(backend):
    selection = sk.compact(masks(9, 0.4), capacity=7, backend=backend)
    assert selection.count < 7
    rows = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: sk.scatter_rows(r, selection, backend=backend), (rows,))
    assert torch.autograd.gradgradcheck(lambda r: sk.scatter_rows(r, selection, backend=backend), (rows,))


def test_selection_from_elsewhere_cannot_read_out_of_bounds():
    wild = sk.Selection(torch.tensor([0, 99]), torch.ones(2), torch.tensor(2), torch.tensor(0), 10)
    with pytest.raises(ValueError, match="99"):
        sk.gather_rows(torch.randn(10, 2), wild, backend="cpp")
    for bad in (-1, 10):
        with pytest.raises(ValueError, match="outside 10 rows"):
            sk.gather_rows(torch.randn(10), wild._replace(index=torch.tensor([0, bad])), backend="cpp")
        with pytest.raises(ValueError, match="outside 10 rows"):
            sk.scatter_rows(torch.randn(2), wild._replace(index=torch.tensor([0, bad])), backend="cpp")
    with pytest.raises(ValueError, match="count 3"):
        sk.scatter_rows(torch.randn(2), wild._replace(index=torch.tensor([0, 1]), count=torch.tensor(3)), backend="cpp")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sk.compact(torch.ones(3)), "wanted bool"),
        (lambda: sk.compact(torch.ones(3, 2, dtype=torch.bool)), r"\(3, 2\)"),
        (lambda: sk.compact(torch.ones(3, dtype=torch.bool), capacity=-1), "capacity=-1"),
        (lambda: sk.compact(torch.ones(3, dtype=torch.bool), capacity=2**31), "capacity"),
        (lambda: sk.compact(torch.ones(3, dtype=torch.bool), capacity=1.5), "capacity=1.5"),
        (lambda: sk.compact(torch.ones(3, dtype=torch.bool), weight=torch.ones(2)), r"weight.*\(2,\)"),
        (lambda: sk.compact(torch.ones(3, dtype=torch.bool), backend="tpu"), "unknown backend 'tpu'"),
        (lambda: sk.compact(torch.ones(3, dtype=torch.bool)).take(torch.ones(4)), "wants 3 rows"),
        (lambda: sk.compact(torch.ones(3, dtype=torch.bool)).take((torch.ones(3), torch.ones(()))), "wants 3 rows"),
        (lambda: sk.compact(torch.ones(3, dtype=torch.bool)).take(torch.ones(3, device="meta")), "meta"),
        (lambda: sk.scatter_rows(torch.ones(4), sk.compact(torch.ones(3, dtype=torch.bool))), "wants 3 rows"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
