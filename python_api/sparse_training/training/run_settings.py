"""Settings of a run: equal on all processes, and in a run and its continuation."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.optim.lr_scheduler import LRScheduler

from sparse_training.data.loader import Loader
from sparse_training.errors import UserError
from sparse_training.gate.gate import Gate
from sparse_training.selection.policies.base import Policy
from sparse_training.training.callbacks import Callbacks
from sparse_training.training.distributed import SAID
from sparse_training.training.schedule import Schedule
from sparse_training.training.step import TrainingStep
from sparse_training.user_code import described

# Names and values of settings in checkpoints of version 0.1.0.
_FORMER_NAMES = {"warmup": "dense_start", "anneal": "dense_end", "kept": "granularity", "within": "cost_budget"}
_FORMER_GRANULARITIES = {"samples": "sample", "elements": "token"}
# Settings that checkpoints of earlier versions lack.
_LATER = (
    "loss",
    "policy_options",
    "groups",
    "trainable",
    "schedule_options",
    "criterion",
    "batch",
    "data",
    "data_rows",
    "model",
    "model_options",
)
_OF_LIBRARIES = ("groups", "schedule_options", "model_options")  # other versions of an optimizer may have more options
_PYTORCHS = "torch.nn.modules."
# How an optimizer computes, and what follows the schedule.
_UNCOMPARED = ("lr", "initial_lr", "last_epoch", "foreach", "fused", "capturable", "differentiable")
_CODE = re.compile(r"<lambda> (\S+) [0-9a-f]{8}")
_POINTS = 16  # of a callable schedule, and the last step of a scheduler's function, a power of 2


def made_with(trainer: TrainingStep, schedule: Schedule) -> dict[str, Any]:
    """Collect what a trainer was made with, by name, as long as no run has changed it.

    Args:
        trainer: the trainer, before its first run.
        schedule: its phases and learning rate.

    Returns:
        Plain values by name, which must agree for a run to be the continuation of another.
    """
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    modules = list(_modules(trainer.model))
    criterion, settings = trainer.criterion, trainer.settings
    return {
        "loss": describe(criterion.loss),
        "groups": [
            {**_options_of(group), "parameters": _summary(names.get(id(part), "another's") for part in group["params"])}
            for group in trainer.optimizer.param_groups
        ],
        "model": {name: kind.__name__ for name, _, kind in modules},
        "model_options": {name: options for name, module, _ in modules if (options := _made_of(module))},
        "trainable": _summary(name for name, part in trainer.model.named_parameters() if part.requires_grad),
        "schedule_options": _schedule_options(schedule),
        "criterion": {
            "classes": criterion.classes,
            "class_dim": criterion.class_dim,
            "ignore_index": criterion.ignore_index,
            "shift": criterion.shift,
            "outputs": _function(criterion.outputs),
        },
        "batch": {"inputs": _function(settings.inputs), "targets": _function(settings.targets)},
    }


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, type]]:
    """Yield names and modules of a model, and the kinds of PyTorch's that they are, or of which they are subclasses.

    The kind of others is ``Module``: their classes have names that users and libraries change.
    """
    for name, module in model.named_modules():
        kind = next(kind for kind in type(module).__mro__ if kind.__module__.startswith(_PYTORCHS))
        if isinstance(module, _BatchNorm):  # with several processes users convert it to SyncBatchNorm
            kind = _BatchNorm
        yield name or "itself", module, getattr(kind, "cls_to_become", None) or kind  # of a lazy one, what it will be


def _made_of(module: nn.Module) -> dict[str, Any]:
    """Return what a module was made with, such as a dropout's p; of modules that are not PyTorch's the floats alone.

    Their other numbers and words may be the process's own, such as its rank or device, and a text that describes a
    module, such as its ``repr``, may hold addresses and differs between versions of PyTorch.
    """
    if isinstance(module, LazyModuleMixin):  # sizes that it does not know yet are 0
        return {}
    kind: Any = type(module)
    arguments = _arguments_of(kind)
    given = {
        name: value
        for name, value in vars(module).items()
        if not isinstance(value, Tensor) and (arguments.get(name) or (name in arguments and isinstance(value, float)))
    }
    return {name: _plain(value) for name, value in _numbers(given).items()}


def _plain(value: Any) -> Any:
    """Return a number or a word without a class of its own, such as an enumeration's, which no checkpoint holds."""
    for kind, plain in ((bool, bool), (int, int), (float, float), (str, str.__str__)):
        if isinstance(value, kind):
            return plain(value)
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


