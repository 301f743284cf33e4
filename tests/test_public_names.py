"""Public names import alone, and importing the package itself is cheap."""

import json
import subprocess
import sys

import pytest

import sparse_training

# Each statement runs in a process of its own that has imported PyTorch and the kernels, and nothing of the package.
FORKING = """
import json, os, sys
import numpy, sparse_kernels, torch
failed = {}
for statement in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        try:
            assert not any(name.startswith("sparse_training") for name in sys.modules)
            exec(statement, {})
        except BaseException as error:
            print(f"{statement}: {type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed[statement] = True
sys.exit(bool(failed))
"""
PATHS = [
    "from sparse_training.criterion import Criterion",
    "from sparse_training.data import DATASETS, ImageData, Split, load_data",
    "from sparse_training.errors import UserError",
    "from sparse_training.gate import Gate",
    "from sparse_training.integrations.hugging_face import GatedTrainer",
    "from sparse_training.integrations.lightning import GatedModule",
    "from sparse_training.integrations.trl import serve",
    "from sparse_training.models import MODELS, build_model",
    "from sparse_training.trainer import SparseTrainer",
    "from sparse_training.callbacks import EarlyStopping, TensorBoard",
    "import sparse_training; sparse_training.nn.Compact; sparse_training.gate.Gate; sparse_training.trainer",
    "import sparse_training; sparse_training.data.load_data; sparse_training.models.build_model",
    "from sparse_training import *; import sparse_training as s; [globals()[n] for n in s.__all__]",
]


def run(*arguments):
    return subprocess.run([sys.executable, "-c", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_public_name_and_path_imports_alone():
    names = [f"from sparse_training import {name}" for name in sparse_training.__all__]
    done = run(FORKING, json.dumps([*names, *PATHS]))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_itself_imports_no_pytorch():
    done = run("import sys, sparse_training; print('torch' in sys.modules, 'SparseTrainer' in dir(sparse_training))")
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_a_name_that_is_absent_is_refused_in_one_line():
    with pytest.raises(AttributeError, match="module 'sparse_training' has no attribute 'Gait'"):
        sparse_training.Gait  # noqa: B018
    done = run("from sparse_training.policies import Policy")
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'sparse_training.policies'"
