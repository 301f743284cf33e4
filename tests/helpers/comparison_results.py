"""Results of comparisons, made by hand."""

import base64
import io
import math

import numpy as np
from PIL import Image
from rich.console import Console

from sparse_training.reporting import tables

EVIL = "$\\frac{$<script>alert('x')</script> & \""


def make_picture(seed):
    """A base64 PNG, 8 x 8, grey."""
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def make_run(arm, seed, final, step_seconds, rate=0.1, evals=12):
    """A run that learns along 1 - exp(-t) and, for the gate, moves a threshold."""
    noise = np.random.default_rng([seed, len(arm)])
    seconds, warmup, anneal = 20.0 + 0.01 * seed, 300, 280
    sparse = int((seconds - (warmup + anneal) * 0.008) / step_seconds) if arm != "dense" else 1900
    steps = warmup + sparse + anneal
    times = np.linspace(seconds / evals, seconds, evals) - 0.05 * seed * (evals > 1)
    accuracy = 0.1 + (final - 0.1) * (1 - np.exp(-times / 3)) + noise.normal(0, 0.012, evals)
    trace = []
    if arm == "gate":
        at = np.linspace(warmup, warmup + sparse, 300).astype(int)
        wave = rate + 0.5 * np.exp(-np.arange(300) / 6) + noise.normal(0, 0.004, 300)
        level = 2.4 * np.exp(-np.arange(300) / 80) + 0.02 + noise.normal(0, 0.002, 300)
        trace = [
            {"step": int(s), "rate": float(r), "threshold": float(t), "mass": min(1.0, 3 * float(r))}
            for s, r, t in zip(at, wave, level, strict=True)
        ]
    reached = {"gate": 1.03 * rate, "random": rate}.get(arm)
    return {
        "seed": seed,
        "accuracy": float(final + 0.003 * (seed - 1)),
        "seconds": seconds,
        "raw_seconds": seconds * 1.17,
        "steps": steps,
        "rows_seen": steps * 128,
        "rows_trained": int(128 * (warmup + anneal + sparse * (reached or 1))),
        "rate": reached,
        "phases": {"warmup": warmup, "sparse": sparse, "anneal": anneal},
        "evals": [
            {
                "seconds": float(t),
                "step": int(steps * t / seconds),
                "accuracy": float(a),
                "loss": 0.3,
            }
            for t, a in zip(times, accuracy, strict=True)
        ],
        "trace": trace,
        "target": rate if arm != "dense" else None,
        "warnings": ["the threshold is saturated"] if arm == "gate" and seed == 2 else [],
    }


