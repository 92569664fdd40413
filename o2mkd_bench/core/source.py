"""A suite as written: YAML in which every value knows its file and line; environment, ``extends``, ``--set``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .complaints import near, wanted
from .disk import read_text
from .errors import UserError

Key = str | int
BESIDE_PLUGIN = frozenset({"label", "training", "spacing", "clip"})
"""Keys of a list item that stand beside the plugin's name and therefore do not name the item."""

# Far beyond what a person writes, and little to read: aliases and merge keys can mean far more than they say.
VALUES, DEPTH, LINKS = 100_000, 50, 20

_MERGE, _STR = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"
_MAP, _SEQ = "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"
_REFERENCE = re.compile(r"\$\{([^}]*)\}")
_VARIABLE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Origin:
    """Where something was written; ``file`` may also be ``--set a.b=c``, which has no lines (0)."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class Node:
    """``value`` is a ``dict[str, Node]``, a ``list[Node]`` or a scalar; ``origin`` is the line of its key."""

    value: Any
    origin: Origin

    def plain(self) -> Any:
        """The same data without origins."""
        match self.value:
            case dict():
                return {key: child.plain() for key, child in self.value.items()}
            case list():
                return [child.plain() for child in self.value]
        return self.value

    def child(self, key: Key) -> Node | None:
        if isinstance(self.value, dict) and isinstance(key, str):
            return self.value.get(key)
        if isinstance(self.value, list) and isinstance(key, int) and key < len(self.value):
            child: Node = self.value[key]
            return child
        return None

    def names(self) -> list[str]:
        """What this list item may be called: its ``name`` or ``label``, its plugins' names, or the string it is."""
        if isinstance(self.value, str):
            return [self.value]
        if not isinstance(self.value, dict):
            return []
        given = [str(self.value[key].value) for key in ("name", "label") if key in self.value]
        plugins = [] if "name" in self.value else [key for key in self.value if key not in BESIDE_PLUGIN]
        return given + plugins


def trace(root: Node, path: Sequence[Key], keep_last: bool = False) -> tuple[Key, ...]:
    """``path`` less the steps that were not written, such as the branch of a union that a validator names.

    ``keep_last`` keeps the last step all the same: the name of a missing key.
    """
    found: list[Key] = []
    node = root
    for number, key in enumerate(path):
        child = node.child(key)
        if child is not None:
            found.append(key)
            node = child
        elif keep_last and number == len(path) - 1:
            found.append(key)
    return tuple(found)


def locate(root: Node, path: Sequence[Key]) -> Origin:
    """The origin of the deepest node on ``path``."""
    node = root
    for key in path:
        child = node.child(key)
        if child is None:
            break
        node = child
    return node.origin


def show(root: Node, path: Sequence[Key]) -> str:
    """``path`` as a person writes it, and ``--set`` reads it: ``methods.output.weight``, ``teachers.small.path``."""
    parts: list[str] = []
    node: Node | None = root
    for number, key in enumerate(path):
        node = node.child(key) if node else None
        if isinstance(key, str):
            parts.append(key)
            continue
        names = node.names() if node else []
        following = path[number + 1] if number + 1 < len(path) else None
        if node and isinstance(node.value, dict) and "name" not in node.value and following is not None:
            if following not in names:
                parts.append(str(key))
        else:
            # a name that nobody can read on one line is no help
            readable = bool(names) and len(names[0]) <= 60 and names[0].isprintable()
            parts.append(names[0] if readable else str(key))
    return ".".join(parts)


