"""Proof at first use against mistakes in the Triton kernels' own source: each is made in a copy, and caught."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from proof_parts import batch, kept, unproved, warned

pytest.importorskip("triton")

from triton.runtime.interpreter import InterpretedFunction

import sparse_kernels as sk
from sparse_kernels.backends.triton import backend, math, row_stats, row_stats_backward, scan, statistics, tiles
from sparse_kernels.self_check import proof

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # NumPy, on NaN and inf
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="nothing is interpreted"),
]
MODULES = (math, tiles, scan, statistics, row_stats, row_stats_backward)

# Of the source: the file's module, what stands there once, and the mistake. None reads or writes out of bounds.
STATISTICS_FAULTS = {
    "series of the logarithm": (math, "s = x / (2.0 + x)", "s = x / (1.0 + x)"),
    "sign in the fraction of tanh": (math, "* p + square * q", "* p - square * q"),
    "softcap not scaled back": (tiles, "x = cap * tanh", "x = tanh"),
    "columns behind the last word": (tiles, "tl.where(at < head, at, at + body)", "tl.where(at < head, at, at)"),
    "entropy's sum not moved with the maximum": (scan, "f * (rest_t - delta * rest)", "f * rest_t"),
    "squares rescaled once": (scan, "rest_sq = f * f * rest_sq", "rest_sq = f * rest_sq"),
    "second of two maxima": (scan, "tl.minimum(m, block_m), tl.maximum(second, block_second)", "second, block_second"),
    "argmax of equal logits": (scan, "tl.where(block_m == m, tl.minimum(at, lowest), at)", "at"),
    "all masked so far": (scan, 'tl.where(new_m == float("-inf"), 0.0, new_m)', "new_m"),
    "0 times minus infinity": (scan, "total(e * tl.maximum(t, -FAR))", "total(e * t)"),
    "lanes in units of their own": (scan, "(reference[:, None] - m) * scale", "(m - m) * scale"),
    "second of the lanes": (scan, "lane == first[:, None]", "lane != first[:, None]"),
    "place of a slice's sums": (scan, "sums_ptr + 3 * part + at, mask=here", "sums_ptr + 2 * part + at, mask=here"),
    "a block that holds the target": (scan, "(y_at >= start) & (y_at < after)", "(y_at > start) & (y_at < start)"),
    "ignored rows' statistics": (statistics, "loss = tl.where(ignored, 0.0, loss)", "loss = loss + 0.0"),
    "the temperature forgotten": (row_stats, "inverse_temperature, ACC) * LOG2E", "1.0, ACC) * LOG2E"),
    "sign of the smoothing": (statistics, "smoothing * (log_sum - mean)", "smoothing * (log_sum + mean)"),
    "squares without the target": (statistics, "divide(rest_sq + e_y * e_y", "divide(rest_sq"),
    "target's part of the entropy": (statistics, "(rest_t + e_y * tl.maximum(t_y, -FAR))", "(rest_t)"),
    "margin without the target": (statistics, "tl.maximum(tl.minimum(top, x_y), second)", "second"),
    "NaN that a maximum dropped": (statistics, '(m == float("-inf")) | bad', "bad"),
    "gradient at the next class": (row_stats_backward, "tl.where(column == y,", "tl.where(column == y + 1,"),
    "slope of the softcap": (row_stats_backward, "slope = 1.0 - bend * bend", "slope = 1.0 - bend"),
    "sign of the entropy's gradient": (row_stats_backward, "b -= g_entropy * LN2", "b += g_entropy * LN2"),
    "gradient of a masked logit": (row_stats_backward, "b * tl.maximum(t, -FAR)", "b * t"),
    "gradient of an ignored row": (row_stats_backward, "tl.where(alive, g, 0.0)", "g"),
}  # fmt: skip
GATE_FAULTS = {
    "kept at the threshold": (statistics, "(significance > threshold) & live", "(significance >= threshold) & live"),
    "ignored rows kept": (statistics, "(significance > threshold) & live", "(significance > threshold)"),
    "the offset forgotten": (statistics, "+= tl.load(offset_ptr", "+= 0 * tl.load(offset_ptr"),
    "weight of another statistic": (statistics, "max_prob, w_max_prob,", "max_prob, w_margin,"),
    "weight of the logarithm": (statistics, "logsumexp, w_logsumexp,", "logsumexp, w_loss,"),
    "squares by the norm's weight": (statistics, "sum_squares, w_sum_squares,", "sum_squares, w_grad_norm,"),
    "half of the draws": (math, "* 4294967296.0)", "* 2147483648.0)"),
    "high word of the seed": (math, "(zero + seed) >> 32", "(zero + seed) >> 31"),
    "weight of a left-out row": (statistics, "tl.where(kept, weight, 0.0)", "weight"),
    "the least probability": (statistics, "p = tl.where(p < low, low, p)", "p = p + 0 * low"),
    "rows of NaN not counted": (statistics, "(significance != significance) & inside", "(row != row) & inside"),
}  # fmt: skip


def plant(monkeypatch, folder, module, right, wrong):
    """Let the kernels call a copy of the module's functions that has the mistake."""
    source = Path(module.__file__).read_text()
    assert source.count(right) == 1, (right, source.count(right))
    file = folder / "faulty.py"
    file.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("faulty", file)
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    own = {
        name: f
        for name, f in vars(faulty).items()
        if isinstance(f, InterpretedFunction) and f is not vars(module)[name]
    }
    for other in MODULES:
        for name, function in own.items():
            if other is not module and hasattr(other, name):
                monkeypatch.setattr(other, name, function)
    if module is row_stats:
        monkeypatch.setattr(backend, "_kernels", lambda: faulty)
    elif module is row_stats_backward:
        monkeypatch.setattr(backend, "_backward_kernels", lambda: faulty)
    else:  # those that call one another within the module, too
        for name, function in own.items():
            monkeypatch.setattr(module, name, function)


@pytest.mark.parametrize("what", [None, *STATISTICS_FAULTS])
def test_a_mistake_in_a_statistic_is_caught(what, monkeypatch, caplog, tmp_path):
    unproved(monkeypatch, tmp_path)
    monkeypatch.setattr(proof, "LIMIT", float("inf"))  # interpreted, on a busy machine
    if what is not None:
        plant(monkeypatch, tmp_path, *STATISTICS_FAULTS[what])
    found = sk.row_stats(*batch(), outputs=sk.STATISTICS)
    assert len(warned(caplog)) == bool(what)
    assert bool(kept(tmp_path)["triton row_stats float32"]) == bool(what)
    if what is not None:
        right = sk.row_stats(*batch(), outputs=sk.STATISTICS, backend="torch")
        torch.testing.assert_close(found, right, rtol=0, atol=0)


@pytest.mark.parametrize("what", GATE_FAULTS)
def test_a_mistake_in_a_decision_is_caught(what, monkeypatch, caplog, tmp_path):
    unproved(monkeypatch, tmp_path)
    monkeypatch.setattr(proof, "LIMIT", float("inf"))  # interpreted, on a busy machine
    plant(monkeypatch, tmp_path, *GATE_FAULTS[what])
    found = sk.gate_rows(*batch(), 2.0, weights={"loss": 1.0}, gate_temperature=0.5)
    right = sk.gate_rows(*batch(), 2.0, weights={"loss": 1.0}, gate_temperature=0.5, backend="torch")
    torch.testing.assert_close(found, right, rtol=0, atol=0)
    assert kept(tmp_path)["triton gate_rows float32"]
    assert len(warned(caplog)) == 1
