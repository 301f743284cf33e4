"""Settings of a call as one value, checked once."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from sparse_kernels._operands import described, integer, number, vetted
from sparse_kernels._tracing import dynamo_compiling

_NUMBERS = frozenset((int, float))
_STEPS = (torch.int64, torch.int32)
_INTEGERS = frozenset(("ignore_index", "seed", "step"))
NO_INDEX = -(2**31)  # the `ignore_index` that ignores no row: a label of every integer dtype, and no class


class Settings(NamedTuple):
    """Numbers that hold for every row of a call, passed whole from the operations to the kernels.

    csrc/bindings/settings.h reads the fields in this order; torch_library takes its schemas from them.
    """

    temperature: float = 1.0  # in [LEAST, MOST]
    softcap: float = 0.0  # the same, or 0: none
    label_smoothing: float = 0.0  # in [0, 1]
    ignore_index: int = -100
    gate_temperature: float = 0.0  # the same, or 0: a threshold without draws
    p_min: float = 0.0  # in [0, 1]
    seed: int = 0  # of the draws, modulo 2^64
    step: int | Tensor = 0  # of the draws, modulo 2^64; a tensor has one int64 or int32 element


_new_tuple = tuple.__new__
LEAST, MOST = 1e-30, 1e30  # of a number that scales others: far from the ends of float32, where products overflow


def _refuse_scale(name: str, rule: str, value: float) -> NoReturn:
    limits = f", from {LEAST:.0e} to {MOST:.0e}" if value > 0.0 else ""
    raise ValueError(f"`{name}` must be {rule}{limits}, got {value}")


def checked_settings(
    temperature: float = 1.0,
    softcap: float | None = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int | None = -100,
    gate_temperature: float = 0.0,
    p_min: float = 0.0,
    seed: int = 0,
    step: int | Tensor = 0,
) -> Settings:
    """Return these settings, or raise the error that names the first one out of range."""
    if dynamo_compiling():
        return _check_settings(
            Settings(
                *_settings_of(temperature, softcap, label_smoothing, ignore_index, gate_temperature, p_min, seed, step)
            )
        )
    given = temperature, softcap, label_smoothing, ignore_index, gate_temperature, p_min, seed
    try:
        known = _CHECKED.get(given)
    except TypeError:  # something without a hash is no number either: the checks below say which
        known = None
    if known is None:
        known = _check_settings(Settings(*_settings_of(*given, 0)))
        if len(_CHECKED) < _MOST_CHECKED:
            _CHECKED[given] = known
    if type(step) is int:
        return _new_tuple(Settings, (*known[:7], step)) if step else known
    return _numbers_of(known._replace(step=step))


# Settings of earlier calls by what was given, the step apart: equal numbers of any type have one entry, Python's own.
# Checking them anew would take a tenth of a small call.
_CHECKED: dict[tuple[Any, ...], Settings] = {}
_MOST_CHECKED = 256


def _settings_of(*given: Any) -> tuple[Any, ...]:
    """Fill in what None stands for."""
    temperature, softcap, label_smoothing, ignore_index, *draw = given
    softcap = 0.0 if softcap is None else softcap
    ignore_index = NO_INDEX if ignore_index is None else ignore_index
    return temperature, softcap, label_smoothing, ignore_index, *draw


def bad_target(target: int, row: int, classes: int, ignore_index: int) -> ValueError:
    """Return the error for a target out of range.

    Args:
        target: the value.
        row: its place among the flat targets.
        classes: the number of classes.
        ignore_index: the target of ignored rows, ``NO_INDEX`` where there is no such.
    """
    other = "" if ignore_index == NO_INDEX else f", or `ignore_index`, {ignore_index}"
    return ValueError(f"target {target} in row {row} is out of range: it must be in [0, {classes - 1}]{other}")


def _check_settings(settings: Settings) -> Settings:
    settings = _numbers_of(settings)
    if not LEAST <= settings.temperature <= MOST:
        _refuse_scale("temperature", "above 0", settings.temperature)
    if settings.softcap != 0.0 and not LEAST <= settings.softcap <= MOST:
        _refuse_scale("softcap", "0 (none) or above", settings.softcap)
    if not 0.0 <= settings.label_smoothing <= 1.0:
        raise ValueError(f"`label_smoothing` must be in [0, 1], got {settings.label_smoothing}")
    if settings.gate_temperature != 0.0 and not LEAST <= settings.gate_temperature <= MOST:
        _refuse_scale("gate_temperature", "0 (a threshold) or above", settings.gate_temperature)
    if not 0.0 <= settings.p_min <= 1.0:
        raise ValueError(f"`p_min` must be a probability in [0, 1], got {settings.p_min}")
    return settings


def _numbers_of(settings: Settings) -> Settings:
    """Return the settings as Python's own numbers; a step may be a tensor. Most are so already."""
    if dynamo_compiling():
        return settings
    types = [*map(type, settings)]
    if _NUMBERS.issuperset(types) and types[3] is types[6] is types[7] is int:  # the three of _INTEGERS
        return settings
    values: list[Any] = []
    value: Any
    for name, value in zip(Settings._fields, settings, strict=True):
        if name == "step" and isinstance(value, Tensor):
            value = vetted("step", value)
            if value.dtype not in _STEPS or value.numel() != 1:
                raise TypeError(f"`step` must be an int or one int64 or int32 element, got {described(value)}")
            values.append(value if value.dtype is torch.int64 else value.long())
        elif isinstance(value, (torch.SymInt, torch.SymFloat)):
            values.append(value)
        else:
            values.append(integer(name, value) if name in _INTEGERS else number(name, value))
    return Settings(*values)
