"""How far a run is: a live display on a terminal, plain lines elsewhere. Never on standard output."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from ..core.events import Event
from ..report.text import si
from .common import counted

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

EVERY = 10.0
"""Seconds between two lines of progress where lines cannot be rewritten."""


@dataclass
class Running:
    """A stage in progress. ``first`` and ``last``: (seconds, steps, images) at two readings, for a rate between."""

    stage: str
    label: str
    began: float
    first: tuple[float, int, int] | None = None
    last: tuple[float, int, int] | None = None
    total: int = 0
    loss: float | None = None

    def read(self, now: float, data: Any) -> None:
        """Take in one progress event; what a resumed stage had done before does not count as speed."""
        reading = (now, int(data["done"]), int(data.get("images", data["done"])))
        self.first = self.first or reading
        self.last, self.total, self.loss = reading, int(data["total"]), data.get("loss")

    @property
    def share(self) -> float:
        return min(self.last[1] / self.total, 1.0) if self.last is not None and self.total else 0.0

    def pace(self) -> str:
        """``loss 0.0312, 8.4k images/s, 12 s left``, as far as known."""
        said = [] if self.loss is None else [f"loss {self.loss:.4g}"]
        if self.first is not None and self.last is not None and self.last[0] > self.first[0]:
            seconds, steps, images = (b - a for a, b in zip(self.first, self.last, strict=True))
            if images:
                said.append(f"{si(images / seconds)} images/s")
            if steps:
                said.append(f"{duration((self.total - self.last[1]) * seconds / steps)} left")
        return ", ".join(said)


class Progress(AbstractContextManager["Progress"]):
    """What the events of a run amount to; how it is shown is a subclass' matter."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.total = self.number = self.made = self.reused = self.failed = 0
        # several while students train together, or while a damaged input is made anew for the stage below
        self.running: list[Running] = []
        self._began = clock()

    @abstractmethod
    def say(self, text: str) -> None:
        """Show a line that stays."""

    def __call__(self, event: Event) -> None:
        handler = getattr(self, f"on_{event.kind}", None)
        if handler is not None:
            handler(event)

    def __exit__(self, *_: object) -> None:
        """Nothing to clear away where lines are never rewritten."""

    def on_plan(self, event: Event) -> None:
        # a run plans again where its first stages decide what the others are
        self.total, self.reused = self.number + event.data["stages"], event.data["reused"]

    def on_start(self, event: Event) -> None:
        if any(one.stage == event.stage for one in self.running):
            # its worker died, and it is tried once more
            self.finish(event)
        else:
            self._next()
        self.running.append(Running(event.stage, event.label, self.clock()))

    def on_reused(self, event: Event) -> None:
        """Another process has made it meanwhile."""
        self._next()
        self.reused += 1

    def on_progress(self, event: Event) -> None:
        for one in self.running:
            if one.stage == event.stage:
                one.read(self.clock(), event.data)

    def on_done(self, event: Event) -> None:
        self.made += 1
        self.finish(event)

    def on_failed(self, event: Event) -> None:
        self.failed += 1
        self.say(f"{self.place()} {event.label}: FAILED: {event.data['reason']}")
        self.finish(event)

    def on_message(self, event: Event) -> None:
        self.say(str(event.data["text"]))

    def finish(self, event: Event) -> float:
        """Forget a stage that has ended; how many seconds it took."""
        ended = next((one for one in reversed(self.running) if one.stage == event.stage), None)
        if ended is None:
            return 0.0
        self.running.remove(ended)
        return self.clock() - ended.began

    def _next(self) -> None:
        self.number += 1
        self.total = max(self.total, self.number)

    def place(self) -> str:
        """``[ 3/24]``."""
        return f"[{self.number:>{len(str(self.total))}}/{self.total}]"

    def summary(self) -> str:
        """``made 21 stages in 8 s, 3 were in the store, 1 failed``."""
        said = [f"made {counted(self.made, 'stage')} in {duration(self.clock() - self._began)}"]
        said += [f"{self.reused} were in the store"] if self.reused else []
        said += [f"{self.failed} failed"] if self.failed else []
        return ", ".join(said)


class PlainProgress(Progress):
    """A line when a stage starts, ends or fails, and one now and then between."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self.stream = stream
        self._said = clock()

    def say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def on_plan(self, event: Event) -> None:
        super().on_plan(event)
        self.say(f"{counted(event.data['stages'], 'stage')} to make, {self.reused} in the store")

    def on_start(self, event: Event) -> None:
        super().on_start(event)
        self._said = self.clock()
        self.say(f"{self.place()} {event.label}")

    def on_progress(self, event: Event) -> None:
        super().on_progress(event)
        if self.running and self.clock() - self._said >= EVERY:
            self._said = self.clock()
            now = self.running[-1]
            said = ", ".join(filter(None, (f"{now.share:.0%}", now.pace())))
            self.say(f"{self.place()} {now.label}: {said}")

    def finish(self, event: Event) -> float:
        seconds = super().finish(event)
        if event.kind == "done":
            self.say(f"{self.place()} {event.label}: done in {duration(seconds)}")
        return seconds


class LiveProgress(Progress):
    """Two lines at the foot of the terminal, rewritten in place: the stage, and how far it is."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.live import Live

        super().__init__(clock)
        self.console = console
        # gone at the end: what stays are the failures said on the way, and the table
        self._live = Live(self, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveProgress:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        style = "red" if "FAILED" in text else "yellow"
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        # the display is drawn by a thread of its own: take what is running once
        now = next(reversed([*self.running]), None)
        label = now.label if now is not None else "reading the store" if not self.total else "writing the tables"
        first = Text.assemble((self.place() if self.total else "", "dim"), " ", (label, "bold"))
        first.no_wrap, first.overflow = True, "ellipsis"
        if now is None or now.last is None:
            return Group(first, Text(f"{'':>7} {duration(self.clock() - now.began)}" if now else "", style="dim"))
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(ratio=1)
        line.add_column(justify="right", no_wrap=True)
        line.add_row(
            ProgressBar(total=1.0, completed=now.share, complete_style="cyan", finished_style="green"),
            Text(f"{now.share:>4.0%}  {now.pace()}", style="dim"),
        )
        return Group(first, line)


def display(stream: TextIO, clock: Callable[[], float] = time.monotonic) -> Progress:
    """The display that fits ``stream``."""
    from rich.console import Console

    console = Console(file=stream)
    live = console.is_terminal and not console.is_dumb_terminal
    return LiveProgress(console, clock) if live else PlainProgress(stream, clock)


def duration(seconds: float) -> str:
    """``1.7 s``, ``45 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
