"""YAML with origins, environment, extends and overrides."""

from __future__ import annotations

from pathlib import Path

import pytest

from o2mkd_bench.core import source
from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.source import Origin


def parse(text: str) -> source.Node:
    return source.parse(text, "x.yaml")


def said(text: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(text)
    return str(caught.value)


def test_every_value_knows_the_line_of_its_key() -> None:
    root = parse("a: 1\nb:\n  - x\n  - c:\n      d: 2\n")
    assert root.plain() == {"a": 1, "b": ["x", {"c": {"d": 2}}]}
    assert str(source.locate(root, ("b", 1, "c", "d"))) == "x.yaml:5"
    assert str(source.locate(root, ("b", 1))) == "x.yaml:4"
    assert str(source.locate(root, ("b", 7))) == "x.yaml:2"


def test_duplicate_key_names_both_lines() -> None:
    assert said("a: 1\nb: 2\na: 3\n") == "x.yaml:3: the key 'a' is given twice, first at x.yaml:1; keep one"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1\nb: 2\n", "x.yaml:2: this is not valid YAML"),
        ("a: 1\n\tb: 2\n", "x.yaml:2: this is not valid YAML"),
        ("a: \x01\n", "x.yaml: this is not valid YAML: special characters are not allowed"),
        ("a: !!python/object:os.system {}\n", "x.yaml:1: the YAML tag tag:yaml.org,2002:python/object:os.system"),
        ("a: !!python/name:os.system\n", "x.yaml:1: this is not valid YAML: could not determine a constructor"),
        ("a: &x [*x]\n", "x.yaml:1: the YAML anchor contains itself"),
        ("[1]: 2\n", "x.yaml:1: a key must be plain text"),
        ("b: 1\n<<: 2\n", "x.yaml:2: << must be given a mapping"),
        ("a: 2024-13-45\n", "x.yaml:1: '2024-13-45' is no value"),
    ],
)
def test_bad_yaml_is_one_sentence_with_its_line(text: str, words: str) -> None:
    assert said(text).startswith(words)


def test_anchors_and_merge_keys() -> None:
    root = parse("a: &a {x: 1, y: 2}\nb: &b {y: 3, z: 4}\nc:\n  <<: [*a, *b]\n  x: 9\nd: {<<: *a}\ne: *a\n")
    assert root.plain()["c"] == {"x": 9, "y": 2, "z": 4}
    assert root.plain()["d"] == root.plain()["e"] == {"x": 1, "y": 2}
    assert source.locate(root, ("c", "x")).line == 5


def test_keys_are_text_as_written() -> None:
    assert parse("on: 1\n2: x\n").plain() == {"on": 1, "2": "x"}


def test_environment_in_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("N", "12")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("GONE", raising=False)
    root = parse(
        'plain: ${N}\nquoted: "${N}"\npart: a${N}b${N}\ndefault: ${GONE:-1.5}\nlist: ${GONE:-text}\n'
        'none: ${GONE:-}\nempty: "${GONE:-}"\nset: "${EMPTY}"\nunset: ${EMPTY:-7}\n'
    )
    assert root.plain() == {
        "plain": 12,
        "quoted": "12",
        "part": "a12b12",
        "default": 1.5,
        "list": "text",
        "none": None,
        "empty": "",
        "set": "",
        "unset": 7,
    }


def test_environment_errors_name_the_variable_and_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GONE", raising=False)
    assert said("a: 1\nb: x${GONE}\n") == (
        "x.yaml:2: the environment variable GONE is not set; set it, or write ${GONE:-default}"
    )
    assert "'${a b}' is no environment variable" in said("a: ${a b}\n")
    assert "'a/${HOME' opens a variable and leaves it open; write ${NAME}" in said("a: a/${HOME\n")


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def test_extends_merges_mappings_and_replaces_lists(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, base="a: {x: 1, y: {p: 1, q: 2}}\nl: [1, 2]\nonly: base\n", mid="extends: base.yaml\nl: [5]\n")
    write(tmp_path / "sub", top="extends: ../mid.yaml\na:\n  y: {q: 3}\n")
    root = source.read(tmp_path / "sub" / "top.yaml")
    assert root.plain() == {"a": {"x": 1, "y": {"p": 1, "q": 3}}, "l": [5], "only": "base"}
    assert str(source.locate(root, ("only",))) == f"{tmp_path}/base.yaml:3"
    assert str(source.locate(root, ("a", "y", "q"))) == f"{tmp_path}/sub/top.yaml:3"


def test_extends_errors(tmp_path: Path) -> None:
    write(tmp_path, a="name: a\nextends: b.yaml\n", b="extends: a.yaml\n", c="\nextends: aa.yaml\n", d="extends: [a]\n")
    write(tmp_path, e="extends: list.yaml\n", list="- 1\n")
    cases = {
        "a": f"{tmp_path}/b.yaml:1: extends: a.yaml -> b.yaml -> a.yaml is a circle; take one of the links out",
        "c": f"{tmp_path}/c.yaml:2: extends: {tmp_path}/aa.yaml: there is no such file; did you mean 'a.yaml'?",
        "d": f"{tmp_path}/d.yaml:1: extends: expected the path of another suite file, got ['...']",
        "e": f"{tmp_path}/e.yaml:1: extends: {tmp_path}/list.yaml: a suite must be a mapping",
    }
    for name, words in cases.items():
        with pytest.raises(UserError) as caught:
            source.read(tmp_path / f"{name}.yaml")
        assert str(caught.value).startswith(words.removesuffix("['...']"))


