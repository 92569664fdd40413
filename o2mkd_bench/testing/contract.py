"""What every plugin promises, of whatever kind: strict options, and a declaration that is known without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from ..core.identity import identity, resolved
from ..core.options import Options
from ..core.plugins import Plugin, registry

_PROBE = """
import json, sys
from o2mkd_bench.core.plugins import registry
kind, name, options, load, then = json.loads(sys.argv[1])
plugin = registry().get(kind, name)
parsed = plugin.parse(options)
target = plugin.load() if load else None
exec(then)
print(json.dumps(sorted({"torch", "sklearn", "torchvision", "matplotlib", "diffusers"} & set(sys.modules))))
"""


@cache
def _heavy(call: str) -> list[str]:
    """The heavy packages that a fresh interpreter imported for one plugin; ``call`` is JSON."""
    done = subprocess.run([sys.executable, "-c", _PROBE, call], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


class Contract:
    """The tests of every kind; subclass that of a kind instead.

    Attributes:
        name: what a suite writes, ``huber`` or ``my-package:huber``.
        options: as in a suite.
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    base: ClassVar[type | None] = None
    """What the target must derive from."""
    loaded_by_plan: ClassVar[bool] = False
    """Whether the plan imports the target, which is then torch-free as well."""

    def planned(self) -> str:
        """Python of what the plan calls, with ``plugin``, ``parsed`` and, where it is loaded, ``target`` at hand."""
        return ""

    @property
    def plugin(self) -> Plugin:
        """What is tested; never a built-in in place of another package's plugin of that name, which a suite gets."""
        found = registry().get(self.kind, self.name)
        claims = [f"{p.distribution}:{p.name}" for p in registry().all(self.kind) if p.name == self.name]
        assert len(claims) <= 1, (
            f"{self.kind} {self.name!r} of {found.distribution} would be tested, and several packages claim that name; "
            f"write name = {' or '.join(map(repr, claims))}"
        )
        return found

    @property
    def parsed(self) -> Options:
        return self.plugin.parse(self.options)

    def test_plan_needs_no_torch(self) -> None:
        """The declaration, and what the plan calls of the target, import no heavy package in a fresh interpreter."""
        call = [self.kind, self.name, dict(self.options), self.loaded_by_plan, self.planned()]
        found = _heavy(json.dumps(call))
        assert not found, f"{', '.join(found)} was imported at plan time; import it inside the function that computes"

    def test_target_is_what_the_kind_asks_for(self) -> None:
        target = self.plugin.load()
        if self.base is None:
            assert callable(target)
        else:
            assert isinstance(target, type)
            assert issubclass(target, self.base)

    def test_version_is_given(self) -> None:
        """An empty version could not be raised when results change."""
        assert self.plugin.version.strip()

    def test_unknown_option_is_refused(self) -> None:
        with pytest.raises(ValidationError, match="no_such_option"):
            self.plugin.parse({**self.options, "no_such_option": 1})

    def test_options_are_frozen(self) -> None:
        """Options are part of the identity of what they make."""
        parsed = self.parsed
        for field in type(parsed).model_fields:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(parsed, field, getattr(parsed, field))

    def test_options_come_back_from_a_stored_plan(self) -> None:
        """A stage carries its options as JSON: all of them, or those that are not at their default."""
        parsed = self.parsed
        whole = json.loads(json.dumps(parsed.model_dump(mode="json")))
        assert self.plugin.parse(whole) == parsed
        given = json.loads(json.dumps(resolved(parsed)))
        assert identity(resolved(self.plugin.parse({**whole, **given}))) == identity(resolved(parsed))
