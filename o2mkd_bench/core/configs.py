"""Architectures as model families give them at plan time, held to what identities ask of data."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from .blocks import STUDENT_KEYS, StudentEntry
from .errors import PluginError, UserError
from .identity import plain
from .models import ModelFamily
from .options import Options
from .plugins import Plugin

_WHOLE = StudentEntry(name="whole").model_dump(include=set(STUDENT_KEYS))


def family_of(plugin: Plugin, where: str) -> ModelFamily:
    """The family of a plugin.

    Raises:
        PluginError: naming ``where``, when it cannot be made.
    """
    with plugin.calling("the class", where):
        made: ModelFamily = plugin.load()()
    if not isinstance(made.student_keys, tuple | list):
        raise PluginError(
            f"{where}: student_keys of plugin models:{plugin.key} is {made.student_keys!r}; make it a tuple of names"
        )
    return made


def teacher_config(plugin: Plugin, options: Options, shape: tuple[int, int], where: str) -> dict[str, Any]:
    """The architecture of a teacher for images of ``shape``: channels, and pixels a side.

    Raises:
        UserError: as the family does. PluginError: for a config that is none, or is for other images.
    """
    family = family_of(plugin, where)
    with plugin.calling("teacher_config()", where, tell=lambda text: f"{where}: {text}"):
        found = family.teacher_config(options, *shape)
    config = _data(plugin, "teacher_config()", found, where)
    for key, value in zip(("in_channels", "sample_size"), shape, strict=True):
        if config.get(key, value) != value:
            raise PluginError(
                f"{where}: teacher_config() of plugin models:{plugin.key} says {key} {config[key]} for images of "
                f"{shape[0]} x {shape[1]} x {shape[1]}; make it {value}"
            )
    return config


def student_config(
    plugin: Plugin, teacher: Mapping[str, Any], student: Mapping[str, Any], where: str, given: bool
) -> dict[str, Any]:
    """The architecture of a student derived from its teacher's.

    Args:
        given: whether the teacher's comes from a checkpoint, which may hold anything.

    Raises:
        UserError: as the family does, for a key of a student that it does not read, and for a teacher's config that it
            cannot read. PluginError: for a config that is none.
    """
    family = family_of(plugin, where)
    for key, value in student.items():
        # a family that does not read it would train a student of full size
        if value != _WHOLE.get(key) and key not in family.student_keys:
            raise UserError(
                f"{where}.{key}: {plugin.key}, the family of its teacher, has no {key}; its students are given by "
                f"{', '.join(family.student_keys) or 'nothing'}"
            )
    try:
        # of its own: what a plugin writes into what it is given is nobody else's
        with plugin.calling("student_config()", where):
            found = family.student_config(deepcopy(dict(teacher)), deepcopy(dict(student)), where)
    except PluginError as error:
        if not given or error.__cause__ is None:
            raise
        cause = error.__cause__
        raise UserError(
            f"{where}: no student can be derived from the config of its teacher ({type(cause).__name__}: {cause}); "
            "correct the teacher's config.json"
        ) from cause
    return _data(plugin, "student_config()", found, where)


def _data(plugin: Plugin, what: str, found: Any, where: str) -> dict[str, Any]:
    """A config of one's own.

    Raises:
        PluginError: for one that is no JSON data.
    """
    reason = ""
    if not isinstance(found, Mapping):
        reason = f"a {type(found).__name__}"
    else:
        try:
            plain(found)
        except ValueError as error:
            reason = f"what is no JSON data ({error})"
    if reason:
        raise PluginError(
            f"{where}: {what} of plugin models:{plugin.key} returns {reason}; make it a dict of numbers, "
            "texts and lists"
        )
    return deepcopy(dict(found))
