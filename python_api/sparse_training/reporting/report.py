"""A comparison's result as a table in the terminal, a PNG, and a self-contained HTML page.

Everything said here is worked out by rules from the numbers of the result (the dictionary that
`compare` returns and compare.json holds): accuracies and rates are fractions there, percent here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from sparse_training.errors import UserError
from sparse_training.reporting import plots

FORMAT = "sparse-training-compare"
VERSION = 1
FILES = ("compare.json", "compare.png", "report.html")

Result = Mapping[str, Any]


# --- numbers as words ---------------------------------------------------------------------------


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _format(value: float | None, spec: str, scale: float = 1.0) -> str:
    """The number, or a dash if there is none to show."""
    return format(scale * value, spec) if value is not None and math.isfinite(value) else "–"


def _accuracy(arm: Mapping[str, Any]) -> str:
    """Mean and deviation in percent; the mean alone where the deviation is not known."""
    text = _format(arm["summary"]["accuracy_mean"], ".1f", 100)
    deviation = _deviation(arm)
    return text if math.isnan(deviation) else f"{text} ± {deviation:.1f}"


def _deviation(arm: Mapping[str, Any]) -> float:
    """Standard deviation of the accuracy over seeds, in points; NaN where it is not known."""
    deviation = arm["summary"]["accuracy_std"]
    return 100 * deviation if _finite(deviation) and len(arm["runs"]) > 1 else math.nan


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _seeds(result: Result) -> int:
    return min(len(arm["runs"]) for arm in result["arms"].values())


def _target(arm: Mapping[str, Any]) -> float | None:
    return next((run["target"] for run in arm["runs"] if run["target"] is not None), None)


def verdict(result: Result) -> str:
    """Who is ahead, and whether by more than chance would give: one clause, no full stop.

    A lead counts when it is larger than the deviation of the difference over seeds,
    sqrt(a^2 + b^2) for arms with deviations a and b.
    """
    arms = result["arms"]
    mean = {name: arm["summary"]["accuracy_mean"] for name, arm in arms.items()}
    ranked = [name for name in mean if _finite(mean[name])]
    if not ranked:
        return "no arm has a finite accuracy"
    if len(ranked) < 2:
        return f"there is nothing to compare {ranked[0]} with"
    best = max(ranked, key=lambda name: mean[name])
    if _seeds(result) < 2:
        return f"{best} is highest; one seed says nothing about the deviation"
    clear: list[str] = []
    close: list[str] = []
    for name in ranked:
        if name != best:
            lead = 100 * (mean[best] - mean[name])
            larger = lead > math.hypot(_deviation(arms[best]), _deviation(arms[name]))
            (clear if larger else close).append(f"{name} ({lead:.2g} points)")
    if not close:
        return f"{best} is best; its lead over {_join(clear)} is larger than the deviation"
    if not clear:
        return f"{best} is highest; its lead over {_join(close)} is not larger than the deviation"
    return (
        f"{best} is highest; its lead over {_join(clear)} is larger than the deviation, over {_join(close)} it is not"
    )


def headline(result: Result) -> str:
    """The result in one sentence, fair to every arm."""
    arms = result["arms"]
    seconds = {name: arm["summary"]["seconds_mean"] for name, arm in arms.items()}
    longest = max(seconds.values())
    if len(arms) < 2:
        time = f"In {longest:.3g} s"
    elif min(seconds.values()) >= 0.95 * longest:
        time = f"At equal time ({longest:.3g} s)"
    else:
        time = f"At unequal time ({_join([f'{name} {s:.3g} s' for name, s in seconds.items()])})"
    scores = _join(
        [
            f"{name} reached {_accuracy(arm)} %"
            if _finite(arm["summary"]["accuracy_mean"])
            else f"{name} reached no finite accuracy"
            for name, arm in arms.items()
        ]
    )
    seeds = _seeds(result)
    over = f" (mean ± standard deviation over {seeds} seeds)" if seeds > 1 else " (one seed)"
    return f"{time}, {scores}{over}: {verdict(result)}."


def findings(result: Result) -> list[str]:
    """What else a fair reader must know, a sentence each."""
    out = []
    for name, arm in result["arms"].items():
        rate, target = arm["summary"]["rate_mean"], _target(arm)
        if rate is not None and target is not None:
            met = "met within" if abs(rate - target) <= 0.01 else "missed by more than"
            out.append(
                f"{name} trained on {100 * rate:.1f} % of the rows offered in its sparse phase "
                f"(counted); its target of {100 * target:.3g} % was {met} 1 point."
            )
    for name, speed in result["speedup"].items():
        if speed.get("measured"):
            out.append(
                f"A step of {name} is {speed['measured']:.2f} times as fast as a dense one "
                f"(measured); its ceiling is {_format(speed.get('ceiling'), '.2f')}."
            )
    if 1 < _seeds(result) < 3:
        out.append("Fewer than 3 seeds were run: the deviation is itself uncertain.")
    return out


def _titles(result: Result) -> dict[str, str]:
    """What each panel of the figure shows, as a sentence."""
    settings = result["settings"]
    runs = [run for arm in result["arms"].values() for run in arm["runs"] if run["trace"]]
    ends = [run["trace"][-1]["threshold"] for run in runs]
    starts = [run["trace"][0]["threshold"] for run in runs]
    masses = {
        name: [m for run in arm["runs"] for point in run["trace"] if _finite(m := point.get("mass"))]
        for name, arm in result["arms"].items()
    }
    carried = [
        f"{name}'s rows carry {100 * _mean(some):.0f} % of the gradient norm" for name, some in masses.items() if some
    ]
    gated = [
        f"{name} keeps {100 * arm['summary']['rate_mean']:.1f} % of rows, target {_format(_target(arm), '.3g', 100)} %"
        for name, arm in result["arms"].items()
        if any(run["trace"] for run in arm["runs"]) and _finite(arm["summary"]["rate_mean"])
    ]
    speeds = [f"{name} {speed['measured']:.2f}×" for name, speed in result["speedup"].items() if speed.get("measured")]
    titles = {
        "figure": f"{settings['model']} on {settings['data']}, seeds per arm: {_seeds(result)}",
        "accuracy": _sentence(verdict(result)),
        "seeds": "Each seed's final accuracy",
        "rate": _sentence("; ".join(gated)) or "Rows kept, by step",
        "threshold": (
            f"The threshold goes from {_mean(starts):.2g} to {_mean(ends):.2g}"
            if runs and all(map(_finite, starts + ends))
            else "Threshold, by step"
        ),
        "mass": _sentence("; ".join(carried)) or "Share of the gradient norm that they carry, by step",
        "step": f"Step speed-up, measured: {', '.join(speeds)}" if speeds else "Time of a step",
    }
    return {name: title.replace(" %", "\xa0%") for name, title in titles.items()}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


# --- the table ----------------------------------------------------------------------------------

# Heading, and how the number was had.
COLUMNS = (
    ("arm", ""),
    ("accuracy, %", "measured"),
    ("clock, s", "calibrated"),
    ("wall, s", "measured"),
    ("rows trained", "counted"),
    ("rate, %\n(target)", "counted"),
    ("step speed-up", "measured"),
    ("its ceiling", "computed"),
    ("steps", "counted"),
)


def table_rows(result: Result) -> list[tuple[str, ...]]:
    """The cells of the table, a row per arm, in the order of `COLUMNS`; means over seeds."""
    rows: list[tuple[str, ...]] = []
    for name, arm in result["arms"].items():
        mean, target = arm["summary"], _target(arm)
        speed = result["speedup"].get(name, {})
        if name == "dense":
            speed = {"measured": 1.0, "ceiling": 1.0}
        rate = _format(mean["rate_mean"], ".1f", 100)
        rows.append(
            (
                name,
                _accuracy(arm),
                _format(mean["seconds_mean"], ".1f"),
                _format(mean["raw_seconds_mean"], ".1f"),
                _format(mean["rows_trained_mean"], ",.0f"),
                rate if target is None else f"{rate} ({100 * target:.3g})",
                _times(speed.get("measured")),
                _times(speed.get("ceiling")),
                _format(_mean([run["steps"] for run in arm["runs"]]), ",.0f"),
            )
        )
    return rows


def _times(value: float | None) -> str:
    text = _format(value, ".2f")
    return text if text == "–" else f"{text}×"


def notes(result: Result) -> list[str]:
    """The lines below the table: the scorer's cost, and the backends that ran."""
    out = []
    for name, speed in result["speedup"].items():
        own = speed.get("own_ceiling")
        if own:
            reached = _format(speed.get("measured"), ".0f", 100 / own)
            out.append(
                f"{name}: scoring costs s = {speed['scorer_cost']:.2f} of a full forward pass; "
                f"its own ceiling 3/(s+3r) = {own:.2f}×, of which {reached} % is reached"
            )
    backends = result["environment"].get("backends") or {}
    ran = ", ".join(f"{op} {backend}" for op, backend in backends.items())
    return [*out, f"backends that ran: {ran or 'not recorded'}"]


