"""All verbs as one command line, and how it ends."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import typer

from ..core.errors import CorruptArtifact, StageFailed, UserError
from ..core.interrupts import INTERRUPTED
from .export import export
from .plan import plan, status
from .plugins import doctor, new, plugins, schema
from .report import compare, report
from .run import run
from .sample import sample
from .store import app as store

PROGRAM = "o2mkd-bench"
FAILED, WRONG, BUG = 1, 2, 70
LONGEST = 2000

app = typer.Typer(
    name=PROGRAM,
    help="Benchmark knowledge distillation and fast sampling of diffusion models.",
    epilog="""A first session:

- `o2mkd-bench plan suites/quickstart.yaml` shows what would be made
- `o2mkd-bench run suites/quickstart.yaml` makes what is missing and prints the table; stop it when you like,
  the same command goes on
- `o2mkd-bench report results/quickstart --format latex` prints the table once more""",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        print(f"{PROGRAM} {importlib.metadata.version(PROGRAM)}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None: ...


_SUITES, _RESULTS, _HERE = "Suites", "Results", "Plugins and this machine"
app.command(rich_help_panel=_SUITES)(run)
app.command(rich_help_panel=_SUITES)(plan)
app.command(rich_help_panel=_SUITES)(status)
app.command(rich_help_panel=_SUITES)(schema)
app.command(rich_help_panel=_RESULTS)(report)
app.command(rich_help_panel=_RESULTS)(compare)
app.command(rich_help_panel=_RESULTS)(sample)
app.command(rich_help_panel=_RESULTS)(export)
app.add_typer(store, rich_help_panel=_RESULTS)
app.command(rich_help_panel=_HERE)(plugins)
app.add_typer(new, rich_help_panel=_HERE)
app.command(rich_help_panel=_HERE)(doctor)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 done, 1 something failed, 2 the suite or the command line is wrong, 70 a bug of ours.

    Raises:
        SystemExit: always.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal that lacks a letter shows another, and so does a path that is no text
            stream.reconfigure(errors="replace")
    try:
        code = _run(words or ["--help"])
        sys.stdout.flush()
    except OSError as error:
        # the reader (`| head`) has left, or a disk is full, maybe another: what can still be said is said, and nothing
        # is flushed again on the way out
        with suppress(OSError):
            sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
        if not isinstance(error, BrokenPipeError):
            code = _complain(f"{error.strerror}; make room, or print to another place", WRONG)
    raise SystemExit(code)


def _run(words: Sequence[str]) -> int:
    try:
        return int(app(list(words), prog_name=PROGRAM, standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted", INTERRUPTED)
    except UserError as error:
        return _complain(error, WRONG)
    except SystemExit as error:
        # how click leaves when the reader has left
        if isinstance(error.__context__, BrokenPipeError):
            raise
        return _complain(f"a plugin ended the program with SystemExit({error.code}); let it raise an error", FAILED)
    except (CorruptArtifact, StageFailed) as error:
        return _complain(f"{error}; run the suite again, which makes damaged artifacts anew", FAILED)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC):
            raise
        if (text := _usage(error)) is not None:
            return _complain(text, WRONG)
        if os.environ.get("O2MKD_TRACEBACK"):
            traceback.print_exc()
        return _complain(
            f"{type(error).__name__}: {error}; this is a bug in {PROGRAM}, please report it "
            "(set O2MKD_TRACEBACK=1 for the traceback)",
            BUG,
        )


def _usage(error: Exception) -> str | None:
    """What is wrong with the command line, where that is what the error says."""
    # of these errors typer exports this one; their base lies elsewhere from version to version
    if not isinstance(error, typer.BadParameter.__mro__[1]):
        return None
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else PROGRAM
    text = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
    return f"{text[:1].lower()}{text[1:]}; see {where} --help"


def _complain(what: object, code: int) -> int:
    # what a suite or a library says in it could be lines, or orders to a terminal
    words = " ".join(str(what).split())
    what = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words[:LONGEST]) + "…" * (len(words) > LONGEST)
    print(f"error: {what}" if code != INTERRUPTED else what, file=sys.stderr)
    return code
