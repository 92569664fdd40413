"""Watching a run from another terminal, by the log that it keeps in the store."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from ..core.runlog import Follower, alive, runs

if TYPE_CHECKING:
    from ..core.session import Session

PAUSE = 0.5
"""Seconds between two looks at the log."""


class Replay:
    """The time of the event being shown, else that of now; seconds since the epoch."""

    moment: float | None = None

    def __call__(self) -> float:
        return time.time() if self.moment is None else self.moment


def follow(session: Session) -> None:
    """Show how far the newest live run of a suite is until it ends, or until Ctrl-C, which does not harm the run."""
    from .progress import display

    log = next((path for path in runs(session.store, session.suite.name) if alive(session.store, path)), None)
    if log is None:
        print(f"no run is at work on {session.suite.name} in the store {session.store.address}", file=sys.stderr)
        return
    clock, follower, ended = Replay(), Follower(log), False
    try:
        with display(sys.stderr, clock) as progress:
            while not ended:
                # asked before the log is read, so that its last lines are not missed
                over = not alive(session.store, log)
                for clock.moment, event in follower.news():
                    progress(event)
                    ended = event.kind == "end"
                clock.moment = None
                if over and not ended:
                    progress.say("the run has stopped before its end; the same command goes on where it stopped")
                    break
                time.sleep(0 if ended else PAUSE)
    except KeyboardInterrupt:
        print("the run goes on", file=sys.stderr)
    else:
        print(progress.summary(), file=sys.stderr)
