"""The gate across ranks: 2 and 4 processes do what one process does with all their rows.

Each check runs in gloo processes on this machine and says what it found; the test compares.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import Processes, signals
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparse_training import Gate, Ramp, Significance, UserError

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="a PyTorch without torch.distributed and gloo"
)

RANKS = 4
CLASSES, FEATURES = 5, 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    processes = Processes(tmp_path_factory.mktemp("ranks"), RANKS)
    yield processes.run
    processes.stop()


# What is trained, alone and together


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def batches(count: int, ranks: int, seed: int = 0) -> list[list[tuple[Tensor, Tensor]]]:
    """For each step a part for each rank: of different sizes, one of them empty now and then, easy and hard ones,
    ignored and invalid rows among them."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for step in range(count):
        parts = []
        for rank in range(ranks):
            rows = 0 if (step + rank) % 7 == 3 else 20 + 8 * rank
            inputs = (1 + rank) * torch.randn(rows, FEATURES, generator=g)
            targets = torch.randint(0, CLASSES, (rows,), generator=g)
            if step % 3 == 1:
                targets[:4] = -100
                inputs[4:5] = math.nan
            parts.append((inputs, targets))
        if step % 7 == 2:  # a rank of nothing but ignored rows
            parts[0][1].fill_(-100)
        found.append(parts)
    return found


def cut(parts: list[tuple[Tensor, Tensor]], ranks: int) -> list[tuple[Tensor, Tensor]]:
    """The parts of 4 ranks for fewer."""
    each = len(parts) // ranks
    return [whole(parts[rank * each : (rank + 1) * each]) for rank in range(ranks)]


