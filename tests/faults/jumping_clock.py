"""The command line under a wall clock that jumps by years, back and forth, at every reading."""

import datetime
import random
import sys
import time
from types import SimpleNamespace

from o2mkd_bench import results
from o2mkd_bench.cli import main
from o2mkd_bench.core import store

DECADE = 315_360_000
_draw, _now, _now_ns = random.Random(0), time.time, time.time_ns


class Jumping(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)


if __name__ == "__main__":
    time.time = lambda: _now() + _draw.uniform(-DECADE, DECADE)
    time.time_ns = lambda: _now_ns() + _draw.randrange(-DECADE, DECADE) * 10**9
    # in place of the class itself, which pandas knows by its layout
    store.datetime = Jumping
    results.datetime = SimpleNamespace(datetime=Jumping, UTC=datetime.UTC)
    main(sys.argv[1:])
