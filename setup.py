"""Builds the compiled extension with ninja: C++ for the CPU, each instruction set with its own flags.

SPARSE_KERNELS_BUILD chooses what is built:
    auto  (default) what the tools at hand allow; with no C++ compiler the install still succeeds,
          says so, and the pure-PyTorch reference serves
    cpu   the CPU part, or an error
    cuda  the CUDA part too, or an error; this version has no CUDA sources, so an error
    none  nothing: pure Python

No PyTorch takes part, so one build serves every PyTorch.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD_INFO = "_build_info.py"
MODES = ("auto", "cpu", "cuda", "none")
X86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
# One file for each instruction set, so that no instruction can leak into code that runs everywhere.
FILE_FLAGS = {
    "compact_avx2.cpp": "-mavx2 -mbmi -mpopcnt",
    "compact_avx512.cpp": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mpopcnt",
    "row_stats_avx2.cpp": "-mavx2 -mfma -mf16c",
    # GCC 12's own avx512fintrin.h trips the warning.
    "row_stats_avx512.cpp": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"
    " -Wno-uninitialized -Wno-maybe-uninitialized",
}
# No -ffast-math: NaN and -inf must mean what they mean.
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra"


class NoCompiler(Exception):
    """There is nothing to compile with; the message says what was looked for."""


def mode() -> str:
    value = os.environ.get("SPARSE_KERNELS_BUILD", "auto")
    if value not in MODES:
        sys.exit(f"error: SPARSE_KERNELS_BUILD={value!r}; wanted one of: {', '.join(MODES)}")
    return value


def find_compiler() -> str:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in wanted:
        words = shlex.split(name)
        if words and shutil.which(words[0]):
            return name
    raise NoCompiler(f"no C++ compiler found (tried {', '.join(wanted)})")


def find_ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise NoCompiler("ninja was not found") from None
        return found


def openmp_flag(compiler: str) -> str:
    """``-fopenmp`` where the compiler and its runtime have it, else nothing: one thread."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "check.cpp"
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [*shlex.split(compiler), "-fopenmp", str(source), "-o", str(Path(folder) / "check")]
        done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode == 0:
        return "-fopenmp"
    print("warning: no OpenMP: the C++ backend will use one thread", file=sys.stderr)
    return ""


class NinjaBuild(build_ext):  # type: ignore[misc]  # setuptools has no types
    """Writes a build.ninja, runs it, and records beside the package what was built and why not."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        reason = ""
        try:
            self.compile(ext, target)
        except (NoCompiler, subprocess.CalledProcessError) as error:
            if mode() != "auto":
                raise SystemExit(f"error: SPARSE_KERNELS_BUILD={mode()}: {error}") from error
            reason = str(error) if isinstance(error, NoCompiler) else "compilation failed"
            print(
                f"\n{'*' * 78}\nWARNING: the C++ backend was not built: {reason}.\n"
                f"sparse-kernels will run on its pure-PyTorch reference, which is slower.\n{'*' * 78}\n",
                file=sys.stderr,
            )
        (target.parent / BUILD_INFO).write_text(
            '"""Written by setup.py: why the C++ backend is not there; empty where it is."""\n\n'
            f"CPP_MISSING = {reason!r}\n"
        )

    def copy_extensions_to_source(self) -> None:
        """An editable install takes the extension to the source tree: its record goes along."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib) / "sparse_kernels" / BUILD_INFO
        shutil.copy(built, ROOT / "sparse_kernels" / BUILD_INFO)

    def compile(self, ext: Extension, target: Path) -> None:
        import pybind11

        if mode() == "cuda":
            raise NoCompiler("this version has no CUDA sources")
        compiler, ninja = find_compiler(), find_ninja()
        openmp = openmp_flag(compiler)
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        includes = [sysconfig.get_path("include"), pybind11.get_include()]
        flags = f"{FLAGS} {openmp} {os.environ.get('CXXFLAGS', '')}"
        flags += "".join(f" -isystem {shlex.quote(path)}" for path in includes)
        if X86:
            flags += " -DSPARSE_KERNELS_X86"
        link = "-shared -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
        lines = [
            "ninja_required_version = 1.5",
            f"flags = {flags}",
            "rule cxx",
            f"  command = {compiler} -MD -MF $out.d $flags $isa -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {compiler} {link} {openmp} $in -o $out {os.environ.get('LDFLAGS', '')}",
        ]
        objects = []
        for source in ext.sources:
            path = ROOT / source
            isa = FILE_FLAGS.get(path.name, "")
            if isa and not X86:
                continue
            obj = folder / (source.replace("/", "_") + ".o")
            objects.append(escape(obj))
            lines += [f"build {escape(obj)}: cxx {escape(path)}", f"  isa = {isa}"]
        lines += [f"build {escape(target)}: link {' '.join(objects)}", ""]
        (folder / "build.ninja").write_text("\n".join(lines))
        subprocess.run([ninja, "-C", str(folder)], check=True)


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
setup(
    ext_modules=[] if mode() == "none" else [Extension("sparse_kernels._cpp", sources, optional=True)],
    cmdclass={"build_ext": NinjaBuild},
)
