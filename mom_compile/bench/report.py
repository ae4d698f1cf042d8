"""Rows of a benchmark: printed, written to CSV, drawn."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Table:
    """Rows that are printed as they come; columns are fixed, what a row lacks stays empty.

    Args:
        columns: printed and written, with the width of each when printed; 0: only written.
        common: the same in every row, only written.
        path: CSV that is written anew with every row, so that a run that is stopped leaves what it measured; or None.
    """

    def __init__(self, columns: Mapping[str, int], common: Mapping[str, Any], path: Path | None = None) -> None:
        self.columns = dict(columns)
        self.common = dict(common)
        self.path = path
        self.rows: list[Row] = []
        print(", ".join(map(str, self.common.values())), flush=True)
        self._print({name: name for name in self.columns})

    def add(self, **values: Any) -> Row:
        """Append and print a row.

        Raises:
            ValueError: a column that the table does not have.
        """
        unknown = set(values) - set(self.columns)
        if unknown:
            raise ValueError(
                f"a row must hold the columns {', '.join(self.columns)}, got {', '.join(sorted(unknown))}; add them"
            )
        row = {name: rounded(value) for name, value in values.items() if value is not None}
        self.rows.append(row)
        self._print(row)
        if self.path is not None:
            self._write(self.path)
        return row

    def _print(self, row: Mapping[str, Any]) -> None:
        cells = [f"{row.get(name, '')!s:<{width}}" for name, width in self.columns.items() if width]
        print("  ".join(cells).rstrip(), flush=True)

    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*self.common, *self.columns], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**self.common, **row} for row in self.rows)


def rounded(value: Any) -> Any:
    """A float with four significant digits, or whole from 1000 up; anything else unchanged."""
    if not isinstance(value, float):
        return value
    return round(value) if abs(value) >= 1000 else float(f"{value:.4g}")


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def plot_lines(
    path: Path, lines: Mapping[str, Sequence[tuple[float, float]]], title: str, x_label: str, y_label: str
) -> bool:
    """Draw lines over logarithmic axes.

    Args:
        path: the PNG to write.
        lines: label -> points (x, y), in ascending x.
        title, x_label, y_label: texts.

    Returns:
        Whether it was drawn: not without matplotlib, nor without a point.
    """
    drawn: Iterable[tuple[str, Sequence[tuple[float, float]]]] = [(k, v) for k, v in lines.items() if v]
    if not drawn or importlib.util.find_spec("matplotlib") is None:
        return False
    from .._extras import require
    from ..plots import import_pyplot

    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for label, points in drawn:
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(require("matplotlib.ticker", "train").LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return True
