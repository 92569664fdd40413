"""The raw table: one row for each cell and seed, nothing averaged, nothing rounded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.columns import LEADING_COLUMNS, TIMING_COLUMNS
from .lines import Results, Row, metrics
from .text import count, finite, listed

if TYPE_CHECKING:
    import pandas as pd

_INTEGERS = ("steps", "nfe", "seed", "students", "batch", "images_total", "rounds_images")
_COUNTS = (*_INTEGERS, "params_total", "params_active", "macs_per_image", "speed_batch", "shared_with")
_ELSEWHERE = {"dtype": "precision"}
_SPEED = {"speed_batch": "batch", "speed_compile": "compile", "speed_device": "device"}


def frame(results: Results) -> pd.DataFrame:
    """One row for each cell and seed, in the order of the suite; metric columns sorted by name.

    Counts have dtype Int64 (Float64 where one is not whole), scores and timings float64, the rest is text; what is
    missing is empty.

    Raises:
        UserError: when the results mix protocols in one column.
    """
    import pandas as pd

    scores = sorted(metric.column for metric in metrics(results))
    data: dict[str, pd.Series[Any]] = {}
    for column in LEADING_COLUMNS:
        values = [_leading(row, column) for row in results["rows"]]
        if column in _COUNTS:
            data[column] = _counted(values)
        else:
            data[column] = pd.Series([None if value is None else listed(value, ";") for value in values], dtype=object)
    for column in scores:
        found = [finite((row.get("scores") or {}).get(column)) for row in results["rows"]]
        data[column] = pd.Series(found, dtype="float64")
    for column in TIMING_COLUMNS:
        values = [(row.get("speed") or {}).get(column, row.get(column)) for row in results["rows"]]
        if column in _COUNTS:
            data[column] = _counted(values)
        else:
            data[column] = pd.Series([finite(value) for value in values], dtype="float64")
    return pd.DataFrame(data)


def _counted(values: Sequence[Any]) -> pd.Series[Any]:
    import pandas as pd

    numbers = [count(value) for value in values]
    whole = all(number is None or float(number).is_integer() for number in numbers)
    return pd.Series(numbers, dtype="Int64" if whole else "Float64")


def _leading(row: Row, column: str) -> Any:
    if column in _SPEED:
        return (row.get("speed") or {}).get(_SPEED[column])
    return row.get(_ELSEWHERE.get(column, column))


def as_csv(results: Results) -> str:
    """:func:`frame` as CSV: ``\\n`` at the end of lines, floats in their shortest exact form."""
    return str(frame(results).to_csv(index=False, lineterminator="\n"))


def write_csv(results: Results, path: Path) -> None:
    """:func:`as_csv` in a file, UTF-8."""
    path.write_text(as_csv(results), encoding="utf-8", newline="")