def make_result(arms=("dense", "random", "gate"), seeds=(0, 1, 2), finals=None, **kwargs):
    """A whole result, with the means and deviations that its runs have."""
    finals = finals or {"dense": 0.931, "random": 0.950, "gate": 0.947}
    times = {
        "dense": {"load": 2e-4, "score": 0.0, "select": 0.0, "train": 7.8e-3, "total": 8e-3},
        "random": {"load": 2e-4, "score": 0.0, "select": 1e-4, "train": 1.3e-3, "total": 1.6e-3},
        "gate": {"load": 2e-4, "score": 1.7e-3, "select": 2e-4, "train": 1.3e-3, "total": 3.4e-3},
    }
    times = {arm: times.get(arm, times["gate"]) for arm in arms}
    result = {
        "format": "sparse-training-compare",
        "version": 1,
        "created": "2025-05-04T10:11:12Z",
        "command": "sparse-train compare --data digits --seconds 20",
        "environment": {
            "python": "3.11.2",
            "torch": "2.13.0",
            "sparse_kernels": "0.1.0",
            "device": "cpu",
            "cpu": "Example CPU @ 2.0 GHz",
            "threads": 2,
            "backends": {"gate_rows": "cpp (avx2)", "compact": "cpp", "gather_rows": "cpp"},
        },
        "settings": {
            "data": "digits",
            "source": "scikit-learn, 1,797 images",
            "model": "cnn-620k",
            "parameters": 620362,
            "rate": 0.1,
            "batch_size": 128,
            "seconds": 20.0,
            "seeds": list(seeds),
            "lr": 1e-3,
            "dense_start": 0.05,
            "dense_end": 0.125,
            "precision": "bfloat16",
            "train_rows": 1437,
            "test_rows": 360,
        },
        "calibration": {"rounds": 40, "arms": times},
        "speedup": {},
        "arms": {},
        "gallery": {"arm": "gate", "most": [], "least": []},
    }
    for arm in arms:
        runs = [make_run(arm, seed, finals.get(arm, 0.9), times[arm]["total"], **kwargs) for seed in seeds]
        accuracy = [run["accuracy"] for run in runs]
        result["arms"][arm] = {
            "runs": runs,
            "summary": {
                "accuracy_mean": float(np.mean(accuracy)),
                "accuracy_std": float(np.std(accuracy, ddof=1)) if len(runs) > 1 else 0.0,
                "seconds_mean": float(np.mean([run["seconds"] for run in runs])),
                "raw_seconds_mean": float(np.mean([run["raw_seconds"] for run in runs])),
                "rows_trained_mean": float(np.mean([run["rows_trained"] for run in runs])),
                "rate_mean": runs[0]["rate"],
            },
        }
        if arm == "gate":
            result["speedup"][arm] = {
                "measured": 8 / 3.4,
                "ceiling": 3 / 1.3,
                "scorer_cost": 0.64,
                "own_ceiling": 3 / (0.64 + 0.3),
            }
        elif arm == "random":
            result["speedup"][arm] = {"measured": 5.0, "ceiling": 10.0}
    for name, base in (("most", 40), ("least", 0)):
        result["gallery"][name] = [
            {
                "index": 10 * i + base,
                "label": i % 10,
                "class": f"class {i % 10}",
                "selected": base + 16 - i,
                "seen": 61,
                "png": make_picture(i + base),
            }
            for i in range(16)
        ]
    return result


def evil():
    """Markup and mathematics wherever a string may stand; one seed, evaluated once."""
    result = make_result(arms=("dense", EVIL), seeds=(0,), evals=1)
    result["command"] = result["settings"]["data"] = result["settings"]["model"] = EVIL
    result["settings"][EVIL] = result["environment"]["cpu"] = result["created"] = EVIL
    result["environment"]["backends"] = {EVIL: EVIL}
    result["gallery"]["arm"] = EVIL
    for key in result["gallery"]["most"][0]:
        result["gallery"]["most"][0][key] = EVIL
    result["speedup"][EVIL] = make_result()["speedup"]["gate"]
    result["arms"][EVIL]["runs"][0]["warnings"] = [EVIL]
    result["arms"][EVIL]["runs"][0]["trace"] = [{"step": 9, "rate": 0.1, "threshold": 1.0}]
    return result


def unwrap():
    """One arm; nothing timed, traced, evaluated or shown, and no accuracy to be had."""
    result = make_result(arms=("gate",))
    result.update(gallery={}, speedup={}, calibration={"rounds": 0, "arms": {}})
    result["environment"].pop("backends")
    for arm in result["arms"].values():
        arm["summary"].update(accuracy_mean=None, accuracy_std=None)
        for run in arm["runs"]:
            run.update(accuracy=None, trace=[], evals=[])
    return result


def diverged():
    """A gate whose loss went to infinity."""
    result = make_result()
    result["arms"]["gate"]["summary"].update(accuracy_mean=math.nan, accuracy_std=None)
    for run in result["arms"]["gate"]["runs"]:
        run["accuracy"] = None
        for point in run["evals"]:
            point.update(accuracy=math.nan, loss=math.inf)
        for point in run["trace"]:
            point.update(threshold=None)
    return result


RESULT = make_result()


CASES = {"whole": RESULT, "evil": evil(), "bare": unwrap(), "diverged": diverged()}


def table(result, width=100, encoding="utf-8"):
    """What the table prints into a file of this many columns."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    tables.print_comparison(result, Console(file=stream, width=width))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)
