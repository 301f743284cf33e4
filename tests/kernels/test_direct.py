"""Calls in one step of C++ against the general route: what they serve is the same, what they leave to it is left."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_kernels as sk
from sparse_kernels import _dispatch, _routing
from sparse_kernels._arguments import Settings
from sparse_kernels.backends import cpp_direct
from sparse_kernels.control_law import initial_state

pytestmark = pytest.mark.skipif(not cpp_direct.AVAILABLE, reason="_cpp is not built, or this PyTorch is too old")
WEIGHTS = {"loss": 0.7, "entropy": 0.3}
CPP = cpp_direct._cpp
FUNCTIONS = (
    "row_stats_plain", "compact_plain", "gather_plain", "gate_rows_plain", "select_plain", "gate_step_plain",
)  # fmt: skip


def flat(result):
    return torch.utils._pytree.tree_leaves(result)


def check_same(call):
    """Served by one step, and equal in everything to what the general route gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpp_direct, "AVAILABLE", False)
        general = call()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_routing, "choose", None)  # the general route: calling it is an error
        patch.setattr(_routing, "serve_fused", None)
        result = call()
    assert type(result) is type(general)
    assert torch.utils._pytree.tree_structure(result) == torch.utils._pytree.tree_structure(general)
    for a, b in zip(flat(result), flat(general), strict=True):
        if isinstance(a, torch.Tensor):
            assert (a.dtype, a.shape, a.stride(), a.device) == (b.dtype, b.shape, b.stride(), b.device)
            assert (type(a), a.requires_grad, a.is_leaf) == (torch.Tensor, False, True)
            if a.dtype.itemsize == 1:
                a, b = a.view(torch.uint8), b.view(torch.uint8)
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            assert a == b
    return result


def batch(rows=37, classes=11, dtype=torch.float32, targets=torch.int64):
    torch.manual_seed(3)
    labels = torch.randint(0, classes, (rows,), dtype=targets)
    labels[::7] = -100
    logits = 2 * torch.randn(rows, classes)
    logits[1::9, 2] = torch.nan
    return logits.to(dtype), labels


@pytest.mark.parametrize("capacity", [None, 0, 5, 200])
@pytest.mark.parametrize("rows", [0, 1, 64, 1000])
def test_compact(rows, capacity):
    torch.manual_seed(0)
    for mask in (torch.rand(rows) < 0.3, torch.zeros(rows, dtype=torch.bool), torch.ones(rows, dtype=torch.bool)):
        check_same(lambda mask=mask: sk.compact(mask, capacity=capacity))
        weight = (torch.arange(rows) * 0.5).requires_grad_()
        check_same(lambda mask=mask, weight=weight: sk.compact(mask, weight=weight, capacity=capacity))


DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn,
]  # fmt: skip


def test_gather_of_every_dtype_and_tree():
    torch.manual_seed(0)
    mask = torch.rand(50) < 0.3
    for selection in (sk.compact(mask), sk.compact(mask, capacity=40), sk.compact(torch.zeros(50, dtype=torch.bool))):
        for dtype in DTYPES:
            for shape in ((50,), (50, 3), (50, 2, 5), (50, 0), (50, 1, 1)):
                values = torch.randint(0, 2, shape).to(dtype)
                check_same(lambda values=values, s=selection: sk.gather_rows(values, s))
        a, b = torch.randn(50, 3), torch.arange(50)
        for tree in (a, (a, b), [a, b, a], {"x": a, "y": b}, (), [], {}, torch.nn.Parameter(a, requires_grad=False)):
            check_same(lambda tree=tree, s=selection: sk.gather_rows(tree, s))


@pytest.mark.parametrize("targets", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 37, 300])
def test_row_stats(rows, dtype, targets):
    logits, labels = batch(rows, 11, dtype, targets)
    settings = {"label_smoothing": 0.1, "temperature": 0.7, "softcap": 20, "ignore_index": -100}
    for outputs in (("loss", "entropy"), sk.STATISTICS, ["argmax"], ("logsumexp", "logsumexp", "loss"), ()):
        check_same(lambda outputs=outputs: sk.row_stats(logits, labels, outputs=outputs, **settings))
    with torch.no_grad():
        leaf = torch.nn.Parameter(logits)
        check_same(lambda: sk.row_stats(leaf, labels))
    check_same(lambda: sk.row_stats(leaf, labels, outputs=("grad_norm",)))  # not differentiable
    pixels = logits.reshape(rows, 1, 11).expand(rows, 4, 11).contiguous()
    check_same(lambda: sk.row_stats(pixels, labels[:, None].repeat(1, 4)))


