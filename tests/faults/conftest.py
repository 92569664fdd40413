"""Faults: a sample of each kind in every test run, all of them where ``O2MKD_FAULTS=all`` (``make faults``)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import Finished, finished

ALL = os.environ.get("O2MKD_FAULTS") == "all"
_FIGURES: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.faults)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _FIGURES:
        terminalreporter.section("faults")
        for line in _FIGURES:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def everything() -> bool:
    """Whether all faults are asked for, and not a sample."""
    return ALL


@pytest.fixture
def figure() -> Callable[[str], None]:
    """Says a line at the end of the run."""
    return _FIGURES.append


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, everything: bool) -> Finished:
    """The grid made once without any fault; copy its store before changing it."""
    return finished(tmp_path_factory.mktemp("undisturbed"), everything)