def warnings(result: Result) -> list[str]:
    """The runs' warnings, each once, with the arm and the seeds that raised it."""
    seeds: dict[tuple[str, str], list[str]] = {}
    for name, arm in result["arms"].items():
        for run in arm["runs"]:
            for text in run["warnings"]:
                seeds.setdefault((name, text), []).append(str(run["seed"]))
    return [f"{name}, seed {', '.join(which)}: {text}" for (name, text), which in seeds.items()]


def print_table(result: Result, console: Console | None = None) -> None:
    """Print one row per arm, then the scorer's cost, the backends that ran and the warnings."""
    console = console or Console()
    # A stream that cannot carry the signs gets ASCII instead of an exception.
    signs = {} if console.encoding.startswith("utf") else {"±": "+-", "×": "x", "–": "-"}
    plain = str.maketrans(signs)

    gap = int(console.width >= 100)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False, show_edge=False)
    for heading, _ in COLUMNS:
        # The words of a heading stand above one another: nine columns in 80 characters.
        header = Text(heading if "\n" in heading else heading.replace(" ", "\n"))
        if heading == "arm":
            table.add_column(header, vertical="bottom", overflow="fold", max_width=12)
        else:
            table.add_column(header, vertical="bottom", justify="right", no_wrap=True)
    for row in table_rows(result):
        table.add_row(*(Text(cell.translate(plain)) for cell in row))
    # At its own width even where the console is narrower: a digit is never cut.
    whole = console.measure(table, options=console.options.update(max_width=1000)).maximum
    lines = console.render(table, console.options.update(width=whole))
    console.print(Segments(lines), crop=False, end="")
    console.print()
    for note in notes(result):
        console.print(Text(note.translate(plain)))
    for warning in warnings(result):
        console.print(Text(f"warning: {warning}".translate(plain), style="yellow"))


