"""``linear_row_stats`` against the dense graph of a linear layer and ``row_stats``."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import sparse_kernels as sk
from sparse_kernels import count_multiplied_rows, linear_row_stats
from sparse_kernels._dispatch import forced

ROWS, HIDDEN, CLASSES = (3, 7), 16, 50
SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 5.0, "temperature": 1.3},
    "smoothing": {"label_smoothing": 0.1},
    "all": {"softcap": 5.0, "temperature": 0.7, "label_smoothing": 0.2},
}
LOW = (torch.bfloat16, torch.float16)
# Gradients of 16-bit weights: one unit in the last place of products that were summed in another order.
CLOSE = {"rtol": 2e-2, "atol": 2e-2}


def head(dtype=torch.float64, rows=ROWS, classes=CLASSES, seed=0):
    """Input, weight, bias that require grad, targets of which some are ignored, and a mask of rows."""
    g = torch.Generator().manual_seed(seed)
    x, w, b = (
        (torch.randn(*shape, generator=g, dtype=torch.float64) * size).to(dtype).requires_grad_()
        for shape, size in (((*rows, HIDDEN), 1.0), ((classes, HIDDEN), 0.5), ((classes,), 1.0))
    )
    target = torch.randint(0, classes, rows, generator=g)
    target[torch.rand(rows, generator=g) < 0.2] = -100
    return x, w, b, target, torch.rand(rows, generator=g) < 0.7


def dense(x, w, b, target, mask=None, outputs=sk.STATISTICS, logit_scale=1.0, **settings):
    if mask is not None:
        target = torch.where(mask, target, -100)
    return sk.row_stats(F.linear(x, w, b) * logit_scale, target, outputs=outputs, **settings)


def upstream(seed=1, rows=ROWS, share=0.4):
    """Upstream gradients of loss and entropy, most of them exactly 0."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, generator=g) * (torch.rand(rows, generator=g) < share) for _ in range(2)]


def gradients(stats, above, operands):
    return torch.autograd.grad((stats.loss * above[0] + stats.entropy * above[1]).sum(), operands)


@pytest.mark.parametrize("chunk", [None, 1, 2, 5, 100])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW], ids=str)
def test_statistics_and_gradients_are_those_of_the_dense_graph(dtype, settings, chunk):
    x, w, b, target, mask = head(dtype)
    found = linear_row_stats(
        x, w, target, linear_bias=b, row_mask=mask, chunk=chunk, outputs=sk.STATISTICS, **settings
    )  # fmt: skip
    right = dense(x, w, b, target, mask, **settings)
    assert found.loss.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    for name in sk.STATISTICS:
        torch.testing.assert_close(getattr(found, name), getattr(right, name), msg=name)
    above = upstream()
    for ours, theirs in zip(gradients(found, above, (x, w, b)), gradients(right, above, (x, w, b)), strict=True):
        assert ours.dtype is dtype
        torch.testing.assert_close(ours, theirs, **(CLOSE if dtype in LOW else {}))


def error(value, right):
    return float((value.double() - right).norm() / right.norm())


@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_gradients_in_16_bits_are_as_near_to_float64_as_those_of_the_dense_graph(dtype, chunk):
    x, w, b, target, _ = head(dtype, rows=(256,), classes=300)
    above = upstream(rows=(256,), share=0.9)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, w, b)]
    right = gradients(dense(*exact, target), above, exact)
    ours = gradients(linear_row_stats(x, w, target, linear_bias=b, chunk=chunk), above, (x, w, b))
    theirs = gradients(dense(x, w, b, target), above, (x, w, b))
    for a, b, c in zip(ours, theirs, right, strict=True):
        assert error(a, c) < 1.2 * error(b, c)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradcheck(settings):
    x, w, b, target, mask = head(rows=(4,), classes=6)

    def function(x, w, b):
        return linear_row_stats(x, w, target, linear_bias=b, row_mask=mask, chunk=2, **settings)[:2]

    assert torch.autograd.gradcheck(function, (x, w, b))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_backend_of_row_stats_serves(backend, settings):
    if backend == "triton" and (reason := sk.backend_info()["row_stats"]["others"].get("triton", "")).startswith(
        "triton is"
    ):
        pytest.skip(reason)
    x, w, b, target, mask = head(torch.float32)
    above = upstream()
    with forced(backend):
        found = linear_row_stats(x, w, target, linear_bias=b, row_mask=mask, chunk=4, **settings)
        ours = gradients(found, above, (x, w, b))
    right = dense(x, w, b, target, mask, ("loss", "entropy"), **settings)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(ours, gradients(right, above, (x, w, b)))


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_the_scale_of_logits_comes_before_the_softcap_and_the_temperature_after(softcap):
    x, w, b, target, _ = head()
    z = F.linear(x, w, b) * 0.0625
    z = (softcap * torch.tanh(z / softcap) if softcap else z) / 0.5
    found = linear_row_stats(
        x, w, target, linear_bias=b, logit_scale=0.0625, softcap=softcap, temperature=0.5,
        outputs=("loss", "mean_logits", "logsumexp", "argmax"),
    )  # fmt: skip
    valid = target != -100
    torch.testing.assert_close(found.mean_logits, torch.where(valid, z.mean(-1), 0.0))
    torch.testing.assert_close(found.logsumexp, torch.where(valid, z.logsumexp(-1), 0.0))
    torch.testing.assert_close(
        found.loss, F.cross_entropy(z.flatten(0, 1), target.flatten(), reduction="none").view(ROWS)
    )
    assert torch.equal(found.argmax, torch.where(valid, z.argmax(-1), 0))
    assert found.entropy is None
    assert not found.mean_logits.requires_grad
    found.loss.sum().backward()
    assert x.grad is not None


