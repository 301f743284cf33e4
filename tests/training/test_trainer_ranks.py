"""The trainer across ranks: 2 processes do what one does with all their rows, and go on from one checkpoint."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_parts import CLASSES, PLAIN, RANKS, network, split, weights
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from trainers import make_trainer

from sparse_training import Gate, SparseTrainer
from sparse_training.criterion import Criterion
from sparse_training.data.resident import ResidentLoader
from sparse_training.selection.scorers.auxiliary import AuxiliaryNetwork
from sparse_training.selection.scorers.early import EarlyScorer
from sparse_training.selection.scorers.proxy import ProxyScorer
from sparse_training.selection.scorers.reference import ReferenceScorer
from sparse_training.selection.types import SelectedBatch
from sparse_training.training.schedule import Schedule

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="a PyTorch without torch.distributed and gloo"
)


def close(found: list[list[float]], wanted: list[list[float]], tolerance: float = 1e-12) -> None:
    for some, others in zip(found, wanted, strict=True):
        assert some == pytest.approx(others, rel=tolerance, abs=tolerance)


# --- the gradient -------------------------------------------------------------------------------


def record(rank: int, ranks: int, group: Any, options: dict[str, Any], wrapped: bool, steps: int) -> Any:
    """Return the rows that each step trained on, and the final weights."""
    model = network(seed=rank)
    trainer = make_trainer(
        DistributedDataParallel(model) if wrapped else model, optimizer=torch.optim.SGD, **PLAIN, **options
    )
    assert isinstance(trainer.parallel, DistributedDataParallel)
    seen: list[Any] = []
    learn = trainer.learn

    def watched(kept: SelectedBatch, **options: bool) -> Tensor | None:
        divisor = len(kept.targets) if kept.weight is None else kept.divisor
        weight = torch.ones(len(kept.targets)) if kept.weight is None else kept.weight
        seen.append((kept.inputs.tolist(), kept.targets.tolist(), weight.tolist(), float(divisor)))
        return learn(kept, **options)

    trainer.learn = watched  # type: ignore[method-assign]
    loader = ResidentLoader(split(), batch_size=11, std=(0.25,))  # batches of 11, 11, and 1 or none
    history = trainer.fit(loader, steps=steps)
    return seen, weights(trainer.model), history.to_dict()


@pytest.mark.parametrize(
    ("options", "wrapped"),
    [
        ({"policy": "dense"}, False),
        ({"policy": "random", "rate": 0.3}, False),
        ({"policy": "gate", "rate": 0.3}, True),
        ({"policy": "importance", "rate": 0.5}, False),
        ({"policy": "infobatch"}, False),
        ({"policy": "gate", "rate": 0.3, "accumulate": 3, "clip_norm": 0.1}, False),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_step_is_that_of_one_process_with_all_the_rows(
    run: Callable[..., list[Any]], options: dict[str, Any], wrapped: bool
) -> None:
    """The ranks' step on the rows that a policy keeps equals one step on all of these rows."""
    steps = 8
    of_ranks = run(record, options, wrapped, steps)
    assert of_ranks[0][1] == of_ranks[1][1]
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulate = options.get("accumulate", 1)
    loss, divisor = torch.zeros(()), 0.0
    kept = set()
    for step, parts in enumerate(zip(*(seen for seen, *_ in of_ranks), strict=True)):
        for inputs, targets, weight, own in parts:
            kept.add(sum(map(bool, weight)))
            losses = F.cross_entropy(
                model(torch.tensor(inputs).reshape(-1, 16)), torch.tensor(targets, dtype=torch.int64), reduction="none"
            )
            loss, divisor = loss + (losses * torch.tensor(weight)).sum(), divisor + own
        if (step + 1) % accumulate == 0 or step == steps - 1:
            if divisor:
                optimizer.param_groups[0]["lr"] = 0.1 * Schedule(0, 0, "constant").factor(step / steps)
                optimizer.zero_grad()
                (loss / divisor).backward()
                if "clip_norm" in options:
                    nn.utils.clip_grad_norm_(model.parameters(), options["clip_norm"])
                optimizer.step()
            loss, divisor = torch.zeros(()), 0.0
    close(of_ranks[0][1], weights(model))
    assert len(kept) > 1  # steps of different sizes
    counts = {(history["rows_seen"], history["rows_trained"]) for *_, history in of_ranks}
    assert len(counts) == 1  # of all ranks, the same on each
    assert counts.pop()[1] == sum(sum(map(bool, weight)) for seen, *_ in of_ranks for _, _, weight, _ in seen)