@pytest.mark.parametrize("targets", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 37, 300])
def test_gate_rows_and_select(rows, dtype, targets):
    logits, labels = batch(rows, 11, dtype, targets)
    settings = {"weights": WEIGHTS, "label_smoothing": 0.1, "temperature": 0.7, "softcap": 20, "ignore_index": -100}
    drawn = {"gate_temperature": 0.5, "p_min": 0.1, "seed": 2**40, "step": torch.tensor(7)}
    for more in ({}, drawn, {**drawn, "step": 7, "seed": -3}):
        check_same(lambda more=more: sk.gate_rows(logits, labels, torch.tensor([1.5]), **settings, **more))
        for capacity in (None, 10):
            for tree in (None, (logits, labels), {"a": logits}) if rows else (None,):
                check_same(
                    lambda more=more, capacity=capacity, tree=tree: sk.select(
                        logits, labels, torch.tensor(1.5), **settings, **more, tree=tree, capacity=capacity
                    )
                )
    pixels = logits.reshape(rows, 1, 11).expand(rows, 4, 11).contiguous()
    check_same(lambda: sk.select(pixels, labels[:, None].repeat(1, 4), torch.tensor(1.5), weights={"margin": 1}))


@pytest.mark.parametrize("threshold", [1.5, 0.1, -2, 0, 2**60, 3e38, torch.inf, -torch.inf, torch.nan])
def test_a_threshold_that_is_a_number(threshold):
    logits, labels = batch(300)
    found = check_same(lambda: sk.gate_rows(logits, labels, threshold, weights=WEIGHTS))
    assert torch.equal(found.mask, sk.gate_rows(logits, labels, torch.tensor(float(threshold)), weights=WEIGHTS).mask)
    drawn = {"weights": WEIGHTS, "gate_temperature": 0.5, "seed": 4}
    check_same(lambda: sk.select(logits, labels, threshold, tree=(logits, labels), capacity=50, **drawn))


@pytest.mark.parametrize(
    "threshold", [1e39, -1e39, 10**400, True, None, "1", 1j, [1.5], torch.ones(2), torch.ones(1).int()]
)
def test_a_threshold_that_is_no_number_of_float32_is_left_to_the_general_route(threshold):
    assert CPP.gate_rows_plain(*batch(), WEIGHTS, Settings(), threshold) is None


