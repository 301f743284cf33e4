"""Measures on a user's own model, loader and loss whether training on fewer rows would help."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader

from sparse_training.arguments import check_integer, check_positive
from sparse_training.criterion import Criterion, Loss
from sparse_training.data.row_numbers import unnumbered_reason
from sparse_training.data.stream import StreamLoader
from sparse_training.errors import UserError
from sparse_training.profiling.advise_isolation import copied
from sparse_training.profiling.advise_methods import MethodBound, PlannedRun, method_bounds
from sparse_training.profiling.advise_result import Advice, recommend
from sparse_training.profiling.advise_rows import concentration
from sparse_training.profiling.advise_steps import Limit, Observed, observe
from sparse_training.ranks import rank_and_world_size
from sparse_training.selection.policies.base import Policy
from sparse_training.training.checks import check_batches, check_model, check_optimizer, check_trains
from sparse_training.training.modes import training_mode
from sparse_training.training.optimizers import LEARNING_RATE, learning_rate
from sparse_training.training.settings import TrainerSettings
from sparse_training.training.step import OptimizerFactory, TrainingStep

SECONDS = 30.0
LEAST_STEPS = 6
TRAINING = 0.75  # of the seconds; the rest is for scoring and for smaller batches
MANY_COPIES, MUCH_LOADING = 0.05, 0.4


def advise(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    loss: Loss | Criterion | None = None,
    optimizer: torch.optim.Optimizer | OptimizerFactory | None = None,
    lr: float | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    epochs: float = 10.0,
    settings: TrainerSettings | None = None,
    progress: Callable[[float], None] | None = None,
) -> Advice:
    """Measure whether training on fewer rows would help, in some steps of the user's own training.

    The steps are real ones, on deep copies of model, optimizer and loss, because losses at initialisation say little.
    The user's own, the loader, the gradients and every random generator are afterwards as they were. Hooks of the
    model run on its copy; batches are read from the user's data set. The machine should be idle.

    Example:
        >>> print(advise(model, loader, loss=nn.CrossEntropyLoss(reduction="none")))

    Args:
        model: any module, on the device to train on. With weights that are trained in part, the answer is about the
            rest of the training.
        loader: a DataLoader, a ResidentLoader, or any iterable of batches that can be iterated again.
        loss: maps (logits, targets) to one loss per row, or a ``Criterion``; as for ``SparseTrainer``. Default:
            cross-entropy.
        optimizer: an optimizer of the model's parameters, or a factory called with (parameters, lr=lr). Default: AdamW.
        lr: learning rate of an optimizer made here, above 0; None for 1e-3. Default None.
        steps: number of training steps, at least 6. Default: as many as ``seconds`` allow.
        seconds: time to measure for, above 0, about; a few steps and their parts are measured in any case. Where
            ``steps`` is given too, whichever ends first. Default 30, or no end where ``steps`` is given.
        epochs: length of the run that savings are of, in passes over the data, above 0. Default 10.
        settings: precision, structure of batches and other settings of a step. Default: ``TrainerSettings()``.
        progress: called after each step with the fraction that is done, in [0, 1]. Default: not called.

    Returns:
        The measurements, what each method could save, and a recommendation; ``print`` shows a table.

    Raises:
        UserError: an argument is out of range or cannot be measured, or the loss does not fit the batches.
    """
    named = {"loss": loss, "optimizer": optimizer, "settings": settings}
    settings = TrainerSettings() if settings is None else settings
    _check(
        model, loader, loss, optimizer, settings, steps=steps, seconds=seconds, epochs=epochs, lr=lr, progress=progress
    )
    device = next(parameter.device for parameter in model.parameters())
    seconds = SECONDS if steps is None and seconds is None else seconds
    with copied(model, loader, Criterion() if loss is None else loss, optimizer, device) as twins:
        criterion = twins.loss if isinstance(twins.loss, Criterion) else Criterion(twins.loss)
        step = TrainingStep(
            twins.model, criterion=criterion, policy=Policy(), optimizer=twins.optimizer,
            lr=lr, settings=settings, device=None,
        )  # fmt: skip
        data = step.loader(twins.loader)
        limit = Limit(steps, None if seconds is None else TRAINING * seconds)
        with training_mode(step.model, step.parallel):
            counts = data.duplicate_counts()
            seen = observe(
                step, data, limit, ahead=_loaded_ahead(loader), compare_inputs=counts is None and not _repeats(loader),
                progress=progress,
            )  # fmt: skip
            if not len(seen.losses):
                raise UserError(f"`loss` must be finite to measure anything, got none of {seen.invalid} rows that is")
            arguments = ", ".join(["model", *(f"{name}={name}" for name, value in named.items() if value is not None)])
            source = data.source if isinstance(data, StreamLoader) else data
            run = PlannedRun(
                epochs, arguments if lr in (None, LEARNING_RATE) else f"{arguments}, lr={lr:g}",
                numbered=data.size is not None
                or (isinstance(data, StreamLoader) and unnumbered_reason(source, data.targets) is None),
                own_batches=isinstance(source, DataLoader) and type(source.batch_sampler) is not BatchSampler,
            )  # fmt: skip
            methods = method_bounds(step, seen, run)
    copies = None if counts is None else 1.0 - float((1.0 / counts.double()).mean())
    return _advice(seen, methods, run, copies, loader)


def _check(
    model: Any,
    loader: Any,
    loss: Any,
    optimizer: Any,
    settings: Any,
    *,
    steps: int | None,
    seconds: float | None,
    epochs: float,
    lr: Any,
    progress: Any,
) -> None:
    """Refuse what cannot be measured, before anything is copied."""
    check_model(model)
    check_trains(model, optimizer if isinstance(optimizer, torch.optim.Optimizer) else None, loss)
    if isinstance(loader, Iterator):
        raise UserError("`loader` must be an iterable that can be iterated again, got a one-shot iterator")
    check_batches(loader, "`loader`")
    if steps is not None:
        check_integer("steps", steps, LEAST_STEPS)
    for name, amount in (("seconds", seconds), ("epochs", epochs)):
        if amount is not None:
            check_positive(name, amount)
    if loss is not None and not callable(loss):
        raise UserError(f"`loss` must be a function of logits and targets, or a Criterion, got {type(loss).__name__}")
    if not isinstance(settings, TrainerSettings):
        raise UserError(f"`settings` must be TrainerSettings, got {type(settings).__name__}")
    if settings.compile:
        raise UserError(f"`settings.compile` must be False, got {settings.compile}; give torch.compile(model) instead")
    if rank_and_world_size()[1] > 1:
        raise UserError(f"advise must run in one process, got {rank_and_world_size()[1]}: they would time one another")
    if optimizer is not None and not callable(optimizer):
        check_optimizer(optimizer, model)
    learning_rate(lr, optimizer)
    if progress is not None and not callable(progress):
        raise UserError(f"`progress` must be a function of the fraction done, or None, got {progress!r}")


def _loaded_ahead(loader: Any) -> int:
    """Return the number of batches that a DataLoader's workers load before the first is used up."""
    return int(getattr(loader, "num_workers", 0) or 0) * int(getattr(loader, "prefetch_factor", 0) or 0)


