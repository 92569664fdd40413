"""JSON schemas of suites and of plugins' options, for editors and for programs that write suites.

``python -m o2mkd_bench.core.schema`` writes the schema that ships with the package.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from .blocks import Steps
from .plugins import BUILTIN, Plugin, Registry, registry
from .suite import Suite
from .uses import BESIDE, KIND_OF_AXIS

Schema = dict[str, Any]
SHIPPED = Path(__file__).parents[1] / "schema" / "suite.json"


def suite_schema(found: Registry, builtin_only: bool = False) -> Schema:
    """The JSON schema (draft 2020-12) of a suite that may use the plugins of ``found``.

    ``builtin_only`` leaves out third parties, so that the result does not depend on what is installed.
    """
    schema = Suite.model_json_schema()
    definitions: Schema = schema["$defs"]
    beside = definitions["SamplerEntry"]["properties"]
    for name in ("MethodEntry", "WrapperEntry", "SamplerEntry"):
        del definitions[name]
    for axis, kind in KIND_OF_AXIS.items():
        plugins = _plugins(found, kind, builtin_only)
        definitions[axis] = _entry(axis, plugins, {key: beside[key] for key in BESIDE[axis]}, definitions)
        schema["properties"][axis] |= {"items": _ref(axis)}
    models = _plugins(found, "models", builtin_only)
    definitions["models"] = _entry("models", models, {}, definitions)
    definitions["TeacherTrain"]["properties"]["model"] = _ref("models")
    definitions["TeacherEntry"]["oneOf"] = [{"required": [key]} for key in ("train", "path", "hub")]
    budget = schema["properties"]["budgets"]
    budget["items"] = {"anyOf": [definitions["Budget"]["properties"]["images"], budget["items"]]}
    schema["properties"]["extends"] = {"type": "string", "description": "another suite file, relative to this one"}
    needed = [key for key in schema.pop("required") if key != "wrappers"]
    schema["anyOf"] = [{"required": needed}, {"required": ["extends"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def options_schemas(found: Registry, kind: str) -> Schema:
    """The JSON schemas of the options of every plugin of one kind, by name."""
    return {name: plugin.options.model_json_schema() for name, plugin in _plugins(found, kind)}


def render(schema: Schema) -> str:
    """The text of a schema file."""
    return json.dumps(schema, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _plugins(found: Registry, kind: str, builtin_only: bool = False) -> list[tuple[str, Plugin]]:
    """Plugins with the name that a suite must write."""
    wanted = [plugin for plugin in found.all(kind) if not builtin_only or plugin.distribution == BUILTIN]
    return [(found.written(plugin), plugin) for plugin in wanted]


def _entry(axis: str, plugins: Sequence[tuple[str, Plugin]], beside: Schema, definitions: Schema) -> Schema:
    """The schema of an entry of ``axis``: a plugin's name, or a mapping with that name as a key."""
    properties: Schema = {}
    bare = []
    for name, plugin in plugins:
        options = _options(axis, name, plugin, definitions)
        needed = options.get("required", [])
        definitions[f"{axis}.{name}"] = options
        properties[name] = _ref(f"{axis}.{name}") if needed else {"anyOf": [_ref(f"{axis}.{name}"), {"type": "null"}]}
        if not needed:
            bare.append({"const": name, **_described(plugin)})
    each = [{"required": [name]} for name, _ in plugins]
    choice = {"anyOf" if axis == "methods" else "oneOf": each} if each else {}
    mapping = {"type": "object", "additionalProperties": False, "properties": {**properties, **beside}, **choice}
    return {"anyOf": [*bare, mapping]}


def _options(axis: str, name: str, plugin: Plugin, definitions: Schema) -> Schema:
    """The options of one plugin, its nested definitions moved to ``definitions``; with ``steps`` for a sampler."""
    template = f"#/$defs/{axis}.{name}.{{model}}"
    try:
        options = plugin.options.model_json_schema(ref_template=template)
    except Exception:
        # options of kinds that JSON does not know stop no editor from knowing the rest
        options = {"type": "object"}
    for inner, definition in options.pop("$defs", {}).items():
        definitions[f"{axis}.{name}.{inner}"] = definition
    options |= _described(plugin)
    if axis == "samplers":
        options["properties"] = {"steps": TypeAdapter(Steps).json_schema(), **options.get("properties", {})}
        options["required"] = ["steps", *options.get("required", [])]
    return options


def _described(plugin: Plugin) -> Schema:
    """What an editor shows beside a plugin's name."""
    text = " — ".join(filter(None, (plugin.summary, plugin.paper)))
    return {"description": text} if text else {}


if __name__ == "__main__":
    SHIPPED.parent.mkdir(exist_ok=True)
    SHIPPED.write_text(render(suite_schema(registry(), builtin_only=True)), encoding="utf-8")
