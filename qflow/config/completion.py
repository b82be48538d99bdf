"""Completion of commands, options, groups and keys in bash, zsh and fish, for `qflow tune` and `python -m qflow.tune`.

The shell's function passes the line up to the cursor to `--complete`, which prints one candidate a line: whole words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from qflow.config.command_table import COMMANDS
from qflow.config.keys import groups, keys, switches
from qflow.core.errors import ConfigError
from qflow.core.nearest import did_you_mean

MODULE = re.compile(r"(?:^|.*\s)-m\s+qflow(?:\.(?P<name>\w*)|\s+)(?P<rest>.*)$")
FLAGS = ("--help", "--json", "--cfg", "--hydra-help")
# A word of bash ends at = and :, so that only what follows may be given back.
BASH = r"""_qflow() {
    local line="${COMP_LINE:0:COMP_POINT}" word="${COMP_LINE:0:COMP_POINT}" candidate
    COMPREPLY=()
    [[ $1 == python* && $line != *"-m qflow"* ]] && return
    local run=(qflow)
    [[ $1 == python* ]] && run=("$1" -m qflow)
    word="${word##*[[:space:]]}"
    local lead="${word%"${word##*[=:]}"}"
    while IFS= read -r candidate; do
        COMPREPLY+=("${candidate#"$lead"}")
    done < <("${run[@]}" --complete "$line" 2>/dev/null)
}
complete -o default -o nospace -F _qflow qflow python python3
"""
ZSH = r"""#compdef qflow python python3
_qflow() {
    local line="${LBUFFER}"
    local -a run=(qflow)
    if [[ $service == python* ]]; then
        if [[ $line != *"-m qflow"* ]]; then
            (( $+functions[_python] )) && _python || _files
            return
        fi
        run=($service -m qflow)
    fi
    compadd -S '' -- ${(f)"$($run --complete "$line" 2>/dev/null)"}
}
compdef _qflow qflow python python3
"""
FISH = r"""function __qflow_complete
    set -l line (commandline -cp)
    if string match -q -r '^python' -- $line
        string match -q -r -- '-m qflow' $line; or return
        set -l words (commandline -opc)
        $words[1] -m qflow --complete "$line" 2>/dev/null
    else
        qflow --complete "$line" 2>/dev/null
    end
end
complete -c qflow -f -a '(__qflow_complete)'
complete -c python -a '(__qflow_complete)'
complete -c python3 -a '(__qflow_complete)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def script(shell: str) -> str:
    """Return the script that a shell evaluates. Raises ConfigError for an unknown shell."""
    if shell not in SCRIPTS:
        raise ConfigError(
            f"A shell is one of {', '.join(SCRIPTS)}, but got {shell or 'none'}.{did_you_mean(shell, SCRIPTS)} "
            'In bash: eval "$(qflow --completion bash)".'
        )
    return SCRIPTS[shell]


def complete(line: str) -> list[str]:
    """Return the candidates for the last word of a command line, which ends at the cursor."""
    found = MODULE.match(line)
    if found is None and re.search(r"-m\s+\S*$", line):
        return []
    if found is not None and found["name"] is not None:
        if not found["rest"] and not line.endswith(" "):
            return [f"qflow.{name}" for name in COMMANDS if name.startswith(found["name"])]
        words = [found["name"], *re.split(r"\s+", found["rest"].lstrip())]
    else:
        words = re.split(r"\s+", found["rest"].lstrip() if found else line.lstrip())[0 if found else 1 :]
    *before, word = words or [""]
    if not before:
        return [name for name in COMMANDS if name.startswith(word)]
    return sorted(set(_candidates(before[0], word))) if before[0] in COMMANDS else []


def _candidates(command: str, word: str) -> Iterator[str]:
    """Whole words that begin with `word`: options of a group after `group=`; keys one level at a time."""
    if word.startswith("-"):
        yield from (flag for flag in (*FLAGS, *switches(command)) if flag.startswith(word))
        return
    yield from (other for other in COMMANDS[command].also if other.startswith(word))
    for listed, values in COMMANDS[command].values.items():
        if word.startswith(f"{listed}="):
            last = re.split(r"[=,\[]", word)[-1]  # of a list, the value at the cursor
            lead = word.removesuffix(last)
            yield from (f"{lead}{value}" for value in values if value.startswith(last))
    plus, name = ("+", word[1:]) if word.startswith("+") else ("", word)
    for group, (_, options) in groups(command).items():
        lead = plus or ("+" if group in ("experiment", "debug") else "")
        if name.startswith(f"{group}="):
            yield from (f"{plus}{group}={option}" for option in options if f"{group}={option}".startswith(name))
        elif group.startswith(name):
            yield f"{lead}{group}="
    level = name.count(".")
    for key in keys(command):
        parts = key.path.split(".")
        if key.path.startswith(name) and "=" not in name:
            yield plus + (".".join(parts[: level + 1]) + ("." if len(parts) > level + 1 else "="))
