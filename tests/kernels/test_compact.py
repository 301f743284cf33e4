"""compact, gather_rows and scatter_rows: every backend, against the definitions."""

import itertools
import mmap

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import sparse_kernels as sk
from sparse_kernels._arguments import CompactCall, GateStepCall, SelectCall, checked_settings

BACKENDS = ["cpp", "torch"]
MISSING = sk._dispatch.BACKENDS["cpp"].unavailable_reason()
needs_cpp = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture(params=BACKENDS)
def backend(request):
    reason = sk._dispatch.BACKENDS[request.param].unavailable_reason()
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


@needs_cpp
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


@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.3, 0.9, 1.0])
def test_every_instruction_set_packs_the_same(instruction_set, density):
    """Sparse and dense words, the last words one by one, and several threads from 256K flags on."""
    for rows, capacity in itertools.product([1, 64, 191, 4096, 300_000], [None, 0, 5, 63, 64, 65, 700, 5000]):
        mask, weight = masks(rows, density), torch.rand(rows)
        ours = sk.compact(mask, weight=weight, capacity=capacity, backend="cpp")
        wanted = sk.compact(mask, weight=weight, capacity=capacity, backend="torch")
        for a, b in zip(ours, wanted, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_slots_behind_the_capacity_stay_as_they_are(instruction_set):
    """Kernels that write whole vectors must not write past the slots that they were given."""
    from sparse_kernels.backends import cpp as cpp_backend

    mask = masks(1000, 0.5)
    wanted = mask.nonzero().squeeze(-1)
    count, overflow = torch.zeros(2, dtype=torch.int32)
    for capacity in (0, 1, 63, 64, 100, 400):
        index, weight = torch.full((600,), -7), torch.full((600,), -7.0)
        cpp_backend._cpp.compact(
            mask.data_ptr(), 0, 1000, [], capacity,
            index.data_ptr(), weight.data_ptr(), count.data_ptr(), overflow.data_ptr(),
        )  # fmt: skip
        assert torch.equal(index[:capacity], wanted[:capacity])
        assert (index[capacity:] == -7).all()
        assert (weight[capacity:] == -7).all()


def test_a_flag_is_set_where_its_byte_is_not_zero(instruction_set):
    flags = torch.tensor([0, 1, 2, 0, 128, 255, 0] * 30, dtype=torch.uint8)
    assert torch.equal(sk.compact(flags.view(torch.bool)).index, flags.nonzero().squeeze(-1))


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


@pytest.mark.parametrize("row_bytes", [1023, 1024, 1025, 1087, 1151, 1152, 1153, 5000, 12_288, 12_289])
def test_rows_of_any_length_are_whole(instruction_set, row_bytes):
    """Rows of every offset to a cache line, among others that stay as they are."""
    torch.manual_seed(0)
    rows = torch.randint(0, 256, (40, row_bytes), dtype=torch.uint8)
    index = torch.randperm(40)[:17].sort().values
    selection = sk.compact(torch.zeros(40, dtype=torch.bool).index_fill_(0, index, 1))
    packed = sk.gather_rows(rows, selection, backend="cpp")
    assert torch.equal(packed, rows[index])
    assert torch.equal(
        sk.scatter_rows(packed, selection, backend="cpp"), torch.zeros_like(rows).index_copy_(0, index, packed)
    )


@pytest.mark.parametrize("shape", [(500, 3000), (3, 100_003), (20, 1_600_001), (40_000, 3), (3, 0)])
def test_large_tensors_by_several_threads(backend, shape):
    """Shares of whole rows, rows cut between threads, and from 16 MB on streaming stores and large pages.

    Each thread has a share of every tensor, however small its rows are.
    """
    rows, before = shape[0], torch.get_num_threads()
    tree = (
        torch.randint(0, 255, shape, dtype=torch.uint8), torch.arange(rows), torch.rand(rows, 0),
        torch.rand(rows, 11) < 0.5, torch.randint(0, 255, (rows, 777), dtype=torch.uint8),
    )  # fmt: skip
    selection = sk.compact(masks(rows, 0.6), backend=backend)
    try:
        for threads in (before, 3, 5):
            torch.set_num_threads(threads)
            taken = sk.gather_rows(tree, selection, backend=backend)
            back = sk.scatter_rows(taken, selection, backend=backend)
            for tensor, some, full in zip(tree, taken, back, strict=True):
                assert torch.equal(some, tensor[selection.index])
                assert torch.equal(full, torch.zeros_like(tensor).index_copy(0, selection.index, some))
    finally:
        torch.set_num_threads(before)


def views():
    """Tensors of 24 rows whose rows do not follow one another, or whose elements do not."""
    images = torch.randn(24, 4, 5, 6)
    return {
        "every second row": torch.randn(48, 7)[::2],
        "part of each row": torch.randn(24, 9)[:, 2:7],
        "part of each inner row": torch.randn(24, 5, 9)[:, :, 2:7],
        "part of the channels": images[:, :2],
        "transposed": torch.randn(7, 24).t(),
        "permuted inside": torch.randn(24, 5, 7).transpose(1, 2),
        "one row, repeated": torch.randn(7).expand(24, 7),
        "one number, repeated": torch.ones(()).expand(24, 7),
        "channels last": images.to(memory_format=torch.channels_last),
        "every second, channels last": torch.randn(48, 4, 5, 6).to(memory_format=torch.channels_last)[::2],
        "columns": torch.randn(24, 2)[:, 1],
        "not aligned": torch.randn(24 * 7 + 1)[1:].reshape(24, 7),
        "conjugate": torch.randn(24, 3, dtype=torch.complex64).conj(),
        "negative": torch.randn(24, 3, dtype=torch.complex64).conj().imag,
    }


@pytest.mark.parametrize("name", views())
def test_gather_and_scatter_of_views(backend, name):
    tensor = views()[name]
    selection = sk.compact(masks(24, 0.4), capacity=12, backend=backend)
    kept = selection.index[: selection.count]
    assert torch.equal(sk.gather_rows(tensor, selection, backend=backend), tensor[selection.index])
    packed = sk.compact(torch.ones(24, dtype=torch.bool), backend=backend)  # the view itself as packed rows
    assert torch.equal(sk.scatter_rows(tensor, packed, backend=backend), tensor)
    first = sk.Selection(kept, torch.ones(len(kept)), torch.tensor(len(kept)), torch.tensor(0), 24)
    back = sk.scatter_rows(tensor[: len(kept)], first, backend=backend)
    assert torch.equal(back, torch.zeros_like(tensor).index_copy(0, kept, tensor[: len(kept)]))


@needs_cpp
def test_rows_without_gaps_are_moved_as_they_lie():
    selection = sk.compact(masks(24, 0.4))
    for name in ("channels last", "every second, channels last", "permuted inside"):
        tensor = views()[name]
        taken = sk.gather_rows(tensor, selection)
        assert taken.stride()[1:] == tensor.stride()[1:], name
        assert sk.scatter_rows(taken, selection).stride()[1:] == tensor.stride()[1:], name


@needs_cpp
@pytest.mark.parametrize("order", [[3, 0, 7], [3, 3, 0, 9, 3], [0, 1, 2], []])
def test_scatter_of_an_index_in_any_order(order):
    """compact gives ascending indices; a selection made by hand need not have them. The last of equals wins."""
    index, rows = torch.tensor(order, dtype=torch.int64), torch.randn(len(order), 4)
    made = sk.Selection(index, torch.ones(len(order)), torch.tensor(len(order)), torch.tensor(0), 10)
    wanted = torch.zeros(10, 4)
    for slot, row in enumerate(order):
        wanted[row] = rows[slot]
    assert torch.equal(sk.scatter_rows(rows, made, backend="cpp"), wanted)


@needs_cpp
def test_a_tree_is_moved_in_one_call(monkeypatch):
    from sparse_kernels.backends import cpp as cpp_backend
    from sparse_kernels.backends import cpp_direct

    calls = []
    monkeypatch.setattr(cpp_direct, "AVAILABLE", False)
    monkeypatch.setattr(cpp_backend, "_move_rows", lambda *a: calls.append(len(a[1])) or a[1])
    tree = {"x": torch.randn(10, 3), "y": torch.arange(10), "z": torch.ones(10, dtype=torch.bool)}
    sk.gather_rows(tree, sk.compact(masks(10, 0.5)), backend="cpp")
    assert calls == [3]


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


@needs_cpp
def test_selection_from_elsewhere_cannot_read_out_of_bounds():
    wild = sk.Selection(torch.tensor([0, 99]), torch.ones(2), torch.tensor(2), torch.tensor(0), 10)
    for tensor in (torch.randn(10, 2), torch.randn(2, 10).t()):  # bytes, and what PyTorch gathers
        with pytest.raises(ValueError, match="index 99 in slot 1 is outside 10 rows"):
            sk.gather_rows((torch.ones(10), tensor), wild, backend="cpp")
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
        (lambda: sk.compact(torch.ones(3)), "`mask` must be bool"),
        (lambda: sk.compact(torch.ones(3, 2, dtype=torch.bool)), r"\(3, 2\)"),
        (lambda: sk.compact(torch.ones(3, dtype=torch.bool), capacity=-1), "`capacity` must be .* got -1"),
        (lambda: sk.compact(torch.ones(3, dtype=torch.bool), capacity=2**31), "`capacity` must be"),
        (lambda: sk.compact(torch.ones(3, dtype=torch.bool), capacity=1.5), "`capacity` must be .* got 1.5"),
        (lambda: sk.compact(torch.ones(3, dtype=torch.bool), weight=torch.ones(2)), r"weight.*\(2,\)"),
        (lambda: sk.compact(torch.ones(3, dtype=torch.bool), backend="tpu"), "unknown backend 'tpu'"),
        (lambda: sk.compact(torch.ones(3, dtype=torch.bool)).take(torch.ones(4)), "must have 3 rows"),
        (lambda: sk.compact(torch.ones(3, dtype=torch.bool)).take((torch.ones(3), torch.ones(()))), "must have 3 rows"),
        (lambda: sk.compact(torch.ones(3, dtype=torch.bool)).take(torch.ones(3, device="meta")), "meta"),
        (lambda: sk.scatter_rows(torch.ones(4), sk.compact(torch.ones(3, dtype=torch.bool))), "must have 3 rows"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def select_arguments(**changes):
    torch.manual_seed(0)
    return {
        "logits": torch.randn(50, 6), "targets": torch.arange(50) % 6, "threshold": torch.tensor(1.5),
        "weights": {"loss": 1.0}, "outputs": ("entropy",), **changes,
    }  # fmt: skip


@pytest.mark.parametrize("capacity", [None, 10, 40])
@pytest.mark.parametrize("gate_temperature", [0.0, 0.5])
def test_select_is_its_three_parts(backend, capacity, gate_temperature):
    arguments = select_arguments(gate_temperature=gate_temperature, p_min=0.1, seed=3, step=5, backend=backend)
    tree = {"x": torch.randn(50, 3), "deep": (torch.arange(50), "name")}
    found = sk.select(**arguments, tree=tree, capacity=capacity)
    gated = sk.gate_rows(**arguments)
    selection = sk.compact(gated.mask, weight=gated.weight, capacity=capacity, backend=backend)
    assert 0 < int(selection.count) < 50
    assert torch.equal(found.gated.mask, gated.mask)
    assert torch.equal(found.gated.significance, gated.significance)
    assert torch.equal(found.gated.stats.entropy, gated.stats.entropy)
    for a, b in zip(found.selection, selection, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert torch.equal(found.packed["x"], tree["x"][selection.index])
    assert torch.equal(found.packed["deep"][0], selection.index)
    assert found.packed["deep"][1] == "name"


def test_select_of_pixels_packs_their_rows_in_the_targets_order(backend):
    logits, targets = torch.randn(2, 5, 4, 3), torch.randint(0, 5, (2, 4, 3))
    features = torch.randn(24, 2, requires_grad=True)
    found = sk.select(logits, targets, torch.tensor(1.5), weights={"loss": 1.0}, tree=features, dim=1, backend=backend)
    flags = found.gated.mask.flatten()
    assert found.gated.mask.shape == targets.shape
    assert torch.equal(found.selection.index, flags.nonzero().squeeze(-1))
    assert torch.equal(found.packed, features[flags])
    found.packed.sum().backward()
    assert torch.equal(features.grad, flags[:, None].float().expand(24, 2))


def test_more_rows_than_int32_counts_are_refused():
    """Of memory that is neither written nor read."""
    mask = torch.frombuffer(mmap.mmap(-1, 2**31, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.bool)
    targets, state = torch.zeros(1, dtype=torch.int64).expand(2**31), sk.initial_state()
    scored = torch.zeros(1, 2).expand(2**31, 2), targets, (), -1, checked_settings()
    for call in (
        lambda: sk.compact(mask, capacity=3),
        lambda: CompactCall(mask[:1].expand(2**31), None, 3),
        lambda: SelectCall(*scored, torch.tensor(0.0), {"loss": 1.0}, None, None, 3),
        lambda: GateStepCall(*scored, state.values, {"loss": 1.0}, None, 3, state, 0.5, False),
    ):
        with pytest.raises(ValueError, match=r"must have fewer than 2\^31 rows to select from, got 2147483648"):
            call()


def test_select_without_a_tree_packs_nothing(backend):
    assert sk.select(**select_arguments(), backend=backend).packed is None


def test_select_is_made_of_the_other_operations_where_no_backend_has_it_as_one():
    found = sk.select(**select_arguments(logits=torch.randn(50, 6, dtype=torch.float64)), tree=torch.arange(50))
    assert torch.equal(found.packed, found.selection.index)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capacity": -1}, "`capacity` must be .* got -1"),
        ({"capacity": 2**31}, "`capacity` must be"),
        ({"tree": torch.ones(49)}, "must have 50 rows"),
        ({"tree": [torch.ones(50), (torch.ones(51), "name")]}, "must have 50 rows"),
        ({"tree": torch.ones(50, device="meta")}, "meta"),
        ({"weights": {}}, "must name one or more"),
        ({"backend": "tpu"}, "unknown backend"),
    ],
)
def test_select_refuses_bad_input_before_it_computes(changes, message):
    # A target out of range is only found while computing: a message about it would say that it came to that.
    with pytest.raises(ValueError, match=message) as error:
        sk.select(**select_arguments(targets=torch.full((50,), 99), **changes))
    assert "\n" not in str(error.value)
