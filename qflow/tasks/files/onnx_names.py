"""The inputs of an ONNX graph as arguments of a model's forward."""

from __future__ import annotations

import keyword
import re
from typing import Any


def arguments_of(graph: Any) -> dict[str, str]:
    """The argument for each input of a graph: its name, as far as Python takes it."""
    held = {tensor.name for tensor in graph.initializer}
    found: dict[str, str] = {}
    for place, name in enumerate((value.name for value in graph.input if value.name not in held), 1):
        word = re.sub(r"\W", "_", name)
        usable = word.isidentifier() and not keyword.iskeyword(word) and word not in found.values()
        found[name] = word if usable else f"input_{place}"
    return found


def name_inputs(graph: Any) -> None:
    """Rename the inputs of a graph that are no names in Python."""
    renamed = {name: word for name, word in arguments_of(graph).items() if name != word}
    for value in graph.input:
        value.name = renamed.get(value.name, value.name)
    for node in graph.node if renamed else ():
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
