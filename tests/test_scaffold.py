"""A new plugin installs, passes its own tests and runs, as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from plugin_install import install, pytest_in, python

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.suite import load
from o2mkd_bench.scaffold import package_name, write_plugin

DOCUMENTATION = Path(__file__).parents[1] / "docs" / "plugins.md"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_plugin("My-new_method", tmp_path_factory.mktemp("scaffold") / "here")


def test_nothing_is_left_to_fill_in(written):
    texts = {path.relative_to(written).as_posix(): path.read_text() for path in written.rglob("*") if path.is_file()}
    assert set(texts) == {
        "README.md",
        "pyproject.toml",
        "src/my_new_method/__init__.py",
        "src/my_new_method/method.py",
        "src/my_new_method/options.py",
        "suites/quick.yaml",
        "tests/test_method.py",
    }
    assert written.name == "My-new_method"
    assert not any("$" in text for text in texts.values())
    assert 'name = "My-new_method"' in texts["pyproject.toml"]
    # the extra brings pytest, which the next line calls
    assert "pip install -e '.[test]'\npytest tests\n" in texts["README.md"]


def test_it_installs_and_passes_its_tests(written, tmp_path):
    site = install(written, tmp_path)
    done = pytest_in(written, site)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    code = "import pathlib, sys; from o2mkd_bench.core.suite import load; print(load(pathlib.Path(sys.argv[1])).name)"
    assert python(code, site, str(written / "suites" / "quick.yaml")).strip() == "My-new_method"


def test_its_suite_needs_it_installed(written):
    with pytest.raises(UserError, match="My-new_method"):
        load(written / "suites" / "quick.yaml")


def test_parts_in_the_documentation_are_true(tmp_path):
    """docs/plugins.md: every block that says which file it is, together, as a package that passes the contracts."""
    folder = write_plugin("my-plugin", tmp_path)
    (folder / "tests" / "test_method.py").unlink()
    blocks = re.findall(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```$", DOCUMENTATION.read_text(), re.M | re.S)
    for path, text in blocks:
        (folder / path).write_text(text)
    site = install(folder, tmp_path)
    done = pytest_in(folder, site)
    assert done.returncode == 0, done.stdout
    code = (
        "import sys, o2mkd_bench\n"
        "found = o2mkd_bench.run(sys.argv[1], out=sys.argv[2] + '/out', store=sys.argv[2] + '/store')\n"
        "print([row['status'] for row in found.document['rows']])\n"
    )
    assert python(code, site, str(folder / "suites" / "all.yaml"), str(tmp_path)).strip() == str(["done"] * 3)


@pytest.mark.parametrize(
    ("name", "package"), [("my-method", "my_method"), ("KD2", "kd2"), ("a--b__c", "a_b_c"), ("x", "x")]
)
def test_package_follows_from_the_name(name, package):
    assert package_name(name) == package


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "is no name of a package"),
        ("2fast", "begin with a letter"),
        ("my method", "letters, digits"),
        ("../up", "letters, digits"),
        ("my.method", "letters, digits"),
        ("méthode", "letters, digits"),
        ("ends-", "letters, digits"),
        ("class", "Python's own"),
        ("json", "Python's own"),
        ("output", "built-in KD method"),
        ("o2mkd-bench", "is taken"),
        ("torch", "is taken"),
    ],
)
def test_unfit_name_is_refused_before_anything_is_written(name, reason, tmp_path):
    with pytest.raises(UserError, match=reason):
        write_plugin(name, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_empty_folder_is_filled_and_a_full_one_left_alone(tmp_path):
    (tmp_path / "my-method").mkdir()
    assert write_plugin("my-method", tmp_path) == tmp_path / "my-method"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="my-method exists and is not empty"):
        write_plugin("my-method", tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_file_in_the_way_is_named(tmp_path):
    (tmp_path / "my-method").write_text("mine")
    with pytest.raises(UserError, match="my-method exists and is not empty"):
        write_plugin("my-method", tmp_path)
    with pytest.raises(UserError, match="other cannot be written"):
        write_plugin("other", tmp_path / "my-method")