def parts_of(batches: int, ranks: int) -> list[list[tuple[Tensor, Tensor]]]:
    """A list of batches for each rank: of different sizes, now and then empty, ignored or not finite on one."""
    g = torch.Generator().manual_seed(0)
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(ranks)]
    for step in range(batches):
        for rank, own in enumerate(found):
            rows = 0 if (step + rank) % 5 == 2 else 12 + 8 * rank
            inputs = (1 + rank) * torch.randn(rows, 16, generator=g, dtype=torch.float64)
            targets = torch.randint(0, CLASSES, (rows,), generator=g)
            if rank == 1 and step % 5 == 4:
                inputs.fill_(math.nan)
            own.append((inputs, targets))
    return found


def whole(rank: int, ranks: int, group: Any, options: dict[str, Any], alone: bool) -> Any:
    parts = parts_of(12, RANKS)
    if alone:
        data = [tuple(map(torch.cat, zip(*batch, strict=True))) for batch in zip(*parts, strict=True)]
    else:
        data = parts[rank]
    trainer = make_trainer(network(seed=rank), optimizer=torch.optim.SGD, **PLAIN, **options)
    history = trainer.fit(data, steps=12)
    gate = trainer.policy.gate
    return weights(trainer.model), gate.threshold.item(), gate.controller.counters.tolist(), history.to_dict()["rate"]


@pytest.mark.parametrize("rate", [0.3, 0.05])
def test_a_gates_run_is_that_of_one_process(run: Callable[..., list[Any]], rate: float) -> None:
    """Batches that are empty, or not finite, on one rank, and steps in which no row is kept on it."""
    alone = whole(0, 1, None, {"policy": "gate", "rate": rate}, True)
    for found in run(whole, {"policy": "gate", "rate": rate}, False):
        close(found[0], alone[0], 1e-9)
        assert found[1] == pytest.approx(alone[1], rel=1e-6)
        assert found[2:] == (alone[2], alone[3])


def nothing(rank: int, ranks: int, group: Any, rows: str) -> Any:
    """A gate that keeps no row of any rank, with and without a capacity; then all of one rank's."""
    found = []
    for capacity in (None, 4):
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
        gate = Gate(0.1, threshold=1e9, capacity=capacity, process_group="world")
        trainer = SparseTrainer(model, policy=gate, granularity=rows, dense_start=0, dense_end=0)
        before = copy.deepcopy(model.state_dict())
        loader = trainer.loader([])
        x, y = torch.randn(8, 16), torch.zeros(8, dtype=torch.int64)
        trainer.step(trainer.policy, loader, (x, y))
        if rows == "sample":  # tokens go through the model before they are chosen
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not trainer.optimizer.state
        gate.settle()
        gate.controller.values[0] = -1.0
        trainer.step(trainer.policy, loader, (x, y) if rank else (x[:0], y[:0]))
        assert all(value.isfinite().all() for value in model.state_dict().values())
        found.append(([int(state["step"]) for state in trainer.optimizer.state.values()], weights(model)[:2]))
    return found


@pytest.mark.parametrize("rows", ["sample", "token"])
def test_a_step_in_which_no_rank_keeps_a_row_is_none(run: Callable[..., list[Any]], rows: str) -> None:
    first, second = run(nothing, rows)
    assert first == second
    assert all(steps == [1] * 6 for steps, _ in first)


# --- what is trained beside the model -----------------------------------------------------------