@pytest.mark.parametrize("by_mass", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_gate_step_moves_the_same_state(temperature, by_mass):
    logits, labels = batch(256)
    states = []

    def step():
        state = initial_state(torch.tensor(1.5))
        states.append(state)
        found = None
        for _ in range(3):
            found = sk.ops.gate_step(
                logits, labels, state, torch.tensor(0.25), weights=WEIGHTS, capacity=20, by_mass=by_mass,
                gate_temperature=temperature, p_min=temperature / 10, seed=5,
            )  # fmt: skip
        return found

    check_same(step)
    (values, counters), (other_values, other_counters) = states
    assert torch.equal(values, other_values)
    assert torch.equal(counters, other_counters)
    assert counters[0] == 3


class Watch(TorchDispatchMode):
    seen = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += (str(func),)
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def untouched(monkeypatch):
    """The functions of C++ that were asked, in a list that grows."""
    asked = []
    spy = type("Spy", (), {name: staticmethod(lambda *a, name=name: asked.append(name)) for name in FUNCTIONS})
    monkeypatch.setattr(cpp_direct, "_cpp", spy)
    return asked


def test_a_watcher_sees_operators(monkeypatch):
    mask, rows = torch.rand(9) < 0.5, torch.randn(9, 2)
    asked = untouched(monkeypatch)
    with Watch() as watch:
        sk.compact(mask).take(rows)
    assert any("sparse_kernels.compact" in name for name in watch.seen)
    assert any("sparse_kernels.gather_rows" in name for name in watch.seen)
    with torch.autograd.forward_ad.dual_level():
        sk.compact(mask).take(rows)
    torch.func.vmap(lambda row: (sk.compact(mask), row)[1])(rows)
    monkeypatch.setattr(_dispatch, "_forced", "torch")
    sk.compact(mask).take(rows)
    monkeypatch.setattr(_dispatch, "_forced", None)
    sk.compact(mask, backend="torch").take(rows)
    assert asked == ["gather_plain"]  # of the last take alone, which names no backend


@pytest.mark.parametrize(("dim", "direct"), [(-1, True), (2, True), (1, False), (-2, False)])
def test_the_last_dimension_is_direct_by_either_of_its_numbers(monkeypatch, dim, direct):
    asked = untouched(monkeypatch)
    sk.gate_rows(torch.randn(3, 3, 3), torch.zeros(3, 3, dtype=torch.int64), torch.zeros(1), weights=WEIGHTS, dim=dim)
    assert asked == ["gate_rows_plain"] * direct


def test_what_is_left_to_the_general_route():
    mask = torch.rand(12) < 0.5
    selection = sk.compact(mask)
    rows = torch.randn(12, 4)
    nothing = CPP.gather_plain(rows, selection.index, 12, False)
    assert nothing is not None
    for other in (
        rows.as_subclass(Subclass), rows.t().contiguous().t(), rows[:, :2], rows[:11], torch.tensor(1.0), 3, None, "x",
        rows.to("meta"), rows.to_sparse(), torch.complex(rows, rows).conj(), torch.complex(rows, rows).conj().imag,
        (rows, [rows]), (rows, 3), torch.quantize_per_tensor(rows, 0.1, 0, torch.qint8), torch._efficientzerotensor(12),
    ):  # fmt: skip
        assert CPP.gather_plain(other, selection.index, 12, False) is None, type(other)
    leaf = rows.clone().requires_grad_()
    assert CPP.gather_plain(leaf, selection.index, 12, True) is None
    assert CPP.gather_plain((rows, leaf * 2), selection.index, 12, True) is None
    packed = CPP.gather_plain(leaf, selection.index, 12, False)
    assert torch.equal(packed, leaf.detach()[mask])
    assert not packed.requires_grad
    for index in (selection.index.int(), selection.index + 6, -1 - selection.index, selection.index[None]):
        assert CPP.gather_plain(rows, index, 12, False) is None
    assert CPP.gather_plain(rows[:0], selection.index[:0], 0, False) is None
    for arguments in (
        (mask.int(), None, None), (mask[None], None, None), (mask, torch.ones(11), None), (mask, mask, None),
        (mask, None, -1), (mask, None, 2**31), (mask, None, True), (mask, None, 2.0), (mask[::2], None, None),
    ):  # fmt: skip
        assert CPP.compact_plain(*arguments) is None, arguments
    with pytest.raises(TypeError, match="argument"):
        CPP.compact_plain(mask)


def test_errors_are_the_general_routes_and_the_state_stays():
    logits, labels = batch(20)
    with pytest.raises(ValueError, match="must have 12 rows"):
        sk.gather_rows(torch.randn(5, 2), sk.compact(torch.ones(12, dtype=torch.bool)))
    with pytest.raises(ValueError, match="`mask` must be "):
        sk.compact(torch.ones(3, dtype=torch.int64))
    wrong = labels.clone()
    wrong[3] = 99
    state = initial_state(torch.tensor(1.5))
    before = [tensor.clone() for tensor in state]
    call = lambda labels, **more: sk.ops.gate_step(  # noqa: E731
        logits, labels, state, torch.tensor(0.2), **({"weights": WEIGHTS} | more)
    )
    for message, run in (
        ("target 99 in row 3", lambda: call(wrong)),
        ("`targets` must have shape", lambda: call(labels[:5])),
        ("`weights` must name", lambda: call(labels, weights={"lost": 1.0})),
        ("`weights` must name", lambda: call(labels, weights={})),
        ("`label_smoothing` must be", lambda: call(labels, label_smoothing=2.0)),
        ("`p_min` must be", lambda: call(labels, p_min=-1.0)),
        ("`capacity` must be", lambda: call(labels, capacity=-1)),
    ):
        with pytest.raises(ValueError, match=message):
            run()
    torch.testing.assert_close(list(state), before, rtol=0, atol=0, equal_nan=True)


def test_gradients_and_compilers_take_the_operators():
    rows, mask = torch.randn(9, 2, requires_grad=True), torch.rand(9) < 0.5
    packed = sk.compact(mask).take((rows, torch.arange(9)))
    packed[0].sum().backward()
    assert torch.equal(rows.grad, mask[:, None].float().expand(9, 2))
    compiled = torch.compile(lambda m, r: sk.compact(m, capacity=4).take(r), fullgraph=True, backend="eager")
    assert torch.equal(compiled(mask, rows.detach()), sk.compact(mask, capacity=4).take(rows.detach()))


@pytest.mark.parametrize("size", [0, 1, 8, 63, 64, 65, 511, 512, 513, 5000])
def test_results_begin_a_cache_line_and_outlive_each_other(size):
    """As PyTorch's own do: small ones in the block that describes them, larger ones in one of their own."""
    rows, mask = torch.arange(size * 2, dtype=torch.uint8).view(2, size), torch.tensor([False, True])
    for _ in range(20):  # blocks of the C library, which begin anywhere
        selection = sk.compact(torch.ones(size, dtype=torch.bool))
        row, ones = sk.compact(mask).take(rows), selection.weight
        for result in (*selection[:4], row):
            assert result.numel() == 0 or result.data_ptr() % 64 == 0
        del selection, result
        others = [torch.full((size,), 7, dtype=torch.uint8) for _ in range(9)]
        assert torch.equal(row[0], rows[1])
        assert torch.equal(ones, torch.ones(size))
        assert all(int(other.sum(dtype=torch.int64)) == 7 * size for other in others)


def test_results_hold_their_memory_and_nothing_leaks():
    """The allocator's memory goes with the last tensor."""
    import gc
    import resource

    rows, mask = torch.randn(256, 4096), torch.ones(256, dtype=torch.bool)
    kept = sk.compact(mask).take(rows)
    view = kept[3:]
    del kept
    gc.collect()
    assert torch.equal(view, rows[3:])
    sizes = []
    for _ in range(3):
        for _ in range(100):
            sk.compact(mask).take((rows, rows))
            assert CPP.gather_plain((rows, 3), torch.arange(256), 256, False) is None
        sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert sizes[2] - sizes[1] < 20_000  # KB; 800 MB have passed


def test_tensors_without_bytes_of_their_own_are_served_right():
    zeros, targets = torch._efficientzerotensor((8, 4)), torch.zeros(8, dtype=torch.int64)
    selection = sk.compact(torch.arange(8) % 2 == 0)
    assert sk.gather_rows(zeros, selection).tolist() == [[0.0] * 4] * 4
    assert sk.scatter_rows(torch._efficientzerotensor((4, 3)), selection).tolist() == [[0.0] * 3] * 8
    torch.testing.assert_close(sk.row_stats(zeros, targets).loss, torch.full((8,), 4.0).log())
    negated = torch.view_as_complex(torch.randn(8, 4, 2)).conj().imag
    assert negated.is_neg()
    expected = torch.nn.functional.cross_entropy(negated.clone(), targets, reduction="none")
    torch.testing.assert_close(sk.row_stats(negated, targets).loss, expected)
    gated = sk.gate_rows(negated, targets, torch.tensor(0.0), weights={"loss": 1.0})
    torch.testing.assert_close(gated.significance, expected)


def test_a_gradient_of_zeros_without_memory_is_moved():
    rows = torch.randn(8, 4, requires_grad=True)
    packed = sk.gather_rows(rows, sk.compact(torch.arange(8) % 2 == 0))
    packed.backward(torch._efficientzerotensor((4, 4)))
    assert rows.grad is not None
    assert rows.grad.count_nonzero() == 0


def test_select_packs_what_it_can_in_the_same_step_and_leaves_the_rest_to_the_general_route():
    logits, labels = batch(40)
    leaf = torch.randn(40, 3, requires_grad=True)
    settings = {"weights": WEIGHTS, "capacity": 12}
    arguments = (logits, labels, WEIGHTS, Settings(), torch.tensor(1.5), 12)
    plain = CPP.select_plain(*arguments, (logits, labels), True)
    assert [tensor.shape for tensor in plain[-1]] == [(12, 11), (12,)]
    for tree in (leaf, {"deep": [logits]}, logits[:7]):
        assert CPP.select_plain(*arguments, tree, True)[-1] is None
    packed = sk.select(logits, labels, torch.tensor(1.5), tree={"deep": [leaf]}, **settings).packed["deep"][0]
    assert packed.grad_fn is not None
    assert torch.equal(packed, leaf[plain[4]])
    with pytest.raises(ValueError, match="40"):
        sk.select(logits, labels, torch.tensor(1.5), tree=logits[:7], **settings)
