"""Suites and command lines that nobody should write: exit code 0 or 2, one sentence, and not a file out of place."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import ROOT, Ended, call, one_sentence

from o2mkd_bench import runner
from o2mkd_bench.core.errors import UserError

EVERYTHING = os.environ.get("O2MKD_FAULTS") == "all"
SECONDS = 30
MEMORY = 3 << 30
SUITES = {
    path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "suites").glob("*.yaml"))
}
BEGUN = "the run would begin"


def examples(number: int) -> settings:
    """So many examples, a fiftieth in the sample, which is the same every time."""
    return settings(
        max_examples=number if EVERYTHING else max(number // 50, 20),
        derandomize=not EVERYTHING,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# what changes a file system: how many of its arguments are paths, and where its descriptors of folders begin
PATHS = {"os.mkdir": (1, 2), "os.remove": (1, 1), "os.rmdir": (1, 1), "os.rename": (2, 2), "os.link": (2, 2)}


class Guard:
    """Notes every file that is written, and where."""

    def __init__(self) -> None:
        self.active, self.allowed, self.strays = False, (), []
        sys.addaudithook(self._hear)

    @contextlib.contextmanager
    def over(self, *allowed: Path) -> Iterator[None]:
        self.active, self.allowed, self.strays = True, tuple(map(str, allowed)), []
        try:
            yield
        finally:
            self.active = False

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                self._note(path)
        elif event in PATHS and all(descriptor == -1 for descriptor in arguments[PATHS[event][1] :]):
            # a path below a descriptor is below what was looked at when that was opened
            for path in arguments[: PATHS[event][0]]:
                self._note(path)

    def _note(self, path: Any) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            full = os.path.abspath(os.fsdecode(path))
            if full != os.devnull and not any(full == a or full.startswith(a + os.sep) for a in self.allowed):
                self.strays.append(full)


GUARD = Guard()


class Sandbox:
    """A working directory, and a command line in it that is watched."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.suite = folder, folder / "suite.yaml"
        self.slowest, self.ended = 0.0, Counter[int]()

    def call(self, *words: object) -> Ended:
        allowed = [self.folder / name for name in ("out", "store", "cache", "results", ".o2mkd")]
        began = time.monotonic()
        signal.alarm(SECONDS)
        try:
            with GUARD.over(*allowed):
                ended = call(*words)
        finally:
            signal.alarm(0)
        self.slowest = max(self.slowest, time.monotonic() - began)
        assert not GUARD.strays, (words, GUARD.strays)
        self.ended[ended.code] += 1
        return ended

    def refused_or_done(self, *words: object) -> Ended:
        ended = self.call(*words)
        assert ended.code in (0, 2), (words, ended.err[-2000:])
        if ended.code == 2:
            one_sentence(ended.err.splitlines(keepends=True)[-1])
            assert ended.err.count("error:") >= 1
            assert len(ended.err) < 5000, ended.err[:2000]
        return ended


@pytest.fixture
def sandbox(tmp_path: Path, request: pytest.FixtureRequest, figure: Callable[[str], None]) -> Iterator[Sandbox]:
    folder = tmp_path

    def begin(*_: object, **__: object) -> None:
        raise UserError(BEGUN)

    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {SECONDS} s")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(runner, "run_session", begin)
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setenv("O2MKD_BENCH_CACHE", str(folder / "cache"))
        patch.setenv("MPLCONFIGDIR", str(folder / "cache" / "matplotlib"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        for name in ("CIFAR10_ROOT", "SYSTEMS_ROOT", "O2MKD_STORE"):
            patch.delenv(name, raising=False)
        before, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
        made = Sandbox(folder)
        yield made
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)
        if (calls := made.ended.total()) > 15:
            codes = ", ".join(f"{number} x {code}" for code, number in sorted(made.ended.items()))
            figure(f"{request.node.name}: {calls} command lines, exit codes {codes}, the slowest {made.slowest:.1f} s")


# ---- suites ----------------------------------------------------------------------------------------------------------

NUMBERS = st.sampled_from([0, -1, 1, 2, 3, 7, 10**9, 10**18, 10**400, 2**31, -(10**9), 0.5, -0.0, 1e-300, 1e308])
ODD = st.sampled_from(
    [
        *("", " ", "..", ".", "/", "../../escape", "/tmp/escape", "a/b", "~", "~root/x", "C:\\x", "con", "-", "--help"),
        *(
            "\0",
            "a\0b",
            "\x1b[31m",
            "\ud800",
            "\u202e",
            "é漢字🙂",
            "x" * 300,
            "y" * 100_000,
            "\n",
            "a\nb",
            "null",
            "*",
            "[",
        ),
        *(
            "<script>alert(1)</script>",
            "<img src=x onerror=alert(1)>",
            "{{7*7}}",
            "$(id)",
            "`id`",
            "${HOME}",
            "${",
            "%s",
        ),
        *("10**9", "1e9", "1e999", "9" * 5000, "1_0", "0x10", "nan", ".inf", "auto", "on", "yes", "2026-01-01", "1:30"),
        *("ddim", "o2mkd", "digits", "fid", "single", "uniform", "snr", "embedded", "epsilon", "cuda:99", "none"),
    ]
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, ODD, st.floats(), st.integers(), st.text(max_size=20))
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(ODD, inner, max_size=3),
        st.lists(inner, max_size=1).map(lambda found: found * 50),
    ),
    max_leaves=8,
)


