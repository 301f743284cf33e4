"""Errors of users' models, losses, optimizers and functions, in one line with what these were given."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparse_training.errors import UserError, one_line
from sparse_training.rank_failures import is_of_a_lost_rank

# Of what does not fit what it is given. A file that is not there or a full memory says all by itself.
MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@contextmanager
def explained(say: Callable[[], str]) -> Iterator[None]:
    """Context of a call of the user's code: what does not fit is one line, and the cause of its traceback.

    Args:
        say: returns what could not be done, as of "the loss CrossEntropyLoss cannot take outputs [32, 10]".

    Raises:
        UserError: the code raised an error of ``MISFITS``.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except MISFITS as error:
        if is_of_a_lost_rank(error):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(last.filename)}:{last.lineno}"
        raise UserError(f"{say()}: {type(error).__name__}: {one_line(error)} ({place})") from error


def described(value: Any) -> str:
    """Describe a batch's part in a few words: shapes and dtypes of its tensors, names of its fields."""
    if isinstance(value, Tensor):
        shape = "nested" if value.is_nested else str(list(value.shape))
        return f"{shape} {str(value.dtype).removeprefix('torch.')}"
    name = type(value).__name__
    if isinstance(value, Mapping):
        return f"a {name} of {', '.join(f'{key} {described(part)}' for key, part in value.items())}"
    if isinstance(value, (tuple, list)):
        return f"a {name} of {', '.join(map(described, value[:3]))}{', ...' if len(value) > 3 else ''}"
    return f"a {name}"


def name_of(code: Any) -> str:
    """Name of a function, or of an object's class."""
    return str(getattr(code, "__name__", type(code).__name__))