@functools.cache
def _arguments_of(kind: type) -> dict[str, bool]:
    """Return the names of a class's and its bases' arguments, and whether each is one of PyTorch's own modules."""
    found: dict[str, bool] = {}
    for base in kind.__mro__:
        own = base.__module__.startswith(_PYTORCHS)
        with contextlib.suppress(KeyError, TypeError, ValueError):  # it has none, or none that Python can read
            found |= {
                name: own or found.get(name, False) for name in inspect.signature(vars(base)["__init__"]).parameters
            }
    return found


def _options_of(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in _numbers(part).items() if name not in _UNCOMPARED}


def _summary(names: Iterable[str]) -> str:
    """Say which parameters these are, in a few words and a digest."""
    given = list(names)
    if len(given) <= 2:
        return " and ".join(given) or "none"
    return f"{len(given)}, {given[0]} to {given[-1]}, {hashlib.sha256(repr(given).encode()).hexdigest()[:8]}"


def _function(function: Any) -> str | None:
    return None if function is None else describe(function)


def _schedule_options(schedule: Schedule) -> Any:
    """Return the options of a scheduler, or a callable schedule's factors; None for a named schedule."""
    if schedule.scheduler is not None:
        return _scheduler_options(schedule.scheduler)
    if not callable(schedule.shape):
        return None
    return [schedule.factor(point / _POINTS) for point in range(_POINTS)]


def _scheduler_options(scheduler: Any) -> dict[str, Any]:
    """Return what a scheduler was made with; of its functions the factors of some steps."""
    options = _given(scheduler, vars(scheduler))
    options = {name: value for name, value in options.items() if name not in _UNCOMPARED}
    if isinstance(milestones := getattr(scheduler, "milestones", None), Mapping):
        options["milestones"] = sorted(milestones)
    steps = [1 << power for power in range(_POINTS)]
    for number, function in enumerate(getattr(scheduler, "lr_lambdas", ())):
        options[f"function {number}"] = list(_values(function, steps))
    parts = getattr(scheduler, "_schedulers", ())
    options["parts"] = [_scheduler_options(part) for part in parts if isinstance(part, LRScheduler)]
    return {"kind": type(scheduler).__name__, **options}


def _values(function: Any, steps: Iterable[int]) -> Iterator[float]:
    """Call a scheduler's function, up to the first step that it does not know."""
    with contextlib.suppress(ArithmeticError, LookupError, TypeError, ValueError):
        for step in steps:
            yield float(function(step))


