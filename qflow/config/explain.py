"""One line for an error of Hydra, OmegaConf or YAML: the rule, what was got, and the nearest of what exists."""

from __future__ import annotations

import re

from omegaconf import OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]

from qflow.config.command_schema import SCHEMAS
from qflow.config.command_table import named
from qflow.config.keys import conf_dir, groups, keys
from qflow.core.nearest import did_you_mean, nearest

UNQUOTED = (
    "A range inside braces is text, but got one without quotes. Write key='{a: \"choice(1,2)\"}', or key.a=choice(1,2)."
)

KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list, as in [a,b]",
    "dict": "a mapping, as in {a: b}",
}
"""How the annotation of a schema's field begins -> the values that it takes."""
TYPES = {
    **{"str": "a text", "int": "a number", "float": "a number", "bool": "true or false"},
    **{"list": "a list", "List": "a list", "dict": "a mapping", "Dict": "a mapping"},
}


def experiments() -> list[str]:
    """Return the names of the experiments that run a workflow of qflow.tune."""
    return sorted(p.stem for p in (conf_dir() / "experiment").glob("*.yaml") if "\nworkflow:" in p.read_text())


def explain(error: Exception, config: str = "tune") -> str:
    """Return one line for an error of Hydra or OmegaConf, with the key or value and those that exist."""
    if isinstance(error, YAMLError):
        return f"A configuration file is YAML, but got {' '.join(str(error).split())}. Correct that line."
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = " ".join(str(cause).split())
    key = str(getattr(cause, "full_key", "") or "")
    found = re.search(r"full_key: (\S+)", text)
    key = key or (found.group(1) if found else "")
    if key.isdigit() and (found := re.search(r"Error merging override \+*([\w.]+)=", str(error))):
        key = f"{found[1]}[{key}]"  # an item of a list
    text = text.split(" full_key:")[0].split(" See https://")[0]
    first = " ".join(str(error).split())
    if "not in" in text and key:
        return _unknown_key(key, config)
    if wrong := _group(first, config):
        return wrong
    if lost := re.search(r"Additional config directory '(.*)' not found", first):
        return f"--config-dir names a folder, but got {lost[1]}, which is none. Correct the path."
    if "Missing mandatory value" in text and key == "workflow":
        names = experiments()
        return f"A study needs an experiment, but got none. Add +experiment=<name>: {', '.join(names)}."
    if "Missing mandatory value" in text and key in ("device.march", "device.oe_version"):
        return (
            f"A device file names its {key.removeprefix('device.')}, but got none. Add it, or start from a shipped "
            "file: defaults: [nash-m, _self_]."
        )
    if "Missing mandatory value" in text:
        return f"A value is needed for {key}, but got none. Set {key}=..., or add +experiment=<name>."
    if key == "tags" and "Set[str]" in text:  # Hydra's own object for choice(...) or interval(...)
        return UNQUOTED
    if wrong := _grammar(text, config):
        return wrong
    if wrong := _wrong_type(key, text, config):
        return wrong
    if key and key not in text:
        return f"{text.rstrip('.')}, for {key}."
    return text if len(text) > 8 else first


def _group(first: str, config: str) -> str:
    """Return one line for a group, or an option of one, that does not exist; "" for another error."""
    if "No match in the defaults list" in first or ("Could not override" in first and "." not in first.split("'")[1]):
        name = first.split("'")[1]
        listed = list(groups(config))
        known = f"Its groups: {', '.join(listed)}." if listed else "It has none: leave that out."
        return f"A group is one that {config} takes, but got {name}.{did_you_mean(name, listed)} {known}"
    lost = re.search(r"In '(\S+)': Could not load '(\S+)'", first)
    if lost:
        group = lost.group(2).rpartition("/")[0]
        shipped = ", ".join(sorted(path.stem for path in (conf_dir() / group).glob("*.yaml")))
        return (
            f"A file's defaults name others of its group, but got {lost.group(2)} in {lost.group(1)}. "
            f"Shipped are: {shipped or 'none'}."
        )
    if "Could not find" in first or ("In '" in first and "Could not" in first):
        wanted = first.split("Could not find '")[-1].split("'")[0]
        options = first.partition("Available options in")[2].partition(":")[2].split("Config search path")[0].split()
        shown = [o.strip("',") for o in options]
        meant = did_you_mean(wanted.rpartition("/")[2], shown)
        return f"A group option must exist, but got {wanted}.{meant} Options: {', '.join(shown)}."
    return ""


