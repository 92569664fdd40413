"""An executor held to its contract: what it raises or gives wrongly is a sentence that names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ..core.errors import PluginError, UserError
from ..core.executor import Executor, Outcome, Report, Task

T = TypeVar("T")


class Held(Executor):
    """``executor``, with every answer checked.

    Raises:
        PluginError: from every method, for what the executor raises that is no UserError, and for answers of another
            kind than :class:`~o2mkd_bench.core.executor.Executor` declares.
    """

    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    @property
    def hint(self) -> str:
        found: str = self._asked("hint", lambda: self.executor.hint)
        return self._a("hint", found, isinstance(found, str), "a property that is a text")

    @property
    def slots(self) -> int:
        found: int = self._asked("slots", lambda: self.executor.slots)
        return self._a("slots", found, type(found) is int and found > 0, "a property that is an int above 0")

    def place(self, task: Task) -> bool:
        found: bool = self._asked("place()", lambda: self.executor.place(task))
        return self._a("place()", found, isinstance(found, bool), "True or False")

    def wait(self, seconds: float) -> list[Report]:
        found = self._asked("wait()", lambda: self.executor.wait(seconds))
        are = isinstance(found, list | tuple) and all(
            isinstance(one, Report) and isinstance(one.outcome, Outcome | None) for one in found
        )
        return list(self._a("wait()", found, are, "a list of Report, with an Outcome or none"))

    def end(self, number: int) -> None:
        self._asked("end()", lambda: self.executor.end(number))

    def stop(self) -> None:
        self._asked("stop()", self.executor.stop)

    def close(self) -> None:
        self._asked("close()", self.executor.close)

    def _asked(self, what: str, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except UserError:
            raise
        except Exception as error:
            name = type(self.executor).__name__
            raise PluginError(f"{what} of executor {name} failed: {type(error).__name__}: {error}") from error

    def _a(self, what: str, found: T, right: bool, wanted: str) -> T:
        if not right:
            name = type(self.executor).__name__
            raise PluginError(f"{what} of executor {name} gives {repr(found)[:60]}; make it {wanted}")
        return found
