"""What an identity depends on, and what it must not depend on."""

from __future__ import annotations

import math
from enum import Enum, IntEnum
from pathlib import Path

import pytest
from pydantic import Field

from o2mkd_bench import Options, neutral
from o2mkd_bench.core.identity import canonical, identity, plain, resolved


class Inner(Options):
    scale: float = 1.0


class Outer(Options):
    weight: float = 1.0
    layers: tuple[str, ...] = ()
    inner: Inner = Field(default_factory=Inner)
    workers: int = neutral(2)
    needed: int


class Colour(Enum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


def test_defaults_and_neutral_fields_are_left_out():
    assert resolved(Outer(needed=1)) == {"needed": 1}
    assert resolved(Outer(needed=1, weight=1.0, layers=(), inner=Inner(), workers=9)) == {"needed": 1}
    assert resolved(Outer(needed=1, inner=Inner(scale=2), layers=("mid",))) == {
        "needed": 1,
        "inner": {"scale": 2},
        "layers": ["mid"],
    }


def test_one_form_for_every_number():
    assert canonical({"a": 1.0}) == canonical({"a": 1}) == '{"a":1}'
    assert canonical(-0.0) == "0"
    assert canonical(0.1) == "0.1"
    assert canonical(1e300) == "1e+300"
    assert canonical(True) != canonical(1)
    assert identity(2e-4) == identity(0.0002)
    assert identity(1.5) != identity(1)


def test_order_of_keys_and_kind_of_sequence_do_not_matter_and_order_of_items_does():
    assert identity({"a": 1, "b": (1, 2)}) == identity({"b": [1, 2], "a": 1})
    assert identity([1, 2]) != identity([2, 1])


def test_models_and_enums_count_as_the_data_they_are():
    assert plain({"o": Outer(needed=1), "c": Colour.RED, "l": Level.HIGH, "n": None}) == {
        "o": {"needed": 1},
        "c": "red",
        "l": 3,
        "n": None,
    }


def test_an_identity_is_80_bits_of_hex_that_never_change():
    assert identity({"a": 1}) == "015abd7f5cc57a2dd94b"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, Path("x"), b"x", {1, 2}, object()])
def test_what_has_no_one_form_is_refused(value):
    with pytest.raises(ValueError, match="cannot be part of an identity"):
        identity({"a": [value]})


def test_keys_that_are_one_as_text_are_refused():
    with pytest.raises(ValueError, match="one and the same as text"):
        identity({1: "a", "1": "b"})
