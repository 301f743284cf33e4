"""The parts of a checkpoint that one number of processes wrote, for a process of another number of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_training.data.loader import Loader
from sparse_training.errors import UserError
from sparse_training.generators import further_rng_state
from sparse_training.samplers.resharding import NewRank
from sparse_training.training.log import TrainingLog
from sparse_training.training.step import TrainingStep

OF_A_PROCESS = ("rows", "batches", "batch_size", "data")  # settings that may differ with the number of processes


class Resumed(NamedTuple):
    """State and settings that a process goes on with.

    Attributes:
        own: its part of the checkpoint, as if it had written it.
        settings: the settings of the run before, as far as they must agree with those of now.
        extra_steps: steps of now that the run before amounts to beyond those that it took; below 0 where each of its
            steps was of fewer rows.
    """

    own: dict[str, Any]
    settings: dict[str, Any]
    extra_steps: float


def check_complete(update: Mapping[str, Any], former: int) -> None:
    """Refuse a checkpoint from within an accumulation: its gradients are sums over the former processes' rows.

    Args:
        update: state of the optimizer step.
        former: number of processes that wrote the checkpoint.

    Raises:
        UserError: the accumulation is not complete.
    """
    if update.get("pending") is not None:
        raise UserError(
            f"the checkpoint of {former} processes was written within an accumulation of batches; resume it with as "
            "many, or use one written after a whole number of optimizer steps"
        )


def reshard(
    parts: Sequence[Mapping[str, Any]], *, trainer: TrainingStep, loader: Loader, settings: Mapping[str, Any],
    extra_steps: float,
) -> Resumed:  # fmt: skip
    """Make this process's part of a checkpoint from the parts of another number of processes; nothing is changed.

    Tables of rows are dealt out exactly, and so are rows that wait. Counts are the first process's, so that sums over
    all are right. Generators go on where there are as many, and begin anew on further processes. Other state is equal
    on all processes, or each goes on with that of one of the former.

    Args:
        parts: parts of the former processes, in order of their ranks, with settings under today's names.
        trainer: the trainer that goes on.
        loader: its training data.
        settings: its settings.
        extra_steps: steps that the run amounted to beyond those that it took, when the checkpoint was written.

    Raises:
        UserError: other data, a budget of another kind, or a state that cannot be dealt out.
    """
    ranks, former = trainer.ranks, len(parts)
    now = NewRank(ranks.rank, ranks.size, loader.divided)
    first = dict(parts[0]["settings"])
    if parts[0]["spending"] is not None:
        raise UserError(f"`cost_budget` needs one process, and the checkpoint's run is resumed with {ranks.size}")
    if loader.divided:
        was, rows = sum(part["settings"]["rows"] for part in parts), int(ranks.total(loader.size or 0))
        if was != rows:
            raise UserError(f"the checkpoint was made with other settings: rows {was} is now {rows}")
        first["rows"] = settings["rows"]
    first["policy_options"] = _options_now(first.get("policy_options"), settings["policy_options"])
    former_batches = first["batches"]
    first |= {name: settings[name] for name in OF_A_PROCESS if name != "rows"}
    ratio = _steps_ratio(first, settings, former_batches, loader.batches())
    if ratio != 1.0 and trainer.update.scheduler is not None:
        raise UserError(
            f"`schedule`, a {type(trainer.update.scheduler).__name__}, counts the steps of {former} processes; resume "
            "with as many, or train with a named schedule"
        )
    history = [{**vars(TrainingLog()), **part["history"]} for part in parts]
    counts = _counts(history, now)
    operations = [part["operations"] for part in parts]
    totals = [operation["total"] for operation in operations] if now.rank == 0 else []
    own = {
        **parts[now.rank % former],
        "settings": first,
        "policy": _policy_state(trainer.policy, [part["policy"] for part in parts], now),
        "loader": {"of ranks": [part["loader"] for part in parts], "batches": former_batches},
        "operations": {
            "known": operations[now.rank % former]["known"],
            "total": {kind: sum(each.get(kind, 0.0) for each in totals) for kind in dict.fromkeys(_keys(totals))},
        },
        "history": {**history[0], **counts},
        "gradients": None,
    }
    if now.rank >= former:
        own |= {"rng": further_rng_state(parts[now.rank % former]["rng"], now.rank), "buffers": parts[0]["buffers"]}
    # Rounded: ten steps of fifteen times a third are ten, whatever their last bit.
    return Resumed(own, first, round((history[0]["steps"] + extra_steps) * ratio - history[0]["steps"], 6))


def _options_now(was: Any, now: Sequence[Mapping[str, Any]]) -> Any:
    """Return a policy's former options with the process group of now: one process has none to share a gate with."""
    if not isinstance(was, list) or len(was) != len(now):
        return was
    name = "process_group"
    return [{**part, name: own[name]} if name in own else part for part, own in zip(was, now, strict=True)]


def _keys(mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for mapping in mappings for name in mapping]


def _steps_ratio(
    saved: dict[str, Any], settings: Mapping[str, Any], former_batches: int | None, batches: int | None
) -> float:
    """Return the steps of now for each former one; budgets of epochs are compared as such, and made equal if they are.

    Raises:
        UserError: one run is of epochs and the other is not.
    """
    was, epochs = saved.get("epochs"), settings["epochs"]
    if (was is None) != (epochs is None):
        said = [f"{amount} epochs" if amount is not None else str(of["budget"]) for amount, of in
                ((was, saved), (epochs, settings))]  # fmt: skip
        raise UserError(
            f"the checkpoint's run was of {said[0]} and is now of {said[1]}; with another number of processes it goes "
            "on with a budget of the same kind"
        )
    if was is None or not former_batches or not batches:
        return 1.0
    saved["budget"] = f"{max(1, round(was * batches))} steps"
    return batches / former_batches


def _policy_state(policy: nn.Module, states: Sequence[Mapping[str, Any]], now: NewRank) -> dict[str, Any]:
    modules = dict(policy.named_modules())
    made: dict[str, Any] = {}
    for name in states[now.rank % len(states)]:
        values = [state[name] for state in states]
        path, _, key = name.rpartition(".")
        module = modules.get(path)
        if key == "_extra_state" and (of_module := getattr(module, "reshard", None)) is not None:
            made[name] = of_module(values, now)
        elif key in getattr(module, "row_buffers", ()):
            made[name] = now.scores(values)
        else:
            made[name] = values[now.rank % len(values)]
    return made


def _counts(history: Sequence[Mapping[str, Any]], now: NewRank) -> dict[str, Any]:
    """Return the counts of the log that are summed over the processes at the run's end."""
    first = now.rank == 0
    made: dict[str, Any] = {
        name: sum(int(each[name]) for each in history) if first else 0
        for name in ("rows_seen", "rows_trained", "offered", "kept")
    }
    for name in ("selected", "seen"):
        parts: list[Tensor] = [each[name] for each in history if each[name] is not None]
        if len(parts) < len(history):
            made[name] = None
        elif now.divided:
            made[name] = now.scores(parts)
        else:
            made[name] = torch.stack(parts).sum(0, dtype=torch.int32) if first else torch.zeros_like(parts[0])
    return made
