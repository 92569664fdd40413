"""Ctrl-C: held back while work is made that should not be cut in the middle, and the second one stops at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""The exit code of who was interrupted."""

Handler = Callable[[int, FrameType | None], object]


@contextmanager
def twice() -> Iterator[None]:
    """The first interrupt raises KeyboardInterrupt as ever; the second ends the process, whatever it is at."""

    def second(number: int, frame: FrameType | None) -> None:
        if sys.stderr.isatty():
            # a live display has hidden the cursor
            os.write(sys.stderr.fileno(), b"\x1b[?25h")
        os._exit(INTERRUPTED)

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(number, second)
        raise KeyboardInterrupt

    with _handled(lambda _: first):
        yield


@contextmanager
def held_back() -> Iterator[Callable[[], bool]]:
    """The first interrupt is noted, which the callable tells, and passed on at the end of the block.

    A second one is passed on at once.
    """
    noted = threading.Event()

    def noting(before: Handler) -> Handler:
        def note(number: int, frame: FrameType | None) -> None:
            if noted.is_set():
                before(number, frame)
            noted.set()

        return note

    with _handled(noting):
        yield noted.is_set
    if noted.is_set():
        signal.raise_signal(signal.SIGINT)


@contextmanager
def _handled(make: Callable[[Handler], Handler]) -> Iterator[None]:
    """SIGINT handled by what ``make`` makes of its handler; nothing where it is ignored, or we are no main thread."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    made = make(before)
    signal.signal(signal.SIGINT, made)
    try:
        yield
    finally:
        # one that has given way to another stays so
        if signal.getsignal(signal.SIGINT) is made:
            signal.signal(signal.SIGINT, before)
