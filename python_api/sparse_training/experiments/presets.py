"""Recorded designs of a study, by name: the options of ``sparse-train study`` that they stand for, and their plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparse_training.errors import UserError
from sparse_training.experiments.design import AGAIN, BASELINE, RANDOM, Plan
from sparse_training.experiments.tasks import TASKS
from sparse_training.gate.presets import ALONE

UNBIASED = (BASELINE, RANDOM, AGAIN, "infobatch")
LADDER = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0)


@dataclass(frozen=True)
class Preset:
    """A design that can be repeated by its name.

    Attributes:
        options: values of the command's options, by their names in Python; what the user gives goes before them.
        plans: settings of single tasks.
    """

    options: Mapping[str, Any]
    plans: Mapping[str, Plan]


# Six tasks of images and one of text by 8 methods, one of two classes by 6, one of a table by 4, and the ladder by 3.
FULL = Preset(
    {
        "data": "fashion-mnist",
        "rows": 20_000,
        "model": "cnn-bn",
        "batch_size": 128,
        "lr": 0.006,
        "amp": "bfloat16",
        "seconds": 10.0,
        "evaluations": 4,
        "seeds": "5",
        "threads": 1,
        "tasks": ",".join(TASKS),
    },
    {
        # Two classes are too few to tell wrong labels.
        "imbalanced": Plan(methods=(*UNBIASED, "adaptive+deduplicate", "adaptive+balance")),
        # The switches of adaptive are for classes: on values they are not defined.
        "tabular": Plan(methods=UNBIASED, lr=0.002),
        "text": Plan(seconds=8.0),
        "long": Plan(methods=(BASELINE, RANDOM, "infobatch"), fractions=LADDER, seconds=36.0, evaluations=8),
    },
)
ABLATED = ("five", *ALONE, "none")
# The gate by each term alone, by all, by none and by its default, beside random subsets: three tasks by 13 methods.
SIGNIFICANCE = Preset(
    {
        **FULL.options,
        "tasks": "clean,noise,longtail",
        "methods": ",".join((BASELINE, RANDOM, AGAIN, "gate", *(f"gate:{name}" for name in ABLATED))),
        "seconds": 4.0,
        "evaluations": 2,
        "seeds": "3",
    },
    {},
)  # fmt: skip
PRESETS = {"full": FULL, "significance": SIGNIFICANCE}


def preset(name: str) -> Preset:
    """Find a preset.

    Raises:
        UserError: an unknown name.
    """
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown; use one of {', '.join(PRESETS)}")
    return PRESETS[name]