def whole(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*parts, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def loss_of(gate: Gate, net: nn.Module, inputs: Tensor, targets: Tensor, scorer: nn.Module | None = None) -> Tensor:
    with torch.no_grad():
        logits = (net if scorer is None else scorer)(inputs)
    kept = gate(logits, targets)
    inputs, targets = kept.take((inputs, targets))
    losses = nn.functional.cross_entropy(net(inputs).float(), targets.clamp(min=0), reduction="none")
    return (kept.weight * losses).sum() / gate.divisor()


def gradient(net: nn.Module) -> list[list[float]]:
    found = []
    for parameter in net.parameters():
        grad = parameter.grad
        assert grad is not None
        found.append(getattr(grad, "full_tensor", lambda grad=grad: grad)().flatten().tolist())
    return found


def train(rank: int, ranks: int, group: Any, options: dict[str, Any], steps: int, wrap: str) -> Any:
    """Thresholds, counters and gradients of a run, whatever wraps the model. ``ranks`` 1 is one process with all."""
    net = model()
    if wrap == "compile":
        net = torch.compile(net, backend="aot_eager", dynamic=True)
    gate = Gate(**options, process_group=group)
    choose: Any = torch.compile(gate, fullgraph=True, backend="aot_eager") if wrap == "gate" else gate
    if wrap == "fsdp":
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        if group is not None:
            fully_shard(net, mesh=DeviceMesh.from_group(group, "cpu"))
    elif group is not None:
        net = DistributedDataParallel(net, process_group=group)
    choose = choose if wrap != "gate" else _Like(choose, gate)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=wrap == "scaler")
    trace: list[Any] = []
    together = batches(steps, 4)
    for step, of_ranks in enumerate(together):
        gate.set_progress(step / steps)
        inputs, targets = cut(of_ranks, ranks)[rank]
        if wrap == "accumulate":  # two backward passes a step, the ranks' gradients summed in the second
            quiet = net.no_sync() if isinstance(net, DistributedDataParallel) else nullcontext()
            with quiet:
                (loss_of(choose, net, inputs, targets) / 2).backward()
            inputs, targets = cut(together[step - 1], ranks)[rank]
            loss = loss_of(choose, net, inputs, targets) / 2
        else:
            with torch.autocast("cpu", torch.bfloat16, enabled=wrap == "autocast"):
                loss = loss_of(choose, net, inputs, targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        trace.append((gate.threshold.item(), gradient(net)))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return trace, gate.controller.counters.tolist(), gate.controller.values.tolist()


class _Like:
    """A compiled gate that still has the gate's own methods."""

    def __init__(self, compiled: Any, gate: Gate) -> None:
        self.compiled, self.divisor = compiled, gate.divisor

    def __call__(self, *arguments: Any) -> Any:
        return self.compiled(*arguments)


def agree(alone: Any, together: list[Any], tolerance: float = 1e-6) -> None:
    """The same thresholds to rounding, the same gradients; on all ranks the same bits of the state."""
    for found in together:
        assert found[1:] == together[0][1:]
        assert found[1] == alone[1]
        for (threshold, gradients), (wanted, exact) in zip(found[0], alone[0], strict=True):
            assert threshold == pytest.approx(wanted, rel=1e-4, abs=1e-5)
            for of_parameter, of_one in zip(gradients, exact, strict=True):
                assert of_parameter == pytest.approx(of_one, rel=tolerance, abs=tolerance)
    moved = {threshold for threshold, _ in alone[0]}
    assert len(moved) > len(alone[0]) / 2
    assert any(any(map(any, gradients)) for _, gradients in alone[0])


OPTIONS: dict[str, dict[str, Any]] = {
    "threshold": {"rate": 0.3},
    "capacity": {"rate": 0.3, "capacity": 160},
    "grad-norm fraction": {"grad_norm_fraction": 0.6},
    "ramp": {"rate": Ramp(1.0, 0.2), "threshold": 0.5},
    "soft": {"rate": 0.5, "temperature": 1e-4, "p_min": 0.0},
}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_ranks_do_what_one_process_does_with_all_rows(run: Callable[..., list[Any]], ranks: int, name: str) -> None:
    options = OPTIONS[name]
    together = run(train, ranks, options, 24, "")
    agree(train(0, 1, None, options, 24, ""), together)


@pytest.mark.parametrize("wrap", ["accumulate", "autocast", "scaler", "compile", "gate", "fsdp"])
def test_under_what_wraps_a_model(run: Callable[..., list[Any]], wrap: str) -> None:
    """Gradient accumulation, autocast, GradScaler, a compiled model, a compiled gate, FSDP2."""
    options = OPTIONS["capacity"]
    # In bfloat16 the sum over a batch and the sum of its parts' sums round differently.
    agree(train(0, 1, None, options, 12, wrap), run(train, 2, options, 12, wrap), 2e-2 if wrap == "autocast" else 1e-6)


def rows_of(parts: list[tuple[Tensor, Tensor]], ranks: int, rank: int) -> tuple[Tensor, Tensor]:
    inputs, targets = cut(parts, ranks)[rank]
    return inputs[:, :CLASSES], targets


def resume(rank: int, ranks: int, group: Any, state: dict[str, list[Any]] | None, first: int, last: int) -> Any:
    """The thresholds of some steps, and the state after them."""
    gate = Gate(0.3, process_group=group)
    if state is not None:
        gate(*rows_of(batches(1, 4)[0], ranks, rank))  # under way when the state comes, and forgotten
        like = gate.state_dict()
        gate.load_state_dict({name: torch.tensor(value, dtype=like[name].dtype) for name, value in state.items()})
    thresholds = []
    for parts in batches(last, 4)[first:]:
        gate(*rows_of(parts, ranks, rank))
        thresholds.append(gate.threshold.item())
    return thresholds, {name: value.tolist() for name, value in gate.state_dict().items()}


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (4, 1), (1, 2)])
def test_a_state_fits_any_number_of_ranks(run: Callable[..., list[Any]], before: int, after: int) -> None:
    def part(ranks: int, *arguments: Any) -> Any:
        return resume(0, 1, None, *arguments) if ranks == 1 else run(resume, ranks, *arguments)[0]

    whole_run, _ = part(1, None, 0, 20)
    first, state = part(before, None, 0, 10)
    second, _ = part(after, state, 10, 20)
    assert first + second == pytest.approx(whole_run, rel=1e-4, abs=1e-5)


def overlap(rank: int, ranks: int, group: Any, world: bool) -> Any:
    """Whether a call returns though another rank has not called; and what reads and copies settle."""
    gate = Gate(0.3, process_group="world" if world else group)
    signal = signals[ranks]
    logits, targets = rows_of(batches(1, 4)[0], ranks, rank)
    before = gate.controller.threshold.item()
    if rank == 0:
        gate(logits, targets)
        returned = gate.controller.threshold.item() == before and gate.controller.steps.item() == 0
        dist.barrier(signal)
    else:
        dist.barrier(signal)  # reached by rank 0 only behind its call
        returned = True
        gate(logits, targets)
    copied = copy.deepcopy(gate)  # in mid-exchange
    assert copied.controller.steps.item() == 1
    steps = [gate.state_dict()["controller.counters"].tolist()[0], gate.step.item(), copied.step.item()]
    for each in (copied, gate):  # which both go on, with the same ranks
        each(logits, targets)
    assert copied.controller.values is not gate.controller.values
    assert torch.equal(copied.threshold, gate.threshold)
    return returned, steps, math.isfinite(gate.threshold.item())


