"""The operators: what autograd, the compiler, export, dispatch modes and transforms see of a kernel."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sparse_kernels as sk
from sparse_kernels import _dispatch, torch_library
from sparse_kernels._arguments import Settings, StatsCall
from sparse_kernels.backends import cpp as cpp_backend
from sparse_kernels.backends import cpp_direct
from sparse_kernels.control_law import initial_state

pytestmark = pytest.mark.skipif(cpp_backend.unavailable_reason() is not None, reason="the C++ backend is not built")
OPS = torch.ops.sparse_kernels
PLAIN = (-1, 1.0, 0.0, 0.0, -100)  # dim, temperature, softcap, label_smoothing, ignore_index
SETTINGS = (1, 0.7, 6.0, 0.1, -100)
WEIGHTS = {"loss": 0.7, "entropy": 0.3}


def batch(*shape, dim=-1, dtype=torch.float32, seed=0):
    """Logits, targets with an ignored row, and what multiplies each row's loss and entropy."""
    generator = torch.Generator().manual_seed(seed)
    rows = [size for axis, size in enumerate(shape) if axis != dim % len(shape)]
    logits = (2 * torch.randn(shape, generator=generator)).to(dtype)
    targets = torch.randint(0, shape[dim], rows, generator=generator)
    targets.view(-1)[1] = -100
    return logits, targets, torch.randn(2, *rows, generator=generator)


def masks(rows, density=0.4, seed=0):
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < density


def objective(logits, targets, factors, **settings):
    """A scalar that both differentiable outputs reach, each row by another factor."""
    stats = sk.row_stats(logits, targets, **settings)
    return (factors[0] * stats.loss + factors[1] * stats.entropy).sum()


def operators(graph):
    """The names of our operators in a graph, in order."""
    return [
        str(node.target).split(".")[1]
        for node in graph.nodes
        if node.op == "call_function" and str(node.target).startswith("sparse_kernels.")
    ]


@pytest.fixture
def seen(monkeypatch):
    """The operations that went through the dispatcher."""
    names = []
    for name in ("row_stats", "gate_rows", "compact", "control", "gather_rows", "scatter_rows"):
        through = getattr(torch_library, name)
        monkeypatch.setattr(
            torch_library,
            name,
            lambda *a, name=name, through=through, **kw: (names.append(name), through(*a, **kw))[1],
        )
    return names


# The operators by themselves


@pytest.mark.parametrize(
    ("shape", "dim", "dtype", "settings", "gradient"),
    [
        ((6, 9), -1, torch.float32, PLAIN, False),
        ((6, 9), -1, torch.float32, PLAIN, True),
        ((2, 5, 3, 4), 1, torch.bfloat16, SETTINGS, False),
    ],
)
def test_opcheck_row_stats(shape, dim, dtype, settings, gradient):
    logits, targets, factors = batch(*shape, dim=dim, dtype=dtype)
    logits.requires_grad_(gradient)
    for save in (False, True):
        outputs = ["loss", "entropy", "argmax", "grad_norm"]
        arguments = (logits, targets, outputs, *settings, save, False, "cpp")
        torch.library.opcheck(OPS.row_stats.default, arguments)
    *_, maximum, total = OPS.row_stats(*arguments)
    entropy = sk.row_stats(logits.detach(), targets, dim=dim).entropy
    factors = factors.requires_grad_(gradient)
    # Its gradient is the reference's second derivative, which takes PyTorch long to trace: once is enough.
    alone = [] if gradient else [(None, factors[1]), (factors[0], None)]
    for given in ((factors[0], factors[1]), *alone):
        upstream = tuple(None if g is None else g.detach().requires_grad_(gradient) for g in given)
        of_rows = (targets, maximum.detach(), total.detach(), entropy)
        torch.library.opcheck(OPS.row_stats_backward.default, (logits, *of_rows, *upstream, *settings, "cpp"))
        arguments = (logits.detach().clone(), *of_rows, *(g if g is None else g.detach() for g in upstream))
        torch.library.opcheck(OPS.row_stats_backward_.default, (*arguments, *settings, "cpp"))


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("gate_temperature", [0.0, 0.5])
def test_opcheck_gate_rows(gate_temperature, gradient):
    logits, targets, factors = batch(6, 9)
    names, weights = list(WEIGHTS), list(WEIGHTS.values())
    gate = (gate_temperature, 0.1, -5, 3)
    for offset, outputs, step in ((None, [], None), (factors[0], ["argmax", "loss"], torch.tensor(7))):
        arguments = (
            logits.requires_grad_(gradient), targets, torch.tensor([1.0]), names, weights, offset, outputs, *PLAIN,
            *gate, step, "cpp",
        )  # fmt: skip
        torch.library.opcheck(OPS.gate_rows.default, arguments)
        assert not any(found.requires_grad for found in OPS.gate_rows(*arguments))


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("capacity", [None, 3, 20])
def test_opcheck_compact(capacity, gradient):
    torch.library.opcheck(OPS.compact.default, (masks(12), None, capacity, "cpp"))
    weight = torch.rand(12, requires_grad=gradient)
    torch.library.opcheck(OPS.compact.default, (masks(12), weight, capacity, "cpp"))
    assert not OPS.compact(masks(12), weight, capacity, "cpp")[1].requires_grad


