"""The gate: what it keeps, what its controller sees, what it refuses, and that it resumes exactly."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_kernels import _dispatch, row_stats
from sparse_kernels.backends import cpp as cpp_backend
from sparse_kernels.types import CONTROL_VALUES
from sparse_training.errors import UserError
from sparse_training.gate.gate import Gate
from sparse_training.gate.schedules import Ramp
from sparse_training.gate.significance import Significance

CLASSES = 10


def batches(count: int, rows: int = 512, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (3 * torch.randn(rows, CLASSES, generator=g), torch.randint(0, CLASSES, (rows,), generator=g))
        for _ in range(count)
    ]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    loss = row_stats(logits, targets, outputs=("loss",)).loss
    assert loss is not None
    return loss


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("threshold", [None, 1e-3, 1e3])
def test_keeps_the_rate_asked_for(rate: float, threshold: float | None) -> None:
    gate = Gate(rate, threshold=threshold)
    kept = [gate(*batch).count.item() / 512 for batch in batches(120)]
    assert sum(kept[50:]) / 70 == pytest.approx(rate, abs=0.01)
    assert gate.rate_observed.item() == pytest.approx(rate, abs=0.02)
    assert gate.step == 120


def test_keeps_exactly_the_rows_above_the_threshold() -> None:
    logits, targets = batches(1)[0]
    gate = Gate(0.1, threshold=4.0, significance=Significance(loss=1.0))
    selection = gate(logits, targets)
    above = (loss_of(logits, targets) > 4.0).nonzero()[:, 0]
    assert 10 < len(above) < 500
    assert torch.equal(selection.index, above)
    assert (selection.weight == 1).all()
    taken, labels = selection.take((logits, targets))
    assert torch.equal(taken, logits[above])
    assert torch.equal(labels, targets[above])


def test_offset_adds_to_the_significance() -> None:
    logits, targets = batches(1)[0]
    offset = torch.zeros(512)
    offset[7], offset[8] = 1e6, -1e6
    index = Gate(0.1, threshold=100.0)(logits, targets, offset=offset).index
    assert index.tolist() == [7]


def test_ignored_and_invalid_rows_are_never_kept_and_invalid_ones_counted() -> None:
    gate = Gate(0.5, floor=0.5)
    for logits, targets in batches(30):
        targets[:100] = -100
        logits[100:110, 3] = math.nan
        logits[110:120, 4] = math.inf
        logits[120:130] = -math.inf
        selection = gate(logits, targets)
        assert selection.index.min() >= 130
    assert gate.invalid == 30 * 30
    assert gate.rate_observed.item() == pytest.approx(0.5, abs=0.03)  # of the 382 valid rows


def test_own_ignore_index() -> None:
    logits, targets = batches(1)[0]
    targets[::2] = 255
    kept = Gate(1.0, ignore_index=255)(logits, targets)
    assert torch.equal(kept.index, torch.arange(1, 512, 2))


def test_rate_one_keeps_every_valid_row_for_ever() -> None:
    gate = Gate(1.0)
    for logits, targets in batches(5):
        logits[3, 0] = math.nan
        assert gate(logits, targets).count == 511
    assert gate.threshold.item() == -math.inf
    assert gate.saturated == 0


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("options", [{}, {"capacity": 8}, {"floor": 0.1}, {"temperature": 0.5}])
def test_tiny_batches(rows: int, options: dict[str, Any]) -> None:
    gate = Gate(0.2, **options)
    for batch in batches(20, rows=rows):
        selection = gate(*batch)
        assert selection.count <= rows
        selection.take(batch)
    assert gate.step == 20


# Capacity


def test_capacity_pads_and_counts_what_does_not_fit() -> None:
    gate = Gate(0.5, capacity=64, threshold=2.0)
    overflow = 0
    for batch in batches(10):
        selection = gate(*batch)
        assert selection.index.shape == (64,)
        overflow += int(selection.overflow)
    assert overflow > 500
    assert gate.overflow == overflow


def test_the_batch_of_an_automatic_start_is_no_overflow() -> None:
    gate = Gate(0.1, capacity=256)
    first, *rest = batches(20)
    assert gate(*first).overflow == 256
    for batch in rest:
        assert gate(*batch).overflow == 0
    assert gate.overflow == 0


# Floor


def test_floor_takes_the_most_significant_rows() -> None:
    logits, targets = batches(1)[0]
    targets[:12] = -100
    logits[12:22, 0] = math.nan
    gate = Gate(0.3, threshold=1e6, floor=0.1, significance=Significance(loss=1.0))
    selection = gate(logits, targets)
    loss = loss_of(logits, targets)
    loss[:22] = -1
    top = loss.topk(49).indices.sort().values  # ceil(0.1 * 490 valid rows)
    assert torch.equal(selection.index, top)


def test_floor_adds_nothing_where_enough_is_kept() -> None:
    logits, targets = batches(1)[0]
    plain = Gate(0.5, threshold=2.0)(logits, targets)
    floored = Gate(0.5, threshold=2.0, floor=0.05)(logits, targets)
    assert torch.equal(plain.index, floored.index)


@pytest.mark.parametrize(("valid", "floor", "least"), [(30, 0.1, 3), (31, 0.1, 4), (1, 0.1, 1), (50, 0.3, 15)])
def test_floor_rounds_up_and_only_up(valid: int, floor: float, least: int) -> None:
    logits, targets = batches(1, rows=64)[0]
    targets[valid:] = -100
    assert Gate(0.5, threshold=1e6, floor=floor)(logits, targets).count == least


def test_controller_sees_the_rate_before_the_floor() -> None:
    """Row 8 of what the original got wrong: fed the rate after its fallback, the controller winds up."""
    plain, floored = Gate(0.1, threshold=50.0), Gate(0.1, threshold=50.0, floor=0.1)
    differed = False
    for batch in batches(60):
        a, b = plain(*batch), floored(*batch)
        differed |= bool(a.count != b.count)
        assert torch.equal(plain.threshold, floored.threshold)
        assert b.count >= 52
    assert differed


# Drawn selections


def test_weights_make_the_sum_over_the_kept_unbiased() -> None:
    torch.manual_seed(0)
    logits, targets = batches(1)[0]
    value = torch.rand(512)
    gate = Gate(0.3, temperature=1.0, p_min=0.05, seed=3)
    for _ in range(30):
        gate(logits, targets)  # settle
    sums = []
    for _ in range(400):
        kept = gate(logits, targets)
        sums.append((kept.weight * value[kept.index]).sum())
    estimates = torch.stack(sums)
    assert estimates.mean().item() == pytest.approx(value.sum().item(), abs=4 * estimates.std().item() / 20)
    assert kept.weight.max() <= 20.001
    assert gate.rate_observed.item() == pytest.approx(0.3, abs=0.01)


def test_draws_follow_the_seed_and_the_step() -> None:
    batch = batches(1)[0]

    def draw(seed: int, calls: int) -> list[list[int]]:
        gate = Gate(0.3, temperature=1.0, seed=seed, threshold=3.0)
        return [gate(*batch).index.tolist() for _ in range(calls)]

    assert draw(1, 2) == draw(1, 2)
    assert draw(1, 1) != draw(2, 1)
    first, second = draw(1, 2)
    assert first != second


# Set-points


def grad_norm_of(logits: Tensor, targets: Tensor) -> Tensor:
    norm = row_stats(logits, targets, outputs=("grad_norm",)).grad_norm
    assert norm is not None
    return norm


@pytest.mark.parametrize("fraction", [0.3, 0.8, 0.95])
@pytest.mark.parametrize("significance", [None, Significance(loss=0.7, entropy=0.3)])
def test_keeps_the_grad_norm_fraction(fraction: float, significance: Significance | None) -> None:
    gate = Gate(grad_norm_fraction=fraction, significance=significance)
    shares, fewest = [], []
    for logits, targets in batches(120):
        kept = gate(logits, targets)
        norm = grad_norm_of(logits, targets)
        shares.append((norm[kept.index].sum() / norm.sum()).item())
        order = norm.sort(descending=True).values.cumsum(0) / norm.sum()
        fewest.append(kept.count.item() / (1 + int((order < shares[-1] - 1e-6).sum())))
    assert sum(shares[50:]) / 70 == pytest.approx(fraction, abs=0.01)
    assert gate.rate_observed.item() == pytest.approx(fraction, abs=0.03)
    if significance is None:  # no smaller set of rows holds as much
        assert max(fewest[50:]) == 1.0
    assert gate.saturated < 10  # a start above every row of a narrow band may count


def test_grad_norm_fraction_counts_neither_ignored_nor_invalid_rows() -> None:
    gate = Gate(grad_norm_fraction=0.7)
    for logits, targets in batches(80):
        targets[:100] = -100
        logits[100:110, 3] = math.nan
        kept = gate(logits, targets)
    assert gate.rate_observed.item() == pytest.approx(0.7, abs=0.03)
    assert gate.invalid == 80 * 10
    assert kept.index.min() >= 110


@pytest.mark.parametrize("name", ["rate", "grad_norm_fraction"])
def test_a_ramp_is_followed_over_the_run(name: str) -> None:
    ramp = Ramp(0.8, 0.2, begin=0.25, finish=0.75)
    gate = Gate(**{name: ramp})  # type: ignore[arg-type]
    observed = []
    for t, (logits, targets) in enumerate(batches(300)):
        gate.set_progress(t / 300)
        kept = gate(logits, targets)
        norm = torch.ones(512) if name == "rate" else grad_norm_of(logits, targets)
        observed.append((norm[kept.index].sum() / norm.sum()).item())
    for start, end in ((50, 75), (140, 160), (250, 300)):
        wanted = sum(ramp(t / 300) for t in range(start, end)) / (end - start)
        # A set-point that moves by 0.004 a batch is followed with a lag of a few batches.
        assert sum(observed[start:end]) / (end - start) == pytest.approx(wanted, abs=0.03)


def test_a_run_that_starts_with_every_row() -> None:
    gate = Gate(Ramp(1.0, 0.1, finish=0.1))
    counts = []
    for t, batch in enumerate(batches(200)):
        gate.set_progress(t / 200)
        counts.append(int(gate(*batch).count))
    assert counts[0] == 512
    assert sum(counts[60:]) / 140 / 512 == pytest.approx(0.1, abs=0.01)


def test_a_target_rate_out_of_range_is_refused_and_changes_nothing() -> None:
    gate = Gate(0.3, floor=0.1)
    for setpoint in (0.0, 1.5, math.nan, 0.05):
        with pytest.raises(UserError, match="`rate`"):
            gate.set_target_rate(setpoint)
        assert gate.rate == 0.3
        assert gate.controller.target.item() == pytest.approx(0.3)
    gate.set_target_rate(0.2)
    assert gate.controller.target.item() == pytest.approx(0.2)


# Other decisions


@pytest.mark.parametrize("rate", [0.1, 0.33, 1.0])
@pytest.mark.parametrize("capacity", [None, 200])
def test_topk_keeps_an_exact_count_of_the_most_significant(rate: float, capacity: int | None) -> None:
    gate = Gate(rate, decision="topk", capacity=capacity, significance=Significance(loss=1.0))
    for logits, targets in batches(3):
        targets[:12], logits[12:22, 0] = -100, math.nan
        kept = gate(logits, targets)
        wanted = math.ceil(rate * 490 - 1e-4)
        loss = loss_of(logits, targets).masked_fill(torch.arange(512) < 22, -1.0)
        top = loss.topk(wanted).indices.sort().values
        assert torch.equal(kept.index[: kept.count], top[:capacity])
        assert kept.overflow == max(0, wanted - (capacity or 512))


def equal_batches(count: int, value: float) -> list[tuple[Tensor, Tensor]]:
    logits, targets = batches(1)[0]
    logits = value * torch.nn.functional.one_hot(targets, CLASSES).float()
    return [(logits, targets)] * count


@pytest.mark.parametrize("value", [-3.0, 0.0, 3.0])
@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_random_ties_hold_a_rate_when_all_rows_are_equal(rate: float, value: float) -> None:
    gate, plain = Gate(rate, ties="random"), Gate(rate)
    counts, chosen = [], []
    for batch in equal_batches(120, value):
        kept = gate(*batch)
        counts.append(kept.count.item() / 512)
        chosen.append(kept.index)
        plain(*batch)
    assert sum(counts[60:]) / 60 == pytest.approx(rate, abs=0.015)
    assert gate.saturated == 0
    assert plain.saturated > 50  # a threshold alone keeps all or none
    if rate < 0.9:
        assert not torch.equal(chosen[-1][:10], chosen[-2][:10])


def test_random_ties_hold_a_rate_within_the_rows_that_are_zero() -> None:
    """Half of the rows have significance 0 exactly; 70% are wanted."""
    gate = Gate(0.7, ties="random", significance=Significance(max_prob=1.0))
    rates = []
    for logits, targets in batches(150):
        probability = row_stats(logits, targets, outputs=("max_prob",)).max_prob
        assert probability is not None
        gone = torch.where(torch.arange(512) < 256, -probability, 0.0)
        kept = gate(logits, targets, offset=gone)
        assert kept.index.max() > 500
        rates.append(kept.count.item() / 512)
        of_zeros = (kept.index < 256).float().mean()
    assert sum(rates[80:]) / 70 == pytest.approx(0.7, abs=0.015)
    assert of_zeros == pytest.approx(0.2 / 0.7, abs=0.1)


def test_random_ties_leave_the_order_of_rows_that_differ() -> None:
    logits, targets = batches(1)[0]
    ordered = Gate(0.2, decision="topk")(logits, targets)
    drawn = Gate(0.2, decision="topk", ties="random")(logits, targets)
    assert torch.equal(ordered.index, drawn.index)


def test_topk_draws_among_equal_rows() -> None:
    gate = Gate(0.1, decision="topk", ties="random")
    picks = [gate(*batch).index for batch in equal_batches(100, 2.0)]
    assert all(len(pick) == 52 for pick in picks)
    times = torch.cat(picks).bincount(minlength=512)
    assert times.max() < 30  # 10 each on average: no row is favoured
    assert (times == 0).sum() < 5


# Bad batches


@pytest.mark.parametrize(
    "options",
    [
        {"rate": 0.2},
        {"rate": 0.2, "capacity": 64},
        {"grad_norm_fraction": 0.5},
        {"rate": 0.2, "decision": "topk"},
        {"rate": 0.2, "ties": "random"},
        {"rate": 0.2, "temperature": 0.5},
        {"rate": 0.2, "floor": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["NaN", "ignored", "empty", "one row"])
def test_a_bad_batch_selects_what_it_can_and_leaves_the_threshold(options: dict[str, Any], kind: str) -> None:
    gate = Gate(**options)
    for batch in batches(10):
        gate(*batch)
    logits, targets = batches(1, rows={"empty": 0, "one row": 1}.get(kind, 32))[0]
    if kind == "NaN":
        logits = torch.full_like(logits, math.nan)
    elif kind == "ignored":
        targets = torch.full_like(targets, -100)
    before = gate.threshold.clone()
    kept = gate(logits, targets)
    assert gate.step == 11
    assert gate.threshold.isfinite()
    assert gate.controller.values.isfinite().all()
    assert kept.index.shape == ((64,) if "capacity" in options else (int(kept.count),))
    assert gate.invalid == (32 if kind == "NaN" else 0)
    if kind != "one row":
        assert kept.count == 0
        assert torch.equal(gate.threshold, before)
    kept.take((logits, targets))


# State


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "p_min": 0.01, "capacity": 100}, {"floor": 0.05}])
def test_resumes_bit_exactly_in_the_middle_of_a_run(options: dict[str, Any]) -> None:
    data = batches(40)
    whole = Gate(0.1, seed=5, **options)
    for batch in data[:20]:
        whole(*batch)
    resumed = Gate(0.1, seed=5, **options)
    resumed.load_state_dict({name: value.clone() for name, value in whole.state_dict().items()})
    for batch in data[20:]:
        a, b = whole(*batch), resumed(*batch)
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.weight, b.weight)
    for (name, x), y in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


VERSION_1 = {  # saved by it after 20 batches of 64 rows
    "step": 20,
    "invalid": 21,
    "overflow": 22,
    "controller.threshold": "0x1.b75de4p+2",
    "controller.drift": "-0x1.e284d4p-8",
    "controller.position_variance": "0x1.91e7a0p-6",
    "controller.covariance": "0x1.8eeca2p-10",
    "controller.drift_variance": "0x1.3ede70p-13",
    "controller.unit": "0x1.05cabap+0",
    "controller.error": "-0x1.e16cf0p-5",
    "controller.error_variance": "0x1.af9408p-8",
    "controller.surprise": "0x0.0p+0",
    "controller.misses": "0x1.7f395ep-4",
    "controller.rate": "0x1.0d8cfap-3",
    "controller.steps": 20,
    "controller.saturated": 3,
}


@pytest.mark.parametrize("prefix", ["", "policy.gate."])
def test_a_state_of_version_1_loads_bit_exactly(prefix: str) -> None:
    saved = {
        prefix + name: torch.tensor(value if isinstance(value, int) else float.fromhex(value))
        for name, value in VERSION_1.items()
    }
    gate = Gate(0.1, capacity=16, temperature=0.25)
    module = gate
    for name in reversed(prefix.split(".")[:-1]):
        module = torch.nn.ModuleDict({name: module})  # type: ignore[assignment,dict-item]
    module.load_state_dict(saved)
    state = gate.controller.state()
    for name in CONTROL_VALUES:
        assert torch.equal(state.value(name), saved[f"{prefix}controller.{name}"]), name
    assert state.counters.tolist() == [20, 3, 21, 22]
    assert gate.step == 20
    gate(*batches(1)[0])


def test_a_state_of_version_1_that_is_not_whole_is_refused() -> None:
    saved = {name: torch.tensor(0.0) for name in VERSION_1 if name != "controller.drift"}
    with pytest.raises(RuntimeError, match=r"controller\.drift"):
        Gate(0.1).load_state_dict(saved)


@pytest.mark.parametrize("before", ["torch", "cpp"])
def test_a_run_goes_on_with_another_backend(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is loaded to the bit; from there each backend's arithmetic is its own, to rounding."""
    after = {"torch": "cpp", "cpp": "torch"}[before]
    if cpp_backend.unavailable_reason():
        pytest.skip(str(cpp_backend.unavailable_reason()))
    data = batches(40)
    whole, resumed = Gate(0.1), Gate(0.1)
    monkeypatch.setattr(_dispatch, "_forced", before)
    for batch in data[:20]:
        whole(*batch)
    resumed.load_state_dict({name: value.clone() for name, value in whole.state_dict().items()})
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for batch in data[20:]:
        monkeypatch.setattr(_dispatch, "_forced", before)
        whole(*batch)
        monkeypatch.setattr(_dispatch, "_forced", after)
        resumed(*batch)
    torch.testing.assert_close(whole.threshold, resumed.threshold, rtol=1e-3, atol=0)


