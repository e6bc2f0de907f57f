"""The report: results.json and the run folders -> one self-contained HTML page.

The page needs no network and runs no script: charts are inline SVG, pictures are embedded, and a content
policy forbids everything else. Whatever comes from the data (names of classes, files, arms, settings) is
escaped. Free of torch.

The parts: `report_text` (the answer, the plain table), `report_choice` (the answer where weights were given),
`report_plots` and `report_charts` (SVG),
`report_results` and `report_origin` (the two halves of the page), `report_efficiency` and `report_label_free`
(between them),
`report.css` (light, dark and print).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unlabel import report_charts, report_efficiency, report_label_free, report_origin, report_results
from unlabel.errors import UserError
from unlabel.page import css, write_page
from unlabel.report_choice import answer, title
from unlabel.report_efficiency import format_efficiency, format_forecasts
from unlabel.report_label_free import format_label_free
from unlabel.report_text import format_table

__all__ = [
    "accuracy_svg",
    "answer",
    "format_efficiency",
    "format_forecasts",
    "format_label_free",
    "format_table",
    "write_report",
]


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html from `folder`/results.json and the runs it names, and return its path.

    Sections without data are left out. Raises UserError where results.json is missing, broken, or of another
    schema.
    """
    results = _read_results(folder)
    try:
        runs = report_charts.read_runs(folder, results)
        sections = [
            report_results.head(results),
            report_results.accuracy(results),
            report_results.differences(results),
            report_efficiency.efficiency(results),
            report_efficiency.forecasts(results),
            report_results.stages(results),
            report_label_free.label_free(results),
            report_results.pictures(folder, results),
            report_origin.pretraining(runs, results),
            report_origin.cost(results),
            report_origin.chosen(results),
            report_origin.reading(results),
            report_origin.provenance(folder, results, runs),
        ]
        heading = title(results)
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # What is missing is left out; a value of another kind, where nobody but a stranger puts one, ends here.
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"{folder / 'results.json'} or a run that it names holds what cannot be shown ({detail}); "
            "run the command that wrote it again"
        ) from error
    return write_page(folder / "report.html", heading, sections)


def accuracy_svg(results: dict[str, Any]) -> str:
    """Accuracy against labels per class with bands, as an SVG document of its own; "" without results."""
    return report_charts.figure(report_charts.accuracy_panels(results), css())


def _read_results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    if not path.is_file():
        raise UserError(
            f"no results.json in {folder}; give the --out folder of `unlabel compare` or `unlabel evaluate`"
        )
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); run the command that wrote it again") from None
    if not isinstance(results, dict) or results.get("schema", 1) != 1:
        raise UserError(f"{path} does not follow schema 1; make the report with the version that wrote it")
    return results
