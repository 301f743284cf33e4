"""Something that is switched on and off by hand, or on for a block."""

from __future__ import annotations

from typing import Any, TypeVar

S = TypeVar("S", bound="Switch")


class Switch:
    """Base of what changes a host between ``on`` and ``off``.

    ``on`` when it is on, and ``off`` when it is off, do nothing. As a context manager it leaves things as it found
    them: blocks may be nested, and a block inside ``on`` does not turn it off.
    """

    def __init__(self) -> None:
        self.is_on = False
        self._before: list[bool] = []  # for each block that was entered

    def on(self) -> None:
        """Change the host; nothing is changed where it raises."""
        if not self.is_on:
            self._turn_on()
            self.is_on = True

    def off(self) -> None:
        """Restore the host; nothing is changed where it raises."""
        if self.is_on:
            self._turn_off()
            self.is_on = False

    def _turn_on(self) -> None:
        raise NotImplementedError

    def _turn_off(self) -> None:
        raise NotImplementedError

    def __enter__(self: S) -> S:
        was_on = self.is_on
        self.on()
        self._before.append(was_on)
        return self

    def __exit__(self, *error: Any) -> None:
        if not self._before.pop():
            self.off()
