"""Ctrl-C, SIGTERM, SIGHUP: held back while work is made that should not be cut; the second one stops at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT
"""The exit code of who was interrupted by Ctrl-C."""

Handler = Callable[[int, FrameType | None], object]

# Ctrl-C, a scheduler that wants its machine back, and, where there is such a signal, a terminal that was closed.
SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """An interrupt by a signal; ``code`` is the exit code that says which."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number


def exit_code(error: KeyboardInterrupt) -> int:
    """What a process ends with that was interrupted by ``error``."""
    return error.code if isinstance(error, Interrupted) else INTERRUPTED


@contextmanager
def twice() -> Iterator[None]:
    """The first signal raises :class:`Interrupted`; the second ends the process, whatever it is at."""
    seen = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if not seen.is_set():
            seen.set()
            raise Interrupted(number)
        if _is_second(number):
            if sys.stderr.isatty():
                # a live display has hidden the cursor
                os.write(sys.stderr.fileno(), b"\x1b[?25h")
            os._exit(128 + number)

    heard = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    # what comes after the first one may be slow too
    with _handled(dict.fromkeys(heard, stop), stays=seen.is_set):
        yield


@contextmanager
def held_back() -> Iterator[Callable[[], bool]]:
    """The first signal is noted, which the callable tells, and passed on at the end of the block.

    A second one is passed on at once. Signals that end the process by default still do.
    """
    noted: list[int] = []
    found = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in found.items() if callable(handler) and handler is not passed_over}

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        if len(noted) > 1 and _is_second(number):
            before[signal.Signals(number)](number, frame)

    with _handled(dict.fromkeys(before, note)):
        yield lambda: bool(noted)
    if noted:
        signal.raise_signal(noted[0])


def passed_over(number: int, frame: FrameType | None) -> None:
    """The handler of who is told otherwise when to stop; unlike SIG_IGN, what it starts does not inherit it."""


def _is_second(number: int) -> bool:
    # of a closed terminal both the shell and the system tell
    return not _closes(number)


def _closes(number: int) -> bool:
    return signal.Signals(number).name == "SIGHUP"


@contextmanager
def _handled(made: Mapping[signal.Signals, Handler], stays: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Signals handled by ``made``, afterwards too if it ``stays``; nothing where we are no main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if _closes(number):
            _let_go()
        made[signal.Signals(number)](number, frame)

    before = {number: signal.signal(number, handle) for number in made}
    try:
        yield
    finally:
        for number, handler in before.items():
            if not stays():
                signal.signal(number, handler)


def _let_go() -> None:
    """Output to a terminal that is gone goes nowhere: its errors would come before the checkpoints."""
    for stream in (1, 2):
        try:
            os.write(stream, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)
