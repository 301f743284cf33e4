"""Numbers and values in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

DASH = "–"  # stands for a number that is not known


def is_finite(value: float | None) -> bool:
    """True for a number that can be shown."""
    return value is not None and math.isfinite(value)


def number(value: float | None, spec: str, scale: float = 1.0) -> str:
    """Format ``scale * value``; a dash where there is no number to show."""
    return format(scale * value, spec) if value is not None and math.isfinite(value) else DASH


def times(value: float | None) -> str:
    """Format a speed-up, such as 2.31×."""
    text = number(value, ".2f")
    return text if text == DASH else f"{text}×"


def points(value: float) -> str:
    """Format a difference of fractions in points; its minus is as wide as a plus."""
    return f"{100 * value:+.2f}".replace("-", "−")


def interval(low: float | None, high: float | None) -> str:
    """Format an interval of fractions in points."""
    return DASH if low is None or high is None else f"{points(low)} to {points(high)}"


def probability(p: float | None) -> str:
    """Format a p-value to three places."""
    return DASH if p is None else "< 0.001" if p < 0.0005 else f"{p:.3f}"


def mean(values: Sequence[float]) -> float:
    """Mean of at least one value; NaN and infinities pass through."""
    return sum(values) / len(values)


def join(words: Sequence[str]) -> str:
    """List words with commas and "and"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def sentence(text: str) -> str:
    """Begin with a capital letter."""
    return text[:1].upper() + text[1:]


def plain(value: Any) -> str:
    """Write out a value of a result: lists with commas, a dash for None."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    if value is None:
        return DASH
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def facts(result: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Title and (name, value) pairs of what a result has of settings and environment."""
    return [
        (title, [(key.replace("_", " "), plain(value)) for key, value in result[part].items()])
        for title, part in (("Settings", "settings"), ("Environment", "environment"))
        if part in result
    ]
