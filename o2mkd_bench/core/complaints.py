"""Validation errors as sentences: what is wrong with a value, the near miss, what would be right."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text (put it in quotes)",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "none_required": "null",
    "string_pattern_mismatch": "text that matches {pattern}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "{min_length} or more entries",
    "too_long": "{max_length} entries or fewer",
}


def near(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` when ``known`` has something close to ``word``, else nothing."""
    listed = list(known)
    # what it is already is no correction
    found = [] if word in listed else difflib.get_close_matches(word, listed, n=5)
    # swapped letters are the commonest slip, and difflib rates them no better than a wrong one (ddmi: ddim, ddpm)
    swapped = [other for other in found if sorted(other) == sorted(word)]
    return f"; did you mean {(swapped or found)[0]!r}?" if found else ""


def wanted(what: str, given: Any) -> str:
    """``expected WHAT, got GIVEN``, with long values cut."""
    text = "nothing" if given is None else repr(given)
    return f"expected {what}, got {text if len(text) <= 60 else text[:57] + '...'}"


def unknown_key(key: str, known: Sequence[str]) -> str:
    """The sentence about a key that is not among ``known``."""
    return f"unknown key{near(key, known)} (known: {', '.join(known) or 'none'})"


def not_allowed(given: Any, allowed: Sequence[str]) -> str:
    """The sentence about a value that is not among ``allowed``."""
    return f"{given!r} is not allowed{near(str(given), allowed)} (allowed: {', '.join(allowed)})"


def complaints(error: ValidationError, model: Any) -> list[tuple[tuple[str | int, ...], str, bool]]:
    """Every error as ``(path, sentence, missing)``, in pydantic's order; ``model`` is the type that was validated.

    The branches of a union each complain; those of one place are joined into one sentence by :func:`joined`.
    """
    found = error.errors(include_url=False)
    return [(e["loc"], _sentence(e, model), e["type"] == "missing") for e in found if not _follows(e, found)]


def _follows(error: ErrorDetails, all_: Sequence[ErrorDetails]) -> bool:
    """Whether a list is too short only because entries of it are wrong: pydantic counts the right ones."""
    place = error["loc"]
    return error["type"] == "too_short" and any(e["loc"][: len(place)] == place != e["loc"] for e in all_)


def joined(sentences: Sequence[str]) -> str:
    """The complaints of a union's branches about one value as one sentence."""
    unique = list(dict.fromkeys(sentences))
    if len(unique) > 1 and all(s.startswith("expected ") for s in unique):
        *first, last = (s.removeprefix("expected ") for s in unique)
        return f"expected {' or '.join([*(s.rpartition(', got ')[0] for s in first), last])}"
    return ", or ".join(unique)


def _sentence(error: ErrorDetails, model: Any) -> str:
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "missing":
        return "this key is missing; add it"
    if kind == "extra_forbidden":
        return unknown_key(str(error["loc"][-1]), _fields_at(model, error["loc"][:-1]))
    if kind in ("literal_error", "enum"):
        return not_allowed(given, [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")])
    if kind in _EXPECTED:
        bounds = {name: f"{value:g}" if isinstance(value, float) else value for name, value in context.items()}
        return wanted(_EXPECTED[kind].format(**bounds), given)
    return str(context["error"]) if kind == "value_error" else error["msg"][0].lower() + error["msg"][1:]


def _fields_at(model: Any, path: Sequence[str | int]) -> list[str]:
    """The keys that the models at ``path`` below ``model`` know; steps that are no field (list indices) are passed."""
    here = _models(model)
    for step in path:
        below = [f.annotation for m in here for name, f in m.model_fields.items() if step in (name, f.alias)]
        here = [m for annotation in below for m in _models(annotation)] or here
    return [field.alias or name for m in here for name, field in m.model_fields.items()]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Every model inside a type such as ``tuple[Model, ...] | None``."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for part in get_args(annotation) for model in _models(part)]
