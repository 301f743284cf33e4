"""A gate's state resumes exactly; bad batches and settings."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from gate_parts import CLASSES, batches

from sparse_kernels import _dispatch
from sparse_kernels.backends import cpp as cpp_backend
from sparse_kernels.types import CONTROL_VALUES
from sparse_training.errors import UserError
from sparse_training.gate.gate import Gate
from sparse_training.gate.significance import Significance


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
        ({"capacity": 12.5}, "`capacity` must be an integer of at least 1, got 12.5"),
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
