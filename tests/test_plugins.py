"""The plugin contract: who may claim which name, and that one broken plugin stops only itself."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from o2mkd_bench import Options, hookimpl
from o2mkd_bench.core import plugins
from o2mkd_bench.core.errors import PluginError
from o2mkd_bench.core.hookspecs import KINDS
from o2mkd_bench.core.jobs import Wrapper
from o2mkd_bench.core.plugins import BUILTIN, Plugin, Registry, normalised
from o2mkd_bench.core.schema import _options


class HuberOptions(Options):
    delta: float = 0.1


class Loose(Options):
    model_config = ConfigDict(extra="allow")


OUTPUT = "o2mkd_plugins.kd.output:OutputMatching"


def module(*names, api=1, kind="kd_methods", target=OUTPUT, **more):
    @hookimpl(specname=f"register_{kind}")
    def declare(register):
        for name in names:
            register(name, target, **more)

    return SimpleNamespace(api=api, declare=declare)


def made(**modules):
    """A registry of the built-in ``output`` and one distribution an argument."""
    found = Registry()
    found.add(module("output"), BUILTIN, "1", "builtin")
    for name, given in modules.items():
        found.add(given, name, "2.0", f"{name}.plugin")
    return found


def test_a_plugin_is_known_by_what_it_declares_and_loaded_on_demand():
    found = made(acme=module("huber", options=HuberOptions, version=3, paper="p", summary="s", needs_teacher=False))
    plugin = found.get("kd_methods", "huber")
    assert (plugin.version, plugin.paper, plugin.summary, plugin.distribution_version) == ("3", "p", "s", "2.0")
    assert plugin.traits == {"needs_teacher": False}
    assert plugin.parse({"delta": 2}) == HuberOptions(delta=2)
    assert plugin.load().__name__ == "OutputMatching"
    with pytest.raises(ValidationError, match="delte"):
        plugin.parse({"delte": 1})


@pytest.mark.parametrize("target", ["no_such_module_here:x", "json:no_such_name"])
def test_a_target_that_cannot_be_loaded_is_the_plugins_error(target):
    plugin = made(acme=module("huber", target=target)).get("kd_methods", "huber")
    with pytest.raises(PluginError, match=f"kd_methods:huber of acme cannot load its target '{target}': "):
        plugin.load()


class Half(Wrapper):
    """Has no ``wrap``."""


@pytest.mark.parametrize(
    ("kind", "target", "told"),
    [
        ("kd_methods", "json:loads", "no subclass of o2mkd_bench.engine.kd.KDMethod; derive it from that"),
        ("samplers", OUTPUT, "no subclass of o2mkd_bench.core.program.Sampler; derive it from that"),
        ("wrappers", "test_plugins:Half", "has no wrap; define what o2mkd_bench.core.jobs.Wrapper leaves open"),
        ("intervals", "json:__name__", "nothing that can be called"),
    ],
)
def test_a_target_of_the_wrong_sort_is_the_plugins_error(kind, target, told):
    plugin = made(acme=module("mine", kind=kind, target=target)).get(kind, "mine")
    with pytest.raises(PluginError, match=f"plugin {kind}:mine of acme: {target} .*{told}"):
        plugin.load()


def test_a_name_that_is_taken_is_listed_with_its_distribution():
    found = made(acme=module("output", "huber"))
    with pytest.raises(PluginError, match=r"\(known: output, huber, acme:output\)$"):
        found.get("kd_methods", "strange")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"name": Options}, "the name of a plugin of kd_methods is <class .*Options'>; make it a word without colons"),
        ({"name": "a:b"}, "is 'a:b'; make it a word without colons"),
        ({"summary": 3}, "the paper or the summary of kd_methods:mine is no text"),
        ({"target": Options}, "the target of kd_methods:mine is <class"),
        ({"needs_teacher": "no"}, "kd_methods:mine has needs_teacher 'no'; make it True or False"),
        ({"options": Loose}, "the options of kd_methods:mine take unknown keys"),
    ],
)
def test_what_is_registered_is_checked(given, told):
    def declare(register):
        words = {"name": "mine", "target": "x:y", **given}
        register(words.pop("name"), words.pop("target"), **words)

    found = Registry()
    found.add(SimpleNamespace(api=1, kd=hookimpl(declare, specname="register_kd_methods")), "acme", "1", "acme")
    assert re.search(told, found.broken[0].error), found.broken[0].error


def test_options_may_have_other_names_in_a_suite():
    class Aliased(Options):
        lam: float = Field(1.0, alias="lambda")

    given = Aliased.model_validate({"lambda": 2})
    assert Aliased.model_validate(given.model_dump(mode="json")) == given


def test_a_schema_leaves_out_what_json_does_not_know(monkeypatch):
    class Calling(Options):
        then: Callable[[], None] = print

    plugin = Plugin("samplers", "mine", "x:y", Calling, "1", "", "", "acme", "1")
    assert _options("methods", "mine", plugin, {}) == {"type": "object"}


def test_a_default_that_cannot_be_made_names_its_plugin():
    class Needing(Options):
        weight: float = 1.0
        double: float = Field(default_factory=lambda data: 2 * data["weight"])

    plugin = Plugin("samplers", "mine", "x:y", Needing, "1", "", "", "acme", "1")
    with pytest.raises(PluginError, match=r"option of plugin samplers:acme:mine decides no identity \(KeyError: 'we"):
        plugin.decides(plugin.parse({}))


def test_options_that_fail_otherwise_name_their_plugin():
    class Stumbling(Options):
        @model_validator(mode="before")
        @classmethod
        def _look(cls, value):
            raise KeyError("gone")

    plugin = Plugin("samplers", "mine", "x:y", Stumbling, "1", "", "", "acme", "1")
    with pytest.raises(PluginError, match="options of plugin samplers:acme:mine cannot be read: KeyError: 'gone'"):
        plugin.parse({})


def test_an_unknown_name_is_answered_with_the_nearest_and_with_what_is_broken():
    found = made(acme=module("huber", api=None))
    with pytest.raises(PluginError) as caught:
        found.get("kd_methods", "outputt")
    assert "did you mean 'output'?" in str(caught.value)
    assert "plugin acme did not load: acme.plugin declares api = None" in str(caught.value)
    with pytest.raises(PluginError, match=r"no samplers plugin is called 'x' \(known: none\)"):
        made().get("samplers", "x")


def test_a_name_claimed_twice_must_be_written_with_its_distribution():
    found = made(acme=module("huber"), other=module("huber"))
    with pytest.raises(PluginError, match=r"'huber' is claimed by two plugins; write acme:huber or other:huber"):
        found.get("kd_methods", "huber")
    one, two = (found.get("kd_methods", f"{name}:huber") for name in ("acme", "other"))
    assert (one.distribution, two.distribution) == ("acme", "other")
    assert one.key != two.key


def test_a_key_means_the_same_plugin_whatever_is_installed():
    found = made(acme=module("huber"))
    assert found.get("kd_methods", "huber").key == "acme:huber"
    assert found.get("kd_methods", "output").key == "output"


def test_a_built_in_is_never_shadowed():
    found = made(acme=module("output"))
    assert found.get("kd_methods", "output").distribution == BUILTIN
    assert found.get("kd_methods", "acme:output").distribution == "acme"
    assert [p.distribution for p in found.all("kd_methods")] == [BUILTIN, "acme"]


def test_names_of_other_kinds_are_other_names():
    found = made(acme=module("output", kind="samplers"))
    assert found.get("samplers", "output").kind == "samplers"
    assert [p.kind for p in found.all()] == ["kd_methods", "samplers"]


class NotOptions(BaseModel):
    pass


def unknown_hook():
    return SimpleNamespace(api=1, register_losses=hookimpl(lambda register: None, specname="register_losses"))


def raising(error):
    def declare(register):
        register("huber", "json:loads")
        raise error

    return SimpleNamespace(api=1, declare=hookimpl(declare, specname="register_kd_methods"))


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (module("huber", api=2), "declares api = 2, this o2mkd-bench offers api = 1"),
        (module("huber", options=NotOptions), "options of kd_methods:huber are no subclass"),
        (module("huber", target="json.loads"), "write it as 'package.module:Attribute'"),
        (
            module("huber", needs_techer=False),
            "has the trait 'needs_techer'; kd_methods have these traits: needs_teacher",
        ),
        (
            module("huber", kind="samplers", fast=True),
            "samplers:huber has the trait 'fast'; samplers have these traits: none",
        ),
        (module("huber", "huber"), "kd_methods:huber is registered twice by acme"),
        (unknown_hook(), "register_losses"),
        (raising(RuntimeError("boom")), "RuntimeError: boom"),
        (raising(SystemExit(3)), "SystemExit: 3"),
    ],
)
def test_a_broken_plugin_is_recorded_and_stops_only_itself(given, error):
    found = made(acme=given, other=module("cosine"))
    (broken,) = found.broken
    assert (broken.distribution, broken.distribution_version, broken.module) == ("acme", "2.0", "acme.plugin")
    assert error in broken.error
    assert [p.name for p in found.all()] == ["output", "cosine"]


def test_two_modules_of_one_distribution_cannot_claim_one_name():
    found = made(acme=module("huber"))
    found.add(module("huber"), "acme", "2.0", "acme.more")
    assert "registered twice by acme" in found.broken[0].error
    assert found.get("kd_methods", "huber").distribution == "acme"


# entry points


@pytest.fixture
def installed(monkeypatch):
    """Entry points as if distributions with these modules were installed; the process's registry is made anew."""

    def install(**modules):
        entries = []
        for name, given in modules.items():
            if given is not None:
                monkeypatch.setitem(sys.modules, f"fake_{name}", given)
            dist = SimpleNamespace(name=name.replace("_", "."), version="1.2")
            entry = importlib.metadata.EntryPoint("e", f"fake_{name}", plugins.GROUP)
            entries += [SimpleNamespace(name=entry.name, value=entry.value, dist=dist, load=entry.load)] * 2
        monkeypatch.setattr(plugins, "entry_points", lambda: entries)
        plugins.registry.cache_clear()
        return plugins.registry()

    monkeypatch.delenv("O2MKD_BENCH_PLUGINS", raising=False)
    yield install
    plugins.registry.cache_clear()


