"""``python -m o2mkd_bench``, and the command ``o2mkd-bench``, which also ends quietly while it still imports."""

from __future__ import annotations

import sys

from .core.interrupts import INTERRUPTED


def main() -> None:
    """See :func:`o2mkd_bench.cli.main`.

    Raises:
        SystemExit: always.
    """
    try:
        from .cli import main as door

        door()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