def test_state_is_named_and_last_is_no_part_of_it() -> None:
    gate = Gate(0.1)
    gate(*batches(1)[0])
    assert gate.last is not None
    assert gate.last.significance.shape == (512,)
    names = set(gate.state_dict())
    assert names == {"controller.values", "controller.counters"}
    assert not any("last" in name for name in names)
    assert gate.threshold.dtype is torch.float32
    assert gate.threshold.numel() == 1


def test_no_gradient_and_the_logits_untouched() -> None:
    logits, targets = batches(1)[0]
    logits.requires_grad_()
    before = logits.detach().clone()
    gate = Gate(0.3)
    selection = gate(logits, targets)
    assert not selection.weight.requires_grad
    assert gate.last is not None
    assert not gate.last.significance.requires_grad
    assert torch.equal(logits.detach(), before)


def test_pixels_are_rows_in_the_order_of_their_targets() -> None:
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, CLASSES, 5, 7, generator=g)
    targets = torch.randint(0, CLASSES, (2, 5, 7), generator=g)
    pixels = Gate(0.3, threshold=3.0, dim=1)(logits, targets)
    rows = Gate(0.3, threshold=3.0)(logits.movedim(1, -1).reshape(-1, CLASSES), targets.flatten())
    assert torch.equal(pixels.index, rows.index)
    assert pixels.size == 70


