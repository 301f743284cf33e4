"""Compact and Expand in a network: values, gradients, statistics, and which rows the layers between them run on."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparse_training import Compact, Expand
from sparse_training.nn import BatchNorm


def mask_of(rows, kept, seed=0):
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:kept]] = True
    return mask


@pytest.mark.parametrize("capacity", [None, 5, 9])
def test_rows_go_back_to_their_places_and_the_rest_is_the_skip(capacity):
    x = torch.randn(12, 3, dtype=torch.float64)
    skip = torch.randn(12, 3, dtype=torch.float64)
    mask = mask_of(12, 5)
    rows, selection = Compact(capacity)(x, mask)
    assert torch.equal(rows[:5], x[mask])
    assert torch.equal(Expand()(rows, selection), torch.where(mask[:, None], x, 0.0))
    assert torch.equal(Expand()(rows, selection, skip), torch.where(mask[:, None], x, skip))


def test_rows_that_do_not_fit_the_capacity_pass_by():
    x, skip = torch.randn(12, 3), torch.zeros(12, 3)
    mask = mask_of(12, 5)
    rows, selection = Compact(3)(x, mask)
    assert selection.overflow == 2
    fitted = torch.zeros(12, dtype=torch.bool)
    fitted[mask.nonzero().squeeze(-1)[:3]] = True
    assert torch.equal(Expand()(rows, selection, skip), torch.where(fitted[:, None], x, 0.0))


@pytest.mark.parametrize("capacity", [None, 6])
def test_gradients(capacity):
    mask = mask_of(8, 4)
    layer = nn.Linear(3, 3).double()

    def residual(x, skip):
        rows, selection = Compact(capacity)(x, mask)
        return Expand()(rows + layer(rows).tanh(), selection, skip)

    inputs = [torch.randn(8, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(residual, inputs)
    x, skip = inputs
    gradient, of_skip = torch.autograd.grad(residual(x, skip).sum(), inputs)
    assert (gradient[~mask] == 0).all()
    assert torch.equal(of_skip, (~mask).double()[:, None].expand(8, 3))


@pytest.mark.parametrize("capacity", [None, 7])
def test_parameters_get_the_gradient_of_the_rows_kept_alone(capacity):
    x, mask = torch.randn(16, 4, dtype=torch.float64), mask_of(16, 5)
    layer = nn.Linear(4, 2).double()
    rows, selection = Compact(capacity)(x, mask)
    Expand()(layer(rows), selection).square().sum().backward()
    found = layer.weight.grad.clone()
    layer.weight.grad = None
    layer(x[mask]).square().sum().backward()
    assert torch.allclose(found, layer.weight.grad, rtol=1e-12)


@pytest.mark.parametrize("kept", [5, 0])
def test_a_row_left_out_that_is_not_finite_reaches_nothing(kept):
    x, mask = torch.randn(16, 4, dtype=torch.float64), mask_of(16, 8)
    mask &= mask.cumsum(0) <= kept
    mask[0] = False
    count = int(mask.sum())
    x[~mask] = torch.nan
    layer, norm = nn.Linear(4, 2).double(), nn.BatchNorm1d(2).double()
    rows, selection = Compact(7)(x, mask)
    hidden = layer(rows)
    norm(hidden)
    out = Expand()(hidden, selection)
    out.square().sum().backward()
    assert norm.running_mean.isfinite().all()
    assert norm.running_var.isfinite().all()
    found = layer.weight.grad.clone()
    layer.weight.grad = None
    layer(x[mask]).square().sum().backward()
    assert torch.allclose(found, layer.weight.grad, rtol=1e-12)
    assert (rows[count:] == (rows[0] if count else 0.0)).all()
    assert torch.equal(selection.take(x)[:count], x[mask])


def test_what_follows_runs_on_the_packed_rows_only():
    """Counted by PyTorch: forward and backward of the block cost kept / rows of the dense block's."""
    rows, kept = 40, 7
    stem = nn.Conv2d(3, 8, 3, padding=1)
    block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    head = nn.Linear(8, 10)
    images = torch.randn(rows, 3, 8, 8)
    mask = mask_of(rows, kept)

    def flops(run):
        with FlopCounterMode(display=False) as forward:
            out = run()
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    def packed():
        x, selection = Compact()(stem(images), mask)
        return Expand()(head(block(x).mean((2, 3))), selection)

    of_stem = flops(lambda: stem(images))
    dense = flops(lambda: head(block(stem(images)).mean((2, 3))))
    for ours, all_rows, before in zip(flops(packed), dense, of_stem, strict=True):
        assert all_rows > before > 0
        assert (ours - before) * rows == (all_rows - before) * kept


