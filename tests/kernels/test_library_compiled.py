"""The operators under the compiler, export, tracers, autocast and transforms."""

import pytest
import torch
from functorch.compile import make_boxed_func
from test_library import WEIGHTS, batch, masks, objective, operators
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import sparse_kernels as sk
from sparse_kernels.backends import cpp as cpp_backend

pytestmark = pytest.mark.skipif(cpp_backend.unavailable_reason() is not None, reason="the C++ backend is not built")


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