def run_settings(
    trainer: TrainingStep,
    schedule: Schedule,
    loader: Loader,
    *,
    made_with: Mapping[str, Any],
    seed: int,
    budget: str,
    epochs: float | None,
    cost_budget: str,
) -> dict[str, Any]:
    """Collect the settings, by name, that must agree for a run to be the continuation of another.

    Args:
        trainer: the run's model, policy and settings.
        schedule: its phases and learning rate.
        loader: its training data.
        made_with: what the trainer was made with, as of the function of this name.
        seed: the trainer's seed.
        budget: length of the run in words, such as "1000 steps".
        epochs: length of the run in epochs; None where it was not given so.
        cost_budget: cost budget in words; "None" without one.

    Returns:
        Plain values by name.
    """
    return {
        "budget": budget,
        "epochs": epochs,
        "policy": trainer.policy.name,
        "rate": trainer.policy.rate if trainer.policy.target is not None else None,  # None: the policy has none
        "seed": seed,
        "dense_start": schedule.dense_start,
        "dense_end": schedule.dense_end,
        "schedule": schedule.name,
        "lr": [float(group["initial_lr"]) for group in trainer.optimizer.param_groups],
        "optimizer": type(trainer.optimizer).__name__,
        "policy_options": [_options(part) for part in trainer.policy.modules() if isinstance(part, Policy | Gate)],
        "clip_norm": trainer.settings.clip_norm,
        "accumulate": trainer.settings.accumulate,
        "ema": trainer.settings.ema,
        "granularity": trainer.criterion.granularity,
        "scorer": str(trainer.scorer),
        "precision": str(trainer.scorer.dtype),
        "amp": str(trainer.amp),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "batches": loader.batches(),
        "batch_size": getattr(loader, "batch_size", None),
        "rows": loader.size,
        "cost_budget": cost_budget,
        "data": loader.options(),
        "data_rows": loader.data_rows(),
        **made_with,
    }


def agree_on_run(
    trainer: TrainingStep, settings: Mapping[str, Any], loader: Loader, callbacks: Callbacks, **given: Any
) -> None:
    """Refuse a run that the ranks were given different settings for, on all of them and before anything is changed.

    Args:
        trainer: the run's model, policy and settings.
        settings: its ``run_settings``.
        loader: its training data.
        callbacks: its callbacks.
        **given: further arguments that must be equal, by name.

    Raises:
        SharedError: the ranks' values of what differs.
    """
    source = getattr(loader, "source", loader)
    shared = {name: value for name, value in settings.items() if name != "rows"}  # a rank may hold a row more
    trainer.ranks.agree(
        {
            **shared,
            "optimizer_options": [_numbers(group) for group in trainer.optimizer.param_groups],
            "batch_size": getattr(source, "batch_size", None) or getattr(loader, "batch_size", None),
            "callbacks": callbacks.deciding,
            **given,
        }
    )


def describe(value: Any) -> str:
    """Name a function, or the class of an object with what it was made with: numbers, words and tensors."""
    if isinstance(value, functools.partial):
        return f"{describe(value.func)}{_numbers(value.keywords)}"
    if isinstance(value, types.FunctionType):
        return f"{value.__qualname__} {_code_of(value)}" if value.__name__ == "<lambda>" else value.__qualname__
    buffers = dict(value.named_buffers(recurse=False)) if isinstance(value, nn.Module) else {}
    return f"{type(value).__qualname__}{_given(value, {**getattr(value, '__dict__', {}), **buffers})}"


def _code_of(function: types.FunctionType) -> str:
    """Return the Python that made a function without a name, and a digest of its code and numbers."""

    def parts(constant: Any) -> Any:
        if isinstance(constant, types.CodeType):
            return [constant.co_code, constant.co_names, [parts(part) for part in constant.co_consts]]
        return sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant  # in one order

    around: dict[str, Any] = {}
    with contextlib.suppress(ValueError):  # a variable that has no value yet
        found = inspect.getclosurevars(function)
        around = {**found.globals, **found.nonlocals}
    told = repr((parts(function.__code__), _numbers(around)))
    return f"{sys.implementation.cache_tag} {hashlib.sha256(told.encode()).hexdigest()[:8]}"