# --- energy and work ---

# Of a run: the field, how its amount was had, and its heading, unit and scale in the table.
_AMOUNTS = (("joules", "measured", "joules", "measured", 1.0), ("flops", "counted", "FLOPs", "counted, 10⁹", 1e-9))


def energy_rows(arms: Mapping[str, Sequence[Any]]) -> tuple[list[tuple[str, ...]], list[tuple[str, str]]]:
    """Joules and FLOPs of a run, means over each arm's runs, where any run has them; and the headings.

    Args:
        arms: the runs of each.
    """
    present = [kind for kind in _AMOUNTS if any(_amount(run, *kind[:2]) is not None for run in _all(arms))]
    rows: list[tuple[str, ...]] = []
    for arm, runs in arms.items() if present else ():
        cells = [arm]
        for field, how, _, _, scale in present:
            known = [value for run in runs if (value := _amount(run, field, how)) is not None]
            cells.append(_format(_mean(known), ",.4g", scale) if known else "–")
        rows.append(tuple(cells))
    return rows, [("arm", ""), *((heading, unit) for _, _, heading, unit, _ in present)]


def energy_line(arms: Mapping[str, Sequence[Any]]) -> str:
    """Whether energy was measured, and by what."""
    meters = dict.fromkeys(
        run["joules"].get("by") or "a meter" for run in _all(arms) if _amount(run, "joules", "measured") is not None
    )
    if not meters:
        return "No energy was measured, and a skipped row is not counted as energy."
    return f"Joules are measured ({', '.join(meters)}), without evaluation; a skipped row is not counted as energy."


