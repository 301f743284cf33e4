"""Everything that is to be done where there is a GPU, in one command of 12 minutes, without a network.

    python benchmarks/gpu.py                            all parts, in order of worth
    python benchmarks/gpu.py build check bench:300      those parts; bench stops after 300 s
    python benchmarks/gpu.py --resume                   what an earlier run of these sources did not finish
    python benchmarks/gpu.py bench --only compact       the rows whose name holds that, a regular expression
    python benchmarks/gpu.py bench --missing            the rows that the record does not have yet
    python benchmarks/gpu.py --wheels DIR               liger-kernel, quack-kernels, trl from a folder, to compare with
    python benchmarks/gpu.py --device cpu --small       every line of this, without a GPU and without a figure

Parts, each with its seconds: see PARTS. Each is a process of its own, so that one that dies leaves the others, and all
of them end within --seconds. Rows are written to benchmarks/results/<device>-<date>.json as they are measured; a row
measured again replaces the old one.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "benchmarks"
LOST = 75  # exit code of a process whose device no longer answers
Outcome = tuple[bool, str]  # whether it went well, and a line about it


def environment(options: argparse.Namespace, **more: str) -> dict[str, str]:
    """This tree first on the path, then what the wheels were unpacked to."""
    path = [str(ROOT), str(ROOT / "python_api"), str(HERE), *([str(options.site)] if options.site else [])]
    path += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", **more}


def run(options: argparse.Namespace, command: list[str], **more: str) -> int:
    """The command's exit code; 124 where it ran past what is left of its part's time."""
    print("$", " ".join(command), flush=True)
    process = subprocess.Popen(command, cwd=ROOT, env=environment(options, **more), start_new_session=True)
    try:
        return process.wait(max(1.0, options.until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return 124
    finally:  # with whatever it started, such as a compiler's workers
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def said(code: int) -> str:
    return "ran out of its time" if code == 124 else f"exit code {code}"


def build(options: argparse.Namespace) -> Outcome:
    """The extension, in place; only what changed is compiled."""
    code = run(options, [sys.executable, "setup.py", "-q", "build_ext", "--inplace"])
    run(options, [sys.executable, "-m", "sparse_kernels"])
    return code == 0, "built" if code == 0 else said(code)


def check(options: argparse.Namespace) -> Outcome:
    """The self-check in full, whose verdicts later runs find; then on fresh inputs, whose verdicts nobody keeps."""
    command = [sys.executable, "-m", "sparse_kernels", "check", "--device", options.device]
    codes = [run(options, [*command, *(["--quick"] if options.small else [])])]
    if not options.small:
        seed = str(random.SystemRandom().randrange(2**31))
        with tempfile.TemporaryDirectory() as folder:
            codes.append(run(options, [*command, "--quick", "--seed", seed], SPARSE_KERNELS_CACHE=folder))
    code = next((code for code in codes if code), 0)
    return code == 0, "agrees with the float64 reference" if code == 0 else said(code)


def pytest(options: argparse.Namespace, *arguments: str) -> Outcome:
    """The tests, with the Triton kernels compiled instead of interpreted."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    code = run(options, [*command, *arguments], TRITON_INTERPRET="0")
    none = 5  # pytest's code for having collected nothing
    return code in (0, none), "passed" if not code else "none" if code == none else said(code)


def tests(options: argparse.Namespace) -> Outcome:
    """What is marked gpu."""
    return pytest(options, "-m", "gpu", "tests")


def suite(options: argparse.Namespace) -> Outcome:
    """The kernels' suite, compiled."""
    return pytest(options, "tests/kernels") if options.device == "cuda" else (True, "left out: no GPU")


