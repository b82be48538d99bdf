"""What the schemas say of every key, read from their source text: `--help` and completion import no library for it.

A key is explained by the docstring below its field. A class whose docstring is `Fields of <module>.<class>.` leaves the
explanation to the fields of that class.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QFLOW = Path(__file__).resolve().parents[1]
FIELDS_OF = re.compile(r"Fields of ([\w.]+)\.(\w+)\.")
EMPTY = {"dict": "{}", "list": "[]"}


@dataclass(frozen=True)
class Key:
    """One key of a command's configuration."""

    path: str
    """Dotted, as it is written on the command line."""
    type: str
    default: str
    """The schema's default as it is written in Python; empty where a value must be given."""
    text: str
    """Its explanation."""


@dataclass(frozen=True)
class _Class:
    bases: tuple[str, ...]
    text: str
    fields: Mapping[str, tuple[str, str, str]]
    """Name -> (type, default, explanation)."""


def keys(command: str) -> list[Key]:
    """All keys of a command, in the order of its schema; a base class's first."""
    return list(_below(_schemas()[command], ""))


def groups(command: str) -> dict[str, tuple[str, list[str]]]:
    """Group that the command takes -> (what it is about, its options).

    That are the groups in the defaults of its conf/<command>.yaml, because Hydra refuses others, and those files of
    `experiment` and `debug`, which set keys of several groups, that set no other key than the command has.
    """
    classes, chosen, folder = _group_classes(), _chosen(command), conf_dir()
    found = {name: classes[kind] for name, kind in _groups(_schemas()[command]) if name in chosen}
    about = {name: "" if FIELDS_OF.match(node.text) else first_sentence(node.text) for name, node in found.items()}
    folders = [folder, *filter(None, [own_conf_dir()])]
    listed = {name: sorted({path.stem for f in folders for path in (f / name).glob("*.yaml")}) for name in about}
    about |= {"experiment": "A branch of the guide's tree, or `full`.", "debug": "Few samples and trials."}
    known = [key.path for key in keys(command)]
    for name in ("experiment", "debug"):
        files = sorted((folder / name).glob("*.yaml"))
        listed[name] = [path.stem for path in files if _is_for(path, chosen, known)]
    return {name: (about[name], options) for name, options in listed.items() if options}


def _chosen(command: str) -> set[str]:
    """Return the groups in the defaults of a command's file."""
    import yaml  # type: ignore[import-untyped]

    top = yaml.safe_load((conf_dir() / f"{command}.yaml").read_text())
    return {group for entry in top["defaults"] if isinstance(entry, dict) for group in entry}


def _is_for(path: Path, chosen: set[str], known: Sequence[str]) -> bool:
    """Return whether a file of `experiment` or `debug` sets only groups and keys that a command has."""
    import yaml

    content = yaml.safe_load(path.read_text()) or {}
    groups_ = [group for entry in content.pop("defaults", []) if isinstance(entry, dict) for group in entry]
    if not {group.removeprefix("override /") for group in groups_} <= chosen:
        return False
    leaves = [key for key, value in _flat(content, "").items() if not isinstance(value, dict)]
    return all(any(leaf == key or leaf.startswith(f"{key}.") for key in known) for leaf in leaves)


def texts(kind: type) -> dict[str, str]:
    """Return the explanation of each field of a class of qflow, its bases' first; "" where there is none."""
    classes = _classes(_file(kind.__module__))
    node = classes[kind.__name__]
    found = {name: field[2] for base in node.bases if base in classes for name, field in classes[base].fields.items()}
    own = {name: field[2] for name, field in node.fields.items()}
    explained = {**own, **{name: text for name, text in _explained(node).items() if name in own and not own[name]}}
    return {name: " ".join(text.split()) for name, text in {**found, **explained}.items()}


def switches(command: str) -> dict[str, str]:
    """Switch -> the key that it sets to true: `--dry-run` for `dry_run=true`."""
    return {f"--{key.path.replace('_', '-')}": key.path for key in keys(command) if key.type == "bool"}


def conf_dir() -> Path:
    """Return the folder of the shipped configuration: conf/ of the repository, or qflow/conf in a wheel."""
    spec = importlib.util.find_spec("qflow.conf")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return QFLOW.parent / "conf"


def own_conf_dir() -> Path | None:
    """Return conf/ of the working folder, whose files are options beside the shipped ones; None if there is none."""
    place = Path("conf").absolute()
    return place if place.is_dir() and place.resolve() != conf_dir() else None


def settings_of(kind: type) -> str:
    """Return the name of the class of settings whose fields a schema class has; "" if it explains its own."""
    found = FIELDS_OF.match(kind.__doc__ or "")
    return found[2] if found else ""


def about(group: str, option: str) -> str:
    """Return what the comment at the start of a file of conf/ says; "" for a file that is not shipped."""
    path = conf_dir() / group / f"{option}.yaml"
    lines = path.read_text().splitlines() if path.exists() else []
    comment = [line[1:].strip() for line in itertools.takewhile(lambda text: text.startswith("#"), lines)]
    return " ".join(text for text in comment if not text.startswith(("@package", "python -m")))


