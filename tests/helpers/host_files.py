"""Single files of the real wheels of hosts whose pins forbid one environment, with stand-ins for what they import.

The wheels are in build/hosts, a folder each: ``make hosts``. Packages of a host are made without running their
``__init__``, so that a file brings in just what it names itself.
"""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

WHEELS = Path(__file__).parents[2] / "build" / "hosts"
NEEDS = ("tensordict", "pyvers", "cloudpickle")  # of verl; installed in the same way


class _Bare(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a host's files, and makes its packages empty but for their version."""

    def __init__(self, folder, package, version):
        self.folder, self.package, self.version = folder, package, version

    def find_spec(self, name, path=None, target=None):
        if not f"{name}.".startswith(f"{self.package}."):
            return None
        place = self.folder.joinpath(*name.split("."))
        if place.is_dir():
            spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
            spec.submodule_search_locations = [str(place)]
            return spec
        file = place.with_suffix(".py")
        return importlib.util.spec_from_file_location(name, file) if file.exists() else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        if module.__name__ == self.package:
            module.__version__ = self.version


def stub(name, **attributes):
    """A module in which everything can be found, and called; ``attributes`` are what matters."""
    module = MagicMock(name=name, **attributes)
    module.__spec__, module.__name__ = importlib.machinery.ModuleSpec(name, None), name
    return module


@contextlib.contextmanager
def host(distribution, package, stubs=()):
    """Make a host importable from its wheel inside the block, some modules replaced.

    ``stubs`` is a mapping of names to modules, or names of modules in which everything is found.
    """
    folder = WHEELS / distribution
    found = list(folder.glob(f"{distribution.replace('-', '_')}-*.dist-info"))
    if not found:
        pytest.skip(f"no wheel of {distribution} in build/hosts (make hosts)")
    version = re.match(rf"{distribution.replace('-', '_')}-(.+)\.dist-info", found[0].name)[1]
    stubs = dict(stubs) if hasattr(stubs, "items") else {name: stub(name) for name in stubs}
    before = dict(sys.modules)
    finder = _Bare(folder, package, version)
    sys.meta_path.insert(0, finder)
    needs = [str(WHEELS / name) for name in NEEDS]
    sys.path.extend(needs)
    sys.modules.update(stubs)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for need in needs:
            sys.path.remove(need)
        for name in [name for name in sys.modules if name not in before and _of(name, package, *stubs)]:
            del sys.modules[name]
        sys.modules.update({name: before[name] for name in stubs if name in before})


def _of(name, *packages):
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


class _Configurable:
    class Config:
        pass


def _registry():
    """A registry that returns what it registers."""
    registry = MagicMock()
    registry.register_module = lambda *_, **__: lambda kind: kind
    return registry


_ABSENT = dict.fromkeys((f"is_{name}_available" for name in ("apollo", "galore", "ray")), lambda *_: False)
_VERL = (
    "verl.models.transformers.monkey_patch", "verl.trainer.config", "verl.utils.activation_offload",
    "verl.utils.checkpoint.fsdp_checkpoint_manager", "verl.utils.debug", "verl.utils.device", "verl.utils.fsdp_utils",
    "verl.utils.model", "verl.utils.py_functional", "verl.utils.seqlen_balancing", "verl.utils.ulysses",
    "verl.workers.config", "verl.workers.utils.padding",
)  # fmt: skip
_TITAN = (
    "spmd_types", "torchtitan.distributed.spmd_types", "torchtitan.distributed.utils", "torchtitan.tools.logging",
)  # fmt: skip
_FACTORY = ("extras", "extras.logging", "extras.constants", "extras.misc", "hparams", "model")


def verl():
    return host("verl", "verl", _VERL)


def openrlhf():
    return host("openrlhf", "openrlhf", ("deepspeed",))


def torchtitan():
    config = stub("torchtitan.config", Configurable=_Configurable)
    return host("torchtitan", "torchtitan", {name: stub(name) for name in _TITAN} | {config.__name__: config})


def axolotl():
    return host("axolotl", "axolotl")


def llamafactory():
    stubs = {name: stub(name) for name in (f"llamafactory.{part}" for part in _FACTORY)}
    packages = stub("llamafactory.extras.packages", **_ABSENT)
    return host("llamafactory", "llamafactory", stubs | {packages.__name__: packages})


def mmseg():
    registry = stub("mmseg.registry", TASK_UTILS=_registry(), MODELS=_registry())
    engine = {name: stub(name) for name in ("mmengine", "mmengine.fileio")}
    return host("mmsegmentation", "mmseg", engine | {registry.__name__: registry})


_SWIFT = (
    "dataset", "rewards", "rl_core", "rl_core.advantage", "rl_core.data", "rl_core.grpo_algorithm", "sequence_parallel",
    "template", "rlhf_trainers.gkd_helpers", "rlhf_trainers.arguments",
)  # fmt: skip


def swift():
    """Its trainer takes methods off TRL's, so that TRL's is a stand-in; TRL's functions are its own."""
    utils = pytest.importorskip("trl").trainer.utils
    trainer = type("GRPOTrainer", (), {"__init__": lambda self: None, "log": lambda self: None})
    modules = {
        "trl": stub("trl", GRPOTrainer=trainer),
        **{name: stub(name) for name in ("trl.models", "trl.models.utils", "trl.trainer", "trl.trainer.grpo_trainer")},
        "trl.trainer.utils": stub(
            "trl.trainer.utils",
            selective_log_softmax=utils.selective_log_softmax, entropy_from_logits=utils.entropy_from_logits,
        ),
        **{name: stub(name) for name in (f"swift.{part}" for part in _SWIFT)},
        "swift.trainers": stub("swift.trainers", SwiftMixin=type("SwiftMixin", (), {})),
        "swift.utils": stub("swift.utils", is_swanlab_available=lambda: False, is_wandb_available=lambda: False),
        "swift.rlhf_trainers.rollout_mixin": stub(
            "swift.rlhf_trainers.rollout_mixin", RolloutTrainerMixin=type("RolloutTrainerMixin", (), {})
        ),
        "swift.rlhf_trainers.utils": stub("swift.rlhf_trainers.utils", profiling_decorator=lambda method: method),
    }  # fmt: skip
    return host("ms-swift", "swift", modules)