def _grammar(text: str, config: str) -> str:
    """Return one line for an error of Hydra's parser; "" for another error."""
    if re.search("no viable alternative|mismatched input|extraneous input|LexerNoViableAlt|token recognition", text):
        got = text.split(" at input ")[-1].removeprefix("LexerNoViableAltException: ").rstrip("^ ")
        return f"An override is key=value with closed brackets and quotes, but got {got or 'an empty one'}."
    if "missing EQUAL" in text:
        got = text.partition("override ")[2].partition(" missing EQUAL")[0]
        experiment, word = nearest(got, experiments()), nearest(got, named(config).also)
        way = f"Did you mean +experiment={experiment}?" if experiment else "Quote a value with blanks: 'key=\"a b\"'."
        way = f"Did you mean {word}?" if word else way
        return f"An override is key=value, but got {got} without =. {way}"
    return ""


def _wrong_type(key: str, text: str, config: str) -> str:
    """Return one line for a value of a type that its key does not take; "" for another error."""
    known = {k.path: k.type for k in keys(config)}
    path = key.partition("[")[0]
    kind = known.get(path) or known.get(path.rpartition(".")[0], "")
    if (path != key or path not in known) and (inside := re.fullmatch(r"(?:dict\[str, |list\[)(.*)\]", kind)):
        kind = inside[1]  # of an entry or item
    if kind == "Any" and "Cannot merge" in text:
        return f"{key} stays a list or a mapping, as a file says, but got the other. Set it in a file of your own."
    takes = next((words for name, words in KINDS.items() if kind.startswith(name)), "")
    got = _got(text, kind)
    if not takes or not got:
        return ""
    rule = f"{takes}{' or null' if kind.endswith('| None') else ''}"
    return f"{key} is {rule}, but got {got}. Leave it out, or see {path.split('.')[0]} in --help."


def _got(text: str, kind: str) -> str:
    """Return the value that OmegaConf refuses for its type, or in words what it is; "" for another refusal."""
    if found := re.search(r"Value '(.*)' (?:of type|is not a valid bool)|Cannot convert '\w+' to string: '(.*)'", text):
        return repr(found[1] if found[1] is not None else found[2])[:80]
    if "is not Optional" in text:
        return "null"
    if found := re.search(r"Cannot assign (\w+) to|assigned: (\w+) is not|'(\w+)Config' is incompatible", text):
        return TYPES.get(next(filter(None, found.groups())), "another type")
    if "Cannot merge DictConfig with ListConfig" in text:
        return "a mapping" if kind.startswith("list") else "a list"
    return ""


def _unknown_key(key: str, config: str) -> str:
    schema = OmegaConf.structured(SCHEMAS[config])
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(schema, parent) if parent else schema
    beside = [str(k) for k in node] if node is not None else []
    listed = f"Keys of {parent or config}: {', '.join(beside)}." if beside else f"To add it, write +{key}=..."
    near = nearest(leaf, beside)
    meant = f"{parent}.{near}".lstrip(".") if near else _elsewhere(leaf, config)
    return f"A key must exist in the configuration, but got {key}.{f' Did you mean {meant}?' if meant else ''} {listed}"


def _elsewhere(leaf: str, config: str) -> str:
    """Return the first key of another group with this last part, else the first with the nearest; "" without one."""
    known = {key.path.rpartition(".")[2]: key.path for key in reversed(keys(config))}
    return known.get(leaf) or known.get(nearest(leaf, known), "")
