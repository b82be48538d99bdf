"""The text of `qflow --help` and `qflow <command> --help`: 80 columns, one explanation for each key."""

from __future__ import annotations

import textwrap

from qflow.config.command_table import COMMANDS, named
from qflow.config.keys import Key, first_sentence, groups, keys, shipped

WIDTH, LEFT = 79, 27  # columns; where explanations begin
EVERY = "Every key may be set: key=value."
SEARCHED = """ tune also searches keys, in Hydra's grammar:
  calibration.method='choice(mse,kl)'     qconfig.int16_ratio='interval(0,0.5)'"""
OPTIONS = {
    "--help": "This text.",
    "--json": "One JSON document on stdout for scripts; messages go to stderr.",
    "--cfg job": "Print the configuration with your overrides, and run nothing.",
    "--hydra-help": "Hydra's own options.",
}


def overview() -> str:
    """Return the text of `qflow --help`."""
    lines = ["qflow <command> [key=value ...]       (or: python -m qflow.<command> ...)", ""]
    lines += ["Tune the precision mix of a model for Journey 6M, every trial tracked in MLflow.", ""]
    lines += [_row(f"  {name}", command.summary, 12) for name, command in COMMANDS.items()]
    lines += [
        "",
        "  qflow <command> --help              its keys, each explained in a line",
        "  qflow --completion bash|zsh|fish    a script that completes commands and keys",
        "  qflow --version",
        "",
        "The first steps:  qflow tune +experiment=int8_int16",
        "                  qflow promote study=perception/int8_int16",
    ]
    return "\n".join(lines)


def command_help(name: str, prefix: str) -> str:
    """Return the help of a command, which is called as `prefix`, for example `python -m qflow.tune`."""
    command, values = named(name), shipped(name)
    lines = []
    for form in command.usage:
        lines += textwrap.wrap(f"{prefix} {form}", WIDTH, subsequent_indent="    ", break_on_hyphens=False)
    if command.summary:
        lines += ["", *textwrap.wrap(f"{command.summary[0].upper()}{command.summary[1:]}.", WIDTH)]
    lines += ["", "Exit codes"]
    lines += [_row(f"  {code}", command.meaning(code), 5) for code in (0, 1, 2)]
    lines += ["", "Options", *(_row(f"  {option}", text, LEFT) for option, text in OPTIONS.items())]
    taken = groups(name)
    if taken:
        plus = " (experiment and debug with a plus)" if "experiment" in taken else ""
        lines += ["", f"Groups: group=option chooses a set of keys{plus}"]
    about = {group: text for group, (text, _) in taken.items()}
    for group, (_, options) in taken.items():
        lines += textwrap.wrap(f"{group}: {', '.join(options)}", WIDTH, initial_indent="  ", subsequent_indent="    ")
    sections: dict[str, list[Key]] = {"": []}
    for key in keys(name):
        sections.setdefault(key.path.rpartition(".")[0], []).append(key)
    for section, found in sections.items():
        lines += ["", *_heading(section, about.get(section, ""))]
        lines += [_row(f"  {_assigned(key, values)}", first_sentence(key.text), LEFT) for key in found]
    return "\n".join([*lines, "", EVERY + (SEARCHED if name == "tune" else "")])


def _heading(group: str, about: str) -> list[str]:
    if not group:
        return ["Keys, with the values that they have unless you set them"]
    return textwrap.wrap(f"{group}.*{f': {about}' if about else ''}", WIDTH)


def _assigned(key: Key, values: dict[str, object]) -> str:
    """`name=default` as it would stand on the command line; `name` alone where the default is long."""
    name = key.path.rpartition(".")[2]
    value = values.get(key.path, key.default if key.default != "None" else None)
    if isinstance(value, bool) or value is None or value in ("True", "False"):
        text = "null" if value is None else str(value).lower()
    else:
        text = str(value).strip("'")
    plain = len(text) <= WIDTH - LEFT - len(name) and not any(sign in text for sign in "{}[$\n ")
    return f"{name}={text}" if plain and text != "???" and text else name


def _row(left: str, text: str, column: int) -> str:
    """A left part and its explanation, which starts at a column; below it if the left part is too long."""
    lines = textwrap.wrap(text, WIDTH - column, break_on_hyphens=False)
    if len(left) > column - 2:
        return "\n".join([left, *(" " * column + line for line in lines)])
    return "\n".join([f"{left:<{column}}{lines[0] if lines else ''}".rstrip(), *(" " * column + x for x in lines[1:])])
