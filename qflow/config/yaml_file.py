"""A user's YAML file, bounded before anything is built from it: size, depth, and what its aliases expand to."""

from __future__ import annotations

from pathlib import Path

import yaml  # type: ignore[import-untyped]

from qflow.core.errors import ConfigError
from qflow.core.text_file import read_text

LARGEST = 256 * 1024  # bytes; a device file has 5 kB
MOST_VALUES = 100_000  # with aliases expanded, as OmegaConf does it


def mapping_text(path: Path, rule: str) -> str:
    """Return the text of a YAML file that holds one mapping or nothing.

    Raises ConfigError, which begins with `rule` (`A device file is YAML`), for any other file.
    """
    text = read_text(path, rule, LARGEST)
    try:
        node = yaml.compose(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        values = _values(node, {}) if node is not None else 0
    except yaml.YAMLError as error:
        raise ConfigError(f"{rule}, but got {path}: {' '.join(str(error).split())}. Correct that line.") from error
    except RecursionError as error:
        raise ConfigError(f"{rule}, but got {path}, which is nested too deep. Correct it.") from error
    if values > MOST_VALUES:
        raise ConfigError(f"{rule} of at most {MOST_VALUES} values, but got more in {path}. Leave out its aliases.")
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{rule} with keys and their values, but got none in {path}. Write key: value.")
    return text


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of values at and below a node. An alias stands for the node that it names."""
    if id(node) not in known:
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        children = [child for part in parts for child in (part if isinstance(part, tuple) else (part,))]
        known[id(node)] = 1 + sum(_values(child, known) for child in children)
    return known[id(node)]