def test_plugins_come_from_entry_points_each_once_and_by_normalised_name(installed):
    found = installed(My_Pack=module("huber"), gone=None)
    assert found.get("kd_methods", "my.pack:huber").key == "my-pack:huber"
    assert len(found.all()) == 1
    assert [(b.distribution, b.error.split(":")[0]) for b in found.broken] == [("gone", "ModuleNotFoundError")]


def test_the_allow_list_limits_third_parties_and_never_the_built_ins(installed, monkeypatch):
    monkeypatch.setenv("O2MKD_BENCH_PLUGINS", "acme, my_pack")
    found = installed(o2mkd_bench=module("output"), acme=module("a"), other=module("b"), My_Pack=module("c"))
    assert [p.name for p in found.all()] == ["output", "a", "c"]


def test_an_entry_point_without_a_distribution_is_of_an_unknown_one(installed, monkeypatch):
    entry = SimpleNamespace(name="e", value="fake", dist=None, load=lambda: module("a"))
    monkeypatch.setattr(plugins, "entry_points", lambda: [entry])
    plugins.registry.cache_clear()
    assert plugins.registry().get("kd_methods", "unknown:a").distribution_version == "0"


def test_the_built_ins_are_installed_like_any_other():
    assert {e.value for e in plugins.entry_points() if normalised(e.dist.name) == BUILTIN} == {"o2mkd_plugins"}


def test_every_built_in_loads():
    found = plugins.registry()
    own = [p for p in found.all() if p.distribution == BUILTIN]
    assert {p.kind for p in own} <= set(KINDS)
    assert len(own) > 20
    assert all(callable(p.load()) for p in own)
    assert all(p.summary for p in own)