def _all(arms: Mapping[str, Sequence[Any]]) -> list[Any]:
    return [run for runs in arms.values() for run in runs]


def _amount(run: Mapping[str, Any], field: str, how: str) -> float | None:
    """What a run took of something, None where nobody measured or counted it."""
    found = run.get(field)
    amount: float | None = found.get(how) if isinstance(found, Mapping) else None
    return amount


# --- files --------------------------------------------------------------------------------------


def write_png(result: Result, path: str | Path) -> Path:
    """Draw the comparison's figure to `path` (PNG, 1800 x 1152 pixels), atomically."""
    return replace(path, plots.png(result, _titles(result)))


def write_html(result: Result, path: str | Path) -> Path:
    """Write the page: one file with its style, curves and images inside, atomically."""
    return replace(path, _html(result).encode())


def write_report(result: Result, folder: str | Path) -> tuple[Path, Path, Path]:
    """Write compare.json, compare.png and report.html into `folder`, which is made if missing.

    All three are made before the first is written, and each replaces its predecessor in one move.

    Raises:
        UserError: if the folder cannot be written.
    """
    contents = (
        (json.dumps(jsonable(result), indent=1, allow_nan=False) + "\n").encode(),
        plots.png(result, _titles(result)),
        _html(result).encode(),
    )
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        data, image, page = (
            replace(Path(folder, name), content) for name, content in zip(FILES, contents, strict=True)
        )
    except OSError as error:
        raise UserError(f"cannot write the report to {str(folder)!r}: {error.strerror}") from error
    return data, image, page


def replace(path: str | Path, content: bytes) -> Path:
    """Write to a file beside `path`, then move it there: readers see the old or the new, whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def jsonable(value: Any) -> Any:
    """The same value with NaN and infinities, which JSON does not have, as None."""
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def templates() -> Environment:
    """The pages' templates, escaping what is put into them."""
    return Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _html(result: Result) -> str:
    titles = _titles(result)
    # matplotlib escapes what it writes into an SVG, so these strings are safe as they are.
    figures = {name: (titles[name], Markup(svg)) for name, svg in plots.svgs(result).items()}
    gallery = result.get("gallery") or {}
    runs = {name: arm["runs"] for name, arm in result["arms"].items()}
    energy, energy_headings = energy_rows(runs)
    return (
        templates()
        .get_template("report.html.j2")
        .render(
            result=result,
            headline=headline(result).replace(" ± ", "\xa0±\xa0").replace(" %", "\xa0%"),
            findings=findings(result),
            columns=COLUMNS,
            rows=table_rows(result),
            notes=notes(result),
            warnings=warnings(result),
            figures=figures,
            step_headings=STEPS,
            step_rows=_step_rows(result),
            rounds=result["calibration"].get("rounds"),
            energy=energy,
            energy_headings=energy_headings,
            energy_line=energy_line(runs),
            gallery_arm=gallery.get("arm"),
            galleries=[
                (title, gallery[key])
                for title, key in (("Selected most", "most"), ("Selected least", "least"))
                if gallery.get(key)
            ],
            facts=[
                (title, [(key.replace("_", " "), plain(value)) for key, value in result[part].items()])
                for title, part in (("Settings", "settings"), ("Environment", "environment"))
            ],
        )
    )


