"""Build of the compiled extensions with ninja: C++ for the CPU, each instruction set with its own flags, and CUDA.

SPARSE_KERNELS_BUILD chooses what is built:
    auto  (default) what the tools at hand allow: CUDA where nvcc is found (CUDA_HOME, then PATH). With no C++
          compiler the install still succeeds, says so, and the pure-PyTorch reference serves
    cpu   the CPU part, or an error
    cuda  the CUDA part too, or an error
    none  nothing: pure Python

TORCH_CUDA_ARCH_LIST ("8.0 9.0+PTX") chooses the CUDA architectures; by default the first of every major from 7.5 to
12.0 that this nvcc knows (its machine code runs on the later ones of that major), and PTX of the newest.

No PyTorch takes part, so one build serves every PyTorch. Nor does a GPU or a driver: the CUDA runtime is linked
statically, into a module of its own, so that the C++ one needs nothing of it.
"""

from __future__ import annotations

import os
import platform
import re
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
INCLUDE = ROOT / "csrc" / "include"
BUILD_INFO = "_build_info.py"
CPP, CUDA = "sparse_kernels._cpp", "sparse_kernels._cuda"
MODES = ("auto", "cpu", "cuda", "none")
X86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
ARM64 = platform.machine().lower() in ("aarch64", "arm64")
# One file for each instruction set, so that no instruction can leak into code that runs everywhere.
FILE_FLAGS = {
    "compact_avx2.cpp": "-mavx2 -mbmi -mpopcnt",
    "compact_avx512.cpp": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mpopcnt",
    "row_stats_avx2.cpp": "-mavx2 -mfma -mf16c",
    # GCC 12's own avx512fintrin.h trips the warning.
    "row_stats_avx512.cpp": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"
    " -Wno-uninitialized -Wno-maybe-uninitialized",
}
NEON_FILES = ("compact_neon.cpp", "row_stats_neon.cpp")  # of aarch64, which has NEON by default
# A product and a sum that the sources do not fuse are rounded twice, as where a processor cannot fuse them.
NEON_FLAGS = "-DSPARSE_KERNELS_NEON -ffp-contract=off"
# No -ffast-math: NaN and -inf must mean what they mean.
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra"


class NoCompiler(Exception):
    """Raised if there is nothing to compile with; the message says what was looked for."""


