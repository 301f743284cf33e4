"""The trainer across ranks: 2 processes do what one does with all their rows, and go on from one checkpoint."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import Processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from trainers import make_trainer

from sparse_training import Gate, SparseTrainer
from sparse_training.criterion import Criterion
from sparse_training.data.resident import ResidentLoader
from sparse_training.errors import UserError
from sparse_training.files import read_json
from sparse_training.selection.registry import POLICIES
from sparse_training.selection.scorers.auxiliary import AuxiliaryNetwork
from sparse_training.selection.scorers.early import EarlyScorer
from sparse_training.selection.scorers.proxy import ProxyScorer
from sparse_training.selection.scorers.reference import ReferenceScorer
from sparse_training.selection.types import SelectedBatch
from sparse_training.training.clock import Clock
from sparse_training.training.schedule import Schedule

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="a PyTorch without torch.distributed and gloo"
)

RANKS, ROWS, CLASSES = 2, 45, 4  # a rank has 23 rows, the other 22
PLAIN = {"dense_start": 0, "dense_end": 0, "schedule": "constant", "lr": 0.1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    processes = Processes(tmp_path_factory.mktemp("ranks"), RANKS)
    yield lambda check, *arguments: processes.run(check, RANKS, *arguments)
    processes.stop()


def split(rows: int = ROWS) -> SimpleNamespace:
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(0, CLASSES, (rows,), generator=g)
    images = torch.randint(0, 120, (rows, 1, 4, 4), dtype=torch.uint8, generator=g)
    images[:, 0, 0, :] += (30 * labels)[:, None].to(torch.uint8)
    return SimpleNamespace(images=images, labels=labels)


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


def network(seed: int = 0) -> nn.Module:
    """In float64, so that a sum in another order differs by 1e-16."""
    torch.manual_seed(seed)
    return nn.Sequential(Double(), nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def weights(model: nn.Module) -> list[list[float]]:
    return [value.flatten().tolist() for value in model.state_dict().values()]


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

    def watched(kept: SelectedBatch) -> Tensor | None:
        divisor = len(kept.targets) if kept.weight is None else kept.divisor
        weight = torch.ones(len(kept.targets)) if kept.weight is None else kept.weight
        seen.append((kept.inputs.tolist(), kept.targets.tolist(), weight.tolist(), float(divisor)))
        return learn(kept)

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

    def watched(kept: SelectedBatch) -> Any:
        seen.append(int(kept.rows))
        return learn(kept)

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


# --- a run --------------------------------------------------------------------------------------


class Rushing(Clock):
    """Rank 1's time goes ten times as fast, and one rank alone is told to stop."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.pace, self.asked = 1 + 9 * rank, 0

    @property
    def seconds(self) -> float:
        return self.asked * self.pace

    def charge(self, *arguments: Any, **options: Any) -> None:
        self.asked += 1


def ends(rank: int, ranks: int, group: Any, budget: dict[str, Any], stops: int) -> Any:
    trainer = make_trainer(network(), policy="random", rate=0.5, **PLAIN)
    clock = Rushing(rank)
    history = trainer.fit(
        ResidentLoader(split(), batch_size=8), clock=clock, **budget,
        stop=lambda: rank == 1 and clock.asked == stops,
    )  # fmt: skip
    return history.steps, history.interrupted, int(history.rows_seen)


@pytest.mark.parametrize(
    ("budget", "stops", "steps"),
    [({"seconds": 9}, 99, 9), ({"rows": 100}, 99, 7), ({"epochs": 2}, 99, 6), ({"steps": 20}, 5, 5)],
    ids=["seconds", "rows", "epochs", "stopped"],
)
def test_all_ranks_end_together(run: Callable[..., list[Any]], budget: dict[str, Any], stops: int, steps: int) -> None:
    found = run(ends, budget, stops)
    assert found[0] == found[1]
    assert found[0][:2] == (steps, stops < 99)


def evaluation(rank: int, ranks: int, group: Any, streamed: bool) -> Any:
    """Without a group of others: this process alone, on everything."""
    place = {"rank": 0, "ranks": 1} if group is None else {}
    trainer = SparseTrainer(network())
    data: Any = ResidentLoader(split(), batch_size=8, shuffle=False, **place)
    if streamed:
        rows = TensorDataset(*ResidentLoader(split(), batch_size=8, rank=0, ranks=1).fetch(torch.arange(44)))
        data = DataLoader(rows, batch_size=8, sampler=None if group is None else DistributedSampler(rows))
    return trainer.evaluate(data)


@pytest.mark.parametrize("streamed", [False, True])
def test_every_row_is_evaluated_once(run: Callable[..., list[Any]], streamed: bool) -> None:
    alone = evaluation(0, 1, None, streamed)
    first, second = run(evaluation, streamed)
    assert first == second == pytest.approx(alone, rel=1e-12)


