"""A run of two processes that was stopped goes on with three, and with one."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
import torch.distributed as dist
from rank_parts import PLAIN, ROWS, network, split, weights
from ranks_of_a_user import run_ranks
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from sparse_training import Gate, Significance, SparseTrainer, TrainerSettings
from sparse_training.data.resident import ResidentLoader
from sparse_training.errors import UserError
from sparse_training.gate.terms import LossChange
from sparse_training.selection.policies.gate import GatePolicy
from sparse_training.selection.policies.random import RandomPolicy
from sparse_training.selection.scorers.history import HistoryScorer

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="a PyTorch without torch.distributed and gloo"
)
ROOT = Path(__file__).parents[2]


def data_loader(size: int, *, batch_size: int = 5, workers: int = 0) -> DataLoader[Any]:
    rows = split(60)
    data = TensorDataset(rows.images.float() / 255, rows.labels)
    sampler = DistributedSampler(data) if size > 1 else None
    return DataLoader(data, batch_size=batch_size, sampler=sampler, shuffle=sampler is None, num_workers=workers)


def train(
    rank: int,
    size: int,
    *,
    folder: Path,
    policy: Any = "infobatch",
    stop: int | None = None,
    resident: bool = True,
    settings: dict[str, Any] | None = None,
    batch_size: int = 5,
    **budget: float,
) -> dict[str, Any]:
    """Train, or go on; return what the process then holds."""
    trainer = SparseTrainer(
        network(), policy=policy() if callable(policy) else policy, settings=TrainerSettings(**(settings or {})),
        **{**PLAIN, "lr": 0.05},
    )  # fmt: skip
    torch.manual_seed(100 + rank)
    before = weights(trainer.model)
    steps = iter(range(1, 1000))
    loader: Any = ResidentLoader(split(), batch_size=batch_size) if resident else data_loader(size)
    try:
        log = trainer.fit(
            loader, **(budget or {"epochs": 4}), checkpoint=folder, resume=True, progress=False,
            stop=lambda: next(steps) == stop,
        )  # fmt: skip
    except UserError as error:
        return {"refused": str(error), "untouched": before == weights(trainer.model)}
    state = trainer.policy.get_extra_state() if hasattr(trainer.policy, "table") else None
    term = getattr(getattr(trainer.policy, "gate", None), "significance", None)
    return {
        "scores": state["table"]["scores"].tolist() if state else None,
        "waiting": [part.tolist() for part in state["waiting"]] if state and "waiting" in state else None,
        "steps": log.steps,
        "rows": int(log.rows_seen),
        "operations": sum(log.operations.values()),
        "selected": None if log.selected is None else log.selected.tolist(),
        "interrupted": log.interrupted,
        "weights": weights(trainer.model),
        "last": None if term is None or not term.terms else term.terms[0].last.tolist(),
        "random": torch.rand(3).tolist(),
    }


def saved(folder: Path) -> list[dict[str, Any]]:
    """Read the parts that the ranks wrote."""
    with open(folder / "checkpoint.pt", "rb") as file:
        file.seek(len(file.readline()))
        state = torch.load(file, weights_only=True)
    return [state, *state["others"]]


def on_ranks(size: int, folder: Path, store: Path, **given: Any) -> list[dict[str, Any]]:
    if size == 1:
        found = [train(0, 1, folder=folder, **given)]
    else:
        found = run_ranks(functools.partial(train, folder=folder, **given), size, store)
    assert all(isinstance(one, dict) and "refused" not in one for one in found), found
    return found


def whole(parts: list[list[float]]) -> torch.Tensor:
    """The values of all rows of processes that hold the rows r, r + n, ..."""
    values = torch.empty(sum(map(len, parts)))
    for rank, part in enumerate(parts):
        values[rank :: len(parts)] = torch.tensor(part)
    return values


def loss_change() -> Gate:
    return Gate(0.5, significance=Significance(loss=0.5, terms=(LossChange(0.5),)))


SLOW_THREE = [1, pytest.param(3, marks=pytest.mark.slow)]  # a start of three more processes
POLICIES = ["infobatch", "importance", "topk@history", loss_change]


def half_at_random() -> RandomPolicy:
    return RandomPolicy(0.5)


@pytest.mark.parametrize(
    ("policy", "size"),
    [(policy, 1) for policy in POLICIES]
    + [("infobatch", 3)]
    + [pytest.param(policy, 3, marks=pytest.mark.slow) for policy in POLICIES[1:]],
)
def test_every_row_keeps_its_score_and_no_row_is_lost(policy: Any, size: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    given = {"policy": policy, "epochs": 4}
    former = on_ranks(2, folder, tmp_path, stop=5, **given)  # an epoch is of five steps
    assert all(found["interrupted"] for found in former)
    parts = saved(folder)
    # Stopped again before its first step changes anything: what it holds is what it was given.
    on_ranks(size, folder, tmp_path, stop=1, **given)
    again = saved(folder)
    assert [len(again), len(parts)] == [size, 2]
    was, tables = ([table(part) for part in of] for of in (parts, again))
    assert sum(map(len, tables)) == ROWS
    before, after = whole(was), whole(tables)
    assert int((~before.isnan()).sum()) > 4
    trained = 5 * size  # the most that the one step can have changed
    assert int((after != before)[~before.isnan()].sum()) <= trained


def table(part: dict[str, Any]) -> list[float]:
    """The values of a process's rows in its part of a checkpoint."""
    policy = part["policy"]
    name = next(name for name in policy if name.endswith(("_extra_state", "last")) and len(policy[name]))
    found = policy[name]
    found = found if isinstance(found, torch.Tensor) else found["table"]
    values: list[float] = (found if isinstance(found, torch.Tensor) else found["scores"]).tolist()
    return values