def kept_by(step: int, rank: int) -> tuple[Tensor, SelectedBatch]:
    """Rows of a rank: with weights and without, on one rank alone in some steps, on none in others, and padded."""
    g = torch.Generator().manual_seed(10 * step + rank)
    rows = 0 if step % 4 == 3 or (step % 4 == 1 and rank == 0) else 3 + 4 * rank
    inputs = torch.randn(rows, 6, generator=g, dtype=torch.float64)
    targets = torch.randint(0, CLASSES, (rows,), generator=g)
    if step < 4:
        return inputs, SelectedBatch(inputs, targets, rows)
    padded = torch.cat((inputs, inputs.new_zeros(2, 6))), torch.cat((targets, targets.new_zeros(2)))
    weight = torch.cat((torch.rand(rows, generator=g, dtype=torch.float64) + 1.0, torch.zeros(2)))
    count = torch.tensor(rows, dtype=torch.int32)
    return padded[0], SelectedBatch(*padded, count, None, weight, count.clamp(min=1))


def beside(rank: int, ranks: int, group: Any, alone: bool) -> Any:
    torch.manual_seed(rank)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    trained, criterion = AuxiliaryNetwork(net, 0.1, torch.device("cpu")), Criterion()
    found = []
    for step in range(8):
        if alone:
            parts = [kept_by(step, rank)[1] for rank in range(RANKS)]
            inputs, targets = (torch.cat(part) for part in zip(*(kept[:2] for kept in parts), strict=True))
            weight = None if step < 4 else torch.cat([kept.weight for kept in parts if kept.weight is not None])
            rows = sum(int(kept.rows) for kept in parts)
            if rows:
                trained.learn(inputs, SelectedBatch(inputs, targets, rows, None, weight, rows), criterion)
        else:
            trained.learn(*kept_by(step, rank), criterion)
        found.append(weights(net))
    return found


def test_a_network_beside_the_model_takes_the_step_of_all_ranks_rows(run: Callable[..., list[Any]]) -> None:
    alone = beside(0, 1, None, True)
    first, second = run(beside, False)
    assert first == second
    assert first[2] == first[3]
    assert first[6] == first[7]  # of no row, none
    for found, wanted in zip(first, alone, strict=True):
        close(found, wanted, 1e-9)


def scored(rank: int, ranks: int, group: Any, scorer: str) -> Any:
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    torch.manual_seed(rank)
    made: Any = (
        EarlyScorer("0")
        if scorer == "early"
        else ProxyScorer(nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, CLASSES)))
    )
    if scorer == "reference":
        made = ReferenceScorer(nn.Linear(16, CLASSES), of=made)
    trainer = make_trainer(model, policy="gate", scorer=made, rate=0.3, **{**PLAIN, "dense_start": 0.2})
    seen: list[int] = []
    learn = trainer.learn

    def watched(kept: SelectedBatch, **options: bool) -> Any:
        seen.append(int(kept.rows))
        return learn(kept, **options)

    trainer.learn = watched  # type: ignore[method-assign]
    data = [(x.float().nan_to_num(1e3), y) for x, y in parts_of(15, RANKS)[rank]]
    trainer.fit(data, steps=15)
    trained = made.of if scorer == "reference" else made
    same = [(x.float(), y) for x, y in parts_of(2, 1)[0]]
    scores = [trained(trainer.loader([]).load(batch)).losses.tolist() for batch in same]
    state = trained.require_auxiliary().net.state_dict()
    # How many batches BatchNorm saw is each rank's own, and counts for nothing.
    return [value.tolist() for value in state.values() if value.is_floating_point()], scores, seen


@pytest.mark.parametrize("scorer", ["early", "proxy", "reference"])
def test_all_ranks_score_alike(run: Callable[..., list[Any]], scorer: str) -> None:
    """Ranks with different rows and initial weights end with one model, running statistics included."""
    (first, scores, seen), (second, others, theirs) = run(scored, scorer)
    assert first == second
    assert scores == others
    assert any(map(bool, first[0]))
    alone = [bool(some) != bool(other) for some, other in zip(seen, theirs, strict=True)]
    assert any(alone)  # one rank had rows, the other none