@pytest.mark.parametrize(("ranks", "world"), [(2, False), (RANKS, False), (RANKS, True)])
def test_a_call_waits_for_no_other_rank(run: Callable[..., list[Any]], ranks: int, world: bool) -> None:
    assert run(overlap, ranks, world) == [(True, [1, 1, 1], True)] * ranks


def balanced(rank: int, ranks: int, group: Any) -> Any:
    gate = Gate(0.25, decision="topk", capacity=8, process_group=group)
    g = torch.Generator().manual_seed(rank)
    found = []
    for _ in range(5):  # rank 1's rows are ten times as hard
        kept = gate(10**rank * torch.randn(32, CLASSES, generator=g), torch.randint(0, CLASSES, (32,), generator=g))
        found.append((kept.index.shape[0], kept.count.item(), kept.overflow.item(), gate.divisor().item()))
    return found


def test_the_balanced_form_gives_every_rank_the_same_rows(run: Callable[..., list[Any]]) -> None:
    assert run(balanced, 2) == [[(8, 8, 0, 8.0)] * 5] * 2


def draws(rank: int, ranks: int, group: Any) -> list[int]:
    gate = Gate(0.5, threshold=0.0, temperature=1e6, seed=3, process_group=group)
    rows: list[int] = gate(torch.zeros(64, CLASSES), torch.zeros(64, dtype=torch.int64)).index.tolist()
    return rows


def test_ranks_draw_differently(run: Callable[..., list[Any]]) -> None:
    first, second = run(draws, 2)
    assert first != second
    assert first == draws(0, 1, None)


def nothing(rank: int, ranks: int, group: Any) -> Any:
    gate = Gate(0.3, threshold=1.0, process_group=group)
    count = gate(torch.zeros(0, CLASSES), torch.zeros(0, dtype=torch.int64)).count.item()
    return count, gate.divisor().item(), gate.threshold.item(), gate.step.item()


def test_a_batch_that_is_empty_on_every_rank(run: Callable[..., list[Any]]) -> None:
    assert run(nothing, 2) == [(0, 1.0, 1.0, 1)] * 2


def pickled(rank: int, ranks: int, group: Any) -> Any:
    """A gate in mid-exchange through pickle, and what its group says to that; and a gate of a group of others."""
    of_all, own = Gate(0.3, process_group="world"), Gate(0.3, process_group=group)
    for gate in (of_all, own):
        gate(*rows_of(batches(1, 4)[0], ranks, rank))
    copied = pickle.loads(pickle.dumps(of_all))
    with pytest.raises(UserError, match="cannot be pickled"):
        pickle.dumps(own)
    own.settle()
    with pytest.raises(UserError, match="not in"):
        Gate(0.3, process_group=dist.GroupMember.NON_GROUP_MEMBER)(*rows_of(batches(1, 4)[0], ranks, rank))
    return copied.step.item(), copied.process_group


def test_a_gate_through_pickle(run: Callable[..., list[Any]]) -> None:
    assert run(pickled, RANKS) == [(1, "world")] * RANKS


# Without processes


def test_world_before_the_group_is_made_is_refused() -> None:
    gate = Gate(0.3, process_group="world")
    with pytest.raises(UserError, match="init_process_group"):
        gate(*rows_of(batches(1, 4)[0], 1, 0))


def test_divisor_of_one_process() -> None:
    logits, targets = 3 * torch.randn(64, CLASSES), torch.zeros(64, dtype=torch.int64)
    targets[:8], logits[8:10] = -100, math.nan
    gate = Gate(0.3, threshold=1.0)
    with pytest.raises(UserError, match="before the first batch"):
        gate.divisor()
    assert gate(logits, targets).count == gate.divisor()
    soft = Gate(0.3, threshold=1.0, temperature=0.5, significance=Significance(loss=1.0))
    soft(logits, targets)
    assert soft.divisor() == 54
