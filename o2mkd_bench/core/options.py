"""The base of every plugin's options and of every block of a suite."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """Frozen, strict about keys: an unknown key is an error, never ignored."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, populate_by_name=True
    )


def neutral(default: Any = ..., **kwargs: Any) -> Any:
    """A pydantic field that cannot change a result (workers, paths, chunk sizes): it stays out of the identity."""
    return Field(default, json_schema_extra={"identity": False}, **kwargs)
