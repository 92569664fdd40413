"""Full and read-only disks, many processes, clocks that jump, odd paths: one sentence, or the same results."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runs import (
    PROGRAM,
    Finished,
    artifacts,
    call,
    end,
    events,
    labels,
    one_sentence,
    places,
    plan,
    result,
    run,
    start,
)

# Seconds since 1970.
YEARS = (0, 1, 4_000_000_000)


class Disk:
    """A file system of its own in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._mount("-t", "tmpfs", "-o", "size=64k", "tmpfs")

    def resize(self, kilobytes: int) -> None:
        self._mount("-o", f"remount,rw,size={kilobytes}k")

    def protect(self) -> None:
        self._mount("-o", "remount,ro")

    def _mount(self, *words: str) -> None:
        done = subprocess.run(["mount", *words, str(self.folder)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("this user may not mount a file system")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if shutil.which("mount") is None or sys.platform != "linux":
        pytest.skip("no mount here")
    made = Disk(tmp_path / "disk")
    yield made
    subprocess.run(["umount", "--lazy", str(made.folder)], capture_output=True, check=False)


def without(made: Finished, store: Path, kind: str) -> Path:
    """A copy of a store without the stages of one kind."""
    shutil.copytree(made.store, store)
    for name, stage in plan(made.suite, store).stages.items():
        if stage.kind == kind:
            shutil.rmtree(places(store)[name])
    return store


def size(folder: Path) -> int:
    """Kilobytes."""
    return sum(path.stat().st_size for path in folder.rglob("*")) // 1024


def test_a_disk_that_is_full_at_any_write_is_one_sentence_and_costs_nothing_finished(
    undisturbed: Finished, tmp_path: Path, disk: Disk, everything: bool, figure: Callable[[str], None]
) -> None:
    """The disk grows by a random piece each time; nothing that was finished is made again."""
    draw, out, store = random.Random(5), tmp_path / "out", disk.folder / "store"
    need = size(undisturbed.store)
    have, fulls = 64 if everything else need * 3 // 4, 0
    disk.resize(have)
    kept: dict[str, int] = {}
    while True:
        ended = end(start(*run(undisturbed.suite, store, out)))
        found = {name: (place / "manifest.json").stat().st_mtime_ns for name, place in places(store).items()}
        assert kept.items() <= found.items(), "a finished stage was made again"
        kept = found
        if ended.code == 0:
            break
        assert ended.code == 2, ended.err
        said = one_sentence(ended.err.splitlines(keepends=True)[-1])
        assert "full disk" in said or "free space there" in said
        fulls += 1
        have += int(need * draw.uniform(0.01, 0.1 if everything else 0.5)) + 16
        disk.resize(have)
    assert fulls
    assert result(out) == result(undisturbed.out)
    assert artifacts(undisturbed.suite, store) == artifacts(undisturbed.suite, undisturbed.store)
    figure(f"full disk: {fulls} times in one run of the grid, one sentence each, results equal to the undisturbed")


def test_files_that_may_not_grow_are_one_sentence(undisturbed: Finished, tmp_path: Path) -> None:
    """A limit on the size of files, which needs no right to mount."""
    store = without(undisturbed, tmp_path / "store", "samples")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
    program = [*PROGRAM[:-1], limit + PROGRAM[-1]]
    # results are larger too, and lie elsewhere
    ended = end(start(*run(undisturbed.suite, store, tmp_path / "out"), program=program))
    assert ended.code == 2, ended.err
    assert f"the store {store}" in one_sentence(ended.err.splitlines(keepends=True)[-1])


def test_results_that_cannot_be_written_are_one_sentence(undisturbed: Finished, tmp_path: Path, disk: Disk) -> None:
    full = call(*run(undisturbed.suite, undisturbed.store, disk.folder / "out"))
    assert full.code == 2
    assert "the results folder" in one_sentence(full.err.splitlines(keepends=True)[-1])
    assert not [p for p in disk.folder.rglob("*") if p.is_file()], "nothing is left in the way"
    disk.protect()
    for words in (
        run(undisturbed.suite, undisturbed.store, disk.folder / "out"),
        ["report", undisturbed.suite, "--store", undisturbed.store, "--out", disk.folder / "out"],
        ["report", undisturbed.out, "--out", disk.folder / "out"],
    ):
        ended = call(*words)
        assert ended.code == 2
        assert "--out" in one_sentence(ended.err.splitlines(keepends=True)[-1])


def test_a_read_only_store_is_read_and_never_written(undisturbed: Finished, tmp_path: Path, disk: Disk) -> None:
    disk.resize(2 * size(undisturbed.store) + 1024)
    store = Path(shutil.copytree(undisturbed.store, disk.folder / "store"))
    disk.protect()
    suite, out = undisturbed.suite, tmp_path / "out"
    cell = plan(suite, store).cells[0].identity
    for words in (
        run(suite, store, out),
        ["plan", suite, "--store", store],
        ["status", suite, "--store", store],
        ["report", suite, "--store", store, "--out", out],
        ["store", "ls", "--store", store],
        ["store", "verify", "--store", store],
        ["store", "export", tmp_path / "carried", "--store", store],
        ["sample", cell, "--suite", suite, "--store", store, "--n", "1", "--out", tmp_path / "one.png"],
    ):
        ended = call(*words)
        assert ended.code == 0, (words, ended.err)
    assert result(out) == result(undisturbed.out)
    for words in (
        run(suite, store, out, "--set", "sampling.images=641"),
        run(suite, store, out, "--rebuild-changed", "--set", "sampling.images=641"),
        ["store", "gc", suite, "--store", store],
    ):
        ended = call(*words)
        if words[0] == "store" and ended.code == 0:
            # there was nothing to remove
            continue
        assert ended.code == 2, words
        assert "make it writable" in one_sentence(ended.err.splitlines(keepends=True)[-1])


def test_many_processes_on_one_store_make_every_stage_once(
    undisturbed: Finished, tmp_path: Path, everything: bool, figure: Callable[[str], None]
) -> None:
    many, store = 8 if everything else 3, tmp_path / "store"
    outs = [tmp_path / f"out-{number}" for number in range(many)]
    processes = [start(*run(undisturbed.suite, store, out, "--tracker", "jsonl")) for out in outs]
    for process in processes:
        ended = end(process)
        assert ended.code == 0, ended.err
    made = Counter(event["stage"] for out in outs for event in events(out) if event["kind"] == "done")
    assert made == Counter(plan(undisturbed.suite, store).stages.keys())
    assert not [label for out in outs for label in labels(events(out), "failed")]
    for out in outs:
        assert result(out) == result(undisturbed.out)
    assert artifacts(undisturbed.suite, store) == artifacts(undisturbed.suite, undisturbed.store)
    workers = sum("done" in {event["kind"] for event in events(out)} for out in outs)
    figure(f"processes: {many} on one store, {len(made)} stages made once each, by {workers} of them")


def test_a_clock_that_jumps_changes_no_result(undisturbed: Finished, tmp_path: Path, everything: bool) -> None:
    program = [sys.executable, str(Path(__file__).with_name("jumping_clock.py"))]
    store = tmp_path / "store" if everything else without(undisturbed, tmp_path / "store", "student")
    ended = end(start(*run(undisturbed.suite, store, tmp_path / "out", "--rebuild-changed"), program=program))
    assert ended.code == 0, ended.err
    assert result(tmp_path / "out") == result(undisturbed.out)
    # experts that rounds have started from are not needed again
    assert artifacts(undisturbed.suite, store).items() <= artifacts(undisturbed.suite, undisturbed.store).items()


@pytest.mark.parametrize("year", YEARS)
def test_the_dates_of_files_decide_nothing(undisturbed: Finished, tmp_path: Path, year: int) -> None:
    store = Path(shutil.copytree(undisturbed.store, tmp_path / "store"))
    for path in [store, *store.rglob("*")]:
        os.utime(path, (year, year))
    before = {name: os.stat(place).st_ino for name, place in places(store).items()}
    ended = call(*run(undisturbed.suite, store, tmp_path / "out"))
    assert ended.code == 0, ended.err
    assert {name: os.stat(place).st_ino for name, place in places(store).items()} == before
    assert result(tmp_path / "out") == result(undisturbed.out)


def test_paths_with_spaces_and_letters_of_other_alphabets(undisturbed: Finished, tmp_path: Path) -> None:
    home = tmp_path / "mit Leerzeichen, 'quotes' & <b>é漢字🙂</b> %s {x} $HOME"
    suite = Path(shutil.copytree(undisturbed.suite.parent, home, ignore=shutil.ignore_patterns("out", "store")))
    suite = suite / undisturbed.suite.name
    store, out = without(undisturbed, home / "the store", "samples"), home / "the results"
    first = end(start(*run(suite, store, out, "--tracker", "jsonl")))
    assert first.code == 0, first.err
    cell = plan(suite, store).cells[0].identity
    assert len(events(out)) > 10
    for words in (
        ["status", suite, "--store", store],
        ["report", suite, "--store", store, "--out", home / "again"],
        ["report", out, "--format", "md"],
        ["compare", out, home / "again"],
        ["sample", cell, "--suite", suite, "--store", store, "--n", "2", "--out", home / "pictures é"],
        ["export", cell, home / "a pipeline é", "--suite", suite, "--store", store],
        ["store", "verify", "--store", store],
        ["store", "export", home / "carried é", "--store", store, "--part-size", "1M"],
        ["store", "import", home / "carried é", "--store", home / "another store"],
        ["store", "gc", suite, "--store", store],
        ["store", "ls", "--store", store],
    ):
        ended = call(*words)
        assert ended.code == 0, (words, ended.err)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_knows_few_letters_gets_what_it_can_show(undisturbed: Finished, encoding: str) -> None:
    ended = subprocess.run(
        [*PROGRAM, "report", str(undisturbed.out)],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert b"half" in ended.stdout