def first_sentence(text: str) -> str:
    """Return the text up to its first full stop, on one line."""
    return re.split(r"(?<=\.)\s", " ".join(text.split()), maxsplit=1)[0]


def shipped(command: str) -> dict[str, Any]:
    """Key -> value in the files of conf/ that the command takes by default; interpolations as they are written."""
    import yaml  # type: ignore[import-untyped]

    found: dict[str, Any] = {}
    top = yaml.safe_load((conf_dir() / f"{command}.yaml").read_text())
    for entry in top.pop("defaults", []):
        for group, option in entry.items() if isinstance(entry, dict) else ():
            if not group.startswith("override "):
                found.update(_option(group, str(option)))
    found.update(_flat({name: value for name, value in top.items() if name != "hydra"}, ""))
    return found


def _option(group: str, option: str) -> dict[str, Any]:
    """Return the keys that a file of a group sets, after the other files of the group that it starts from."""
    import yaml

    content = yaml.safe_load((conf_dir() / group / f"{option}.yaml").read_text()) or {}
    found: dict[str, Any] = {}
    for base in content.pop("defaults", []):
        if isinstance(base, str) and base != "_self_":
            found.update(_option(group, base))
    return found | _flat(content, f"{group}.")


def _flat(content: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict) and value:
            found.update(_flat(value, f"{prefix}{name}."))
        found[f"{prefix}{name}"] = value
    return found


def _below(kind: str, prefix: str) -> Iterator[Key]:
    """The keys of a schema class, and of the classes of its fields."""
    known = _classes("config/command_schema.py") | _group_classes()
    node = known[kind]
    for base in node.bases:
        if base in known:
            yield from _below(base, prefix)
    explained = _explained(node)
    for name, (annotation, default, text) in node.fields.items():
        if annotation in known:
            yield from _below(annotation, f"{prefix}{name}.")
        else:
            shown = "" if default == "MISSING" else default
            yield Key(f"{prefix}{name}", annotation, shown, " ".join((text or explained.get(name, "")).split()))


def _groups(kind: str) -> Iterator[tuple[str, str]]:
    """(name, class) of the groups of a command."""
    known, groups_ = _classes("config/command_schema.py"), _group_classes()
    for base in known[kind].bases:
        yield from _groups(base)
    yield from ((name, field[0]) for name, field in known[kind].fields.items() if field[0] in groups_)


def _explained(node: _Class) -> dict[str, str]:
    found = FIELDS_OF.match(node.text)
    if not found:
        return {}
    return {name: field[2] for name, field in _classes(_file(found[1]))[found[2]].fields.items()}


def _file(module: str) -> str:
    return f"{module.removeprefix('qflow.').replace('.', '/')}.py"


@functools.cache
def _schemas() -> dict[str, str]:
    """Command -> the class of its schema, from the table SCHEMAS."""
    tree = ast.parse((QFLOW / "config" / "command_schema.py").read_text())
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "SCHEMAS"
    )
    assert isinstance(table, ast.Dict)
    entries = zip(table.keys, table.values, strict=True)
    return {ast.literal_eval(key): ast.unparse(value) for key, value in entries if key}


def _group_classes() -> dict[str, _Class]:
    """The classes of all groups."""
    files = sorted(path.name for path in (QFLOW / "config").glob("*schema.py") if path.name != "command_schema.py")
    return {name: found for file in files for name, found in _classes(f"config/{file}").items()}


@functools.cache
def _classes(file: str) -> dict[str, _Class]:
    """The classes of a file of qflow, with their fields."""
    tree = ast.parse((QFLOW / file).read_text())
    return {node.name: _class(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def _class(node: ast.ClassDef) -> _Class:
    fields: dict[str, tuple[str, str, str]] = {}
    for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            kind = ast.unparse(_Unlimited().visit(statement.annotation))
            fields[statement.target.id] = kind, _default(statement.value), str(text)
    return _Class(tuple(map(ast.unparse, node.bases)), ast.get_docstring(node) or "", fields)


class _Unlimited(ast.NodeTransformer):
    """`Annotated[int, Between(1, 9)]` as `int`: limits are in the JSON schema (json_schema.py)."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        self.generic_visit(node)
        limited = (
            isinstance(node.value, ast.Name) and node.value.id == "Annotated" and isinstance(node.slice, ast.Tuple)
        )
        return node.slice.elts[0] if limited else node  # type: ignore[attr-defined]


def _default(value: ast.expr | None) -> str:
    """Return the default's source; of `field(default_factory=lambda: x)` the source of x."""
    if isinstance(value, ast.Call) and value.keywords:
        made = value.keywords[0].value
        return ast.unparse(made.body) if isinstance(made, ast.Lambda) else EMPTY.get(ast.unparse(made), "")
    return ast.unparse(value) if value is not None else ""
