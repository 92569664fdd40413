"""The hash of everything that decides an artifact, and of nothing else (docs/semantics.md, Identity)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_AS_THEY_ARE = frozenset({str, int, bool, type(None)})


def resolved(options: BaseModel) -> dict[str, Any]:
    """The fields of ``options`` that bear on a result and differ from their default, nested models included."""
    found: dict[str, Any] = {}
    for name, field in type(options).model_fields.items():
        if not _bears(field):
            continue
        value = getattr(options, name)
        if value == field.get_default(call_default_factory=True, validated_data={}):
            continue
        found[name] = plain(value)
    return found


def decisive(options: BaseModel) -> dict[str, Any]:
    """The fields of ``options`` that bear on a result, those at their default as well."""
    return {name: plain(getattr(options, name)) for name, f in type(options).model_fields.items() if _bears(f)}


def _bears(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return not (isinstance(extra, dict) and extra.get("identity") is False)


def plain(value: Any) -> Any:
    """``value`` as JSON data with one form for every number: 1.0 and 1 are the same number.

    Raises:
        ValueError: for NaN and infinities, which have no JSON form, for types JSON does not know, and for mappings
            two of whose keys are the same text.
    """
    # a large plan spends most of its time here: the common types first
    if type(value) in _AS_THEY_ARE:
        return value
    match value:
        case Enum():
            return plain(value.value)
        case str() | int():
            return value
        case BaseModel():
            return resolved(value)
        case float():
            if not math.isfinite(value):
                raise ValueError(f"{value} cannot be part of an identity")
            return int(value) if value.is_integer() and abs(value) < 2**53 else value
        case Mapping():
            found = {str(key): plain(item) for key, item in value.items()}
            if len(found) != len(value):
                raise ValueError(f"two of the keys {list(value)} are one and the same as text")
            return found
        case tuple() | list():
            return [plain(item) for item in value]
    raise ValueError(f"a {type(value).__name__} cannot be part of an identity")


def canonical(value: Any) -> str:
    """Canonical JSON of ``value``: sorted keys, no spaces, one form for every number."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def identity(value: Any) -> str:
    """The first 20 hex digits (80 bits) of the SHA-256 of ``value``'s canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:20]
