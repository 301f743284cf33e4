"""Pages and files of a report: one self-contained HTML page, with the result as JSON and figures beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sparse_training import files
from sparse_training.errors import UserError
from sparse_training.experiments.formats import COMPARISON, STUDY
from sparse_training.reporting import comparison, plots, study, study_plots
from sparse_training.reporting.energy import energy_line, energy_rows
from sparse_training.reporting.result import Result, to_json
from sparse_training.reporting.text import facts

PAGE, IMAGE = "report.html", "compare.png"
COMPARISON_FILES = (COMPARISON.file, IMAGE, PAGE)


def write_comparison(result: Result, folder: str | Path) -> tuple[Path, Path, Path]:
    """Write compare.json, compare.png and report.html.

    All three are made before the first is written, and each replaces its predecessor in one move.

    Args:
        result: a comparison.
        folder: folder to write to, made if missing.

    Returns:
        The three paths.

    Raises:
        UserError: the folder cannot be written.
    """
    image = plots.png(result, comparison.titles(result))
    contents = (to_json(result, indent=1), image, comparison_page(result).encode())
    data, png, page = write_files(folder, dict(zip(COMPARISON_FILES, contents, strict=True)))
    return data, png, page


def write_study(result: Result, folder: str | Path) -> tuple[Path, ...]:
    """Write study.json and report.html; both are made before the first is written.

    A result that was read from an older version's file is not written over it: its page alone is.

    Args:
        result: a study.
        folder: folder to write to, made if missing.

    Returns:
        The paths of what was written.

    Raises:
        UserError: the folder cannot be written.
    """
    page = study_page(result).encode()
    data = {STUDY.file: to_json(result)} if result["version"] == STUDY.version else {}
    return tuple(write_files(folder, {**data, PAGE: page}))


def write_files(folder: str | Path, contents: dict[str, bytes]) -> list[Path]:
    """Write files by their names into a folder, made if missing; return their paths.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the report to {str(folder)!r}: {error.strerror}") from error
    paths = [Path(folder, name) for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        files.write_atomic(path, content)
    return paths


def write_page(folder: str | Path, name: str, data: Mapping[str, Any], page: str) -> tuple[Path, Path]:
    """Write data as JSON beside a page that shows it; both are made before the first is written.

    Raises:
        UserError: the folder cannot be written.
    """
    content = json.dumps(data, indent=1, allow_nan=False).encode()
    written, report = write_files(folder, {name: content, PAGE: page.encode()})
    return written, report


def comparison_page(result: Result) -> str:
    """Render a comparison's page: one file with its style, curves and images inside."""
    titles = comparison.titles(result)
    figures = {name: (titles[name], drawn) for name, drawn in plots.svgs(result).items()}
    gallery = result.get("gallery") or {}
    runs = {method: arm["runs"] for method, arm in result["arms"].items()}
    energy, energy_headings = energy_rows(runs)
    return render(
        "comparison.html.j2",
        result=result,
        headline=comparison.headline(result).replace(" ± ", "\xa0±\xa0").replace(" %", "\xa0%"),
        findings=comparison.findings(result),
        columns=comparison.COLUMNS,
        rows=comparison.table_rows(result),
        notes=comparison.notes(result),
        warnings=comparison.warnings(result),
        figures=figures,
        step_headings=comparison.STEP_COLUMNS,
        step_rows=comparison.step_rows(result),
        rounds=result["calibration"].get("rounds"),
        energy=energy,
        energy_headings=energy_headings,
        energy_line=energy_line(runs),
        gallery_method=gallery.get("arm"),
        galleries=[
            (title, gallery[key])
            for title, key in (("Selected most", "most"), ("Selected least", "least"))
            if gallery.get(key)
        ],
        facts=facts(result),
    )


def study_page(result: Result) -> str:
    """Render a study's page: one file with its style, curves and images inside."""
    figures = study_plots.figures(result)
    runs = study.whole_runs(result)
    energy, energy_headings = energy_rows(runs)
    on = "test" if result["settings"].get("validation") is None else "validation"
    kinds = (
        ("accuracy", f"Measure on {on} rows"),
        ("differences", f"Difference from {result['baseline']}"),
        ("ladder", "Ladder of budgets, each run with its whole schedule"),
    )
    overall, overall_headings = study.overall_rows(result)
    tasks = [
        {
            **section,
            "figures": [
                (title, figures[f"{kind} {section['name']}"])
                for kind, title in kinds
                if f"{kind} {section['name']}" in figures
            ],
        }
        for section in study.task_sections(result)
    ]
    return render(
        "study.html.j2",
        result=result,
        headline=study.headline(result),
        again=study.again_line(result),
        passed=study.passed(result),
        warnings=study.warnings(result),
        seconds=f"{result['settings']['seconds']:g}",
        score_headings=study.SCORE_COLUMNS,
        scores=study.score_rows(result),
        overall=overall,
        overall_headings=overall_headings,
        adjusted=study.is_adjusted(result),
        margin=f"{100 * result['margin']:g}",
        ladder_lines=study.ladder_lines(result),
        headings=study.columns(result),
        tasks=tasks,
        figures=figures | {name: "" for name in ("rate", "threshold", "mass") if name not in figures},
        traced=study_plots.traced_task(result),
        step_headings=study.STEP_COLUMNS,
        steps=study.step_rows(result),
        claim_headings=study.CLAIM_COLUMNS,
        claims=study.claim_rows(),
        notes=study.notes(result),
        raw=study.raw_seconds_line(result),
        energy=energy,
        energy_headings=energy_headings,
        energy_line=energy_line(runs),
        facts=facts(result),
    )


def render(template: str, **values: Any) -> str:
    """Render a page from a template of the folder ``templates``; it escapes what is put into it."""
    environment = Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