def test_a_list_of_bases_is_shown_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("extends: [small.yaml]")
    with pytest.raises(UserError, match=r"expected the path of another suite file, got \['small\.yaml'\]$"):
        source.read(tmp_path / "x.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.yaml").write_text("")
    cases = {
        "quickstrat.yaml": "there is no such file; did you mean 'quickstart.yaml'?",
        "quickstart.yaml": "this is not a text file in UTF-8",
        "empty.yaml": "a suite must be a mapping of keys",
        ".": "the file cannot be read: Is a directory",
        "nowhere/x.yaml": "there is no such file",
    }
    for name, words in cases.items():
        with pytest.raises(UserError) as caught:
            source.read(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: {words}")


TREE = """
training: {lr: 1}
empty:
scalar: 3
samplers: [{ddim: {steps: [1]}}, {dpm: {steps: [1]}, label: fast}, ddpm, {dpm: {steps: [2]}}]
twins: [a, b, a]
teachers: [{name: small, train: {model: unet2d, images: 5}}]
"""


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("training.lr=1e-4", ("training", "lr"), "1e-4"),
        ("training.new.deep=2", ("training", "new", "deep"), 2),
        ("empty.key=a=b", ("empty", "key"), "a=b"),
        ("samplers.ddim.steps=[4]", ("samplers", 0, "ddim", "steps"), [4]),
        ("samplers.fast.dpm.steps=7", ("samplers", 1, "dpm", "steps"), 7),
        ("samplers.dpm.steps=6", ("samplers", 3, "dpm", "steps"), 6),
        ("samplers.3.dpm.steps=8", ("samplers", 3, "dpm", "steps"), 8),
        ("samplers.ddpm.steps=9", ("samplers", 2), {"ddpm": {"steps": 9}}),
        ("samplers.ddpm={steps: 3}", ("samplers", 2), {"ddpm": {"steps": 3}}),
        ("samplers.fast=ddim", ("samplers", 1), "ddim"),
        ("teachers.small.train.images=1k", ("teachers", 0, "train", "images"), "1k"),
        ("teachers.0.train.model.unet2d.c=[8]", ("teachers", 0, "train", "model"), {"unet2d": {"c": [8]}}),
        ("empty=", ("empty",), None),
    ],
)
def test_override(assignment: str, path: tuple[str | int, ...], value: object) -> None:
    before = parse(TREE)
    after = source.override(before, assignment)
    node = after
    for key in path:
        child = node.child(key)
        assert child is not None
        node = child
    assert node.plain() == value
    assert before.plain() == parse(TREE).plain()


def test_override_is_the_origin_of_what_it_set() -> None:
    root = source.override(parse(TREE), "samplers.ddim.steps=[4]")
    assert str(source.locate(root, ("samplers", 0, "ddim", "steps", 0))) == "--set samplers.ddim.steps=[4]"
    assert str(source.locate(root, ("samplers", 0, "ddim"))) == "x.yaml:5"


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("training.lr", "write it as key=value, for example training.lr=1e-4"),
        ("=3", "write it as key=value"),
        ("a..b=3", "write it as key=value"),
        (
            "samplers.ddmi.steps=1",
            "samplers has no item 'ddmi'; did you mean 'ddim'? (items: ddim, fast, dpm, ddpm, dpm)",
        ),
        ("twins.a=1", "twins has 2 items 'a'; use a number: 0, 2"),
        ("samplers.9=1", "samplers has 4 items, counted from 0"),
        ("samplers.label=1", "samplers has no item 'label'"),
        ("scalar.x=1", "scalar is 3, which has no key 'x'"),
        ("training.lr=[", "this is not valid YAML: "),
    ],
)
def test_override_errors_name_the_flag(assignment: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        source.override(parse(TREE), assignment)
    assert str(caught.value).startswith(f"--set {assignment}: {words}")


def test_show_writes_paths_as_overrides_read_them() -> None:
    root = parse(TREE)
    assert source.show(root, ("samplers", 0, "ddim", "steps")) == "samplers.ddim.steps"
    assert source.show(root, ("samplers", 1)) == "samplers.fast"
    assert source.show(root, ("samplers", 1, "label")) == "samplers.1.label"
    assert source.show(root, ("samplers", 2)) == "samplers.ddpm"
    assert source.show(root, ("teachers", 0, "train", "images")) == "teachers.small.train.images"
    assert source.show(root, ("teachers", 4, "x")) == "teachers.4.x"


def test_python_data_has_one_origin() -> None:
    root = source.from_data({"a": (1, {"b": None})}, Origin("suite"))
    assert root.plain() == {"a": [1, {"b": None}]}
    assert str(source.locate(root, ("a", 1, "b"))) == "suite"
