"""Modules that the model calls several times: which of them get a quantizer for each call, and what the user writes.

The plugin collects one set of quantization information for each module. So all calls of a shared module have one scale
and one dtype: the largest range of a call sets the scale, and one call that the device keeps at int8 keeps all at int8.
`split_shared` gives each call of such a module an output quantizer of its own, named by the call (`act`, `act(1)`), as
if the float model had a copy of the module for each call. The weight of a module stays one, with one quantizer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import nn

from qflow.core.errors import ModelError
from qflow.core.graph import ModelGraph, OpNode
from qflow.quant.model.module_names import Named, matching
from qflow.quant.trace.ops import is_leaf

REPORT, AUTO = "report", "auto"
SETTING = "quant.split_shared"


def split_names(split: Named) -> tuple[str | type[nn.Module], ...]:
    """`split_shared` as a tuple: empty for `report`. Raises ModelError for what is no name."""
    names = (split,) if isinstance(split, (str, type)) else split
    if not isinstance(names, Sequence) or not all(isinstance(name, (str, type)) for name in names):
        raise ModelError(
            f"{SETTING} is {REPORT}, {AUTO} or names of modules, but got {split!r}. {SETTING}={AUTO} splits those "
            "without parameters and buffers."
        )
    return () if split == REPORT else tuple(names)


def split_paths(model: nn.Module, split: Named, skipped: Collection[str] = ()) -> frozenset[str]:
    """Paths of the modules whose calls get quantizers of their own; leaf modules and those that are `skipped`.

    `auto` stands for all without parameters and buffers: a copy of them in the float model costs nothing. A path, class
    name or class stands for all modules in it; copies of their weights are stored and trained apart, so that is asked
    for by name. Raises ModelError for a name without a match.
    """
    names = split_names(split)
    single = {path: m for path, m in model.named_modules() if path and (is_leaf(m) or path in skipped)}
    found = {path for path, module in single.items() if AUTO in names and stateless(module)}
    path_of = {id(module): path for path, module in single.items()}
    for path in matching(model, [name for name in names if name != AUTO], SETTING):
        found |= {path_of[id(m)] for m in model.get_submodule(path).modules() if id(m) in path_of}
    return frozenset(found)


def stateless(module: nn.Module) -> bool:
    """True for a module without parameters and buffers."""
    return next(module.parameters(), None) is None and next(module.buffers(), None) is None


def split_graph(graph: ModelGraph, modules: Collection[str]) -> ModelGraph:
    """`graph` with a quantizer for each call of `modules`, which have no weights: splitting does not change fusion."""

    def split(node: OpNode) -> OpNode:
        inner = (node.name + name.removeprefix(node.quantizer or "") for name in node.inner)
        return replace(node, quantizer=node.name, inner=tuple(inner))

    return replace(graph, nodes=tuple(split(node) if node.quantizer in modules else node for node in graph.nodes))


def own_modules(model: nn.Module, path: str) -> str:
    """What to do in the float model, so that each call of the module at `path` has a module of its own."""
    module = model.get_submodule(path)
    places = [place for place, other in model.named_modules(remove_duplicate=False) if other is module]
    classes = list(dict.fromkeys(type(model.get_submodule(p.rpartition(".")[0])).__name__ for p in places))
    name = path.rpartition(".")[2]
    if len(places) == 1:
        if name.isdigit():
            return f"call a copy.deepcopy of {path}, or of the module around it, each further time"
        line = f"self.{name}_1 = copy.deepcopy(self.{name})"
        return f"write {line} in {classes[0]} for its second call (or copy {classes[0]}, if that is called again)"
    if name.isdigit() or any(place.rpartition(".")[2] != name for place in places):
        some = ", ".join(places[:3]) + ", ..." * (len(places) > 3)
        return f"put a copy.deepcopy of it at each of its {len(places)} places: {some}"
    more = f" and of {len(classes) - 1} more classes" if len(classes) > 1 else ""
    return f"write self.{name} = copy.deepcopy(self.{name}) at the end of {classes[0]}.__init__{more}"