@pytest.mark.parametrize(("size", "steps"), [(1, 5 + 27), pytest.param(3, 5 + 9, marks=pytest.mark.slow)])
def test_epochs_are_those_of_the_present_number_of_processes(size: int, steps: int, tmp_path: Path) -> None:
    """45 rows in fives: 5 steps an epoch on two processes, 9 on one, 3 on three; three epochs are left."""
    folder = tmp_path / "run"
    on_ranks(2, folder, tmp_path, stop=5, policy="dense", epochs=4)
    now = on_ranks(size, folder, tmp_path, policy="dense", epochs=4)
    assert [found["steps"] for found in now] == [steps] * size
    assert now[0]["rows"] == 4 * ROWS
    assert all(found["weights"] == now[0]["weights"] for found in now)
    assert len({str(found["random"]) for found in now}) == size  # each process draws its own numbers
    more = on_ranks(size, folder, tmp_path, policy="dense", epochs=5)  # a finished run is extended
    assert more[0]["steps"] == steps + (9 if size == 1 else 3)


def test_counts_of_all_processes_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    on_ranks(2, folder, tmp_path, stop=5, policy=half_at_random, epochs=4)
    one = on_ranks(1, folder, tmp_path, policy=half_at_random, epochs=4)[0]
    whole_run = on_ranks(1, tmp_path / "whole", tmp_path, policy=half_at_random, epochs=4)[0]
    assert one["rows"] == whole_run["rows"] == 4 * ROWS
    assert one["operations"] == pytest.approx(whole_run["operations"], rel=0.2)
    assert len(one["selected"]) == ROWS


@pytest.mark.parametrize("size", SLOW_THREE)
def test_a_run_of_steps_goes_on_within_an_epoch(size: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    on_ranks(2, folder, tmp_path, stop=7, policy="dense", steps=20)
    now = on_ranks(size, folder, tmp_path, policy="dense", steps=20, batch_size=15)
    assert [found["steps"] for found in now] == [20] * size


@pytest.mark.parametrize("size", SLOW_THREE)
def test_rows_of_a_data_loader_keep_a_score_that_a_process_knew(size: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    on_ranks(2, folder, tmp_path, stop=12, resident=False)  # two epochs of six steps
    scores = torch.tensor([table(part) for part in saved(folder)])
    waiting = sum(len(part["policy"]["_extra_state"]["waiting"][0]) for part in saved(folder))
    on_ranks(size, folder, tmp_path, resident=False, stop=1)
    for part in saved(folder):
        now = torch.tensor(table(part))
        same = torch.isclose(now, scores.nanmean(0), equal_nan=True)
        assert int(same.sum()) >= 60 - 2 * 5 - waiting
    finished = on_ranks(size, folder, tmp_path, resident=False)
    assert not any(found["interrupted"] for found in finished)


NAMED = ["random", "topk", "masked", "gate@history", "gate@early:1", "topk@early:1", "importance@self"]


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "size"), [*((name, 1) for name in NAMED), ("gate", 3), ("gate@history", 3)])
def test_a_run_of_any_policy_goes_on_and_sees_every_row(policy: str, size: int, tmp_path: Path) -> None:
    """Stopped within its second epoch by two processes; rows of four epochs, whoever sees them."""
    folder = tmp_path / "run"
    on_ranks(2, folder, tmp_path, policy=policy, stop=7)
    found = on_ranks(size, folder, tmp_path, policy=policy)
    assert not any(one["interrupted"] for one in found)
    assert found[0]["rows"] == pytest.approx(4 * ROWS, abs=5 * size)
    assert all(one["weights"] == found[0]["weights"] for one in found)


