"""``selective_linear_cross_entropy`` against the dense loss with every other row masked."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from test_head import CLOSE, LOW, SETTINGS, head
from torch._dynamo.backends.common import aot_autograd

import sparse_kernels as sk
from sparse_kernels import TopFraction, count_multiplied_rows, selective_linear_cross_entropy
from sparse_training import Gate, Significance
from sparse_training.errors import UserError

ROWS = (4, 25)
AS_IT_IS = aot_autograd(fw_compiler=lambda module, _inputs: make_boxed_func(module.forward))


def dense_statistics(x, w, b, target, mask, **settings):
    labels = target if mask is None else torch.where(mask, target, -100)
    return labels, sk.row_stats(F.linear(x, w, b), labels, **settings)


def masked(x, w, b, target, mask, kept, reduction="mean_kept", weight=1.0, **settings):
    """The dense loss, every other row masked."""
    labels, stats = dense_statistics(x, w, b, target, mask, outputs=("loss",), **settings)
    divisor = {"sum": 1.0, "mean_valid": (labels != -100).sum(), "mean_kept": (kept * weight).sum()}[reduction]
    return (stats.loss * kept * weight).sum() / divisor


def same_gradients(loss, right, leaves, **close):
    torch.testing.assert_close(loss, right)
    for a, c in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(right, leaves), strict=True):
        assert a.dtype is c.dtype
        torch.testing.assert_close(a, c, **close)


def warm(gate, x, w, b, target, mask=None, batches=3):
    """A gate after some batches, so that its threshold is its own."""
    labels = target if mask is None else torch.where(mask, target, -100)
    with torch.no_grad():
        for _ in range(batches):
            gate(F.linear(x, w, b).flatten(0, -2), labels.flatten())
    return gate


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("reduction", ["mean_kept", "mean_valid", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW], ids=str)
def test_a_gate_keeps_what_it_would_keep_of_the_logits_and_moves_as_it_would(dtype, reduction, chunk):
    x, w, b, target, mask = head(dtype, rows=ROWS)
    gate = warm(Gate(rate=0.3), x, w, b, target, mask)
    twin = copy.deepcopy(gate)
    for _ in range(3):
        labels = torch.where(mask, target, -100).flatten()
        selection = twin(F.linear(x, w, b).flatten(0, 1), labels)
        kept = torch.zeros(target.numel(), dtype=torch.bool).index_fill(0, selection.index, True).view(ROWS)
        with count_multiplied_rows() as rows:
            loss, found = selective_linear_cross_entropy(
                x, w, target, select=gate, linear_bias=b, row_mask=mask, reduction=reduction, chunk=chunk
            )  # fmt: skip
            right = masked(x, w, b, target, mask, kept, reduction)
            same_gradients(loss * 3, right * 3, (x, w, b), **(CLOSE if dtype in LOW else {}))
        assert torch.equal(found, kept)
        valid, differentiated = int((labels != -100).sum()), int(kept.sum())
        assert 0 < differentiated < valid
        again = differentiated if dtype is torch.float16 else 0  # its scale is known in the backward alone
        assert (rows.scored, rows.differentiated, rows.recomputed) == (valid, differentiated, again)
        torch.testing.assert_close(gate.threshold, twin.threshold, rtol=1e-5, atol=1e-6)
        assert torch.equal(gate.step, twin.step)


@pytest.mark.parametrize(
    "options",
    [
        {"decision": "topk"},
        {"floor": 0.1},
        {"ties": "random"},
        {"capacity": 12},
        {"temperature": 0.5, "p_min": 0.05},
    ],
    ids=str,
)
def test_a_gate_that_ranks_or_draws_scores_first(options):
    x, w, b, target, mask = head(rows=ROWS)
    gate = warm(Gate(rate=0.3, seed=3, **options), x, w, b, target, mask)
    twin = copy.deepcopy(gate)
    labels = torch.where(mask, target, -100).flatten()
    selection = twin(F.linear(x, w, b).flatten(0, 1), labels)
    weight = torch.zeros(target.numel()).index_add(0, selection.index, selection.weight).view(ROWS)
    kept = weight > 0
    with count_multiplied_rows() as rows:
        loss, found = selective_linear_cross_entropy(x, w, target, select=gate, linear_bias=b, row_mask=mask)
        same_gradients(loss, masked(x, w, b, target, mask, kept, weight=weight), (x, w, b))
    assert torch.equal(found, kept)
    assert rows.differentiated == rows.recomputed == int(kept.sum())
    torch.testing.assert_close(gate.threshold, twin.threshold, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("reduction", ["mean_kept", "mean_valid"])
@pytest.mark.parametrize("of", ["entropy", "loss"])
def test_a_quantile_of_a_statistic(of, reduction, settings):
    x, w, b, target, mask = head(rows=ROWS)
    labels, stats = dense_statistics(x, w, b, target, mask, **settings)
    values = getattr(stats, of)
    kept = (values >= values[labels != -100].quantile(0.8)) & (labels != -100)
    with count_multiplied_rows() as rows:
        loss, found = selective_linear_cross_entropy(
            x, w, target, select=TopFraction(0.2, of=of), linear_bias=b, row_mask=mask, reduction=reduction, **settings
        )  # fmt: skip
        same_gradients(loss, masked(x, w, b, target, mask, kept, reduction, **settings), (x, w, b))
    assert torch.equal(found, kept)
    assert rows.differentiated == int(kept.sum())


@pytest.mark.parametrize("keep", [1.0, 0.8, 0.5, 0.3, 0.2, 0.1])
def test_the_quantile_is_pytorchs(keep):
    g = torch.Generator().manual_seed(1)
    for rows in (1, 2, 10, 11, 997):
        values = torch.randn(rows, generator=g).masked_fill(torch.rand(rows, generator=g) < 0.2, torch.nan)
        valid = torch.rand(rows, generator=g) < 0.9
        counted = values.masked_fill(~valid, torch.nan)
        assert torch.equal(TopFraction(keep).mask(values, valid), counted >= counted.nanquantile(1.0 - keep))


def test_a_quantile_of_more_rows_than_pytorchs_takes():
    values = torch.arange(2**24 + 8).float()
    values[1] = torch.nan
    kept = TopFraction(0.25).mask(values, values != 2.0)
    assert int(kept.sum()) in range(2**22 - 1, 2**22 + 4)  # ties of a float32 place
    assert bool(kept[-(2**22) + 1 :].all())


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("reduction", ["mean_kept", "mean_valid", "sum"])
def test_a_mask_multiplies_nothing_else(reduction, settings, chunk):
    x, w, b, target, mask = head(rows=ROWS)
    select = torch.rand(ROWS, generator=torch.Generator().manual_seed(7)) < 0.3
    labels = torch.where(mask, target, -100)
    kept = select & (labels != -100)
    with count_multiplied_rows() as rows:
        loss, found = selective_linear_cross_entropy(
            x, w, target, select=select, linear_bias=b, row_mask=mask, reduction=reduction, chunk=chunk, **settings
        )  # fmt: skip
        same_gradients(loss, masked(x, w, b, target, mask, kept, reduction, **settings), (x, w, b))
    assert torch.equal(found, kept)
    assert rows.scored == rows.differentiated == int(kept.sum())
    assert rows.recomputed == 0


@pytest.mark.parametrize("reduction", ["mean_kept", "mean_valid"])
@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
def test_all_rows_is_torchs_loss_in_three_products(dtype, reduction):
    x, w, b, target, _ = head(dtype, rows=(60,))
    with count_multiplied_rows() as rows:
        loss, kept = selective_linear_cross_entropy(x, w, target, select=None, linear_bias=b, reduction=reduction)
        right = F.cross_entropy(F.linear(x, w, b).to(loss.dtype), target)
        same_gradients(loss, right, (x, w, b), **(CLOSE if dtype in LOW else {}))
    assert torch.equal(kept, target != -100)
    assert rows.products == (4 if dtype is torch.float16 else 3) * int(kept.sum())


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("reduction", ["mean_kept", "mean_valid", 7.5])
@pytest.mark.parametrize("of", ["loss", "entropy", "margin"])
def test_the_top_fraction_of_all_is_differentiated_at_once_but_for_rows_of_nan(of, reduction, chunk):
    x, w, b, target, _ = head(rows=(60,))
    for nan in ((), (20, 21, 40)):
        with torch.no_grad():
            x[nan, :] = torch.nan
        kept = (target != -100) & ~x[:, 0].isnan()
        with count_multiplied_rows() as rows:
            loss, found = selective_linear_cross_entropy(
                x, w, target, select=TopFraction(1.0, of=of), linear_bias=b, reduction=reduction, chunk=chunk
            )  # fmt: skip
        assert torch.equal(found, kept)
        assert (rows.scored, rows.recomputed, rows.differentiated) == (int((target != -100).sum()), 0, int(kept.sum()))
        right, _ = selective_linear_cross_entropy(
            x, w, target, select=None, row_mask=kept, linear_bias=b,
            reduction=float((target != -100).sum()) if reduction == "mean_valid" else reduction,
        )  # fmt: skip
        same_gradients(loss, right, (x, w, b))


@pytest.mark.parametrize("select", [None, TopFraction(0.4), Gate(0.5, threshold=2.0), Gate(0.5, floor=0.1)], ids=str)
@pytest.mark.parametrize("divisor", [3, 0.7, torch.tensor(50), torch.tensor([2.5], dtype=torch.float64)], ids=str)
def test_a_number_divides_the_sum(divisor, select):
    x, w, b, target, mask = head(rows=ROWS)
    given = {"linear_bias": b, "row_mask": mask, "chunk": 16}
    total, kept = selective_linear_cross_entropy(x, w, target, select=copy.deepcopy(select), reduction="sum", **given)
    loss, found = selective_linear_cross_entropy(
        x, w, target, select=copy.deepcopy(select), reduction=divisor, **given
    )  # fmt: skip
    assert torch.equal(found, kept)
    same_gradients(loss, total / float(divisor), (x, w, b))


@pytest.mark.parametrize("chunk", [None, 16])
def test_bfloat16_gradients_are_as_near_to_float64_as_the_dense_ones(chunk):
    x, w, b, target, _ = head(torch.bfloat16, rows=(300,), classes=400)
    gate = Gate(rate=0.9, threshold=0.5)
    loss, kept = selective_linear_cross_entropy(x, w, target, select=gate, linear_bias=b, chunk=chunk)
    wide = [leaf.detach().double().requires_grad_() for leaf in (x, w, b)]
    right = torch.autograd.grad(masked(*wide, target, None, kept), wide)
    theirs = torch.autograd.grad(masked(x, w, b, target, None, kept), (x, w, b))
    for ours, dense, exact in zip(torch.autograd.grad(loss, (x, w, b)), theirs, right, strict=True):
        assert (ours.double() - exact).norm() < 1.2 * (dense.double() - exact).norm()


@pytest.mark.parametrize("reduction", ["mean_kept", "mean_valid", "sum"])
@pytest.mark.parametrize("why", ["mask", "gate", "all ignored", "quantile of nothing", "no rows"])
def test_a_selection_without_rows_is_a_loss_of_0(why, reduction):
    x, w, b, target, _ = head(rows=(0,) if why == "no rows" else ROWS)
    select = {
        "mask": torch.zeros(ROWS, dtype=torch.bool),
        "gate": Gate(rate=0.1, threshold=1e6),
        "all ignored": None,
        "quantile of nothing": TopFraction(0.5),
        "no rows": TopFraction(0.5),
    }[why]
    if why in ("all ignored", "quantile of nothing"):
        target.fill_(-100)
    loss, kept = selective_linear_cross_entropy(x, w, target, select=select, linear_bias=b, reduction=reduction)
    assert loss == 0
    assert not kept.any()
    loss.backward()
    for leaf in (x, w, b):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_rows_of_nan_are_kept_by_no_gate_and_no_quantile():
    x, w, b, target, _ = head(rows=ROWS)
    target.clamp_(min=0)
    with torch.no_grad():
        x[0, 0] = torch.nan
    gate = Gate(rate=0.5, threshold=1.0)
    for select in (gate, TopFraction(1.0)):
        loss, kept = selective_linear_cross_entropy(x, w, target, select=select, linear_bias=b)
        assert not kept[0, 0]
        assert kept.any()
        assert torch.autograd.grad(loss, w)[0].isfinite().all()
    assert gate.invalid == 1


@pytest.mark.parametrize("which", [(), (0,), (1,), (2,)], ids=str)
def test_only_what_requires_a_gradient_gets_one(which):
    operands = [leaf.detach() for leaf in head(rows=(20,))[:3]]
    target = head(rows=(20,))[3]
    for i in which:
        operands[i].requires_grad_()
    x, w, b = operands
    with count_multiplied_rows() as rows:
        loss, kept = selective_linear_cross_entropy(x, w, target, select=None, linear_bias=b)
    assert loss.requires_grad == bool(which)
    assert rows.differentiated == (int(kept.sum()) if which else 0)
    for i in which:
        same_gradients(loss, masked(x, w, b, target, None, kept), [operands[i]])


def test_autocast_and_no_grad():
    x, w, b, target, _ = head(torch.float32, rows=(30,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = selective_linear_cross_entropy(x, w, target, select=None, linear_bias=b).loss
        right = F.cross_entropy(F.linear(x, w, b).float(), target)
    same_gradients(loss, right, (x, w, b), **CLOSE)
    with torch.no_grad():
        assert not selective_linear_cross_entropy(x, w, target, select=None).loss.requires_grad


@pytest.mark.parametrize("select", ["mask", "quantile", "all"])
def test_one_graph(select):
    torch._dynamo.reset()
    x, w, b, target, mask = head(rows=(30,))
    kind = {"mask": mask, "quantile": TopFraction(0.3), "all": None}[select]

    def step(x, w, b):
        return selective_linear_cross_entropy(x, w, target, select=kind, linear_bias=b, reduction="mean_valid").loss * 2

    compiled = torch.compile(step, backend=AS_IT_IS, fullgraph=True)
    same_gradients(compiled(x, w, b), step(x, w, b), (x, w, b))


def test_a_gate_under_a_compiler():
    torch._dynamo.reset()
    x, w, b, target, _ = head(rows=(30,))
    gate = warm(Gate(rate=0.3), x, w, b, target)
    twin = copy.deepcopy(gate)
    compiled = torch.compile(
        lambda gate: selective_linear_cross_entropy(x, w, target, select=gate, linear_bias=b).loss, backend=AS_IT_IS
    )  # fmt: skip
    right = selective_linear_cross_entropy(x, w, target, select=twin, linear_bias=b).loss
    same_gradients(compiled(gate), right, (x, w, b))
    assert torch.equal(gate.threshold, twin.threshold)


def test_operator_checks():
    x, w, b, target, mask = head(rows=(5,), classes=7)
    operator = torch.ops.sparse_kernels.selective_linear_cross_entropy
    arguments = (x, w, target, b, mask, 0.7, 5.0, 0.1, -100, 2, torch.tensor(1.5), ["loss", "entropy"], [0.7, 0.3])
    torch.library.opcheck(
        operator,
        (*arguments, None, [True] * 3),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
    )


def test_a_loss_that_is_scaled_accumulated_or_kept():
    x, w, b, target, _ = head(rows=(30,))
    loss = selective_linear_cross_entropy(x, w, target, select=None, linear_bias=b).loss
    first = torch.autograd.grad(loss, (x, w, b), retain_graph=True)
    again = torch.autograd.grad(loss, (x, w, b), retain_graph=True)
    assert all(torch.equal(a, c) for a, c in zip(first, again, strict=True))
    for _ in range(2):
        (loss / 4).backward(retain_graph=True)
    torch.testing.assert_close(w.grad, first[1] / 2)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, w, create_graph=True)


X, W = torch.randn(6, 4), torch.randn(9, 4)
Y = torch.randint(0, 9, (6,))
BAD = {
    "a mask of another shape": ({"select": torch.ones(5, dtype=torch.bool)}, ValueError, r"select.*\(6,\).*\(5,\)"),
    "a mask of numbers": ({"select": torch.ones(6)}, ValueError, "select.*bool.*float32"),
    "a mask on another device": (
        {"select": torch.ones(6, dtype=torch.bool, device="meta")},
        ValueError,
        "select.*cpu.*meta",
    ),
    "a number": ({"select": 0.2}, TypeError, "select.*Gate, a TopFraction, a bool mask or None.*0.2"),
    "a class": ({"select": Gate}, TypeError, "select.*Gate, a TopFraction"),
    "a reduction": ({"select": None, "reduction": "mean"}, ValueError, "reduction.*mean_kept.*'mean'"),
    "a divisor of 0": ({"select": Gate(0.5), "reduction": 0}, ValueError, "reduction.*number above 0.*got 0"),
    "a divisor of NaN": ({"select": None, "reduction": torch.tensor(torch.nan)}, ValueError, "reduction.*above 0.*nan"),
    "a divisor without end": ({"select": None, "reduction": torch.inf}, ValueError, "reduction.*above 0.*inf"),
    "two divisors": ({"select": None, "reduction": torch.ones(2)}, TypeError, r"reduction.*one real number.*\(2,\)"),
    "a bool": ({"select": None, "reduction": True}, ValueError, "reduction.*got True"),
    "a reduction of None": ({"select": None, "reduction": None}, TypeError, "reduction.*number.*None"),
    "a divisor to learn": (
        {"select": None, "reduction": torch.ones((), requires_grad=True)},
        TypeError,
        "reduction.*without a gradient, got .*requires a gradient",
    ),
    "smoothing that is not the gate's": (
        {"select": Gate(0.5), "label_smoothing": 0.1},
        ValueError,
        "gate's, 0.0, got 0.1",
    ),
    "a gate by gradient norm": (
        {"select": Gate(grad_norm_fraction=0.5)},
        UserError,
        "grad_norm_fraction=0.5.*use a rate",
    ),
    "a target where none is ignored": (
        {"select": None, "target": Y - 100, "ignore_index": None},
        ValueError,
        r"target .* in row 0 is out of range: it must be in \[0, 8\]$",
    ),
    "a target out of range": ({"select": None, "target": Y + 9}, ValueError, "target .* in row 0 is out of range"),
    "hidden sizes": ({"select": None, "linear_weight": torch.randn(9, 5)}, ValueError, "got 4 and 5"),
    "a chunk of 0": ({"select": None, "chunk": 0}, ValueError, "chunk.*got 0"),
    "dtypes": ({"select": None, "linear_weight": W.double()}, TypeError, "linear_weight.*float32.*float64"),
}


@pytest.mark.parametrize(("bad", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_one_line_and_moves_no_gate(bad, kind, message):
    arguments = {"input": X, "linear_weight": W, "target": Y} | bad
    gate = bad["select"]
    before = copy.deepcopy(gate.state_dict()) if isinstance(gate, Gate) else None
    operands = [arguments.pop(name) for name in ("input", "linear_weight", "target")]
    with pytest.raises(kind, match=message) as caught:
        selective_linear_cross_entropy(*operands, **arguments)
    assert "\n" not in str(caught.value)
    if before is not None:
        assert all(torch.equal(value, before[name]) or value.isnan().any() for name, value in gate.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"keep": 0.0}, ValueError, r"keep.*\(0, 1\].*0.0"),
        ({"keep": 1.5}, ValueError, r"keep.*\(0, 1\].*1.5"),
        ({"keep": "most"}, TypeError, "keep.*number.*most"),
        ({"keep": True}, TypeError, "keep.*fraction.*True"),
        ({"keep": 0.5, "of": "argmax"}, ValueError, "of.*entropy.*argmax"),
    ],
    ids=str,
)
def test_a_fraction_that_makes_no_sense_is_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        TopFraction(**arguments)


def test_a_fraction_is_a_number_whatever_held_it():
    assert TopFraction(torch.tensor(0.25)) == TopFraction(0.25) == TopFraction(np.float32(0.25))
    assert type(TopFraction(torch.tensor(1)).keep) is float


def test_other_terms_of_a_significance():
    x, w, b, target, _ = head(rows=ROWS)
    significance = Significance(grad_norm=1.0, margin=-0.5)
    gate = warm(Gate(rate=0.3, significance=significance), x, w, b, target)
    twin = copy.deepcopy(gate)
    selection = twin(F.linear(x, w, b).flatten(0, 1), target.flatten())
    _, kept = selective_linear_cross_entropy(x, w, target, select=gate, linear_bias=b)
    assert torch.equal(kept.flatten().nonzero().squeeze(1), selection.index)