# Rows that are multiplied


@pytest.mark.parametrize("chunk", [None, 3])
def test_rows_without_an_upstream_gradient_are_not_multiplied(chunk):
    x, w, b, target, mask = head()
    counts = mask & (target != -100)
    above = upstream()
    with count_multiplied_rows() as rows:
        stats = linear_row_stats(x, w, target, linear_bias=b, row_mask=mask, chunk=chunk)
        assert (rows.scored, rows.differentiated) == (int(counts.sum()), 0)
        gradients(stats, above, (x, w, b))
    used = counts & ((above[0] != 0) | (above[1] != 0))
    assert 0 < int(used.sum()) < int(counts.sum())
    assert (rows.scored, rows.differentiated, rows.recomputed) == (int(counts.sum()), *[int(used.sum())] * 2)
    assert rows.products == rows.scored + 3 * rows.differentiated


def test_a_row_that_is_not_multiplied_may_hold_anything():
    x, w, b, target, mask = head()
    target[1, 2], mask[1, 2] = 10**6, False
    with torch.no_grad():
        x[1, 2] = torch.nan
        x[0, 0] = torch.inf
    target[0, 0] = -100
    stats = linear_row_stats(x, w, target, linear_bias=b, row_mask=mask)
    assert stats.loss.isfinite().all()
    stats.loss.sum().backward()
    for leaf in (x, w, b):
        assert leaf.grad.isfinite().all()
    assert x.grad[1, 2].eq(0).all()


def test_an_invalid_row_is_nan_and_taints_no_gradient_unless_it_is_used():
    x, w, _, target, _ = head()
    target.clamp_(min=0)
    with torch.no_grad():
        x[1, 2] = torch.nan
    stats = linear_row_stats(x, w, target, outputs=("loss", "argmax"))
    assert stats.loss[1, 2].isnan()
    assert stats.argmax[1, 2] == -1
    assert torch.autograd.grad(stats.loss.nan_to_num().sum(), w, retain_graph=True)[0].isfinite().all()
    assert torch.autograd.grad(stats.loss.sum(), w)[0].isnan().any()


def test_nan_upstream_is_not_taken_for_zero():
    x, w, _, target, _ = head()
    target.clamp_(min=0)
    loss = linear_row_stats(x, w, target).loss
    above = torch.zeros(ROWS, dtype=torch.float64)
    above[0, 0] = torch.nan
    (gradient,) = torch.autograd.grad(loss, x, above)
    assert gradient[0, 0].isnan().any()
    assert gradient[0, 1:].eq(0).all()


@pytest.mark.parametrize("why", ["ignored", "masked", "no rows", "zero upstream"])
def test_nothing_to_multiply_gives_zeros(why):
    x, w, b, target, mask = head(rows=(0,) if why == "no rows" else ROWS)
    if why == "ignored":
        target.fill_(-100)
    if why == "masked":
        mask.fill_(False)
    with count_multiplied_rows() as rows:
        stats = linear_row_stats(x, w, target, linear_bias=b, row_mask=mask)
        (stats.loss.sum() * (0.0 if why == "zero upstream" else 1.0)).backward()
    assert rows.differentiated == 0
    assert (rows.scored == 0) == (why != "zero upstream")
    for leaf in (x, w, b):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


# What is differentiated


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_what_requires_a_gradient_gets_one(which):
    operands = [leaf.detach() for leaf in head()[:3]]
    target = head()[3]
    for i in which:
        operands[i].requires_grad_()
    above = upstream()
    leaves = [operands[i] for i in which]
    x, w, b = operands
    ours = gradients(linear_row_stats(x, w, target, linear_bias=b), above, leaves)
    for a, c in zip(ours, gradients(dense(x, w, b, target), above, leaves), strict=True):
        torch.testing.assert_close(a, c)
    assert all(operands[i].grad is None for i in range(3))