def _repeats(loader: Any) -> bool:
    """Tell whether a pass draws rows with replacement, so that the same row twice is no copy."""
    return bool(getattr(getattr(loader, "sampler", None), "replacement", False))


def _advice(
    seen: Observed, methods: list[MethodBound], run: PlannedRun, copies: float | None, loader: Iterable[Any]
) -> Advice:
    """Put measurements and bounds together."""
    counts, losses = seen.counts, seen.losses
    facts = {
        "ignored": counts.share("ignored", "targets"),
        "padded": counts.share("padded", "positions"),
        "no_gradient": counts.share("flat", "graded"),
        "copies": counts.share("copies", "hashed") if copies is None else copies,
        "below_mean": float((losses < losses.mean()).float().mean()),
    }
    method, recommendation, code = recommend(seen.times, methods, run)
    return Advice(
        times=seen.times,
        batch_size=seen.batch.rows,
        device=str(seen.batch.targets.device),
        steps=seen.steps,
        rows=counts.rows,
        epochs=run.epochs,
        facts=facts,
        losses=concentration(losses.clamp(min=0.0)),
        gradients=concentration(seen.squares.sqrt()) if len(seen.squares) else None,
        methods=tuple(methods),
        method=method,
        recommendation=recommendation,
        code=code,
        notes=tuple(_notes(seen, facts, loader)),
    )


def _notes(seen: Observed, facts: dict[str, float | None], loader: Any) -> Iterator[str]:
    """Yield remarks on what no method of this package mends."""
    if (facts["copies"] or 0.0) >= MANY_COPIES:
        yield f"{facts['copies']:.0%} of the rows are exact copies of others; drop them from the data set."
    waits = seen.times.load / seen.times.total
    if waits >= MUCH_LOADING and getattr(loader, "num_workers", None) == 0:
        yield f"{waits:.0%} of a step waits for a DataLoader without workers; num_workers= would load meanwhile."
    if seen.invalid:
        yield f"Rows whose loss is not finite: {seen.invalid}."
    if not len(seen.squares):
        yield "No gradient of the model's output was seen; the noise of the methods is unknown."