def _given(value: Any, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes that an object was made with: others, such as counts of its calls, are its state."""
    names = inspect.signature(type(value).__init__).parameters
    return _numbers({name: attribute for name, attribute in attributes.items() if name in names})


def _options(part: Policy | Gate) -> dict[str, Any]:
    """Return what a policy or a gate was made with; its rate may follow a schedule, and its seed is the rank's own."""
    options = _given(part, {name: value for name, value in vars(part).items() if name != "rate"})
    return {**options, "significance": part.significance.settings} if isinstance(part, Gate) else options


def _numbers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the public entries that are numbers or words, or tuples of such, but a seed; of a tensor its digest."""
    plain = (bool, int, float, str, type(None), np.generic)

    return {
        name: _digest(value) if isinstance(value, Tensor) else value
        for name, value in settings.items()
        if name[:1] != "_" and name not in ("seed", "training")
        if isinstance(value, (*plain, Tensor))
        or (isinstance(value, tuple) and all(isinstance(part, plain) for part in value))
    }


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().cpu().double().contiguous().numpy().tobytes()
    return f"{list(tensor.shape)} {hashlib.sha256(values).hexdigest()[:8]}"


def renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a checkpoint under today's names."""
    if settings.get("policy") == "adaptive":  # before its switches had names, all of them were on
        settings = {**settings, "policy": "adaptive+denoise+deduplicate+balance"}
    if "warmup" not in settings:
        return dict(settings)
    renamed = {_FORMER_NAMES.get(name, name): value for name, value in settings.items()}
    return {**renamed, "granularity": _FORMER_GRANULARITIES.get(str(settings.get("kept")), settings.get("kept"))}


def former_amount(saved: Mapping[str, Any], settings: Mapping[str, Any]) -> float | None:
    """Return the amount of the saved budget, where the new one is a larger one of its kind and no cost is bounded."""
    amount, _, kind = str(saved.get("budget")).partition(" ")
    more, _, now = settings["budget"].partition(" ")
    if kind != now or settings["cost_budget"] != "None":
        return None
    try:
        return float(amount) if float(amount) < float(more) else None
    except ValueError:
        return None


def compare_settings(saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings than the checkpoint's, before anything is restored.

    Args:
        saved: the checkpoint's settings, under today's names.
        settings: those of the run that goes on.

    Raises:
        UserError: what differs.
    """
    settings = {**settings, "rate": saved.get("rate") if settings["rate"] is None else settings["rate"]}
    known = [name for name in settings if name != "epochs" and (name in saved or name not in _LATER)]
    differing = [
        difference
        for name in known
        for difference in _differences(name, saved.get(name), settings[name], common=name in _OF_LIBRARIES)
    ]
    if differing:
        more = f" and {len(differing) - SAID} more" if len(differing) > SAID else ""
        raise UserError(f"the checkpoint was made with other settings: {', '.join(differing[:SAID])}{more}")


def _differences(name: str, was: Any, now: Any, *, common: bool) -> Iterator[str]:
    """Say which values differ; ``common``: an entry that one of two mappings lacks is no difference."""
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for number, pair in enumerate(zip(was, now, strict=True)):
            yield from _differences(f"{name}[{number}]", *pair, common=common)
    elif isinstance(was, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*was, *now)):
            if not common or (key in was and key in now):
                pair = (was.get(key, "absent"), now.get(key, "absent"))
                yield from _differences(f"{name}.{key}", *pair, common=common)
    elif was != now and repr(was) != repr(now) and not _is_other_python(was, now):
        yield f"{name} {was} is now {now}"


def _is_other_python(was: Any, now: Any) -> bool:
    """Tell whether two descriptions differ by the code alone that two Pythons make of a function without a name."""
    pythons = [_CODE.findall(str(told)) for told in (was, now)]
    return pythons[0] != pythons[1] and _CODE.sub("<lambda>", str(was)) == _CODE.sub("<lambda>", str(now))


def compare_models(saved: Any, model: Mapping[str, Any]) -> None:
    """Refuse the weights of another model before anything is restored."""
    shapes = [
        {name: _shape_and_type(value) for name, value in states.items()}
        for states in (saved if isinstance(saved, Mapping) else {}, model)
    ]
    for name in dict.fromkeys((*shapes[1], *shapes[0])):
        was, now = (of.get(name, "absent") for of in shapes)
        if was != now:
            raise UserError(f"the checkpoint is of another model: {name} {was} is now {now}")


def _shape_and_type(value: Any) -> str:
    return described(value) if isinstance(value, Tensor) else "no tensor"
