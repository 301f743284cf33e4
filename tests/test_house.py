"""The house rules that a tool can hold: sizes of files and functions, and how docstrings begin."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = [*ROOT.glob("sparse_kernels/**/*.py"), *ROOT.glob("python_api/sparse_training/**/*.py")]
EVERYTHING = [*PACKAGES, *ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py"), ROOT / "setup.py"]
FILE, FUNCTION, TRITON_KERNEL = 450, 80, 150


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("path", EVERYTHING, ids=name)
def test_a_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= FILE


@pytest.mark.parametrize("path", EVERYTHING, ids=name)
def test_a_function_fits_on_a_screen_or_two(path):
    for node in functions(path):
        jitted = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        docstring = ast.get_docstring(node, clean=False)
        lines = node.end_lineno - node.lineno + 1
        if docstring and len(node.args.args) + len(node.args.kwonlyargs) > 8:
            lines -= len(docstring.splitlines())  # one entry for each of many parameters is wanted
        assert lines <= (TRITON_KERNEL if jitted else FUNCTION), f"{node.name}: {lines} lines"


@pytest.mark.parametrize("path", PACKAGES, ids=name)
def test_docstrings_begin_with_a_verb_or_a_noun(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            first = (ast.get_docstring(node) or "").split(" ")[0]
            where = getattr(node, "name", path.name)
            assert first not in ("What", "Whether", "Told", "Of", "Where"), f"{where}: {first}"


@pytest.mark.parametrize("path", PACKAGES, ids=name)
def test_messages_say_must_be_and_got(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise):
            assert "wanted" not in ast.unparse(node), f"line {node.lineno}: {ast.unparse(node)[:100]}"
