"""Processes as a user starts them: each makes the process group, trains, and ends by itself."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIME_OUT = 60.0  # seconds of the group: an error after it came too late
LATE = 40.0  # seconds


def _work(check: Callable[..., Any], rank: int, size: int, store: str, answers: Any, release: Any, stays: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=TIME_OUT)
    )
    try:
        answers.put((rank, check(rank, size)))
    except Exception as error:
        answers.put((rank, error if isinstance(error, ValueError) else traceback.format_exc()))
    if stays:  # whoever waits for this process is not woken by its end
        release.wait(LATE)


def run_ranks(check: Callable[..., Any], size: int, folder: Path, *, stays: bool = True, lost: int = 0) -> list[Any]:
    """Return what ``check(rank, size)`` returned or raised on each rank; ``lost`` of them never answer.

    ``stays``: no process ends before all have answered, as one that caught the error.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sparse_training", "torch._dynamo"])
    answers, release = context.Queue(), context.Event()
    number = len(list(folder.glob("store-*")))
    arguments = (size, str(folder / f"store-{number}"), answers, release, stays)
    processes = [context.Process(target=_work, args=(check, rank, *arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    try:
        found = dict(answers.get(timeout=LATE) for _ in range(size - lost))
    finally:
        release.set()
        for process in processes:
            process.kill()
            process.join()
    return [found.get(rank) for rank in range(size)]
