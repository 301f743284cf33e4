"""Parses each C++ and CUDA header of csrc alone with the host compiler, to show that it needs nothing before it.

Run by ``make headers`` and ``make lint``. The compiler's options are those of csrc/compile_flags.txt, which clangd
reads too; tests/cuda_on_cpu takes CUDA's place. Each header is included twice, which fails without an include guard.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
X86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
ARM64 = platform.machine().lower() in ("aarch64", "arm64")


def headers(folder: Path = CSRC) -> list[Path]:
    """All headers below the folder that this processor's compiler can parse."""
    found = sorted(path for pattern in ("*.h", "*.cuh") for path in folder.rglob(pattern))
    foreign = ("vec_neon",) if X86 else ("vec_avx",) if ARM64 else ("vec_avx", "vec_neon")
    return [path for path in found if not path.name.startswith(foreign)]


def options() -> list[str]:
    """The compiler's options, to be used inside csrc."""
    listed = (CSRC / "compile_flags.txt").read_text().split()
    if not X86:
        listed = [option for option in listed if not option.startswith("-m") and "X86" not in option]
    return [*listed, "-isystem", sysconfig.get_path("include")]


def parse(header: Path) -> str:
    """The compiler's messages about the header; empty where it stands alone."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    done = subprocess.run(
        [*compiler, *options(), "-Werror", "-fsyntax-only", "-"], cwd=CSRC, input=f'#include "{header}"\n' * 2,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stderr if done.returncode else ""


def main() -> int:
    """Prints the messages; the exit status is 1 where there are any."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        messages = [message for message in pool.map(parse, headers()) if message]
    print("".join(messages), end="", file=sys.stderr)
    return int(bool(messages))


if __name__ == "__main__":
    sys.exit(main())
