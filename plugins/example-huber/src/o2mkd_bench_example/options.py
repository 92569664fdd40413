"""What a suite may say; torch-free."""

from __future__ import annotations

from pydantic import Field

from o2mkd_bench import Options


class HuberOptions(Options):
    """``delta``: errors well below it count by their square, those well above by their size."""

    delta: float = Field(0.1, gt=0)
    weight: float = Field(1.0, gt=0)
