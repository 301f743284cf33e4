"""Every operation on the device against the float64 reference, on inputs that are fresh each time.

    python benchmarks/gpu_check.py [--device cpu] [--small] [--seed N]

Small, it launches each kernel once or twice: what compute-sanitizer is run on. Exit code 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import sparse_kernels as sk
from sparse_kernels import _dispatch, control_law
from sparse_kernels.ops import gate_step

SHAPES = [(130, 10), (1000, 21), (64, 1000), (6, 4097), (2, 151936), (4, 21, 32, 33)]  # the last one: classes in dim 1
SMALL = [(37, 10), (5, 1000), (2, 4097), (2, 21, 4, 5)]
ROWS = [1, 1000, 65536, 65537, 1 << 20]  # about where tiles end and shares begin, and above
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def relative(found: Tensor, exact: Tensor) -> float:
    """Largest error over 1 + the value; infinite where one is NaN and the other not."""
    found, exact = found.detach().double().cpu(), exact.detach().double().cpu()
    if not torch.equal(found.isnan(), exact.isnan()):
        return float("inf")
    difference = (found - exact).abs() / (1 + exact.abs())
    return float(difference.nan_to_num(0.0).max()) if difference.numel() else 0.0


def row_statistics(device: str, backend: str | None, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple]:
    """(what, error, allowed) of every output and the gradient."""
    dim = 1
    logits = (3 * torch.randn(shape)).to(dtype)
    labels = torch.randint(0, shape[dim], shape[:dim] + shape[dim + 1 :])
    flat = labels.view(-1)
    flat[:: max(2, len(flat) // 7)] = -100
    logits[0, 1::2] = -torch.inf
    given, weights = logits.to(device).requires_grad_(), torch.rand(2, *labels.shape)
    exact_in = logits.double().requires_grad_()
    found = sk.row_stats(given, labels.to(device), outputs=sk.STATISTICS, dim=dim, backend=backend)
    exact = sk.row_stats(exact_in, labels, outputs=sk.STATISTICS, dim=dim, backend="torch")
    allowed = 1e-12 if dtype is torch.float64 else 1e-5  # one-pass sums of up to 151,936 terms in float32
    for name in sk.STATISTICS:
        yield name, relative(getattr(found, name), getattr(exact, name)), allowed
    # A masked target's loss is inf, and its gradient has no meaning to compare.
    finite = exact.loss.isfinite()
    pairs = ((found, given, device), (exact, exact_in, "cpu"))
    ours, theirs = (
        torch.autograd.grad((s.loss[finite.to(at)], s.entropy[finite.to(at)]), x,
                            [w[finite].to(at, s.loss.dtype) for w in weights])[0]
        for s, x, at in pairs
    )  # fmt: skip
    epsilon = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) if dtype is not torch.float64 else 1e-13
    yield "gradient", relative(ours, theirs), 40 * epsilon


def decisions(device: str, backend: str | None) -> Iterator[tuple]:
    """The mask of both kinds of gate, the draws included, where no rounding can decide it."""
    logits, labels = torch.randn(5000, 100), torch.randint(0, 100, (5000,))
    for temperature in (0.0, 0.5):
        settings = {"weights": {"loss": 0.7, "entropy": 0.3}, "gate_temperature": temperature, "seed": 7, "step": 3}
        ours = sk.gate_rows(
            logits.to(device), labels.to(device), torch.tensor([4.5], device=device), **settings, backend=backend
        )
        exact = sk.gate_rows(logits.double(), labels, torch.tensor([4.5]), **settings, backend="torch")
        different = (ours.mask.cpu() != exact.mask).sum()
        yield f"mask, temperature {temperature}", float(different), 2.0  # draws and rows within rounding of the limit


def packing(device: str, backend: str | None, rows: int) -> Iterator[tuple]:
    """compact, gather and scatter, exactly."""
    mask = torch.rand(rows) < 0.3
    exact = mask.nonzero().squeeze(-1)
    for capacity in (rows, max(0, len(exact) - 1)):
        found = sk.compact(mask.to(device), capacity=capacity, backend=backend)
        filled = min(capacity, len(exact))
        same = torch.equal(found.index[:filled].cpu(), exact[:filled]) and not found.index[filled:].any()
        same &= int(found.overflow) == len(exact) - filled
        yield f"compact {rows}, capacity {capacity}", float(not same), 0.0
        tree = [torch.randn(rows, 3), torch.randn(rows).bfloat16(), torch.randint(0, 9, (rows, 2, 5), dtype=torch.int8)]
        packed = sk.gather_rows([leaf.to(device) for leaf in tree], found, backend=backend)
        where = found.index.cpu()
        same = all(torch.equal(a.cpu(), b[where]) for a, b in zip(packed, tree, strict=True))
        yield f"gather {rows}, capacity {capacity}", float(not same), 0.0
        spread = sk.scatter_rows(packed, found, backend=backend)
        for a, b in zip(spread, tree, strict=True):
            back = torch.zeros_like(b)
            back[exact[:filled]] = b[exact[:filled]]
            same &= torch.equal(a.cpu(), back)
        yield f"scatter {rows}, capacity {capacity}", float(not same), 0.0


def steps(device: str, rows: int) -> Iterator[tuple]:
    """A gate's step in as few launches as there are: its own decisions packed exactly, and the law in float64."""
    for settings in ({}, {"by_mass": True}, {"gate_temperature": 0.5, "p_min": 0.01}):
        logits, labels = torch.randn(rows, 5), torch.randint(0, 5, (rows,))
        logits[::97, 2], labels[::11] = torch.nan, -100
        state = control_law.initial_state(torch.tensor(2.0, device=device))
        setpoint = torch.tensor(0.3, device=device)
        for number in range(3):
            before = [x.cpu().clone() for x in state]
            given = (logits.to(device), labels.to(device), state, setpoint)
            gated, found, _ = gate_step(*given, weights={"loss": 1.0}, capacity=rows // 3, **settings)
            kept = gated.mask.cpu().nonzero().squeeze(-1)
            filled = min(len(kept), rows // 3)
            same = torch.equal(found.index[:filled].cpu(), kept[:filled]) and int(found.overflow) == len(kept) - filled
            same &= int(gated.invalid) == int(gated.significance.isnan().sum())
            yield f"step {number} of {settings}, packed", float(not same), 0.0
            significance, mass = gated.significance.double().cpu(), gated.stats.grad_norm
            exact = sk.ControlState(before[0].double(), before[1])
            soft = {name: value for name, value in settings.items() if name != "by_mass"}
            batch = control_law.summarise(
                significance, labels != -100, None if mass is None else mass.double().cpu(), exact.values[0], **soft
            )
            exact = control_law.advance(exact, batch, setpoint.double().cpu(), found.overflow.cpu())
            yield f"step {number} of {settings}, state", relative(state.values, exact.values), 1e-3
            yield f"step {number} of {settings}, counters", relative(state.counters, exact.counters), 0.0


def checks(device: str, small: bool) -> Iterator[tuple[str, Iterator[tuple]]]:
    score, pack = ("triton", "cuda") if device == "cuda" else (None, None)
    for dtype in DTYPES[:2] if small else DTYPES:
        for shape in SMALL if small else SHAPES:
            yield f"row_stats {dtype} {shape}", row_statistics(device, score, shape, dtype)
    yield "gate_rows", decisions(device, score)
    for rows in (1000, 70000) if small else ROWS:
        yield "packing", packing(device, pack, rows)
    for rows in (1000, 9000, 70000) if small else ROWS:
        yield "gate_step", steps(device, rows)


def compare(what: str, found: Iterator[tuple], errors: list[bool]) -> str:
    """Adds to ``errors`` whether each comparison failed; why a backend does not serve them, or nothing."""
    try:
        for name, error, allowed in found:
            errors.append(not error <= allowed)
            if errors[-1]:
                print(f"WRONG {what} {name}: {error:.3g}, allowed {allowed:.3g}")
    except sk.BackendUnavailable as error:
        return str(error)
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="a few launches of each kernel")
    parser.add_argument("--seed", type=int, help="of the inputs; drawn where not given")
    options = parser.parse_args()
    seed = torch.seed() % 2**31 if options.seed is None else options.seed
    torch.manual_seed(seed)
    errors: list[bool] = []
    not_served: dict[str, str] = {}
    with _dispatch.forced("cuda") if options.device == "cuda" else contextlib.nullcontext():  # where none is named
        for what, found in checks(options.device, options.small):
            reason = compare(what, found, errors)
            if reason:
                not_served[what.split()[0]] = reason
    for what, reason in not_served.items():
        print(f"not served: {what}: {reason}")
    hold = len(errors) - sum(errors)
    print(f"{hold} of {len(errors)} comparisons with the float64 reference hold (seed {seed})")
    return int(any(errors) or not errors)


if __name__ == "__main__":
    sys.exit(main())
