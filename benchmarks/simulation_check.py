"""The simulation of many ranks beside real runs of 2 and 4 gloo processes on this machine.

    python benchmarks/simulation_check.py [--processes 2,4] [--counts] [--record FILE]

Rows per rank, imbalance and bytes of a step can be compared on any machine (--counts); seconds need an idle one.
A step's costs are calibrated with as many processes at work as the run has, each with one thread. Where they share
cores, as four do on two, the simulation shares them, too. It has one latency for all messages: the one that makes a
simulated dense step as long as a dense step of the same processes in a loop of its own. Exit code 1 where a figure is
off by more than 15%. With seconds it takes some 4 minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from sparse_kernels import keep_freed_memory
from sparse_training import Gate, HistorySampler, SparseTrainer
from sparse_training.data.load import load_data
from sparse_training.data.resident import ResidentLoader
from sparse_training.experiments.environment import environment
from sparse_training.files import write_atomic
from sparse_training.profiling.calibration import calibrate
from sparse_training.profiling.scale import METHODS, Cluster, Plan, Simulated, collectives, simulate
from sparse_training.profiling.scale_costs import StageCosts
from sparse_training.selection.registry import make_policy
from sparse_training.training.clock import Costs, Curve

BATCH, RATE, TOLERANCE = 64, 0.3, 0.15
STEPS, SETTLING = 240, 80  # of a run, and those at its start that are not counted
CALIBRATION_SECONDS = 8.0
EXCHANGES = 100  # dense steps by which the latency is found


class Mean(nn.Module):
    """The mean over the pixels: [rows, pixels, width] to [rows, width]."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Take the mean."""
        return pixels.mean(1)


