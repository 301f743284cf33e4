"""The documentation builds without a warning, its Python blocks run, and it leaves no public name out."""

import importlib
import inspect
import os
import re
import subprocess
import sys

import fresh
import pytest
from pages import ROOT, blocks, names

DOCS = ROOT / "docs"
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if blocks(page) and page.name != "row_stats.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_python_blocks_run(page, monkeypatch, tmp_path):
    """In order and in one namespace, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    used = names()
    for number, code in enumerate(blocks(page), 1):
        exec(compile(code, f"{page.name}, block {number}", "exec"), used)


@pytest.mark.slow
def test_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", str(DOCS), str(tmp_path)]
    environment = {**os.environ, "SPARSE_DOCS_OFFLINE": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-5000:]
    page = (tmp_path / "reference" / "sparse_training.html").read_text()
    assert "sparse_training.SparseTrainer.fit" in page


@pytest.mark.parametrize("package", ["sparse_kernels", "sparse_training"])
def test_every_public_name_is_in_the_reference(package):
    module = __import__(package)
    page = (DOCS / "reference" / f"{package}.md").read_text()
    missing = [name for name in module.__all__ if not re.search(rf"\b{re.escape(name)}\b", page)]
    assert not missing


def documented(docstring, section):
    """Names of the entries of a section of a Google-style docstring."""
    match = re.search(rf"^ *{section}:\n(.*?)(?=^ *[A-Z][a-z]+:\n|\Z)", inspect.cleandoc(docstring), re.M | re.S)
    if match is None:
        return []
    return re.findall(r"^    \*{0,2}(\w[\w, *]*?)(?: \([^)]*\))?:(?: |$)", match[1], re.M)


PUBLIC = [
    f"{package}.{name}"
    for package in ("sparse_kernels", "sparse_training")
    for name in importlib.import_module(package).__all__
    if callable(getattr(importlib.import_module(package), name))
]


@pytest.mark.parametrize("name", PUBLIC)
def test_each_parameter_has_an_entry_of_its_own(name):
    """By its name in the signature; no entry is of something else."""
    package, _, attribute = name.rpartition(".")
    value = getattr(importlib.import_module(package), attribute)
    assert value.__doc__
    if isinstance(value, type) and issubclass(value, (tuple, Exception)):
        return  # fields and a message
    parameters = [
        parameter.name
        for parameter in inspect.signature(value).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    docstring = value.__doc__ if not isinstance(value, type) else f"{value.__doc__}\n"
    entries = documented(docstring, "Args") or documented(docstring, "Attributes")
    if entries or len(parameters) > 2:
        assert entries == parameters


def test_every_page_is_reachable():
    listed = "\n".join(page.read_text() for page in DOCS.rglob("index.md"))
    for page in DOCS.rglob("*.md"):
        if page.name != "index.md":
            assert re.search(rf"^(\w+/)?{page.stem}$", listed, re.MULTILINE), page


def test_files_that_pages_name_are_there():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")):
        text = page.read_text()
        named = re.findall(r"`((?:csrc|sparse_kernels|python_api|benchmarks|examples|tests|docs)/[\w/.-]+\.\w+)`", text)
        linked = [link for link in re.findall(r"\]\(([^)#:\s]+)[^)]*\)", text) if "://" not in link]
        for path in named:
            assert (ROOT / path).exists(), f"{page.name}: {path}"
        for path in linked:
            assert (page.parent / path).exists(), f"{page.name}: {path}"


def test_every_make_target_is_documented():
    makefile = (ROOT / "Makefile").read_text()
    documented = (DOCS / "how_to" / "command_line.md").read_text()
    targets = re.findall(r"^([a-z][a-z -]*):(?!=)[^#\n]*##", makefile, re.MULTILINE)
    assert "test" in targets
    for target in " ".join(targets).split():
        assert f"`make {target}`" in documented, target


COMMANDS = sorted(
    {
        line.removeprefix("$ ")
        for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md"))
        for block in blocks(page, "console")
        for line in block.splitlines()
        if line.startswith("$ sparse-train ")
    }
)


@pytest.mark.parametrize("command", sorted({line.split()[1] for line in COMMANDS}))
def test_command_lines_name_options_that_there_are(command):
    run = fresh.run("-m", "sparse_training", command, "--help")
    assert run.returncode == 0, run.stderr
    for line in COMMANDS:
        if line.split()[1] == command:
            for option in re.findall(r"--[\w-]+", line):
                assert re.search(rf"{option}\b", run.stdout), line