def test_label_smoothing_and_reduced_precision() -> None:
    logits, targets = batches(1)[0]
    smooth = Gate(0.1, threshold=3.0, label_smoothing=0.1, significance=Significance(loss=1.0))
    smooth(logits, targets)
    assert smooth.last is not None
    expected = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(smooth.last.significance, expected)
    smooth(logits.bfloat16(), targets)
    assert smooth.last.significance.dtype is torch.float32


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, r"`rate` must be .*, got 0.0"),
        ({"rate": 1.5}, r"`rate` must be .*, got 1.5"),
        ({"rate": "0.1"}, r"`rate` must be .*, got '0.1'"),
        ({"rate": math.nan}, r"`rate` must be .*, got nan"),
        ({"floor": 0.2}, r"`floor` must be at most `rate`=0.1, got 0.2"),
        ({"floor": -0.1}, r"`floor` must be .*, got -0.1"),
        ({"floor": 0.05, "temperature": 1.0}, "`floor`=0.05 cannot be used with `temperature`=1.0"),
        ({"temperature": -1.0}, r"`temperature` must be .*, got -1.0"),
        ({"temperature": math.inf}, r"`temperature` must be .*, got inf"),
        ({"p_min": 0.05}, "`p_min`=0.05 needs a temperature"),
        ({"p_min": 0.1, "temperature": 1.0}, "`p_min` must be below `rate`=0.1, got 0.1"),
        ({"p_min": 1.0, "temperature": 1.0}, r"`p_min` must be .*, got 1.0"),
        ({"capacity": 0}, r"`capacity` must be .*, got 0"),
        ({"capacity": 12.5}, "`capacity` must be an integer, got 12.5"),
        ({"capacity": True}, r"`capacity` must be .*, got True"),
        ({"seed": 0.5}, "`seed` must be an integer, got 0.5"),
        ({"ignore_index": None}, r"`ignore_index` must be .*, got None"),
        ({"dim": 1.0}, r"`dim` must be .*, got 1.0"),
        ({"label_smoothing": 1.1}, r"`label_smoothing` must be .*, got 1.1"),
        ({"threshold": math.inf}, r"`threshold` must be .*, got inf"),
        ({"significance": {"loss": 1.0}}, "must be a Significance"),
        ({"rate": None, "grad_norm_fraction": 0.0}, r"`grad_norm_fraction` must be .*, got 0.0"),
        ({"rate": None, "grad_norm_fraction": 1.1}, r"`grad_norm_fraction` must be .*, got 1.1"),
        ({"grad_norm_fraction": 0.5}, "got both: 0.1 and 0.5"),
        ({"rate": None, "grad_norm_fraction": 0.5, "decision": "topk"}, "use `rate`"),
        ({"rate": None, "grad_norm_fraction": 0.5, "floor": 0.1}, "use `rate`"),
        (
            {"rate": None, "grad_norm_fraction": 0.05, "temperature": 1.0, "p_min": 0.1},
            "`p_min` must be below `grad_norm_fraction`=0.05, got 0.1",
        ),
        ({"decision": "best"}, "`decision` must be one of threshold, topk, got 'best'"),
        ({"ties": "keep"}, "`ties` must be one of equal, random, got 'keep'"),
        ({"temperature": 1.0, "decision": "topk"}, "use temperature=0"),
        ({"temperature": 1.0, "ties": "random"}, "use temperature=0"),
    ],
)
def test_a_setting_out_of_range_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Gate(**{"rate": 0.1, **options})
    assert "\n" not in str(caught.value)
    assert re.search("must be|use |set |give ", str(caught.value))


