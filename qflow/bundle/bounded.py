"""JSON and YAML as data: size, nesting, tags, aliases and interpolations are checked before anything is built."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig

from qflow.bundle.files import LIMITS, MOST
from qflow.bundle.texts import check_texts
from qflow.config.settings import load_resolved
from qflow.core.errors import BundleError

DEEPEST = 32  # levels of lists and mappings; what qflow writes has 8
_STRUCTURE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)
"""A text, also one without an end (so that no byte is looked at twice), or a bracket."""


def read_json(folder: Path, name: str) -> Any:
    """Return the value in a JSON file. Raises BundleError if it is too large, nested too deep, or no strict JSON."""
    return parse_json(_bytes(folder, name), name)


def parse_json(data: bytes, name: str) -> Any:
    """Return the value in a JSON text. Raises BundleError if it is nested too deep, or no strict JSON."""
    depth = 0
    for token in _STRUCTURE.finditer(data):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token.group(), 0)
        if depth > DEEPEST:
            raise _error(name, f"nesting deeper than {DEEPEST}")

    def refuse(constant: str) -> None:
        raise _error(name, constant)

    try:
        value = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise _error(name, f"no JSON ({' '.join(str(error).split())[:80]})") from error
    if b"\\" in data or b"\x7f" in data or not data.isascii():  # large tables of numbers are not walked
        check_texts(value, name)
    return value


def read_config(folder: Path) -> DictConfig:
    """Return the configuration of a run, from config.yaml as data. Raises BundleError, or ConfigError for its values.

    Nothing else reads it: an interpolation in it would read the environment, or build an object.
    """
    return load_resolved(read_yaml_text(folder, "config.yaml"))


def read_yaml_text(folder: Path, name: str) -> str:
    """Return the text of a YAML file without interpolations, tags and aliases. Raises BundleError for any of them."""
    try:
        text = _bytes(folder, name).decode()
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise _error(name, "a YAML alias")
            check_texts(getattr(event, "value", ""), name)
            if "${" in getattr(event, "value", ""):  # decoded: a quoted text may write $ as an escape
                raise _error(name, "an interpolation, ${")
            if getattr(event, "tag", None):
                raise _error(name, f"the YAML tag {event.tag:.40}")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise _error(name, f"nesting deeper than {DEEPEST}")
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise _error(name, f"no YAML ({' '.join(str(error).split())[:80]})") from error
    return text


def _bytes(folder: Path, name: str) -> bytes:
    path = folder / name
    if (size := path.stat().st_size) > (most := LIMITS.get(name, MOST)):
        raise _error(name, f"{size} bytes, more than {most}")
    return path.read_bytes()


def _error(name: str, what: str) -> BundleError:
    return BundleError(f"{name} is plain data as qflow writes it, but got {what}. Take another source.")
