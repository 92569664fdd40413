"""Numbers and names as people read them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any


def finite(value: Any) -> float | None:
    """``value`` as a float; None for what is missing, not a number, NaN or infinite."""
    if value is None or isinstance(value, bool | str) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def si(value: float | None) -> str:
    """Three significant digits and an SI suffix: ``50k``, ``12.4M``, ``0.021``; empty for None.

    Zeros at the end stay where they were measured (``12.0`` for 12.01) and go where the number is exact (``12``).
    """
    if value is None:
        return ""
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(float(f"{value:.2e}"))))
    thousands = min(max(size // 3, 0), 4)
    text = f"{value / 1000**thousands:.{max(0, 2 - size + 3 * thousands)}f}"
    if "." in text and float(text) * 1000**thousands == value:
        text = text.rstrip("0").rstrip(".")
    return text + ("", "k", "M", "G", "T")[thousands]


def decimals(values: Iterable[float]) -> int:
    """Decimals that serve a whole column: two where its smallest size is 1 or more, one from 100, else three digits."""
    sizes = [abs(value) for value in values if value]
    if not sizes:
        return 2
    least = min(sizes)
    if least >= 1:
        return 2 if least < 100 else 1
    return min(2 - math.floor(math.log10(least)), 8)


def count(value: Any) -> int | float | None:
    """A whole number as it is; anything else as :func:`finite` takes it."""
    return value if isinstance(value, int) and not isinstance(value, bool) else finite(value)


def spread(mean: float, sd: float | None, places: int) -> str:
    """``12.31 ± 0.40``, or the mean alone where one reading has no spread."""
    return f"{mean:.{places}f}" if sd is None else f"{mean:.{places}f} ± {sd:.{places}f}"


def listed(value: Any, separator: str = ", ") -> str:
    """A number, or one number an expert: ``5, 5``; one number where all experts share it; empty for None."""
    if value is None:
        return ""
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    texts = [str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in items]
    return separator.join(texts)


def shared(value: Any) -> Any:
    """A list whose entries are all equal as that one entry; anything else as it is."""
    if isinstance(value, list | tuple) and value and all(item == value[0] for item in value):
        return value[0]
    return value


def markdown_text(value: Any) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"[|*<>`\\]|(?<=\])\(|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(str(value).split()))


def si_listed(value: Any) -> str:
    """As :func:`si`, for one number or one an expert."""
    value = shared(value)
    if isinstance(value, list | tuple):
        return ", ".join(si(finite(item)) for item in value)
    return si(finite(value))
