"""The table of a verification: what was compared, how far apart it was, and whether that is close enough. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


def relative(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """``||actual - expected|| / ||expected||``; infinite where ``actual`` is not finite."""
    if actual.size == 0:
        return 0.0
    if not np.isfinite(actual).all():
        return float("inf")
    difference = float(np.linalg.norm(actual.astype(np.float64) - expected))
    return difference / max(float(np.linalg.norm(expected.astype(np.float64))), 1e-30)


@dataclass(frozen=True)
class Check:
    """One row of a :class:`Report`; ``error`` is relative, ``measured`` says what is where that is something else."""

    name: str
    error: float | None
    passed: bool
    note: str = ""
    measured: str = ""

    @property
    def figure(self) -> str:
        """What the row measured, as the tables print it."""
        return f"{self.error:.1e}" if self.error is not None else self.measured


@dataclass(frozen=True)
class Report:
    """What was compared and how it came out."""

    subject: str
    tolerance: float
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def error(self) -> float:
        """The largest relative error measured."""
        return max((check.error for check in self.checks if check.error is not None), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        checks = [
            {key: value for key, value in asdict(check).items() if value not in (None, "")} for check in self.checks
        ]
        return {"passed": self.passed, "tolerance": self.tolerance, "error": self.error, "checks": checks}

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        rows = [f"{'check':<{width}}  {'relative error':>14}  result"]
        for check in self.checks:
            note = f"  ({check.note})" if check.note else ""
            rows.append(f"{check.name:<{width}}  {check.figure or '-':>14}  {'ok' if check.passed else 'FAILED'}{note}")
        return "\n".join(rows)


def reports_table(reports: Mapping[str, Report]) -> str:
    """Several reports side by side: a row per check, a column per report; what a report lacks is left empty."""
    names = list(dict.fromkeys(check.name for report in reports.values() for check in report.checks))
    columns = [["check", *names]]
    for title, report in reports.items():
        checks = {check.name: check for check in report.checks}
        columns.append([title, *(_cell(checks[name]) if name in checks else "" for name in names)])
    widths = [max(map(len, column)) for column in columns]
    rows = zip(*columns, strict=True)
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _cell(check: Check) -> str:
    return f"{check.figure} {'ok' if check.passed else 'FAILED'}".lstrip()