def rough() -> nn.Module:
    """With running statistics, which are each rank's own, and with dropout."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, CLASSES))


def resumed(rank: int, ranks: int, group: Any, options: dict[str, Any], folder: str | None, stop: int | None) -> Any:
    trainer = make_trainer(rough(), **{"dense_start": 0.1, "dense_end": 0.1, **options})
    torch.manual_seed(5 + rank)
    steps = 0

    def stopping() -> bool:
        nonlocal steps
        steps += 1
        return rank == 0 and steps == stop

    loader, test = (ResidentLoader(split(), batch_size=8, shuffle=shuffle) for shuffle in (True, False))
    history = trainer.fit(loader, steps=20, checkpoint=folder, resume=True, stop=stopping, evaluate=test)
    assert history.interrupted == (stop is not None)
    assert dist.is_initialized()
    kept = {name: value.tolist() for name, value in trainer.policy.state_dict().items() if isinstance(value, Tensor)}
    selected = None if history.selected is None else history.selected.tolist()
    plain = {**history.to_dict(), "seconds": 0, "raw_seconds": 0}
    plain["evals"] = [{**found, "seconds": 0} for found in plain["evals"]]
    return weights(trainer.model), kept, selected, plain, torch.rand(3).tolist()


@pytest.mark.parametrize(
    "options",
    [{"policy": name, "rate": 0.4} for name in POLICIES]
    + [{"policy": "gate", "accumulate": 3, "ema": 0.9}, {"policy": "gate@early:1", "rate": 0.4}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_run_resumes_bit_for_bit_on_every_rank(
    run: Callable[..., list[Any]], options: dict[str, Any], tmp_path: Path
) -> None:
    uninterrupted = run(resumed, options, None, None)
    assert uninterrupted[0][0][:2] == uninterrupted[1][0][:2]  # parameters
    assert uninterrupted[0][4] != uninterrupted[1][4]  # generators
    if options["policy"] == "gate":
        assert len(uninterrupted[0][2]) == ROWS  # rows are numbered as in the data set
    run(resumed, options, str(tmp_path), 7)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert repr(run(resumed, options, str(tmp_path), None)) == repr(uninterrupted)  # NaN is not equal to itself
    with pytest.raises(UserError, match="written by 2 processes; resume it with as many, not 1"):
        make_trainer(rough(), **options).fit(
            ResidentLoader(split(), batch_size=8, rank=0, ranks=2), steps=20, checkpoint=tmp_path, resume=True
        )


def shard(rank: int, ranks: int, group: Any) -> Any:
    loader = ResidentLoader(split(), batch_size=11)
    batches = [loader.load(item) for item in loader]
    assert len(batches) == loader.batches()
    return [batch.targets.shape[0] for batch in batches], torch.cat([batch.ids for batch in batches]).tolist()


def test_a_loader_gives_each_process_its_part(run: Callable[..., list[Any]]) -> None:
    (first, ids), (second, others) = run(shard)
    assert (first, second) == ([11, 11, 1], [11, 11, 0])
    assert (sorted(ids), sorted(others)) == (list(range(23)), list(range(22)))
    assert ids[:22] != others
    with pytest.raises(UserError, match="each process needs a row"):
        ResidentLoader(split(3), batch_size=1, rank=3, ranks=4)
    with pytest.raises(UserError, match="must be 1 to 2, the rows of a process"):
        ResidentLoader(split(3), batch_size=3, rank=1, ranks=2)


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*line, "-m", "sparse_training", *arguments], capture_output=True, text=True, check=False, timeout=600
    )


@pytest.mark.timeout(900)
def test_the_command_line_under_torchrun(tmp_path: Path) -> None:
    """One line of progress and one result, of the first process, over the rows of both."""
    folder = tmp_path / "run"
    done = torchrun(
        "train", "--data", "digits", "--policy", "gate", "--rate", "0.3", "--batch-size", "64", "--steps", "20",
        "--out", str(folder),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accuracy") == 2
    assert done.stdout.count("written") == 1
    found = read_json(folder / "result.json")["run"]
    assert found["steps"] == 20
    # 1437 images are 719 and 718: 11 batches of 64 on each and 15 and 14; then 8 more.
    assert found["rows_seen"] == 1437 + 2 * 8 * 64
    assert {path.name for path in folder.iterdir()} == {"checkpoint.pt", "model.pt", "options.json", "result.json"}
    refused = torchrun("compare", "--data", "digits", "--out", str(tmp_path / "compared"))
    assert refused.returncode != 0
    assert "error: rank 0: compare on 2 processes" in refused.stderr