def test_opcheck_control():
    significance, targets = torch.rand(12), torch.randint(0, 3, (12,))
    overflow = torch.tensor(2, dtype=torch.int32)
    for labels, mass, spilt in ((None, None, None), (targets, torch.rand(12), overflow)):
        state = initial_state(torch.tensor(0.5))
        arguments = (*state, significance, torch.tensor(0.1), labels, -100, mass, spilt, 0.0, 0.0, "cpp")
        torch.library.opcheck(OPS.control.default, arguments)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("capacity", [None, 3, 20])
def test_opcheck_gather_and_scatter(capacity, gradient):
    index, _, count, _, size = sk.compact(masks(12), capacity=capacity)
    images = torch.randn(12, 2, 3, 4).to(memory_format=torch.channels_last)
    tree = [
        torch.randn(12, 3),
        torch.arange(12),
        images,
        torch.randn(4, 12).t(),
        torch.randn(12, dtype=torch.complex64),
    ]
    for tensors, op in (
        (tree, OPS.gather_rows),
        ([t[:1].expand(len(index), *t.shape[1:]).clone() for t in tree], OPS.scatter_rows),
    ):
        for i in (0, 2):
            tensors[i] = tensors[i].detach().requires_grad_(gradient)
        torch.library.opcheck(op.default, (tensors, index, count, size, "cpp"))


def test_operators_check_what_they_are_handed():
    logits, targets, factors = batch(4, 5)
    with pytest.raises(ValueError, match="`targets` must have shape"):
        OPS.row_stats(logits, targets[:3], ["loss"], *PLAIN, False, False, "cpp")
    with pytest.raises(sk.BackendUnavailable, match="unknown backend 'nonsense'"):
        OPS.row_stats(logits, targets, ["loss"], *PLAIN, False, False, "nonsense")
    rows = torch.ones(4)
    for bad in (torch.ones(3), torch.ones(4, dtype=torch.float64)):
        for position in range(5):
            of_rows = [rows] * 5
            of_rows[position] = bad
            if position < 3 or bad.shape != rows.shape:  # an upstream gradient is cast
                with pytest.raises(ValueError, match=r"must be torch.float32 of shape \(4,\)"):
                    OPS.row_stats_backward(logits, targets, *of_rows, *PLAIN, "cpp")
    with pytest.raises(ValueError, match="`entropy` must be the forward's"):
        OPS.row_stats_backward(logits, targets, rows, rows, None, None, rows, *PLAIN, "cpp")
    with pytest.raises(ValueError, match="must have 9 rows"):
        OPS.gather_rows([factors], torch.tensor([0]), torch.tensor(1, dtype=torch.int32), 9, "cpp")


# Direct or through the operator


