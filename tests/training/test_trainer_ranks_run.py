"""Whole runs of several processes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
import torch.distributed as dist
from rank_parts import CLASSES, PLAIN, ROWS, network, split, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from trainers import NAMES, make_trainer

from sparse_training import SparseTrainer
from sparse_training.data.resident import ResidentLoader
from sparse_training.errors import UserError
from sparse_training.files import read_json
from sparse_training.training.clock import Clock

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
    resume = folder is not None
    history = trainer.fit(loader, steps=20, checkpoint=folder, resume=resume, stop=stopping, evaluate=test)
    assert history.interrupted == (stop is not None)
    assert dist.is_initialized()
    kept = {name: value.tolist() for name, value in trainer.policy.state_dict().items() if isinstance(value, Tensor)}
    selected = None if history.selected is None else history.selected.tolist()
    plain = {**history.to_dict(), "seconds": 0, "raw_seconds": 0}
    plain["evals"] = [{**found, "seconds": 0} for found in plain["evals"]]
    return weights(trainer.model), kept, selected, plain, torch.rand(3).tolist()


@pytest.mark.parametrize(
    "options",
    [{"policy": name, "rate": 0.4} for name in NAMES]
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
    with pytest.raises(UserError, match=r"rows 45 is now 23|within an accumulation of batches"):
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
    return fresh.run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sparse_training", *arguments,
        timeout=600,
    )  # fmt: skip


@pytest.mark.slow
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
    # 1293 images beside the validation rows are 647 and 646: 10 batches of 64 on each and 7 and 6; then 9 more.
    assert found["rows_seen"] == 1293 + 2 * 9 * 64
    assert {path.name for path in folder.iterdir()} == {"checkpoint.pt", "model.pt", "options.json", "result.json"}
    refused = torchrun("compare", "--data", "digits", "--out", str(tmp_path / "compared"))
    assert refused.returncode != 0
    assert "error: rank 0: compare needs one process, got 2" in refused.stderr


def starts(rank: int, ranks: int, group: Any, policy: str) -> Any:
    torch.manual_seed(0)
    trainer = make_trainer(network(), policy=policy, rate=0.1, **PLAIN)
    history = trainer.fit(ResidentLoader(split(), batch_size=3), steps=8)
    return history.steps, trainer.model.state_dict()


@pytest.mark.parametrize("policy", ["random", "importance", "gate"])
def test_a_rank_without_rows_in_its_first_step_keeps_none_waiting(run: Callable[..., list[Any]], policy: str) -> None:
    (steps, first), (_, second) = run(starts, policy)
    assert steps == 8
    assert all(torch.equal(first[name], second[name]) for name in first)