def mode() -> str:
    value = os.environ.get("SPARSE_KERNELS_BUILD", "auto")
    if value not in MODES:
        sys.exit(f"error: SPARSE_KERNELS_BUILD must be one of {', '.join(MODES)}; got {value!r}")
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
    """Return ``-fopenmp`` if the compiler and its runtime have it, else nothing: one thread."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "check.cpp"
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [*shlex.split(compiler), "-fopenmp", str(source), "-o", str(Path(folder) / "check")]
        done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode == 0:
        return "-fopenmp"
    print("warning: no OpenMP: the C++ backend will use one thread", file=sys.stderr)
    return ""


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)
    if found is None:
        raise NoCompiler(f"nvcc was not found ({'in ' + home + '/bin: CUDA_HOME' if home else 'CUDA_HOME, PATH'})")
    return found


def known_architectures(nvcc: str) -> list[tuple[int, int]]:
    """Return (major, minor) of each architecture that this nvcc knows, ascending; proves that it runs."""
    try:
        command = [nvcc, "--list-gpu-arch"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NoCompiler(f"{nvcc} does not run: {error}") from error
    return sorted((int(major), int(minor)) for major, minor in re.findall(r"compute_(\d+)(\d)\b", listed))


def architectures(nvcc: str) -> list[str]:
    """Return the architectures to compile for, in TORCH_CUDA_ARCH_LIST's notation, such as 8.0, 9.0a or 12.0+PTX."""
    asked = re.split(r"[\s;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    known = known_architectures(nvcc)
    if asked != [""]:
        for name in asked:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
                raise NoCompiler(f"TORCH_CUDA_ARCH_LIST must hold numbers, such as 8.0 or 9.0+PTX; got {name!r}")
        return asked
    wanted = [arch for arch in known if (7, 5) <= arch <= (12, 0)]
    first = sorted({major: (major, minor) for major, minor in reversed(wanted)}.values())
    if not first:
        raise NoCompiler(f"{nvcc} knows no architecture from 7.5 to 12.0")
    names = [f"{major}.{minor}" for major, minor in first]
    return [*names[:-1], names[-1] + "+PTX"]


def gencode(names: list[str]) -> str:
    """Return nvcc's options for these architectures."""
    options = []
    for name in names:
        number = name.removesuffix("+PTX").replace(".", "")
        options.append(f"-gencode arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            options.append(f"-gencode arch=compute_{number},code=compute_{number}")
    return " ".join(options)


class NinjaBuild(build_ext):  # type: ignore[misc]  # setuptools has no types
    """Write a build.ninja for each extension, run it, and record beside the package what was not built and why."""

    def build_extensions(self) -> None:
        self.missing = {CPP: "", CUDA: f"SPARSE_KERNELS_BUILD={mode()}"}
        super().build_extensions()
        folder = Path(self.get_ext_fullpath(CPP)).resolve().parent
        (folder / BUILD_INFO).write_text(
            '"""Written by setup.py: the reason why an extension is missing; empty if it is not."""\n\n'
            f"CPP_MISSING = {self.missing[CPP]!r}\nCUDA_MISSING = {self.missing[CUDA]!r}\n"
        )

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        reason = ""
        try:
            (self.compile_cuda if ext.name == CUDA else self.compile)(ext, target)
        except (NoCompiler, subprocess.CalledProcessError) as error:
            if mode() != "auto":
                raise SystemExit(f"error: SPARSE_KERNELS_BUILD={mode()}: {error}") from error
            reason = str(error) if isinstance(error, NoCompiler) else "compilation failed"
            self.warn_of(ext, reason, not isinstance(error, NoCompiler))
        self.missing[ext.name] = reason

    def warn_of(self, ext: Extension, reason: str, failed: bool) -> None:
        if ext.name == CUDA and not failed:  # most machines have no nvcc
            print(f"The CUDA backend is not built: {reason}.", file=sys.stderr)
            return
        name = "CUDA" if ext.name == CUDA else "C++"
        print(
            f"\n{'*' * 78}\nWARNING: the {name} backend was not built: {reason}.\n"
            f"sparse-kernels will run on its pure-PyTorch reference, which is slower.\n{'*' * 78}\n",
            file=sys.stderr,
        )

    def copy_extensions_to_source(self) -> None:
        """Copy the record along with the extensions, which an editable install takes to the source tree."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib) / "sparse_kernels" / BUILD_INFO
        shutil.copy(built, ROOT / "sparse_kernels" / BUILD_INFO)

    def compile(self, ext: Extension, target: Path) -> None:
        import pybind11

        compiler, ninja = find_compiler(), find_ninja()
        openmp = openmp_flag(compiler)
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        includes = [sysconfig.get_path("include"), pybind11.get_include()]
        flags = f"{FLAGS} {openmp} {os.environ.get('CXXFLAGS', '')} -I{shlex.quote(str(INCLUDE))}"
        flags += "".join(f" -isystem {shlex.quote(path)}" for path in includes)
        if X86:
            flags += " -DSPARSE_KERNELS_X86"
        if ARM64:
            flags += f" {NEON_FLAGS}"
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
            if (isa and not X86) or (path.name in NEON_FILES and not ARM64):
                continue
            obj = folder / (source.replace("/", "_") + ".o")
            objects.append(escape(obj))
            lines += [f"build {escape(obj)}: cxx {escape(path)}", f"  isa = {isa}"]
        lines += [f"build {escape(target)}: link {' '.join(objects)}", ""]
        run_ninja(ninja, folder, lines)

    def compile_cuda(self, ext: Extension, target: Path) -> None:
        import pybind11

        compiler, ninja, nvcc = find_compiler(), find_ninja(), find_nvcc()
        names = architectures(nvcc)
        folder = Path(self.build_temp).resolve() / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        include = f"-I{shlex.quote(str(INCLUDE))}"
        flags = f"-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra {include}"
        flags += f" {os.environ.get('CXXFLAGS', '')} '-DSPARSE_KERNELS_ARCHITECTURES=\"{' '.join(names)}\"'"
        flags += "".join(f" -isystem {shlex.quote(p)}" for p in (sysconfig.get_path("include"), pybind11.get_include()))
        host = f"{shlex.quote(nvcc)} -ccbin {shlex.quote(shlex.split(compiler)[0])}"
        lines = [
            "ninja_required_version = 1.5",
            f"flags = {flags}",
            "rule cxx",
            f"  command = {compiler} -MD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule nvcc",
            f"  command = {host} -std=c++17 -O3 --threads 2 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"
            f" {include} {gencode(names)} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            # PyTorch's own runtime is in the global scope: exported, ours would be bound to its functions.
            "rule link",
            f"  command = {host} -shared -cudart static -Xlinker --exclude-libs=ALL $in -o $out",
        ]
        objects = []
        for source in ext.sources:
            obj = folder / (source.replace("/", "_") + ".o")
            objects.append(escape(obj))
            lines.append(f"build {escape(obj)}: {'nvcc' if source.endswith('.cu') else 'cxx'} {escape(ROOT / source)}")
        lines += [f"build {escape(target)}: link {' '.join(objects)}", ""]
        run_ninja(ninja, folder, lines)


def run_ninja(ninja: str, folder: Path, lines: list[str]) -> None:
    (folder / "build.ninja").write_text("\n".join(lines))
    subprocess.run([ninja, "-C", str(folder)], check=True)


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


extensions = {
    CPP: Extension(CPP, sources("bindings/cpu_module.cpp", "bindings/direct.cpp", "cpu/*.cpp"), optional=True),
    CUDA: Extension(CUDA, sources("bindings/cuda_module.cpp", "cuda/*.cu"), optional=True),
}
built = {"auto": (CPP, CUDA), "cuda": (CPP, CUDA), "cpu": (CPP,), "none": ()}
setup(ext_modules=[extensions[name] for name in built[mode()]], cmdclass={"build_ext": NinjaBuild})
