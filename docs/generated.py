"""Pages of the site that are made from the code: all keys of each command, and the reference of the library.

mkdocs calls `on_files` before it reads the pages (hooks in mkdocs.yml). The pages are never written to docs/.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from qflow import _PLACES
from qflow.config.command_table import COMMANDS
from qflow.config.keys import Key, groups, keys, shipped

PLUGIN_MODULES = ("qflow.api.plugin_names", "qflow.api.plugin_qconfigs")
PLUGIN = "These names are those of Horizon's plugin, so that scripts written for it run with `import qflow` instead."


def pages() -> dict[str, tuple[str, str]]:
    """Path of a generated page -> (its title in the contents, its text)."""
    found = {f"reference/{name}.md": (f"Command {name}", command_page(name)) for name in COMMANDS}
    for group, listed in sections().items():
        found[f"reference/{group}-keys.md"] = f"Keys of {group}", group_page(group, listed)
    found |= {f"reference/{place}.md": library_page(place, names.split()) for place, names in _PLACES.items()}
    return found | {f"reference/{module}.md": plugin_page(module) for module in PLUGIN_MODULES}


def sections() -> dict[str, list[Key]]:
    """Group -> its keys, from the command that has all groups."""
    found: dict[str, list[Key]] = {}
    for key in keys("tune"):
        if "." in key.path:
            found.setdefault(key.path.partition(".")[0], []).append(key)
    return found


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the generated pages under Reference."""
    (reference,) = (entry["Reference"] for entry in config.nav or [] if "Reference" in entry)
    reference += [{title: path} for path, (title, _) in pages().items()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those of docs/."""
    for path, (_, text) in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def command_page(name: str) -> str:
    """A command: how it is called, what its exit codes mean, its groups, and the keys that it has alone."""
    command, values = COMMANDS[name], shipped(name)
    lines = [f"# `{name}`: all keys", "", f"{command.summary[0].upper()}{command.summary[1:]}.", "", "```"]
    lines += [*(f"python -m qflow.{name} {form}" for form in command.usage), "```", ""]
    lines += ["| exit code | meaning |", "|---|---|"]
    lines += [f"| {code} | {_plain(command.meaning(code))} |" for code in (0, 1, 2)]
    if taken := groups(name):
        lines += ["", "## Groups", "", "| group | options | |", "|---|---|---|"]
        lines += [
            f"| `{g}` | {', '.join(f'`{o}`' for o in options)} | {_plain(text)} |"
            for g, (text, options) in taken.items()
        ]
    shared = sections()
    own = [key for key in keys(name) if key.path.partition(".")[0] not in shared]
    lines += ["", "## Keys", "", *_table(own, values)]
    if below := sorted({key.path.partition(".")[0] for key in keys(name)} & set(shared)):
        linked = ", ".join(f"[{group}]({group}-keys.md)" for group in below)
        lines += ["", f"Keys of the groups: {linked}."]
    return "\n".join([*lines, ""])


def group_page(group: str, listed: Sequence[Key]) -> str:
    """All keys of a group, as `qflow.tune` has them by default."""
    lines = [f"# Keys of `{group}`", ""]
    if about := groups("tune").get(group):
        lines += [
            about[0],
            "",
            f"`{group}=<option>` chooses a set of them: {', '.join(f'`{o}`' for o in about[1])}.",
            "",
        ]
    return "\n".join([*lines, *_table(listed, shipped("tune")), ""])


def _table(listed: Sequence[Key], values: Mapping[str, object]) -> list[str]:
    lines = ["| key | type | value | |", "|---|---|---|---|"]
    for key in listed:
        value = _code(_shown(values.get(key.path, key.default)))
        lines.append(f"| `{key.path}` | {_code(key.type)} | {value} | {_plain(key.text)} |")
    return lines


def library_page(place: str, names: Sequence[str]) -> tuple[str, str]:
    """The public names that one module gives to `import qflow`."""
    title = ", ".join(names)
    head = f"`import qflow` gives these names of `{place}`. [The library](../library.md) shows them at work."
    return title, "\n\n".join([f"# {title}", head, *(f"::: {place}.{name}" for name in names), ""])


def plugin_page(module: str) -> tuple[str, str]:
    """A module that holds names of the plugin, whole."""
    title = f"Names of the plugin: {module.rpartition('_')[2]}"
    return title, "\n\n".join([f"# {title}", PLUGIN, f"::: {module}", ""])


def _shown(value: object) -> str:
    """A value, or its text in Python, as it is written on the command line."""
    text = str(value)
    return {"None": "null", "True": "true", "False": "false"}.get(text, text)


def _code(text: str) -> str:
    return f"`{text}`" if text and "`" not in text else text  # a pipe in code ends no cell


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