@pytest.mark.parametrize("outputs", [("loss",), "entropy", ("argmax", "max_prob")], ids=str)
def test_only_the_outputs_asked_for(outputs):
    x, w, _, target, _ = head()
    stats = linear_row_stats(x, w, target, outputs=outputs)
    names = (outputs,) if isinstance(outputs, str) else outputs
    assert {name for name, value in stats._asdict().items() if value is not None} == set(names)
    assert all(getattr(stats, name).requires_grad == (name in ("loss", "entropy")) for name in names)
    with torch.no_grad():
        assert not any(value.requires_grad for value in linear_row_stats(x, w, target) if value is not None)


def test_a_weight_tied_to_an_embedding_gets_both_gradients():
    tokens = torch.randint(0, CLASSES, (2, 9), generator=torch.Generator().manual_seed(0))
    results = []
    for ours in (True, False):
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(CLASSES, HIDDEN, dtype=torch.float64)
        hidden, target = embedding(tokens[:, :-1]).tanh(), tokens[:, 1:]
        w = embedding.weight
        stats = linear_row_stats(hidden, w, target) if ours else dense(hidden, w, None, target)
        stats.loss.mean().backward()
        results.append(w.grad)
    torch.testing.assert_close(*results)


def test_operands_of_any_strides_and_targets_of_any_kind():
    x, w, b, target, mask = head()
    right = dense(x, w, b, target, mask)
    wide = torch.zeros(*ROWS, 2 * HIDDEN, dtype=x.dtype)
    wide[..., ::2] = x.detach()
    turned = w.detach().t().contiguous().t()
    targets = torch.empty(*ROWS[::-1], dtype=torch.int32).t().copy_(target)
    masks = torch.empty(*ROWS[::-1], dtype=torch.bool).t().copy_(mask)
    leaves = wide.requires_grad_(), turned.requires_grad_(), b
    found = linear_row_stats(wide[..., ::2], turned, targets, linear_bias=b, row_mask=masks, outputs=sk.STATISTICS)
    for name in sk.STATISTICS:
        torch.testing.assert_close(getattr(found, name), getattr(right, name))
    above = upstream()
    ours, theirs = gradients(found, above, leaves), gradients(right, above, (x, w, b))
    torch.testing.assert_close(ours[0][..., ::2], theirs[0])
    torch.testing.assert_close(ours[1:], theirs[1:])


@pytest.mark.parametrize("rows", [(), (1,), (2, 1, 3)], ids=str)
def test_rows_of_any_shape(rows):
    x, w, b, _, _ = head(rows=rows)
    target = torch.full(rows, 3)
    found = linear_row_stats(x, w, target, linear_bias=b, outputs=("loss",))
    assert found.loss.shape == rows
    torch.testing.assert_close(found.loss, dense(x, w, b, target).loss)
    found.loss.sum().backward()
    assert x.grad.shape == x.shape


def test_an_ignore_index_that_is_a_class_and_none():
    x, w, b, target, _ = head()
    target.clamp_(min=0)
    target[0] = 3
    for index in (3, None):
        torch.testing.assert_close(
            linear_row_stats(x, w, target, linear_bias=b, ignore_index=index)[:2],
            dense(x, w, b, target, ignore_index=index)[:2],
        )
    mask = target != 3
    masked = linear_row_stats(x, w, target, linear_bias=b, ignore_index=None, row_mask=mask).loss
    assert torch.equal(masked.eq(0), ~mask)


def test_a_graph_that_is_kept_gives_the_same_gradient_twice_and_inside_checkpoint():
    x, w, b, target, _ = head()
    loss = linear_row_stats(x, w, target, linear_bias=b).loss.mean()
    first = torch.autograd.grad(loss, (x, w, b), retain_graph=True)
    assert all(torch.equal(a, c) for a, c in zip(first, torch.autograd.grad(loss, (x, w, b)), strict=True))
    again = checkpoint(lambda x: linear_row_stats(x, w, target, linear_bias=b).loss.mean(), x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, w)[0], first[1])


def test_a_second_derivative_is_refused_in_one_line():
    x, w, _, target, _ = head()
    loss = linear_row_stats(x, w, target).loss.mean()
    with pytest.raises(RuntimeError, match=r"linear_row_stats has no second derivative.*row_stats\(F.linear"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_counters_close_and_nest():
    x, w, _, target, _ = head()
    with count_multiplied_rows() as outer:
        with count_multiplied_rows() as inner:
            linear_row_stats(x, w, target)
        linear_row_stats(x, w, target)
    linear_row_stats(x, w, target)
    assert outer.scored == 2 * inner.scored > 0
