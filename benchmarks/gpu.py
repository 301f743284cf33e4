"""Everything that is to be done where there is a GPU, in one command, without a network.

    python benchmarks/gpu.py                            all parts, in order of worth
    python benchmarks/gpu.py build check bench:300      those parts; bench stops after 300 s
    python benchmarks/gpu.py bench --only compact       the rows whose name holds that
    python benchmarks/gpu.py bench --missing            the rows that the record does not have yet
    python benchmarks/gpu.py --wheels DIR               liger-kernel, quack-kernels, trl from a folder, to compare with
    python benchmarks/gpu.py --device cpu --small       every line of this, without a GPU and without a figure

Parts: build (the extension, with the compiler and nvcc at hand), check (float64 reference, fresh inputs), bench
(gpu_cases.py, gpu_steps.py), tests (those marked gpu, then the kernels' suite with Triton compiled), sanitize
(compute-sanitizer over small cases). Each is a process of its own, so that one that dies leaves the others. Rows are
written to benchmarks/results/<device>-<date>.json as they are measured; a row measured again replaces the old one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    left = options.until - time.monotonic()
    try:
        return process.wait(None if left == float("inf") else max(1.0, left))
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
    """The float64 reference, on fresh inputs."""
    small = ["--small"] if options.small else []
    code = run(options, [sys.executable, str(HERE / "gpu_check.py"), "--device", options.device, *small])
    return code == 0, "agrees with the float64 reference" if code == 0 else said(code)


def tests(options: argparse.Namespace) -> Outcome:
    """What is marked gpu, and the kernels' suite with the Triton kernels compiled instead of interpreted."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    compiled = {"TRITON_INTERPRET": "0"}
    codes = {"marked gpu": run(options, [*pytest, "-m", "gpu", "tests"], **compiled)}
    if options.device == "cuda":
        codes["kernels, compiled"] = run(options, [*pytest, "tests/kernels"], **compiled)
    none = 5  # pytest's code for having collected nothing
    return (
        all(code in (0, none) for code in codes.values()),
        ", ".join(f"{name}: {'passed' if not code else 'none' if code == none else said(code)}"
                  for name, code in codes.items()),
    )  # fmt: skip


def sanitize(options: argparse.Namespace) -> Outcome:
    """compute-sanitizer over one or two launches of each kernel."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None or options.device != "cuda":
        return True, "left out: " + ("no compute-sanitizer" if tool is None else "no GPU")
    found = {}
    for kind in ("memcheck", "racecheck", "synccheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "99", "--print-limit", "20"]
        command += [sys.executable, str(HERE / "gpu_check.py"), "--small", "--seed", "0"]
        # Without its caching, PyTorch's allocations end where the tensors do.
        found[kind] = run(options, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return not any(found.values()), ", ".join(f"{k}: {said(c) if c else 'clean'}" for k, c in found.items())


def bench(options: argparse.Namespace) -> Outcome:
    """The rows of gpu_cases.py, in processes that are begun anew where the device was lost."""
    code = LOST
    with tempfile.TemporaryDirectory() as folder:
        begun = Path(folder) / "begun"
        begun.touch()
        while code == LOST:
            code = run(options, [sys.executable, __file__, "--rows", str(begun), *options.arguments])
        return code == 0, f"{len(begun.read_text().split())} rows" + (f", {said(code)}" if code else "")


def rows(options: argparse.Namespace) -> int:
    """The process that measures: one row after the other, each recorded at once."""
    import gpu_bench
    import gpu_cases  # noqa: F401  imported for the cases that it registers
    import gpu_steps  # noqa: F401  after the others: rows are measured in this order
    import timing
    import torch

    device = torch.device(options.device)
    machine = describe(device)
    path = options.out or timing.record_path(machine["device"])
    present = {row["case"] for row in json.loads(path.read_text())["rows"] if row["ratios"]} if path.exists() else set()
    begun = options.rows.read_text().split()
    names = [name for name in gpu_bench.CASES if options.only in name and name not in begun]
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


PARTS: dict[str, Callable[[argparse.Namespace], Outcome]] = {
    "build": build,
    "check": check,
    "bench": bench,
    "tests": tests,
    "sanitize": sanitize,
}


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART[:SECONDS]", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes: that it runs, not how fast")
    parser.add_argument("--only", default="", help="the rows of bench whose name holds this")
    parser.add_argument("--missing", action="store_true", help="the rows of bench that the record does not have")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to compare with")
    parser.add_argument("--out", type=Path, help="the record; benchmarks/results/<device>-<date>.json by default")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.site = None
    for part in options.parts:
        name, _, seconds = part.partition(":")
        if name not in PARTS or (seconds and not seconds.isdigit()):
            parser.error(f"{part!r}: wanted one of {', '.join(PARTS)}, with :SECONDS or without")
    if options.device == "cuda" and not has_gpu():
        parser.error("no CUDA device here; with --device cpu --small it shows that it runs")
    if options.small and options.out is None:
        parser.error("--small measures nothing: wanted --out, where its record may go")
    options.arguments = ["--device", options.device, "--only", options.only]
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
        if options.wheels:
            options.site = Path(folder)
            unpack(options.wheels, options.site)
        for part in options.parts or PARTS:
            name, _, seconds = part.partition(":")
            start = time.monotonic()
            options.until = start + (float(seconds) if seconds else float("inf"))
            well, line = PARTS[name](options)
            outcomes[name] = (well, f"{line} ({time.monotonic() - start:.0f} s)")
    import timing

    record = options.out or max(
        timing.RESULTS.glob(f"*-{timing.today()}.json"), key=lambda p: p.stat().st_mtime, default=None
    )
    if "bench" in outcomes and record and record.exists():
        print(f"\n{record}", *table(record), sep="\n")
    print()
    for name, (well, line) in outcomes.items():
        print(f"{'ok    ' if well else 'FAILED'} {name}: {line}")
    print(f"{time.monotonic() - began:.0f} s")
    return int(not all(well for well, _ in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