def spots(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested data."""
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from spots(value, (*path, key))


def mutate(data: Any, path: tuple[Any, ...], how: str, value: Any) -> Any:
    """``data`` with one place of it changed."""
    if not path:
        return value if how == "replace" else data
    holder = data
    for key in path[:-1]:
        holder = holder[key]
    if how == "delete":
        del holder[path[-1]]
    elif how == "replace":
        holder[path[-1]] = value
    elif how == "repeat" and isinstance(holder, list):
        holder.extend(copy.deepcopy(holder))
    elif how == "add" and isinstance(holder, dict):
        holder[str(value)[:50]] = value
    elif how == "nest":
        holder[path[-1]] = [holder[path[-1]]]
    elif how == "rename" and isinstance(holder, dict):
        holder[str(value)[:50]] = holder.pop(path[-1])
    return data


@st.composite
def suites(draw: Callable[[Any], Any]) -> Any:
    """A shipped suite with a few places changed, small where it was small."""
    data = copy.deepcopy(SUITES[draw(st.sampled_from(sorted(SUITES)))])
    if draw(st.booleans()):
        data["extends"] = str(ROOT / "suites" / "quickstart.yaml")
    for _ in range(draw(st.integers(1, 3))):
        found = list(spots(data))
        how = draw(st.sampled_from(["replace", "replace", "replace", "delete", "repeat", "add", "nest", "rename"]))
        data = mutate(data, draw(st.sampled_from(found)), how, draw(JUNK))
    return data


VERBS = st.sampled_from(["plan", "plan", "plan", "status", "run", "report"])


@examples(6000)
@given(data=suites(), verb=VERBS)
def test_suites_with_anything_anywhere(sandbox: Sandbox, data: Any, verb: str) -> None:
    try:
        text = yaml.safe_dump(data, allow_unicode=True)
    except (yaml.YAMLError, ValueError):
        text = repr(data)
    sandbox.suite.write_bytes(text.encode("utf-8", "surrogatepass"))
    sandbox.refused_or_done(verb, sandbox.suite, "--store", sandbox.folder / "store")


TEXTS = {name: (ROOT / "suites" / name).read_bytes() for name in SUITES}


@st.composite
def texts(draw: Callable[[Any], Any]) -> bytes:
    """The bytes of a shipped suite, cut, joined and spliced."""
    text = bytearray(TEXTS[draw(st.sampled_from(sorted(TEXTS)))])
    for _ in range(draw(st.integers(1, 4))):
        place, length = draw(st.integers(0, len(text))), draw(st.integers(0, 40))
        text[place : place + length] = draw(
            st.one_of(
                st.binary(max_size=20),
                st.sampled_from(
                    [b"&a ", b"*a ", b"<<: *a\n", b"!!python/object/apply:os.system [id]\n", b"\t", b"- ", b": ", b"? "]
                ),
                st.sampled_from(
                    [b"{", b"}", b"[" * 500, b"'", b'"', b"|", b">", b"%YAML 9.9\n", b"---\n", b"\xff\xfe"]
                ),
            )
        )
    return bytes(text)


@examples(2000)
@given(text=texts())
def test_texts_that_are_hardly_yaml(sandbox: Sandbox, text: bytes) -> None:
    sandbox.suite.write_bytes(text)
    sandbox.refused_or_done("plan", sandbox.suite, "--store", sandbox.folder / "store")


# ---- command lines ---------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    [
        *("run", "plan", "status", "report", "compare", "sample", "export", "store", "plugins", "schema", "new"),
        *("ls", "gc", "verify", "import", "plugin", "my-method", "samplers", "kd_methods", "3fa9c1d2", "--", "-", ""),
        *(
            "--set",
            "--only",
            "--out",
            "--store",
            "--device",
            "--seed",
            "--json",
            "--fail-fast",
            "--format",
            "--n",
            "-n",
        ),
        *("--tracker", "--part-size", "--state", "--dry-run", "--discard", "--suite", "--dtype", "--rebuild-changed"),
        *("suite.yaml", "nothing.yaml", "out", "store", "results", ".", "suite.yaml/x", "a\x1b[31mb", "é漢", "\udcff"),
        *("training.lr=1", "students.half.width=0.3", "a.b.c=1", "=", "x=", "seeds=[", "budgets=[10]", "methods=[]"),
        *("method=output", "method=*", "metod=output", "sampler=ddim", "seed=0", "cpu", "cuda:7", "auto", "tpu", "-1"),
        *(
            "0",
            "7",
            "10000000000000000000000",
            "1e9",
            "md",
            "csv",
            "latex",
            "jsonl",
            "16M",
            "0",
            "fp16",
            "-h",
            "--version",
        ),
    ]
)


@examples(2000)
@given(words=st.lists(st.one_of(WORDS, WORDS, WORDS, st.text(max_size=12)), max_size=7))
def test_command_lines_of_any_words(sandbox: Sandbox, words: list[str]) -> None:
    sandbox.suite.write_bytes(TEXTS["quickstart.yaml"])
    # never a store or folder of its own choice, and nothing that goes on for long
    end = ["--store", "store"] if words and words[0] in ("run", "plan", "status", "report", "sample", "export") else []
    ended = sandbox.call(*words, *end)
    assert ended.code in (0, 1, 2), (words, ended.err)
    if ended.code == 2:
        one_sentence(ended.err.splitlines(keepends=True)[-1])


# ---- results of others -----------------------------------------------------------------------------------------------


@st.composite
def documents(draw: Callable[[Any], Any]) -> Any:
    """A results document with a few places changed."""
    data = json.loads(DOCUMENT)
    for _ in range(draw(st.integers(1, 3))):
        found = list(spots(data))
        how = draw(st.sampled_from(["replace", "replace", "delete", "repeat", "add", "nest", "rename"]))
        data = mutate(data, draw(st.sampled_from(found)), how, draw(JUNK))
    return data


DOCUMENT = (ROOT / "results" / "quickstart" / "results.json").read_text(encoding="utf-8")


FORMATS = ["table", "csv", "md", "latex", "json"]


@examples(1500)
@given(data=documents(), format=st.sampled_from([*FORMATS, "compare", "write", "merge"]))
def test_results_with_anything_anywhere(sandbox: Sandbox, data: Any, format: str) -> None:
    folder = sandbox.folder / "theirs"
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(data), encoding="utf-8")
    if format == "compare":
        sandbox.refused_or_done("compare", folder, ROOT / "results" / "quickstart")
    elif format == "write":
        sandbox.refused_or_done("report", folder, "--out", sandbox.folder / "out")
    elif format == "merge":
        sandbox.refused_or_done("report", ROOT / "results" / "quickstart", folder, "--out", sandbox.folder / "out")
    else:
        ended = sandbox.refused_or_done("report", folder, "--format", format)
        assert "\x1b" not in ended.out


# ---- what once went wrong --------------------------------------------------------------------------------------------

TEACHER = SUITES["quickstart.yaml"]["teachers"][0]
UNET = {"block_out_channels": [32, 64], "norm_num_groups": 8}
LAUGHS = 'a: &a ["lol","lol","lol","lol","lol","lol","lol","lol","lol"]\n' + "".join(
    f"{after}: &{after} [{','.join([f'*{before}'] * 9)}]\n" for before, after in pairwise("abcdefghi")
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}], k{i}: 1}}\n" for i in range(1, 12)
)
ABSURD: dict[str, tuple[Any, str]] = {
    "a name that climbs": ({"name": "../../escape"}, "a name that a folder can have"),
    "an absolute name": ({"name": "/tmp/escape"}, "a name that a folder can have"),
    "a hidden name": ({"name": ".."}, "a name that a folder can have"),
    "a NUL in a name": ({"name": "a\0b"}, "can be printed"),
    "a long name": ({"name": "é" * 150}, "a name that a folder can have"),
    "a line in a name": ({"students": [{"name": "a\nb"}]}, "can be printed"),
    "a colour in a name": ({"teachers": [{**TEACHER, "name": "\x1b[31mred"}]}, "can be printed"),
    "a line in a label": ({"methods": [{"output": {}, "label": "a\nb"}]}, "can be printed"),
    "students: 10**9": ({"wrappers": [{"o2mkd": {"students": 10**9}}]}, "at most 1000"),
    "students: 10**9 of one": ({"wrappers": [{"single": {"students": 10**9}}]}, "at most 1000"),
    "timesteps: 10**12": ({"teachers": [{**TEACHER, "schedule": {"timesteps": 10**12}}]}, "at most 100000"),
    "steps: 10**9": ({"samplers": [{"ddim": {"steps": 10**9}}]}, "do not fit into 1000 training timesteps"),
    "many steps": ({"samplers": [{"ddim": {"steps": list(range(1, 900))}}]}, "100 entries or fewer"),
    "many seeds": ({"seeds": list(range(20_000))}, "1000 entries or fewer"),
    "a large grid": ({"budgets": list(range(1000, 4000))}, "at most 25000 can be planned"),
    "a budget of 10**20": ({"budgets": [10**20]}, "at most 1000000000000"),
    "a budget of 10**400": ({"budgets": [10**400]}, "a whole number above 0"),
    "a budget of 5000 digits": ({"budgets": ["9" * 5000]}, "a whole number above 0"),
    "width: 1e300": ({"students": [{"name": "a", "width": 1e300}]}, "at most 64"),
    "blocks: 10**9": ({"students": [{"name": "a", "blocks": 10**9}]}, "at most 64"),
    "a network of 10**9 layers": (
        {
            "teachers": [
                {"name": "a", "train": {"model": {"unet2d": {**UNET, "layers_per_block": 10**9}}, "images": "80k"}}
            ]
        },
        "at most 1000",
    ),
    "a device as a config": ({"students": [{"name": "a", "config": "/dev/zero"}]}, "more than 1024 KiB"),
    "billion laughs": (LAUGHS, "with its aliases the YAML has more than 100000 values"),
    "merge keys that multiply": (MERGES, "with its aliases the YAML has more than 100000 values"),
    "deep lists": ("[" * 100_000, "more than 50 levels"),
    "deep mappings": ("{a: " * 200 + "1" + "}" * 200, "more than 50 levels"),
    "a file of 2 MiB": ("# " + "x" * (2 << 20), "more than 1024 KiB"),
    "itself": ("extends: suite.yaml", "is a circle"),
    "a device": ("extends: /dev/zero", "more than 1024 KiB"),
    "a folder": ("extends: .", "cannot be read"),
}


@pytest.mark.parametrize("what", ABSURD)
@pytest.mark.parametrize("verb", ["plan", "report"])
def test_absurd_suites_are_refused_fast(sandbox: Sandbox, what: str, verb: str) -> None:
    content, said = ABSURD[what]
    text = content if isinstance(content, str) else yaml.safe_dump({**SUITES["quickstart.yaml"], **content})
    sandbox.suite.write_text(text, encoding="utf-8")
    ended = sandbox.refused_or_done(verb, sandbox.suite, "--store", sandbox.folder / "store")
    assert ended.code == 2
    assert said in one_sentence(ended.err)
    assert not (sandbox.folder / "results").exists()


def test_a_circle_of_files_and_a_long_chain_of_them(sandbox: Sandbox) -> None:
    for number in range(30):
        (sandbox.folder / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n", encoding="utf-8")
    assert "a chain of more than 20 files" in sandbox.refused_or_done("plan", sandbox.folder / "0.yaml").err
    (sandbox.folder / "5.yaml").write_text("extends: 0.yaml\n", encoding="utf-8")
    assert "is a circle" in sandbox.refused_or_done("plan", sandbox.folder / "0.yaml").err


HTML = ("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[a](javascript:alert(1))", "$\\frac{", "a|b")


@pytest.mark.parametrize("name", HTML)
def test_names_are_text_wherever_they_stand(sandbox: Sandbox, name: str) -> None:
    changes = {"students": [{"name": name, "width": 0.5}], "teachers": [{**TEACHER, "name": name}], "seeds": [0]}
    sandbox.suite.write_text(yaml.safe_dump({**SUITES["quickstart.yaml"], **changes}), encoding="utf-8")
    words = ["--store", sandbox.folder / "store", "--out", sandbox.folder / "out"]
    assert sandbox.refused_or_done("report", sandbox.suite, *words).code == 0
    page = (sandbox.folder / "out" / "results.md").read_text(encoding="utf-8")
    assert not re.search(r"(?<!\\)<|\]\(", page)
    assert len({line.count(" | ") for line in page.splitlines() if line.startswith("| ")}) == 1
    # pictures are drawn of what has scores
    document = json.loads(DOCUMENT)
    for row in document["rows"]:
        row |= {"student": name, "teacher": name}
    theirs = sandbox.folder / "theirs"
    theirs.mkdir()
    (theirs / "results.json").write_text(json.dumps(document), encoding="utf-8")
    assert sandbox.refused_or_done("report", theirs, "--out", sandbox.folder / "out").code == 0
    assert not list((sandbox.folder / "out").rglob("*.html"))
