"""gloo processes on this machine that run a test's checks; one that hangs or fails is a failure."""

from __future__ import annotations

import multiprocessing
import queue
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

LIMIT = 240.0  # seconds until a hang is a failure

Check = Callable[..., Any]
signals: dict[int, Any] = {}  # second groups of as many ranks, to order what they do: collectives of one are in order


def _work(rank: int, size: int, store: str, tasks: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    groups = {1: None, 2: dist.new_group([0, 1]), size: dist.group.WORLD}
    # Every group is made here, by all: PyTorch names one made with use_local_synchronization=True after the number of
    # groups its rank is in, so ranks that are in different numbers of groups wait for each other for ever.
    signals.update({2: dist.new_group([0, 1]), size: dist.new_group()})
    while (task := tasks.get()) is not None:
        check, ranks, arguments = task
        try:
            # Plain objects: tensors would be shared by a file that goes with their process.
            answers.put((rank, True, check(rank, ranks, groups[ranks], *arguments)))
        except BaseException:
            answers.put((rank, False, traceback.format_exc()))


class Processes:
    """``size`` of them, started when first wanted, and again after a failure; each with one thread."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size, self.starts = folder, size, 0
        self.all: list[Any] = []

    def start(self) -> None:
        self.starts += 1
        context = multiprocessing.get_context("forkserver")  # they need not import PyTorch, each for itself
        context.set_forkserver_preload(["sparse_training", "torch._dynamo"])
        self.tasks = [context.Queue() for _ in range(self.size)]
        self.answers = context.Queue()
        store = str(self.folder / f"store-{self.starts}")
        self.all = [
            context.Process(target=_work, args=(rank, self.size, store, tasks, self.answers), daemon=True)
            for rank, tasks in enumerate(self.tasks)
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            for process in self.all:
                process.start()

    def run(self, check: Check, ranks: int, *arguments: Any) -> list[Any]:
        """What ``check(rank, ranks, group, *arguments)`` returned on each of the first ``ranks``."""
        if not self.all:
            self.start()
        for tasks in self.tasks[:ranks]:
            tasks.put((check, ranks, arguments))
        found = {}
        for _ in range(ranks):
            try:
                rank, fine, answer = self.answers.get(timeout=LIMIT)
            except queue.Empty:
                self.stop()
                pytest.fail(f"no answer of ranks {sorted(set(range(ranks)) - set(found))} in {LIMIT:.0f} s")
            if not fine:
                self.stop()  # the others may be waiting for it
                pytest.fail(f"rank {rank}:\n{answer}")
            found[rank] = answer
        return [found[rank] for rank in range(ranks)]

    def stop(self) -> None:
        for process in self.all:
            process.kill()
        for process in self.all:
            process.join()
        self.all = []