def network(width: int) -> nn.Sequential:
    """Three layers on every pixel of the digits; their width says how long a step takes.

    Matrix products take any number of rows alike. A convolution compiles code for each new one, which would be
    measured in a run of some hundred steps, and is nothing in a long one.
    """
    torch.manual_seed(0)
    hidden = (nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    return nn.Sequential(nn.Flatten(), nn.Unflatten(1, (64, 1)), *hidden, Mean(), nn.Linear(width, 10))


def _work(rank: int, ranks: int, width: int, timed: bool, store: str, barrier: Any, answers: Any) -> None:
    try:
        answers.put((rank, _measure(rank, ranks, width, timed, store, barrier)))
    except BaseException as error:
        answers.put((rank, error))
        raise


def _measure(rank: int, ranks: int, width: int, timed: bool, store: str, barrier: Any) -> dict[str, Any]:
    torch.set_num_threads(1)
    keep_freed_memory()  # as `sparse-train` has it; else a step's time is that of the C library's fresh pages
    data = load_data("digits").train
    costs = None
    if timed:
        barrier.wait()  # all at once
        loader = ResidentLoader(data, batch_size=BATCH, rank=rank, ranks=ranks)
        policies = {name: make_policy(name, rate=RATE, seed=0) for name in ("gate", "infobatch", "importance")}
        trainer = SparseTrainer(network(width), policy="dense")
        costs = calibrate(trainer, loader, policies, seconds=CALIBRATION_SECONDS).to_dict()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    found = {method: _run(method, data, width) for method in METHODS}
    measured = {"costs": costs, "runs": found, "dense": _dense_step(width) if timed else None}
    dist.barrier()
    dist.destroy_process_group()
    return measured


def _dense_step(width: int) -> float:
    """Mean seconds of a dense step with its collectives, each after the work that it follows in a trainer's step.

    By itself in a loop a collective is several times as fast: nothing has to be woken up there, and no rank waits.
    """
    images, labels = torch.rand(BATCH, 1, 8, 8), torch.zeros(BATCH, dtype=torch.long)
    model = network(width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rows, finite = (torch.zeros(size // 4) for size in collectives("dense"))
    gradients = torch.zeros(sum(parameter.numel() for parameter in model.parameters()))
    for step in range(EXCHANGES + 10):
        if step == 10:
            dist.barrier()
            began = time.perf_counter()
        dist.all_reduce(rows)
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        dist.all_reduce(finite)
        loss.backward()
        dist.all_reduce(gradients)
        optimizer.step()
    return (time.perf_counter() - began) / EXCHANGES


def _on_a_core(costs: StageCosts, share: float) -> StageCosts:
    """Costs of a process that has a core to itself, of one that had a share of it."""

    def scaled(curve: Curve) -> Curve:
        return curve[0], tuple(share * seconds for seconds in curve[1])

    select = {name: scaled(curve) for name, curve in costs.select.items()}
    return StageCosts(scaled(costs.load), scaled(costs.score), scaled(costs.train), select)


def _cluster(costs: StageCosts, parameters: int, ranks: int, cores: int, dense_seconds: float) -> Cluster:
    """These processes, with the latency that makes a simulated dense step as long as the one measured."""
    instant = Cluster(latency=0.0, cores=cores)
    plan = Plan(1 << 20, ranks, BATCH, parameters)
    beyond = dense_seconds - simulate(plan, costs, instant)[0].seconds
    unit = Cluster(latency=1.0).exchange_seconds(ranks, 4 * parameters, collectives("dense"))
    return Cluster(latency=max(0.0, beyond / unit), cores=cores)


class Watch:
    """Rows, bytes and seconds of every step of this rank."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.bytes: list[int] = []
        self.seconds: list[float] = []
        self.sent = 0

    def count(self, tensor: Tensor) -> None:
        """Add a tensor that is given to a collective."""
        self.sent += tensor.numel() * tensor.element_size()

    def hook(self, ddp: DistributedDataParallel) -> None:
        """Count the gradients that DistributedDataParallel exchanges."""

        def counted(state, bucket):  # type: ignore[no-untyped-def]  # PyTorch refuses annotations that are strings
            self.count(bucket.buffer())
            gradients = bucket.buffer().div_(dist.get_world_size())
            work = plain["all_reduce"](gradients, async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        ddp.register_comm_hook(None, counted)

    def step(self, take: Callable[[], int]) -> None:
        """Take a step, which returns its rows, and enter what it took."""
        sent, began = self.sent, time.perf_counter()
        self.rows.append(take())
        self.seconds.append(time.perf_counter() - began)
        self.bytes.append(self.sent - sent)

    def found(self) -> dict[str, list[Any]]:
        """All of it, without the first steps."""
        return {name: getattr(self, name)[SETTLING:] for name in ("rows", "bytes", "seconds")}


plain: dict[str, Any] = {"all_reduce": dist.all_reduce, "all_gather": dist.all_gather}


def _run(method: str, data: Any, width: int) -> dict[str, Any]:
    """Run a method on all ranks; return what this one saw of each step, and the share of rows below the mean loss."""
    watch = Watch()

    def all_reduce(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        watch.count(tensor)
        return plain["all_reduce"](tensor, *arguments, **options)

    def all_gather(tensors: list[Tensor], tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        watch.count(tensor)
        return plain["all_gather"](tensors, tensor, *arguments, **options)

    dist.all_reduce, dist.all_gather = all_reduce, all_gather
    try:
        table = (_run_sampler if method == "infobatch-balanced" else _run_trainer)(method, data, width, watch)
    finally:
        dist.all_reduce, dist.all_gather = plain["all_reduce"], plain["all_gather"]
    below = None if table is None else float((table.scores < table.mean).float().mean())
    return {**watch.found(), "below_mean": below}


def _run_trainer(method: str, data: Any, width: int, watch: Watch) -> Any:
    policy: Any = method
    if method == "gate-balanced":
        policy = Gate(RATE, decision="topk", capacity=math.ceil(RATE * BATCH), process_group="world")
    ddp = DistributedDataParallel(network(width))
    watch.hook(ddp)
    rate = RATE if method in ("gate", "importance") else None
    trainer = SparseTrainer(ddp, policy=policy, rate=rate, lr=1e-4, dense_start=0.0, dense_end=0.0)
    step = trainer.step

    def watched(*arguments: Any) -> Any:
        answer: list[Any] = []

        def take() -> int:
            answer.append(step(*arguments))
            return int(answer[0][1].rows)

        watch.step(take)
        return answer[0]

    trainer.step = watched  # type: ignore[method-assign]
    trainer.fit(ResidentLoader(data, batch_size=BATCH, drop_last=True), steps=STEPS, progress=False)
    return trainer.policy.sampler.table if method == "infobatch" else None


def _run_sampler(method: str, data: Any, width: int, watch: Watch) -> Any:
    ddp = DistributedDataParallel(network(width))
    watch.hook(ddp)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-4, fused=True)
    sampler = HistorySampler(len(data), BATCH, method="infobatch")

    def take(rows: list[int]) -> int:
        index = torch.tensor(rows)
        losses = cross_entropy(ddp(data.images[index].float() / 255.0), data.labels[index], reduction="none")
        optimizer.zero_grad()
        (losses * sampler.weights(index)).mean().backward()
        optimizer.step()
        sampler.update(index, losses)
        return len(rows)

    while len(watch.rows) < STEPS:
        for rows in sampler:
            watch.step(lambda rows=rows: take(rows))  # type: ignore[misc]
    return sampler.table


def real_runs(ranks: int, *, width: int, timed: bool) -> list[dict[str, Any]]:
    """Run every method on that many processes; what each saw, in order of the ranks."""
    context = mp.get_context("spawn")
    answers, barrier = context.Queue(), context.Barrier(ranks)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, width, timed, f"{folder}/store", barrier, answers)
        processes = [context.Process(target=_work, args=(rank, *arguments), daemon=True) for rank in range(ranks)]
        for process in processes:
            process.start()
        found = {}
        for _ in processes:
            rank, answer = answers.get(timeout=300)
            if isinstance(answer, BaseException):
                for process in processes:  # the others wait for it
                    process.kill()
                raise answer
            found[rank] = answer
        for process in processes:
            process.join()
    return [found[rank] for rank in range(ranks)]


def compare(ranks: int, *, width: int = 8, timed: bool = False) -> list[dict[str, Any]]:
    """Simulate what real runs did; a dict of each figure: method, quantity, simulated, measured and their ratio."""
    seen = real_runs(ranks, width=width, timed=timed)
    parameters = sum(parameter.numel() for parameter in network(width).parameters())
    samples = len(load_data("digits").train)
    costs, cluster = StageCosts.from_step(BATCH, load=0.0, forward=1.0, backward=2.0, optimizer=0.0), Cluster()
    if timed:
        cores = len(os.sched_getaffinity(0))
        shared = StageCosts.from_costs(Costs.from_dict(seen[0]["costs"]))
        costs = _on_a_core(shared, min(1.0, cores / ranks))
        cluster = _cluster(costs, parameters, ranks, cores, statistics.mean(one["dense"] for one in seen))
    lines = []
    for number, method in enumerate(METHODS):
        runs = [one["runs"][method] for one in seen]
        shares = [run["below_mean"] for run in runs if run["below_mean"] is not None]
        plan = Plan(samples, ranks, BATCH, parameters, rate=RATE, below_mean=statistics.mean(shares) if shares else 0.6)
        result = simulate(plan, costs, cluster)[number]
        for quantity, simulated, measured in _figures(result, runs, timed=timed):
            lines.append(
                {
                    "ranks": ranks, "method": method, "quantity": quantity, "simulated": simulated,
                    "measured": measured, "ratio": simulated / measured,
                }
            )  # fmt: skip
    return lines


def _figures(result: Simulated, runs: list[dict[str, Any]], *, timed: bool) -> list[tuple[str, float, float]]:
    rows = torch.tensor([run["rows"] for run in runs]).double()  # [ranks, steps]
    full = rows[:, rows.sum(0) > 0]
    figures = [
        ("rows", result.rows, full.mean().item()),
        ("imbalance", result.imbalance, (full.amax(0).mean() / full.mean()).item()),
        ("bytes", float(result.reduced_bytes), statistics.mean(runs[0]["bytes"])),
    ]
    if timed:
        figures.append(("seconds", result.seconds, statistics.mean(runs[0]["seconds"])))
    return figures


def main() -> int:
    """Compare, print and record; 1 where a figure is further off than 15%."""
    parser = argparse.ArgumentParser(description="The simulation beside real runs of gloo processes.")
    parser.add_argument("--processes", default="2,4", help="numbers of processes")
    parser.add_argument("--counts", action="store_true", help="rows, imbalance and bytes alone, by a small model")
    parser.add_argument("--width", type=int, default=256, help="channels of the model's layers where seconds count")
    parser.add_argument("--record", type=Path, help="JSON file to write")
    options = parser.parse_args()
    lines = []
    for ranks in map(int, options.processes.split(",")):
        found = compare(ranks, width=8 if options.counts else options.width, timed=not options.counts)
        for line in found:
            what = f"{line['ranks']} ranks {line['method']:18}  {line['quantity']:9}"
            print(what, f"{line['simulated']:<10.4g} measured {line['measured']:<9.4g} {line['ratio']:.2f}", flush=True)
        lines += found
    if options.record is not None:
        record = {"format": "simulation-check", "environment": environment(torch.device("cpu")), "lines": lines}
        write_atomic(options.record, (json.dumps(record, indent=1) + "\n").encode())
    return int(any(abs(line["ratio"] - 1.0) > TOLERANCE for line in lines))


if __name__ == "__main__":
    sys.exit(main())
