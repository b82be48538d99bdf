"""The names that operators have in the plugin, each with how it was derived and whether that is sure.

Known is: a module keeps its path, and all its calls share it; a fused group stands at its first module, with an add at
the add; a FloatFunctional is a module of the user's; other functionals become modules with generated names,
`_generated_add_0`. In public configurations such a name stands below the module that calls the functional and counts
its calls (`layers.3.self_attn._generated_matmul_1`). Whether this holds everywhere is not known, so that these names
are candidates: `sure` is no until the user has found them in the prepared model.
"""

from __future__ import annotations

import copy
import csv
import re
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from torch import nn

from qflow.core.graph import OpKind, OpNode
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.trace.calling import copied, input_tensors, run_model

STUB = "QuantStub"
FUNCTIONALS = frozenset({"FloatFunctional", "FFFunctional", "QFunctional"})
_CALL = re.compile(r"(?P<scope>.*)\[(?P<function>\w+)\](?:\((?P<call>\d+)\))?")
_MODULE = re.compile(r"(?P<path>[^\[\]()]+)(?:\(\d+\))?")


@dataclass(frozen=True)
class PluginName:
    """One operator's name in the plugin."""

    op: str
    """The name in the qconfig."""
    plugin: str
    """The name in the model that the plugin prepared, or a candidate for it; empty if there is none."""
    derived: str
    """How it was derived."""
    sure: bool


def plugin_names(prepared: QuantizedModel, sample: Any) -> dict[str, PluginName]:
    """Return the plugin's name of every operator of the qconfig, in the order of execution.

    `sample` are inputs of the float model; a model with QuantStubs runs on them once.
    """
    modules = dict(prepared.model.named_modules())
    stubs = _stubs(prepared, modules, sample)
    given = _functionals(prepared, modules)
    return {node.name: given.get(node.name) or _name(node, modules, stubs) for node in prepared.graph.quantized}


def names_csv(names: dict[str, PluginName]) -> str:
    """Return the names as CSV: qflow, plugin, derived, sure."""
    file = StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["qflow", "plugin", "derived", "sure"])
    for name in names.values():
        writer.writerow([name.op, name.plugin, name.derived, "yes" if name.sure else "no"])
    return file.getvalue()


def _name(node: OpNode, modules: dict[str, nn.Module], stubs: dict[str, str]) -> PluginName:
    if node.kind == OpKind.input:
        return _input(node.name, stubs)
    if node.kind == OpKind.constant:
        how = "a constant has no module: the operator that reads it quantizes it (ConstTensorQuantTemplate)"
        return PluginName(node.name, "", how, False)
    if (found := _MODULE.fullmatch(node.name)) and found["path"] in modules:
        return PluginName(node.name, found["path"], f"path of the module{_group(node)}", True)
    if found := _CALL.fullmatch(node.name):
        return _functional(node, found["scope"], found["function"], int(found["call"] or 0), modules)
    return PluginName(node.name, "", "no rule is known", False)


def candidate(op: str) -> str:
    """Return the name that the plugin may give to the functional `op`; empty for an operator of another kind."""
    found = _CALL.fullmatch(op)
    if not found or op.startswith(("quant[", "const[")):
        return ""
    return f"{found['scope']}._generated_{found['function']}_{int(found['call'] or 0)}".removeprefix(".")


def _input(name: str, stubs: dict[str, str]) -> PluginName:
    if name in stubs:
        return PluginName(name, stubs[name], "the QuantStub that receives this input", True)
    wanted = "quant_" + re.sub(r"\W+", "_", name.removeprefix("quant[").removesuffix("]"))
    return PluginName(name, wanted, "the model has no QuantStub for this input: add one under this name", False)


def _functional(node: OpNode, scope: str, function: str, call: int, modules: dict[str, nn.Module]) -> PluginName:
    if isinstance(modules.get(scope), nn.MultiheadAttention):
        how = "inside nn.MultiheadAttention, which the plugin replaces as a whole by names of its own"
        return PluginName(node.name, "", how, False)
    how = f"candidate: call {call + 1} of {function} in {scope or 'the model'}{_group(node)}"
    return PluginName(node.name, candidate(node.name), how, False)


def _functionals(prepared: QuantizedModel, modules: dict[str, nn.Module]) -> dict[str, PluginName]:
    """Return the functionals that a FloatFunctional called: its own Identity reads their result."""
    found = {}
    for node in prepared.graph.quantized:
        for reader in prepared.graph.consumers[node.name]:
            path, _, own = _MODULE.sub(r"\g<path>", reader).rpartition(".")
            if own == "activation_post_process" and type(modules.get(path)).__name__ in FUNCTIONALS:
                found[node.name] = PluginName(node.name, path, f"path of the FloatFunctional{_group(node)}", True)
    return found


def _group(node: OpNode) -> str:
    return f", which holds {', '.join(node.fused)}" if node.fused else ""


def _stubs(prepared: QuantizedModel, modules: dict[str, nn.Module], sample: Any) -> dict[str, str]:
    """Return input -> path of the QuantStub that receives it in a forward pass on the example input."""
    paths = [path for path, module in modules.items() if type(module).__name__ == STUB]
    if not paths:
        return {}
    model = copy.deepcopy(prepared).model  # a model with state keeps its own
    inputs = copied(sample)
    names = {id(tensor): f"quant[{name}]" for name, tensor in input_tensors(model, inputs)}
    found: dict[str, str] = {}

    def receives(path: str, args: tuple[Any, ...]) -> None:
        if args and id(args[0]) in names:
            found.setdefault(names[id(args[0])], path)

    for path in paths:
        model.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: receives(path, args))
    with torch.no_grad():
        run_model(model, inputs)
    return found