def test_both_ways_agree_and_each_is_taken_where_it_should(seen):
    logits, targets, _ = batch(50, 11)
    mask, tree = masks(50), {"x": torch.randn(50, 3), "y": torch.arange(50)}
    step = torch.tensor(2)

    def everything():
        gated = sk.gate_rows(
            logits, targets, torch.tensor([2.0]), weights=WEIGHTS, outputs={"margin", "argmax"},
            gate_temperature=0.7, seed=2**64 - 3, step=step,
        )  # fmt: skip
        plain = sk.gate_rows(logits, targets, torch.tensor([2.0]), weights=WEIGHTS, seed=3, step=2**64 - 1)
        packed = sk.compact(mask, weight=torch.rand(50, generator=torch.Generator().manual_seed(1)), capacity=30)
        exact = sk.compact(mask)
        taken = packed.take(tree)
        back = sk.scatter_rows(taken, packed)
        return torch.utils._pytree.tree_leaves(
            (sk.row_stats(logits, targets, outputs=sk.STATISTICS), gated, plain, packed, exact, taken, back)
        )

    direct = everything()
    assert seen == []
    with FlopCounterMode(display=False):
        through = everything()
    assert seen == ["gate_rows", "gate_rows", "compact", "compact", "gather_rows", "scatter_rows", "row_stats"]
    assert len(direct) == len(through) > 25
    for a, b in zip(direct, through, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_gradient_goes_through_the_operator_and_nothing_else_does(seen):
    logits, targets, factors = batch(6, 5)
    logits.requires_grad_()
    with torch.no_grad():
        sk.row_stats(logits, targets)
    assert not sk.row_stats(logits, targets, outputs=["argmax", "margin"]).margin.requires_grad
    selection = sk.compact(masks(6), weight=factors[0].requires_grad_())
    assert not selection.weight.requires_grad
    gated = sk.gate_rows(logits, targets, torch.tensor([1.0]), weights=WEIGHTS, outputs=["loss"])
    assert not gated.stats.loss.requires_grad
    assert seen == []
    stats = sk.row_stats(logits, targets, outputs=["margin", "loss"])
    assert stats.loss.requires_grad
    assert not stats.margin.requires_grad
    x, y = selection.take((logits, targets))
    assert x.requires_grad
    assert not y.requires_grad
    plain = [] if cpp_direct.AVAILABLE else ["row_stats"]  # one call of C++ within a Function of autograd
    assert seen == [*plain, "gather_rows"]


class Sub(torch.Tensor):
    """A tensor of another class: no kernel may take its address for its values."""


def test_another_class_of_tensor_is_served_by_the_reference(seen):
    logits, targets, _ = batch(6, 5)
    found = sk.row_stats(logits.as_subclass(Sub), targets)
    assert isinstance(found.loss, Sub)
    torch.testing.assert_close(found.loss.as_subclass(torch.Tensor), sk.row_stats(logits, targets).loss)
    with pytest.raises(sk.BackendUnavailable, match="a Sub has no address"):
        sk.row_stats(logits.as_subclass(Sub), targets, backend="cpp")
    assert seen == []


# Gradients


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(("shape", "dim"), [((7, 9), -1), ((2, 6, 3, 4), 1)])
def test_first_gradient_is_the_kernels_own_with_or_without_a_graph(shape, dim, create_graph):
    logits, targets, factors = batch(*shape, dim=dim)
    gradients = []
    for backend in ("cpp", "torch"):
        leaf = logits.clone().requires_grad_()
        total = objective(leaf, targets, factors, dim=dim, backend=backend)
        gradients += torch.autograd.grad(total, leaf, create_graph=create_graph)
    torch.testing.assert_close(*gradients)
    ours = torch.autograd.grad(objective(leaf, targets, factors, dim=dim, backend="cpp"), leaf)[0]
    assert torch.equal(gradients[0], ours)


def test_an_upstream_gradient_that_depends_on_the_logits_is_followed_once():
    """d2/dx2 of a function of the loss: both the gradient's own slope and that of what it is multiplied with."""
    logits, targets, _ = batch(5, 6)
    results = []
    for backend in ("cpp", "torch"):
        leaf = logits.clone().requires_grad_()
        stats = sk.row_stats(leaf, targets, backend=backend)
        total = (stats.loss.square() * stats.entropy.exp() + leaf.square().sum(-1) * stats.loss).sum()
        (gradient,) = torch.autograd.grad(total, leaf, create_graph=True)
        (second,) = torch.autograd.grad((gradient * logits.sin()).sum(), leaf, create_graph=True)
        (third,) = torch.autograd.grad((second * logits.cos()).sum(), leaf)
        results.append((gradient, second, third))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def serves_double(backend):
    logits, targets, _ = batch(3, 4, dtype=torch.float64)
    call = StatsCall(logits, targets, ["loss"], -1, Settings())
    return _dispatch.BACKENDS[backend].row_stats_unsupported_reason(call) is None


@pytest.mark.parametrize("settings", [PLAIN, (-1, 1.4, 5.0, 0.2, -100)])
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_gradcheck_of_the_operators(backend, settings):
    if not serves_double(backend):
        pytest.skip(f"{backend} does not serve float64 here")
    logits, targets, _ = batch(3, 4, dtype=torch.float64)
    logits.requires_grad_()

    def stats(x):
        return tuple(OPS.row_stats(x, targets, ["entropy", "loss"], *settings, True, False, backend)[:2])

    assert torch.autograd.gradcheck(stats, (logits,))
    assert torch.autograd.gradgradcheck(stats, (logits,))


def test_gather_passes_gradients_of_a_tree_with_padding_and_missing_ones():
    selection = sk.compact(masks(10), capacity=8)
    assert selection.count < 8
    x, y, unused = (torch.randn(10, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def gather(x, y):
        tree = selection.take({"x": x, "ids": torch.arange(10), "y": y, "unused": unused})
        return tree["x"], tree["y"]

    def with_weight(x, y):  # padding is row 0 again: without its weight, finite differences would see it
        return tuple(t * selection.weight[:, None] for t in gather(x, y))

    assert torch.autograd.gradcheck(with_weight, (x, y))
    assert torch.autograd.gradgradcheck(with_weight, (x, y))
    ours = torch.autograd.grad(gather(x, y)[0].sum(), (x, y, unused), allow_unused=True)
    assert (ours[0].sum(), ours[1], ours[2]) == (2 * selection.count, None, None)

    rows = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: sk.scatter_rows([r, r.detach()], selection)[0], (rows,))
    assert torch.autograd.gradgradcheck(lambda r: sk.scatter_rows([r, r.detach()], selection)[0], (rows,))


def test_padding_of_a_scatter_gets_no_gradient_even_where_row_0_is_nan():
    selection = sk.compact(torch.tensor([True, False, True]), capacity=3)
    rows = torch.randn(3, 2, requires_grad=True)
    upstream = torch.tensor([[torch.nan] * 2, [1.0] * 2, [2.0] * 2])
    (gradient,) = torch.autograd.grad(sk.scatter_rows(rows, selection), rows, upstream)
    assert gradient[0].isnan().all()
    assert gradient[1:].tolist() == [[2, 2], [0, 0]]


# The gradient in the logits' memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "dim", "layout"),
    [
        ((9, 10), -1, lambda t: t),
        ((5, 1025), -1, lambda t: t),
        ((2, 70, 3, 5), 1, lambda t: t),
        ((2, 70, 3, 6), 1, lambda t: t.to(memory_format=torch.channels_last)),
        ((20, 33), -1, lambda t: t.t().contiguous().t()),
        ((9, 40), -1, lambda t: torch.cat([t, t], -1)[:, :40]),
    ],
)
def test_inplace_backward_is_the_gradient_in_the_memory_of_the_logits(shape, dim, layout, dtype):
    base, targets, factors = batch(*shape, dim=dim, dtype=dtype)
    gradients = []
    for inplace in (False, True):
        leaf = base.clone().requires_grad_()
        logits = layout(leaf * 1)
        written = []
        logits.register_hook(lambda gradient, written=written: written.append(gradient.data_ptr()))
        total = objective(logits, targets, factors, dim=dim, softcap=4.0, inplace_backward=inplace, backend="cpp")
        address, before = logits.data_ptr(), logits._version
        total.backward()
        gradients.append(leaf.grad)
        if inplace:
            assert logits._version > before
            assert written == [address]
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0


def test_inplace_backward_is_found_out_by_whoever_needs_the_logits():
    base, targets, factors = batch(6, 5)
    modified = "modified by an inplace operation"

    def start():
        logits = base.clone().requires_grad_() * 1
        return logits, objective(logits, targets, factors, inplace_backward=True)

    _, total = start()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=modified):
        total.backward()
    logits, total = start()
    other = logits.square().sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=modified):
        other.backward()
    logits = base.clone().requires_grad_().tanh()  # saved its result
    with pytest.raises(RuntimeError, match=modified):
        objective(logits, targets, factors, inplace_backward=True).backward()
    logits, total = start()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(total, logits, create_graph=True)


def test_inplace_backward_is_refused_where_it_would_lose_something():
    logits, targets, _ = batch(6, 5)
    logits.requires_grad_()
    with pytest.raises(ValueError, match="a leaf that requires grad"):
        sk.row_stats(logits, targets, inplace_backward=True)
    for overlapping in ((logits[:1] * 1).expand(6, 5), (logits * 1).as_strided((6, 5), (2, 1))):
        with pytest.raises(ValueError, match="overlap themselves"):
            sk.row_stats(overlapping, targets, inplace_backward=True)
    kept = logits.detach().clone()
    with torch.no_grad():  # no gradient, nothing to refuse
        sk.row_stats(logits, targets, inplace_backward=True)
    sk.row_stats(logits.detach(), targets, inplace_backward=True)
    assert torch.equal(logits, kept)