@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 4, 3), (6, 2, 3, 2)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_statistics_leave_padding_out(shape, momentum):
    plain = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(shape)]
    theirs, ours = (kind(6, momentum=momentum).double() for kind in (plain, BatchNorm))
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    for step in range(3):
        x = torch.randn(20, *shape, dtype=torch.float64)
        mask = mask_of(20, 5 + step, step)
        exact, _ = Compact()(x, mask)
        padded, selection = Compact(13)(x, mask)
        wanted = theirs(exact)
        found = ours(padded, selection)
        assert torch.allclose(found[: 5 + step], wanted)
        assert not torch.allclose(theirs.running_mean, torch.zeros(6, dtype=torch.float64))
        for name, buffer in theirs.named_buffers():
            assert torch.allclose(ours.get_buffer(name), buffer), name
    assert torch.allclose(ours.eval()(padded, selection)[:7], theirs.eval()(exact))


def test_batch_statistics_have_the_right_gradient():
    x, mask, upstream = torch.randn(10, 3, dtype=torch.float64), mask_of(10, 4), torch.randn(10, 3, dtype=torch.float64)
    gradients = []
    for capacity in (None, 8):
        x.requires_grad_(True).grad = None
        rows, selection = Compact(capacity)(x, mask)
        rows = nn.BatchNorm1d(3).double()(rows) if capacity is None else BatchNorm(3).double()(rows, selection)
        Expand()(rows, selection).mul(upstream).sum().backward()
        gradients.append(x.grad.clone())
    assert torch.allclose(*gradients)


@pytest.mark.parametrize("kept", [0, 1])
def test_too_few_rows_leave_the_running_statistics(kept):
    norm = BatchNorm(3)
    rows, selection = Compact(4)(torch.randn(6, 3), mask_of(6, kept))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    assert norm(rows, selection).isfinite().all()
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_dropout_draws_for_the_packed_rows_alone():
    torch.manual_seed(0)
    x = torch.ones(1000, 8)
    rows, selection = Compact()(x, mask_of(1000, 300))
    dropped = nn.Dropout(0.5)(rows)
    full = Expand()(dropped, selection, skip=x)
    assert dropped.shape == (300, 8)
    assert 0.4 < (dropped == 0).float().mean() < 0.6
    assert (full == 0).sum() == (dropped == 0).sum()


def test_bad_input_is_one_clear_line():
    x, mask = torch.randn(6, 3), mask_of(6, 2)
    rows, selection = Compact()(x, mask)
    for call, message in [
        (lambda: Expand()(rows, selection, x[:5]), r"`skip` must be .* got .*\(5, 3\)"),
        (lambda: Expand()(rows, selection, x.double()), "`skip` must be .* got torch.float64"),
        (lambda: Expand()(rows[:1], selection), "must have 2 rows"),
        (lambda: BatchNorm(3)(x, selection), "2 slots"),
        (lambda: BatchNorm(4)(rows, selection), "4 channels"),
        (lambda: Compact(-1)(x, mask), "`capacity` must be .* got -1"),
        (lambda: Compact()(x, mask[:5]), "must have 5 rows"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