def sanitize(options: argparse.Namespace) -> Outcome:
    """compute-sanitizer over one or two launches of each kernel."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None or options.device != "cuda":
        return True, "left out: " + ("no compute-sanitizer" if tool is None else "no GPU")
    found = {}
    for kind in ("memcheck", "racecheck", "synccheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "99", "--print-limit", "20"]
        command += [sys.executable, "-m", "sparse_kernels", "check", "--quick"]
        # Without its caching, PyTorch's allocations end where the tensors do.
        with tempfile.TemporaryDirectory() as folder:  # for verdicts that nobody keeps
            more = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "SPARSE_KERNELS_CACHE": folder}
            found[kind] = run(options, command, **more)
    return not any(found.values()), ", ".join(f"{k}: {said(c) if c else 'clean'}" for k, c in found.items())


def bench(options: argparse.Namespace, only: str = "") -> Outcome:
    """The rows of gpu_cases.py and gpu_steps.py that this run has not begun, after a lost device in a new process."""
    code, before = LOST, len(options.begun.read_text().split())
    while code == LOST:
        arguments = [*options.arguments, "--only", only or options.only]
        code = run(options, [sys.executable, __file__, "--rows", str(options.begun), *arguments])
    rows = len(options.begun.read_text().split()) - before
    return code == 0, f"{rows} rows" + (f", {said(code)}" if code else "")


def rows(options: argparse.Namespace) -> int:
    """The process that measures: one row after the other, each recorded at once."""
    import gpu_bench
    import gpu_cases  # noqa: F401  imported for the cases that it registers
    import gpu_head  # noqa: F401
    import gpu_sparse_attention  # noqa: F401
    import gpu_steps  # noqa: F401  after the others: rows are measured in this order
    import timing
    import torch

    device = torch.device(options.device)
    machine = describe(device)
    path = options.out or timing.record_path(machine["device"])
    present = {row["case"] for row in json.loads(path.read_text())["rows"] if row["ratios"]} if path.exists() else set()
    begun = options.rows.read_text().split()
    names = [name for name in gpu_bench.CASES if re.search(options.only, name) and name not in begun]
    names = [name for name in names if not (options.missing and name in present)]
    setting = gpu_bench.Bench(device, options.small)
    for name in names:
        with options.rows.open("a") as file:
            print(name, file=file)
        lost = False
        began = time.monotonic()
        try:
            row = gpu_bench.run(setting, name)
        except gpu_bench.Lost as error:
            row, lost = error.row, True
        if row.ratios or name not in present:  # what failed now does not replace what was once measured
            timing.write_record(path, machine, [row])
        print(*row.lines(), f"    ({time.monotonic() - began:.0f} s)", sep="\n", flush=True)
        if lost:
            return LOST
    return 0


def describe(device: Any) -> dict[str, Any]:
    """Device, clocks, driver and versions."""
    import peers
    import torch

    import sparse_kernels

    found: dict[str, Any] = {
        "device": "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "sparse_kernels": sparse_kernels.__version__,
        "peers": peers.versions(),
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name().lower().replace(" ", "-")
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
        try:
            values = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split(", ")
            found |= dict(zip(query.split(","), values, strict=True))
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            found["driver_version"] = f"unknown: {error}"
    return found


def unpack(wheels: Path, target: Path) -> None:
    """Install every wheel of the folder beside everything else; nothing is fetched."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
    ]
    subprocess.run([*command, "--target", str(target), *map(str, sorted(wheels.glob("*.whl")))], check=True)


def table(path: Path) -> list[str]:
    """The record as a few short lines: what is wanted and what was found."""
    lines = []
    for row in json.loads(path.read_text())["rows"]:
        ours = row["seconds"].get("ours", {}).get("p50")
        reason = next((f"{k}: {v}" for k, v in row["notes"].items() if k in ("not served", "left out", "failed")), "")
        time_ = f"{1e6 * ours:10.1f} us" if ours else f"{'-':>13}"
        wanted = [
            f"{name} {row['ratios'][name]:.2f}{'' if row['ratios'][name] >= aim else ' MISSED'} (>= {aim:g})"
            for name, aim in row["targets"].items()
            if name in row["ratios"]
        ]
        lines.append(f"{row['case']:40}{time_}  {', '.join(wanted) or str(reason)[:90]}")
    return lines


class Part(NamedTuple):
    """A part and the most seconds that it may take."""

    seconds: int
    run: Callable[[argparse.Namespace], Outcome]
    what: str