_PARTS = ("load", "score", "select", "train", "total")
STEPS = (
    ("arm", ""),
    *((part, "measured") for part in _PARTS),
    ("speed-up", "measured"),
    ("ceiling", "computed"),
    ("own ceiling", "from measured s"),
)


def _step_rows(result: Result) -> list[tuple[str, ...]]:
    """The cells of the table of a step, an arm a row, under ``STEPS``; times in milliseconds."""
    rows = []
    for name, parts in result["calibration"]["arms"].items():
        speed = result["speedup"].get(name, {})
        if name == "dense":
            speed = {"measured": 1.0, "ceiling": 1.0}
        times = (_format(parts.get(key), ".3f", 1e3) for key in _PARTS)
        ratios = (_times(speed.get(key)) for key in ("measured", "ceiling", "own_ceiling"))
        rows.append((name, *times, *ratios))
    return rows


def plain(value: Any) -> str:
    """A value of a result in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# --- reading ------------------------------------------------------------------------------------

_NUMBER = (int, float)
_MAYBE = (int, float, NoneType)
_RUN = {
    "seed": int,
    "accuracy": _MAYBE,
    "seconds": _NUMBER,
    "steps": int,
    "target": _MAYBE,
    "phases": {...: int},
    "evals": [{"seconds": _NUMBER, "accuracy": _MAYBE}],
    "trace": [{"step": int, "rate": _MAYBE, "threshold": _MAYBE}],
    "warnings": [str],
}
_SUMMARY = {
    "accuracy_mean": _MAYBE,
    "accuracy_std": _MAYBE,
    "seconds_mean": _NUMBER,
    "raw_seconds_mean": _NUMBER,
    "rows_trained_mean": _NUMBER,
    "rate_mean": _MAYBE,
}
# A type or types; {key: shape}, where ... stands for every key; or [shape of every item].
_SHAPE = {
    "created": str,
    "command": str,
    "environment": {},
    "settings": {"data": str, "model": str},
    "calibration": {"arms": {...: {"total": _NUMBER}}},
    "speedup": {...: {...: _MAYBE}},
    "arms": {...: {"runs": [_RUN], "summary": _SUMMARY}},
}


def read_result(path: str | Path, *, kind: str, file: str, format: str, version: int) -> dict[str, Any]:
    """The JSON of a result; what is in it is not looked at beyond its format and version.

    Raises:
        UserError: if it cannot be read, is of another format or of another version.
    """
    name = str(path)
    try:
        result = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {name!r}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name!r} is not JSON; wanted a {file}: {error}") from error
    if not isinstance(result, dict) or result.get("format") != format:
        raise UserError(f"{name!r} is not the result of a {kind} (format {format!r})")
    if result.get("version") != version:
        raise UserError(f"{name!r} has version {result.get('version')!r}; wanted {version}")
    return result


def load_result(path: str | Path) -> dict[str, Any]:
    """Read a compare.json.

    Raises:
        UserError: if it cannot be read, is not a comparison's result, or is of another version.
    """
    name = str(path)
    result = read_result(path, kind="comparison", file="compare.json", format=FORMAT, version=VERSION)
    fault = _fault(result, _SHAPE, "")
    if fault is None and not all(arm["runs"] for arm in (result["arms"] or {"": {"runs": []}}).values()):
        fault = "arms have no runs"
    if fault:
        raise UserError(f"{name!r} is a damaged result of a comparison: {fault}")
    return result


def _fault(value: Any, shape: Any, where: str) -> str | None:
    """What is wrong with the value's shape, or None."""
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where} is not a list"
        faults = (_fault(item, shape[0], f"{where}[{i}]") for i, item in enumerate(value))
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{where} is not an object"
        keys = value if ... in shape else shape
        missing = [key for key in keys if key not in value]
        if missing:
            return f"{where} lacks {missing[0]!r}"
        faults = (_fault(value[key], shape.get(..., shape.get(key)), f"{where}/{key}") for key in keys)
    else:
        return None if isinstance(value, shape) else f"{where} is {str(value)[:40]!r}"
    return next(filter(None, faults), None)
