"""The operators: what autograd, the compiler, export, dispatch modes and transforms see of a kernel."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import sparse_kernels as sk
from sparse_kernels import _dispatch, torch_library
from sparse_kernels._arguments import Settings, StatsCall
from sparse_kernels.backends import cpp as cpp_backend
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
    assert seen == ["row_stats", "gather_rows"]


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


# Compiled


@pytest.fixture
def graphs():
    """A compiler backend that runs the graphs of forward and backward as they are, and keeps their operators."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    kept = []

    def keep(module, _inputs):
        kept.append(operators(module.graph))
        return make_boxed_func(module.forward)

    return aot_autograd(fw_compiler=keep), kept


def frames():
    """Number of compilations."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("outputs", [["loss"], ["entropy"], ["margin", "entropy", "loss", "argmax"]], ids=str)
def test_compiled_row_stats_is_the_kernel_and_its_gradient(graphs, outputs):
    compiler, kept = graphs
    logits, targets, factors = batch(2, 6, 5, dim=1)

    def step(logits, targets, factors):
        stats = sk.row_stats(logits * 2, targets, outputs=outputs, dim=1, temperature=0.7)
        total = sum((factors * getattr(stats, name)).sum() for name in outputs)
        return total, stats

    results = []
    for call in (step, torch.compile(step, backend=compiler, fullgraph=True)):
        leaf = logits.clone().requires_grad_()
        total, stats = call(leaf, targets, factors[0])
        total.backward()
        results.append((total.detach(), leaf.grad, *(getattr(stats, name) for name in outputs)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    assert kept == [["row_stats"], ["row_stats_backward"]]


def test_inplace_backward_under_a_compiler_is_the_same_gradient(graphs):
    base, targets, factors = batch(6, 5)
    gradients = []
    for call in (objective, torch.compile(objective, backend=graphs[0], fullgraph=True)):
        leaf = base.clone().requires_grad_()
        call(leaf * 1, targets, factors, inplace_backward=True).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("capacity", [None, 39])
def test_a_whole_gated_step_compiles_once_for_every_mask(graphs, capacity):
    compiler, kept = graphs
    _, targets, _ = batch(40, 7)
    inputs = torch.randn(40, 3)
    weight = torch.randn(3, 7)

    def step(inputs, targets, threshold, weight):
        gated = sk.gate_rows(inputs @ weight, targets, threshold, weights=WEIGHTS)
        selection = sk.compact(gated.mask, capacity=capacity)
        x, y = selection.take((inputs * 2, targets))
        loss = (sk.row_stats(x @ weight, y, outputs=["loss"]).loss * selection.weight).sum()
        return loss, selection

    compiled = torch.compile(step, backend=compiler, fullgraph=True)
    counts = set()
    for threshold in (1.0, 1.5, 2.0, 2.5, 1e9):
        results = []
        for call in (step, compiled):
            leaf = weight.clone().requires_grad_()
            loss, selection = call(inputs, targets, torch.tensor([threshold]), leaf)
            loss.backward()
            results.append((loss, leaf.grad, *selection))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        counts.add(int(selection.count))
    assert len(counts) == 5
    assert 0 in counts
    assert frames() == 1
    assert kept == [["gate_rows", "compact", "gather_rows", "row_stats"], ["row_stats_backward"]]


@pytest.mark.parametrize("capacity", [None, 30])
def test_a_selection_crosses_the_border_of_a_compiled_function(graphs, capacity):
    compiled = torch.compile(lambda selection, tree: selection.take(tree), backend=graphs[0], fullgraph=True)
    make = torch.compile(lambda mask: sk.compact(mask, capacity=capacity), backend=graphs[0], fullgraph=True)
    tree = {"x": torch.randn(40, 3), "y": torch.arange(40)}
    for seed in range(5):
        mask = masks(40, seed=seed)
        selection = sk.compact(mask, capacity=capacity)
        for ours, wanted in zip(make(mask), selection, strict=True):
            assert torch.equal(ours, wanted) if isinstance(ours, torch.Tensor) else ours == wanted
        taken = compiled(make(mask), tree)
        assert torch.equal(taken["x"], tree["x"][selection.index])
        assert torch.equal(taken["y"], selection.index)
        back = torch.compile(sk.scatter_rows, backend=graphs[0], fullgraph=True)(taken, selection)
        assert torch.equal(back["y"] != 0, mask & (torch.arange(40) > 0))


def test_the_step_of_a_stochastic_gate_does_not_compile_anew(graphs):
    logits, targets, _ = batch(64, 5)

    def gate(step):
        return sk.gate_rows(logits, targets, torch.tensor([1.0]), weights=WEIGHTS, gate_temperature=1.0, step=step)

    compiled = torch.compile(gate, backend=graphs[0], fullgraph=True)
    for step in map(torch.tensor, range(3)):
        ours, wanted = compiled(step), gate(step)
        assert torch.equal(ours.mask, wanted.mask)
        assert torch.equal(ours.weight, wanted.weight)
    assert frames() == 1
    for step in range(5, 9):  # as a Python number: compiled anew once, to make it a variable
        assert torch.equal(compiled(step).mask, gate(step).mask)
    assert frames() <= 3


def test_inductor_runs_the_kernels():
    torch._dynamo.reset()
    logits, targets, factors = batch(30, 9)

    def step(logits):
        selection = sk.compact(sk.gate_rows(logits, targets, torch.tensor([2.0]), weights=WEIGHTS).mask)
        x, y, f = selection.take((logits.sin(), targets, factors[0]))
        stats = sk.row_stats(x, y)
        return (f * stats.loss + stats.entropy.square()).sum()

    gradients = []
    for call in (step, torch.compile(step, fullgraph=True)):
        leaf = logits.clone().requires_grad_()
        call(leaf).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_a_bad_target_is_an_error_when_compiled_too(graphs):
    logits = torch.randn(3, 5)
    for call in (
        lambda targets: sk.row_stats(logits, targets).loss,
        lambda targets: sk.gate_rows(logits, targets, torch.tensor([1.0]), weights=WEIGHTS).mask,
    ):
        compiled = torch.compile(call, backend=graphs[0], fullgraph=True)
        compiled(torch.tensor([0, 1, 4]))
        with pytest.raises(ValueError, match="target 5 in row 2 is out of range"):
            compiled(torch.tensor([0, 1, 5]))


def test_a_backend_by_name_keeps_its_meaning_when_compiled(graphs):
    compiler, kept = graphs
    logits, targets, _ = batch(6, 5)
    compiled = torch.compile(
        lambda backend: sk.row_stats(logits, targets, backend=backend).loss, backend=compiler, fullgraph=True
    )
    torch.testing.assert_close(compiled("torch"), compiled("cpp"))
    assert kept == [[], ["row_stats"]]


# Traced


class Gated(torch.nn.Module):
    """Scores, packs and trains, with parameters."""

    def __init__(self, capacity):
        super().__init__()
        self.linear = torch.nn.Linear(3, 5)
        self.capacity = capacity

    def forward(self, inputs, targets, threshold):
        gated = sk.gate_rows(self.linear(inputs), targets, threshold, weights=WEIGHTS)
        selection = sk.compact(gated.mask, capacity=self.capacity)
        x, y = selection.take((inputs, targets))
        return sk.row_stats(self.linear(x), y).loss, selection.count, gated.stats


@pytest.mark.parametrize("capacity", [None, 6])
@pytest.mark.parametrize("strict", [True, False])
def test_export_round_trip(tmp_path, strict, capacity):
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = Gated(capacity)
    inputs, targets, threshold = torch.randn(8, 3), torch.randint(0, 5, (8,)), torch.tensor([1.5])
    rows = torch.export.Dim("rows", min=2, max=1000)
    program = torch.export.export(
        module,
        (inputs, targets, threshold),
        dynamic_shapes=({0: rows}, {0: rows}, None),
        strict=strict,
    )
    assert operators(program.graph) == ["gate_rows", "compact", "gather_rows", "row_stats"]
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for count in (8, 30):
        inputs, targets = torch.randn(count, 3), torch.randint(0, 5, (count,))
        for threshold in (torch.tensor([1.4]), torch.tensor([1.9])):
            loss, kept, _ = loaded(inputs, targets, threshold)
            wanted, wanted_kept, _ = module(inputs, targets, threshold)
            assert torch.equal(loss, wanted)
            assert kept == wanted_kept


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_operators(mode, pre_dispatch):
    logits, targets, _ = batch(12, 5)

    def score(logits, targets):
        gated = sk.gate_rows(logits, targets, threshold(), weights=WEIGHTS)
        return sk.compact(gated.mask, capacity=9).take(logits), sk.row_stats(logits, targets).entropy

    def threshold():
        return torch.ones(1)

    graph = make_fx(score, tracing_mode=mode, pre_dispatch=pre_dispatch)(logits, targets)
    assert operators(graph.graph) == ["gate_rows", "compact", "gather_rows", "row_stats"]
    logits, targets, _ = batch(12, 5, seed=3)
    for ours, wanted in zip(graph(logits, targets), score(logits, targets), strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("backend", [None, "torch"])
def test_fake_tensors_have_the_shapes_of_real_ones(backend):
    logits, targets, _ = batch(12, 5)

    def everything(logits, targets, threshold, mask):
        gated = sk.gate_rows(
            logits, targets, threshold, weights=WEIGHTS, outputs=sk.STATISTICS, gate_temperature=1.0, backend=backend
        )
        selection = sk.compact(mask, capacity=9, backend=backend)
        taken = sk.gather_rows([logits, targets], selection, backend=backend)
        back = sk.scatter_rows(taken, selection, backend=backend)
        return torch.utils._pytree.tree_leaves((gated, tuple(selection), taken, back))

    real = (logits, targets, torch.tensor([1.0]), masks(12))
    with FakeTensorMode() as mode:
        fake = everything(*map(mode.from_tensor, real))
    results = [everything(*real), fake]
    if backend is None:  # with the mode not entered, PyTorch itself refuses the reference's torch.where(mask, 0, x)
        results.append(everything(*map(mode.from_tensor, real)))
    for a, *others in zip(*results, strict=True):
        for x in others if isinstance(a, torch.Tensor) else []:
            assert isinstance(x, FakeTensor)
            assert (x.shape, x.stride(), x.dtype, x.device) == (a.shape, a.stride(), a.dtype, a.device)


# Autocast and transforms


def test_autocast_casts_nothing():
    logits, targets, factors = batch(8, 6, dtype=torch.bfloat16)
    results = []
    for enabled in (False, True):
        leaf = logits.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            stats = sk.row_stats(leaf, targets, outputs=["loss", "entropy", "logsumexp"])
            gated = sk.gate_rows(leaf, targets, torch.tensor([1.0]), weights=WEIGHTS)
            taken = sk.compact(gated.mask).take(factors[0])
        (factors[0] * stats.loss + stats.entropy).sum().backward()
        assert stats.loss.dtype is torch.float32
        assert leaf.grad.dtype is torch.bfloat16
        assert taken.dtype is torch.float32
        results.append((stats.loss, stats.entropy, stats.logsumexp, gated.significance, taken, leaf.grad))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("compiled", [False, True])
def test_vmap_and_grad_compose(compiled):
    logits, targets, factors = batch(4, 6, 5)

    def per_example(logits, targets, factors):
        stats = sk.row_stats(logits, targets, outputs=["loss", "entropy", "grad_norm"])
        gated = sk.gate_rows(logits, targets, torch.ones(1), weights=WEIGHTS)
        taken = sk.compact(gated.mask, capacity=3).take(logits)
        return (factors * stats.loss).sum() + stats.entropy.sum(), (stats.grad_norm, gated.mask, taken)

    mapped = torch.func.vmap(torch.func.grad(per_example, has_aux=True))
    if compiled:
        torch._dynamo.reset()
        mapped = torch.compile(mapped, backend="eager", fullgraph=True)
    gradient, auxiliary = mapped(logits, targets, factors[0])
    for i in range(4):
        leaf = logits[i].clone().requires_grad_()
        total, wanted = per_example(leaf, targets[i], factors[0, i])
        torch.testing.assert_close(gradient[i], torch.autograd.grad(total, leaf)[0])
        for ours, alone in zip(auxiliary, wanted, strict=True):
            torch.testing.assert_close(ours[i], alone.detach())


def test_a_named_backend_refuses_a_transform():
    logits, targets, _ = batch(4, 6, 5)
    with pytest.raises(sk.BackendUnavailable, match="inside a transform"):
        torch.func.vmap(lambda x, y: sk.row_stats(x, y, backend="cpp").loss)(logits, targets)


def test_forward_mode_differentiation_is_the_reference():
    logits, targets, _ = batch(4, 5)
    direction = torch.randn(4, 5)
    _, wanted = torch.func.jvp(lambda x: sk.row_stats(x, targets).loss, (logits,), (direction,))
    with forward_ad.dual_level():
        loss = sk.row_stats(forward_ad.make_dual(logits, direction), targets).loss
        tangent = forward_ad.unpack_dual(loss).tangent
    assert wanted.abs().sum() > 0
    torch.testing.assert_close(tangent, wanted)
