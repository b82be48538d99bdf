"""JSON Schema (draft 2020-12) of what a command takes and of what it writes, for programs (`qflow describe`).

The settings come from the schema classes, their limits from the types of the fields (core/limits.py), texts from the
docstrings, defaults and choices from conf/. The document comes from json_output.py and results.py. Keywords that begin
with `x-` are not JSON Schema's: they say how a thing is written on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from qflow.config.command_schema import SCHEMAS
from qflow.config.command_table import COMMANDS, named
from qflow.config.json_output import VERSION, Document
from qflow.config.key_limits import hints_of
from qflow.config.keys import about, groups, settings_of, shipped, switches, texts
from qflow.config.results import RESULTS
from qflow.core.errors import ConfigError
from qflow.core.nearest import did_you_mean

DRAFT = "https://json-schema.org/draft/2020-12/schema"
SIMPLE = {bool: "boolean", int: "integer", float: "number", str: "string"}
PLUS = ("experiment", "debug")
"""Groups that set keys of others, and are written with a plus."""
Schema = dict[str, Any]


def table() -> Schema:
    """Return all commands: what each is for, how it is called, and what its exit codes mean."""
    return {
        name: {
            "about": command.summary,
            "usage": [f"qflow {name} {form}" for form in command.usage],
            "exit_codes": {str(code): command.meaning(code) for code in (0, 1, 2, 3, 130)},
        }
        for name, command in COMMANDS.items()
    }


def settings(command: str, free: Sequence[str] = ()) -> Schema:
    """Return the schema of a command's configuration; a key that begins as one of `free` may change on continuing."""
    found = _object(SCHEMAS[command], "", shipped(command), free)
    for group, (_, options) in groups(command).items():
        lead = "+" if group in PLUS else ""
        choices = {"x-write": f"{lead}{group}=<choice>", "x-choices": {name: about(group, name) for name in options}}
        found["properties"].setdefault(group, {}).update(choices)
    for written, key in switches(command).items():
        _at(found, key)["x-switch"] = written
    return {"$schema": DRAFT, "title": f"qflow {command}", **found, "x-usage": list(named(command).usage)}


def part(schema: Schema, path: str) -> Schema:
    """Return the schema of a group or key. Raises ConfigError for one that does not exist."""
    found, walked = schema, list[str]()
    for name in path.split("."):
        known = found.get("properties", {})
        if name not in known:
            inside, listed = ".".join(walked) or schema["title"], ", ".join(known)
            near = did_you_mean(".".join([*walked, name]), [".".join([*walked, other]) for other in known])
            rule = f"{inside} has the keys {listed}" if known else f"{inside} has no keys below it"
            raise ConfigError(f"{rule}, but got {path}.{near}")
        found = known[name]
        walked.append(name)
    return {"$schema": DRAFT, "title": path, **found}


def document_schema(command: str) -> Schema:
    """Return the schema of the JSON document that a command writes with `--json`."""
    found = of_type(Document)
    forms = [of_type(kind) for kind in RESULTS[command]]
    found["properties"]["schema"] |= {"const": f"qflow.{command}/{VERSION}"}
    found["properties"]["command"] |= {"const": command}
    told = {"type": "object", "properties": {"text": {"type": "string"}}, "additionalProperties": False}  # of --help
    done = {"properties": {"error": {"type": "null"}, "result": {"anyOf": [*forms, told]}}}
    ended = {"properties": {"error": {"type": "object"}, "result": {"type": "object"}}}
    return {
        "$schema": DRAFT,
        "title": f"qflow {command} --json",
        **found,
        "if": {"properties": {"exit_code": {"enum": [0, 1]}}},
        "then": done,
        "else": ended,
        "x-exit-codes": table()[command]["exit_codes"] if command in COMMANDS else {},
    }


def of_type(hint: Any) -> Schema:
    """Return the schema of a Python type: of builtins, containers, limits, TypedDicts."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        found = of_type(arguments[0])
        for limit in arguments[1:]:
            found |= limit.keywords()
        return found
    if origin in (Union, UnionType):
        return _or_null(of_type(next(kind for kind in arguments if kind is not NoneType)))
    if is_typeddict(hint):
        return _fields(hint)
    if origin is dict or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return {"type": "object", "additionalProperties": of_type(arguments[1]) if arguments else {}}
    if origin is list or (isinstance(origin, type) and issubclass(origin, Sequence)):
        return {"type": "array", "items": of_type(arguments[0])}
    return {"type": SIMPLE[hint]} if hint in SIMPLE else {}


def _or_null(schema: Schema) -> Schema:
    if not isinstance(schema.get("type"), str) or "properties" in schema:
        return {"anyOf": [schema, {"type": "null"}]} if schema else schema
    found = {**schema, "type": [schema["type"], "null"]}
    return {**found, "enum": [*schema["enum"], None]} if "enum" in schema else found


def _fields(kind: type) -> Schema:
    """Return the schema of a TypedDict with the explanation of each field."""
    text = texts(kind)
    properties = {
        name: {**of_type(hint), "description": text[name]}
        for name, hint in get_type_hints(kind, include_extras=True).items()
    }
    return {
        "type": "object",
        "description": (kind.__doc__ or "").strip(),
        "properties": properties,
        "required": sorted(kind.__required_keys__),  # type: ignore[attr-defined]
        "additionalProperties": False,
    }


def _object(kind: type, prefix: str, shipped_: Mapping[str, Any], free: Sequence[str]) -> Schema:
    """Return the schema of a schema class, with the values of conf/ and of its fields as defaults."""
    text, hints, properties = texts(kind), hints_of(kind), {}
    own = {field.name: field for field in fields(kind)}
    plain = get_type_hints(kind)
    for name, hint in hints.items():
        path = f"{prefix}{name}"
        if is_dataclass(plain[name]):
            properties[name] = _object(plain[name], f"{path}.", shipped_, free)
            continue
        properties[name] = {**of_type(hint), "description": text[name], **_default(own[name], path, shipped_)}
        if free:
            properties[name]["x-may-change"] = path.startswith(tuple(free))
    about_ = "" if settings_of(kind) else " ".join((kind.__doc__ or "").split())
    described = {"description": about_} if about_ else {}
    return {"type": "object", **described, "properties": properties, "additionalProperties": False}


def _default(field: Any, path: str, shipped_: Mapping[str, Any]) -> Schema:
    if path in shipped_:
        return {"default": shipped_[path]}
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    return {} if value == "???" else {"default": value}


def _at(schema: Schema, key: str) -> Schema:
    for name in key.split("."):
        schema = schema["properties"][name]
    return schema