class _Reader:
    """One YAML document to nodes."""

    def __init__(self, text: str, file: str, numbered: bool) -> None:
        self.file, self.numbered = file, numbered
        self.loader = yaml.SafeLoader(text)
        self.open: set[int] = set()
        self.values = 0

    def read(self) -> Node:
        node = self.loader.get_single_node()
        if node is None:
            return Node(None, Origin(self.file))
        return Node(self.convert(node), self.origin(node))

    def origin(self, node: yaml.Node) -> Origin:
        return Origin(self.file, node.start_mark.line + 1 if self.numbered else 0)

    def convert(self, node: yaml.Node) -> Any:
        self.values += 1
        if self.values > VALUES or len(self.open) > DEPTH:
            much = f"more than {VALUES} values" if self.values > VALUES else f"more than {DEPTH} levels"
            raise UserError(f"{self.origin(node)}: with its aliases the YAML has {much}; write a smaller suite")
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if node.tag not in (_MAP, _SEQ):
            raise UserError(f"{self.origin(node)}: the YAML tag {node.tag} is not allowed in a suite; leave it out")
        if id(node) in self.open:
            raise UserError(f"{self.origin(node)}: the YAML anchor contains itself; write the value out")
        self.open.add(id(node))
        found: Any
        if isinstance(node, yaml.SequenceNode):
            found = [Node(self.convert(item), self.origin(item)) for item in node.value]
        else:
            found = self.mapping(node)
        self.open.remove(id(node))
        return found

    def mapping(self, node: yaml.Node) -> dict[str, Node]:
        own: dict[str, Node] = {}
        inherited: dict[str, Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{self.origin(key)}: a key must be plain text, not a list or a mapping")
            if key.tag == _MERGE:
                for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    merged = self.convert(source)
                    if not isinstance(merged, dict):
                        raise UserError(f"{self.origin(key)}: << must be given a mapping, or a list of mappings")
                    inherited = {**merged, **inherited}
                    self.values += len(merged)
                continue
            if key.value in own:
                first = own[key.value].origin
                raise UserError(f"{self.origin(key)}: the key {key.value!r} is given twice, first at {first}; keep one")
            own[key.value] = Node(self.convert(value), self.origin(key))
        return {**inherited, **own}

    def scalar(self, node: yaml.ScalarNode) -> Any:
        tag, text = node.tag, node.value
        if tag == _STR and "${" in text:
            whole = _REFERENCE.fullmatch(text) is not None
            if "${" in _REFERENCE.sub("", text):
                raise UserError(f"{self.origin(node)}: {text!r} opens a variable and leaves it open; write ${{NAME}}")
            text = _REFERENCE.sub(lambda found: self.variable(found, self.origin(node)), text)
            if whole and node.style is None:
                tag = self.loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        try:
            return self.loader.construct_object(yaml.ScalarNode(tag, text, node.start_mark, node.end_mark))
        except ValueError as error:
            raise UserError(f"{self.origin(node)}: {text!r} is no value ({error}); put it in quotes") from error

    @staticmethod
    def variable(found: re.Match[str], origin: Origin) -> str:
        parts = _VARIABLE.fullmatch(found[1])
        if parts is None:
            raise UserError(f"{origin}: {found[0]!r} is no environment variable; write ${{NAME}} or ${{NAME:-default}}")
        name, default = parts[1], parts[2]
        value = os.environ.get(name, "")
        if value or (default is None and name in os.environ):
            return value
        if default is None:
            raise UserError(
                f"{origin}: the environment variable {name} is not set; set it, or write ${{{name}:-default}}"
            )
        return str(default)


def parse(text: str, file: str, numbered: bool = True) -> Node:
    """YAML text to nodes, environment variables filled in.

    Raises:
        UserError: ``file:line: …`` for bad syntax, duplicate keys, foreign tags and unset variables.
    """
    try:
        return _Reader(text, file, numbered).read()
    except RecursionError:
        raise UserError(f"{file}: the YAML has more than {DEPTH} levels; write a smaller suite") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Origin(file, mark.line + 1 if mark and numbered else 0)
        context = f" {error.context}" if error.context else ""
        raise UserError(f"{place}: this is not valid YAML: {error.problem}{context}") from error
    except yaml.YAMLError as error:
        reason = getattr(error, "reason", "it cannot be read")
        raise UserError(f"{file}: this is not valid YAML: {reason}") from error


def from_data(data: Any, origin: Origin) -> Node:
    """Nodes of Python data, all of one origin."""
    if isinstance(data, Mapping):
        return Node({str(key): from_data(value, origin) for key, value in data.items()}, origin)
    if isinstance(data, list | tuple):
        return Node([from_data(value, origin) for value in data], origin)
    return Node(data, origin)


def read(path: Path) -> Node:
    """The file at ``path`` with everything it extends merged in.

    Raises:
        UserError: when a file is missing, unreadable, no mapping, or extends itself.
    """
    return extend(_read_one(path, str(path)), path.parent, (path,))


def extend(root: Node, folder: Path, chain: tuple[Path, ...] = ()) -> Node:
    """``root`` merged over the file its ``extends`` names, relative to ``folder``; mappings merge, lists replace."""
    given = root.child("extends")
    if given is None:
        return root
    if not isinstance(given.value, str):
        raise UserError(f"{given.origin}: extends: {wanted('the path of another suite file', given.plain())}")
    path = Path(os.path.normpath(folder / given.value))
    links = [*chain, path]
    if len(links) > LINKS:
        raise UserError(f"{given.origin}: extends: this is a chain of more than {LINKS} files; merge some of them")
    if any(os.path.realpath(path) == os.path.realpath(seen) for seen in chain):
        circle = " -> ".join(link.name for link in links)
        raise UserError(f"{given.origin}: extends: {circle} is a circle; take one of the links out")
    base = extend(_read_one(path, f"{given.origin}: extends: {path}"), path.parent, tuple(links))
    merged = _merge(base, root)
    return Node({key: child for key, child in merged.value.items() if key != "extends"}, root.origin)


def _read_one(path: Path, where: str) -> Node:
    try:
        text = read_text(path)
    except FileNotFoundError:
        folder = path.parent if path.parent.is_dir() else Path()
        hint = near(path.name, [p.name for p in folder.glob("*.y*ml")])
        raise UserError(f"{where}: there is no such file{hint}") from None
    except UnicodeDecodeError:
        raise UserError(f"{where}: this is not a text file in UTF-8") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: the file cannot be read: {getattr(error, 'strerror', error)}") from error
    node = parse(text, str(path))
    if not isinstance(node.value, dict):
        raise UserError(f"{where}: a suite must be a mapping of keys such as name, datasets and teachers")
    return node


def _merge(base: Node, over: Node) -> Node:
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    both = {key: _merge(base.value[key], child) for key, child in over.value.items() if key in base.value}
    return Node({**base.value, **over.value, **both}, over.origin)


def override(root: Node, assignment: str) -> Node:
    """``root`` with ``a.b=c`` of ``--set`` done: a dotted path, then YAML.

    A list item is written by its number or by one of its names; a missing key of a mapping is made.

    Raises:
        UserError: for an assignment without ``=``, and for a path that does not exist.
    """
    path, equals, text = assignment.partition("=")
    origin = Origin(f"--set {assignment}")
    if not equals or not all(path.split(".")):
        raise UserError(f"{origin}: write it as key=value, for example training.lr=1e-4")
    return put(root, path.split("."), parse(text, origin.file, numbered=False).value, origin)


def put(root: Node, path: Sequence[str], value: Any, origin: Origin) -> Node:
    """``root`` with ``value`` (as in a node) at ``path``, everything new being of ``origin``."""
    return _put(root, tuple(path), Node(value, origin), ())


def _put(node: Node, path: tuple[str, ...], new: Node, done: tuple[str, ...]) -> Node:
    if not path:
        return new
    head, rest = path[0], path[1:]
    if isinstance(node.value, list):
        number, inside = _item(node, head, new.origin, done)
        items = list(node.value)
        items[number] = _put(items[number], path if inside else rest, new, done if inside else (*done, head))
        return Node(items, node.origin)
    if node.value is None:
        entries = {}
    elif node.value == head:
        entries = {head: Node({}, new.origin)}
    elif isinstance(node.value, dict):
        entries = node.value
    else:
        raise UserError(f"{new.origin}: {'.'.join(done)} is {node.value!r}, which has no key {head!r}")
    below = entries.get(head, Node({}, new.origin))
    return Node({**entries, head: _put(below, rest, new, (*done, head))}, node.origin)


def _item(node: Node, name: str, origin: Origin, done: tuple[str, ...]) -> tuple[int, bool]:
    """Which item of a list ``name`` means, and whether it is a plugin's name, which is a key inside that item."""
    where = ".".join(done)
    if name.isdecimal():
        if int(name) < len(node.value):
            return int(name), False
        raise UserError(f"{origin}: {where} has {len(node.value)} items, counted from 0")
    found = [number for number, item in enumerate(node.value) if name in item.names()]
    if not found:
        known = [item_name for item in node.value for item_name in item.names()]
        hint = near(name, known)
        raise UserError(f"{origin}: {where} has no item {name!r}{hint} (items: {', '.join(known) or 'none'})")
    if len(found) > 1:
        # an item with a label is called by it; its plugin's name belongs to the item without one
        found = [number for number in found if node.value[number].names()[0] == name] or found
    if len(found) > 1:
        raise UserError(
            f"{origin}: {where} has {len(found)} items {name!r}; use a number: {', '.join(map(str, found))}"
        )
    item = node.value[found[0]].value
    return found[0], item == name or (isinstance(item, dict) and name in item)