@pytest.mark.parametrize(("former", "now"), [(2, 1), (1, 2)])
def test_a_named_gate_goes_on(former: int, now: int, tmp_path: Path) -> None:
    """One process has nobody to share the threshold with, and goes on with it."""
    on_ranks(former, tmp_path / "run", tmp_path, policy="gate", stop=5)
    assert not any(found["interrupted"] for found in on_ranks(now, tmp_path / "run", tmp_path, policy="gate"))


def test_processes_that_share_a_gate_cannot_choose_the_rows_of_a_loader_ahead(tmp_path: Path) -> None:
    """One whose batch has no row would ask the others for another threshold, who are elsewhere: they would wait."""
    refused = functools.partial(train, folder=tmp_path / "run", policy="gate@history", resident=False)
    for one in run_ranks(refused, 2, tmp_path):
        assert "cannot choose a DataLoader's rows before they are loaded; use a ResidentLoader" in one["refused"]
        assert one["untouched"]
    own = functools.partial(train, folder=tmp_path / "own", policy=gate_by_history, resident=False)
    assert [one["interrupted"] for one in run_ranks(own, 2, tmp_path)] == [False, False]


def gate_by_history() -> GatePolicy:
    return GatePolicy(gate=Gate(0.3), scorer=HistoryScorer())


DENSE = {"policy": "dense", "stop": 5}
THREE = {"settings": {"accumulate": 3}}
REFUSALS = {
    "an epoch of a loader": (
        {"resident": False, "stop": 3}, {"resident": False}, "chosen before loading cannot go on.*end of an epoch",
    ),
    "an accumulation": ({**DENSE, **THREE}, {"policy": "dense", **THREE}, "within an accumulation.*resume it with as"),
    "epochs for steps": ({**DENSE, "steps": 20}, {"policy": "dense"}, "was of 20 steps and is now of 4 epochs"),
    "fewer epochs": (DENSE, {"policy": "dense", "epochs": 3}, "budget 36 steps is now 27 steps"),
    "another policy": (DENSE, {"policy": "random"}, "policy dense is now random"),
    "weights": (
        {"policy": "adaptive+balance", "stop": 5}, {"policy": "adaptive+balance"},
        "are of 2 processes and cannot be dealt out to 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_go_on_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    began, now, words = REFUSALS[name]
    on_ranks(2, tmp_path / "run", tmp_path, **began)
    found = train(0, 1, folder=tmp_path / "run", **now)
    assert found["untouched"]
    assert "\n" not in found["refused"]
    assert re.search(words, found["refused"])


def test_other_rows_are_refused(tmp_path: Path) -> None:
    on_ranks(2, tmp_path / "run", tmp_path, stop=5)
    trainer = SparseTrainer(network(), **{**PLAIN, "lr": 0.05})
    with pytest.raises(UserError, match=f"rows {ROWS} is now 23"):
        trainer.fit(
            ResidentLoader(split(), batch_size=5, rank=0, ranks=2), epochs=4, checkpoint=tmp_path / "run", resume=True
        )


SCRIPT = """
import sys
import torch, torch.distributed as dist
from sparse_training import ResidentLoader, SparseTrainer, load_data
dist.init_process_group("gloo")
data = load_data("digits")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
trainer = SparseTrainer(model, policy="infobatch")
steps = iter(range(1, 1000))
stop = int(sys.argv[2])
log = trainer.fit(ResidentLoader(data.train, batch_size=64), epochs=3, checkpoint=sys.argv[1], resume=True,
    progress=False, stop=lambda: next(steps) == stop)
print(f"rank {dist.get_rank()}: {log.steps} steps, {log.interrupted}, {trainer.policy.table.seen} rows known")
"""


@pytest.mark.slow
def test_torchrun_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    def start(ranks: int, stop: int) -> list[str]:
        places = os.pathsep.join([str(ROOT), str(ROOT / "python_api"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": places.rstrip(os.pathsep), "OMP_NUM_THREADS": "1"}
        done = fresh.run(
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            str(script), str(tmp_path / "run"), str(stop), cwd=tmp_path, environment=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return sorted(re.findall(r"rank \d: \d+ steps, (?:True|False), \d+ rows known", done.stdout))

    assert start(2, 12) == [f"rank {rank}: 12 steps, True, 704 rows known" for rank in range(2)]
    # 1,437 rows: all that were trained on are known to the three.
    assert start(3, 4) == [f"rank {rank}: 16 steps, True, 479 rows known" for rank in range(3)]
    # 12 steps of two are 8 of the 24 of three processes; 12 of these are half of the 69 of one.
    assert start(1, 0) == ["rank 0: 51 steps, False, 1437 rows known"]
