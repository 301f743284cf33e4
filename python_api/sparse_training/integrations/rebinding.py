"""Names of another package that stand for functions of ours between ``on`` and ``off``."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from sparse_training.errors import UserError
from sparse_training.integrations.switch import Switch


class Rebinding(Switch):
    """Binds names of a host package to functions of ours, and back; imports nothing of the host before ``on``.

    A name is rebound in every module of the host that holds the same object, whatever it is called there. Modules that
    are imported later get ours too, and ``off`` takes it from them again. The whole process is concerned.

    ``on`` raises ``UserError`` where the host is not installed, has another version, or lacks one of the names; ``off``
    where someone else has bound one of them since. Nothing is changed then.

    Example:
        >>> head = Rebinding("trl", ("1.16", "1.17"), {"trl.trainer.utils:selective_log_softmax": ours})
        >>> with head:
        ...     trainer.train()

    Args:
        host: name of the distribution, as pip knows it.
        versions: the first version that is served and the first after it that is not.
        replacements: by "module:name", or "module:Class.name", what it is to be bound to; no two the same object.
        only_there: those of ``replacements`` that other modules of the host keep as they are. Default: none.
        packages: packages whose modules are searched for the names; the first has the version. Default: the host's
            name.
    """

    def __init__(
        self, host: str, versions: tuple[str, str], replacements: Mapping[str, Any], *,
        only_there: Collection[str] = (), packages: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.host, self.versions = host, versions
        self.replacements, self.packages = dict(replacements), packages or (host,)
        self._only_there = {*only_there, *(place for place in self.replacements if "." in place.partition(":")[2])}
        self._originals: dict[str, Any] = {}
        self._places: list[tuple[Any, str, str]] = []  # owner, name there, key of the replacement

    def _turn_on(self) -> None:
        version = self._checked_version()
        owners = {place: self._owner(place, version) for place in self.replacements}
        self._originals = {place: vars(owner)[name] for place, (owner, name) in owners.items()}
        self._places = [
            *self._holders(self._originals),
            *((*owners[place], place) for place in self._only_there),
        ]
        for owner, name, place in self._places:
            setattr(owner, name, self.replacements[place])

    def _turn_off(self) -> None:
        for owner, name, place in self._places:
            if vars(owner).get(name) is not self.replacements[place]:
                raise UserError(
                    f"{owner.__name__}.{name} must be what {self.host}'s rebinding made it, got "
                    f"{vars(owner).get(name)!r}; undo what was done to it since, then call off() again"
                )
        for owner, name, place in {*self._places, *self._holders(self.replacements)}:
            setattr(owner, name, self._originals[place])

    def original(self, place: str) -> Any:
        """Return what a name was bound to before, for a replacement that hands a call on; None before ``on``.

        Args:
            place: one of ``replacements``.
        """
        return self._originals.get(place)

    def _checked_version(self) -> str:
        first, after = self.versions
        served = f"{self.host} from {first} up to, but not including, {after}"
        try:
            package = importlib.import_module(self.packages[0])
            version = getattr(package, "__version__", None) or importlib.metadata.version(self.host)
        except ImportError as error:  # PackageNotFoundError is one
            raise UserError(f"this needs {served}, which cannot be imported: {error}") from error
        if not _release(first) <= _release(version) < _release(after):
            raise UserError(f"this needs {served}, got {version}")
        return str(version)

    def _owner(self, place: str, version: str) -> tuple[Any, str]:
        """Return the module or class that holds a name, and the last part of the name."""
        module, _, path = place.partition(":")
        *classes, name = path.split(".")
        try:
            owner = functools.reduce(getattr, classes, importlib.import_module(module))
        except (ImportError, AttributeError) as error:
            raise UserError(f"{self.host} {version} must have {place} to be rebound, got: {error}") from error
        if name not in vars(owner):
            raise UserError(f"{self.host} {version} must have {place} to be rebound, but has no such name")
        return owner, name

    def _holders(self, objects: Mapping[str, Any]) -> Iterator[tuple[Any, str, str]]:
        """Find the modules of the host that hold one of some objects by name: module, name there, key."""
        objects = {place: held for place, held in objects.items() if place not in self._only_there}
        for module_name, module in list(sys.modules.items()):
            if module is None or not any(f"{module_name}.".startswith(f"{package}.") for package in self.packages):
                continue
            for name, value in list(vars(module).items()):
                for place, held in objects.items():
                    if value is held:
                        yield module, name, place


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with, trailing zeros left out: "1.16.0rc1" is (1, 16)."""
    found = re.match(r"v?(\d+(?:\.\d+)*)", version)
    numbers = [int(part) for part in found[1].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