def test_tensors_that_do_not_fit_are_refused_and_change_nothing() -> None:
    logits, targets = batches(1)[0]
    gate = Gate(0.1)
    before = {name: value.clone() for name, value in gate.state_dict().items()}
    with pytest.raises(ValueError, match="`targets` must have shape"):
        gate(logits, targets[:-1])
    with pytest.raises(TypeError, match="`targets` must be"):
        gate(logits, targets.float())
    with pytest.raises(TypeError, match="`logits` must be"):
        gate(logits.long(), targets)
    with pytest.raises(ValueError, match="out of range"):
        gate(logits, targets + CLASSES)
    with pytest.raises(ValueError, match="offset"):
        gate(logits, targets, offset=torch.zeros(3))
    with pytest.raises(UserError, match="`index` must have shape"):
        gate(logits, targets, index=torch.arange(3))
    for name, value in gate.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


@pytest.mark.parametrize(
    ("settings", "biased"),
    [
        ({"rate": 0.2}, True),
        ({"rate": 0.2, "decision": "topk"}, True),
        ({"grad_norm_fraction": 0.9}, True),
        ({"rate": 0.2, "ties": "random"}, True),
        ({"rate": 0.2, "temperature": 0.5}, False),
        ({"rate": 1.0}, False),
    ],
)
def test_a_gate_says_whether_it_is_biased(settings, biased):
    gate = Gate(**settings)
    assert gate.biased is biased
    assert f"biased={biased}" in repr(gate)
    # What it says is so: the weighted sum over the rows kept against the sum over all, over many batches.
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(120):
        logits, targets = torch.randn(256, 10, generator=generator), torch.zeros(256, dtype=torch.int64)
        kept = gate(logits, targets)
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        share = 1.0 if gate.temperature or gate.setpoint == 1.0 else 256 / max(1, int(kept.count))
        ratios.append(float((kept.weight * loss[kept.index]).sum() * share / loss.sum()))
    assert (abs(sum(ratios[20:]) / len(ratios[20:]) - 1.0) > 0.05) is biased
