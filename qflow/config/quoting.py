"""Quoting for Hydra's override grammar and for the shell, so that a printed line works when it is pasted.

Without quotes, Hydra takes ASCII letters, digits, blanks and a few signs in a value; other characters have a meaning in
its grammar or are refused. In quotes it takes every character; a backslash is an escape only before a quote.
"""

from __future__ import annotations

import os
import re
import shlex

PAIRS = {"[": "]", "{": "}", "(": ")"}
NOT_TEXT = ("null", "true", "false", "inf", "nan")  # in any case


def assignment(key: str, value: object) -> str:
    """Return `key=value` as one word for the shell, which gives the text `value` to Hydra whatever is in it."""
    text = str(value)
    plain = re.fullmatch(r"[a-zA-Z_/][\w/.-]*", text, re.ASCII) and text.lower() not in NOT_TEXT
    return word(f"{key}={text if plain else quoted(_literal(text))}")


def word(text: str) -> str:
    """Return `text` as one word for bash, on one line."""
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + "".join(map(_escaped, text)) + "'"


def _escaped(character: str) -> str:
    if character.isprintable() and character not in "\\'":
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 128 else f"\\U{code:08x}"


def quoted(text: str) -> str:
    """Return `text` in double quotes for Hydra."""
    return '"' + re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + (r"\"" if found[2] else ""), text) + '"'


def mended(argument: str) -> str | None:
    """Return an override that Hydra refuses with its value quoted, as one word for the shell; None if that is no help.

    Of a list, a mapping or a choice(...) only those items are quoted that need it. A leading ~ becomes the home folder,
    because nothing expands it inside quotes.
    """
    key, _, value = argument.partition("=")
    if not _parses(f"{key}=1") or not value or not _closed(value):
        return None
    found = f"{key}={_mended(value.strip())}"
    return word(found) if _parses(found) else None


def in_braces(key: str, name: str, value: str) -> str:
    """Return `key={name: value}` as one word for the shell, with `name` escaped; "" if Hydra cannot read it."""
    escaped = re.sub(r"([][(){},:= ])", r"\\\1", name)
    found = f"{key}={{{escaped}: {_mended(value)}}}"
    return word(found) if _parses(found) else ""


def _mended(value: str) -> str:
    head = re.fullmatch(r"(\w*)([\[{(])(.*)([\]})])", value, re.DOTALL)
    if _parses(f"key={value}"):
        return value
    if head and PAIRS[head[2]] == head[4] and bool(head[1]) == (head[2] == "("):
        items = [_pair(item) if head[2] == "{" else _mended(item) for item in _split(head[3])]
        if _parses(f"key={(whole := f'{head[1]}{head[2]}{chr(44).join(items)}{head[4]}')}"):
            return whole
    return quoted(os.path.expanduser(value))


def _pair(item: str) -> str:
    key, colon, value = item.partition(":")
    return f"{key}{colon}{_mended(value.strip())}"


def _split(text: str) -> list[str]:
    """Return the items between the commas that are outside of all brackets and quotes."""
    items, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        depth += not quote and (character in PAIRS) - (character in PAIRS.values())
        if character == "," and not depth and not quote:
            items.append("")
        else:
            items[-1] += character
    return [item.strip() for item in items]


def _closed(value: str) -> bool:
    """Return whether brackets and quotes are closed; if not, quoting would hide the mistake."""
    if _parses(f"key={value}"):
        return True
    opened: list[str] = []
    bare = re.sub(r"\"[^\"]*\"|'[^']*'", "", value)
    for character in bare:
        if character in PAIRS:
            opened.append(PAIRS[character])
        elif character in PAIRS.values() and (not opened or opened.pop() != character):
            return False
    return not opened and value[0] not in "'\""


def _parses(argument: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser  # heavy: only where a line is quoted
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True


def _literal(text: str) -> str:
    """Return `text` escaped for OmegaConf, which would replace `${name}`."""
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)