# In order of worth; together they take 12 minutes at most.
PARTS = {
    "build": Part(180, build, "the extension, with the compiler and nvcc at hand"),
    "check": Part(90, check, "the kernels against the float64 reference, and their speed beside a copy's"),
    "row": Part(60, functools.partial(bench, only="^gate_rows-bfloat16-8192x151936$"), "the row that TRL publishes"),
    "gate": Part(60, functools.partial(bench, only="^gate-"), "the whole gate"),
    "compact": Part(30, functools.partial(bench, only="^compact-"), "compaction"),
    "tests": Part(90, tests, "the tests marked gpu"),
    "bench": Part(120, bench, "all other rows"),
    "sanitize": Part(60, sanitize, "compute-sanitizer over the quick check"),
    "suite": Part(300, suite, "the kernels' tests with Triton compiled, in the time that is left"),
}
SECONDS = 720


def progress_path(options: argparse.Namespace) -> Path:
    return ROOT / "build" / f"gpu-{options.device}.json"


def finished(options: argparse.Namespace) -> list[str]:
    """Parts that went well in an earlier run of the same sources."""
    try:
        record = json.loads(progress_path(options).read_text())
    except (OSError, ValueError):
        return []
    return list(record["done"]) if record.get("sources") == sources() else []


def note_finished(options: argparse.Namespace, name: str) -> None:
    path = progress_path(options)
    path.parent.mkdir(exist_ok=True)
    done = sorted({*finished(options), name})
    path.write_text(json.dumps({"sources": sources(), "done": done}))


@functools.cache
def sources() -> str:
    """A digest of the Python and C++ files."""
    digest = hashlib.sha256()
    for folder in ("csrc", "sparse_kernels", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART[:SECONDS]",
        help="; ".join(f"{name} ({part.seconds} s): {part.what}" for name, part in PARTS.items()),
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes: that it runs, not how fast")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all parts; {SECONDS} by default")
    parser.add_argument("--resume", action="store_true", help="only what an earlier run of these sources left")
    parser.add_argument("--only", default="", help="the rows of bench whose name holds this, a regular expression")
    parser.add_argument("--missing", action="store_true", help="the rows of bench that the record does not have")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to compare with")
    parser.add_argument("--out", type=Path, help="the record; benchmarks/results/<device>-<date>.json by default")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.site = None
    for part in options.parts:
        name, _, seconds = part.partition(":")
        if name not in PARTS or (seconds and not seconds.isdigit()):
            parser.error(f"{part!r}: a part must be one of {', '.join(PARTS)}, with :SECONDS or without")
    if options.device == "cuda" and not has_gpu():
        parser.error("no CUDA device here; with --device cpu --small it shows that it runs")
    if options.small and options.out is None:
        parser.error("--small measures nothing: give --out, where its record may go")
    options.missing = options.missing or options.resume
    options.arguments = ["--device", options.device]
    options.arguments += ["--small"] if options.small else []
    options.arguments += ["--missing"] if options.missing else []
    options.arguments += ["--out", str(options.out)] if options.out else []
    return options


def main() -> int:
    options = parse()
    if options.rows:
        return rows(options)
    began = time.monotonic()
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder:
        options.begun = Path(folder) / "begun"
        options.begun.touch()
        if options.wheels:
            options.site = Path(folder) / "site"
            unpack(options.wheels, options.site)
        left_out = finished(options) if options.resume else []
        for part in options.parts or [name for name in PARTS if name not in left_out]:
            name, _, seconds = part.partition(":")
            start = time.monotonic()
            left = began + options.seconds - start
            if left < 5:
                outcomes[name] = (True, "left for another run: --resume")
                continue
            options.until = start + min(float(seconds or PARTS[name].seconds), left)
            well, line = PARTS[name].run(options)
            outcomes[name] = (well, f"{line} ({time.monotonic() - start:.0f} s)")
            if well:
                note_finished(options, name)
    import timing

    record = options.out or max(
        timing.RESULTS.glob(f"*-{timing.today()}.json"), key=lambda p: p.stat().st_mtime, default=None
    )
    if outcomes.keys() & {"row", "gate", "compact", "bench"} and record and record.exists():
        print(f"\n{record}", *table(record), sep="\n")
    print()
    for name, (well, line) in outcomes.items():
        print(f"{'ok    ' if well else 'FAILED'} {name}: {line}")
    print(f"{time.monotonic() - began:.0f} s")
    return int(not all(well for well, _ in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
