"""The graph of a model: the calls of leaf modules and of functions in one run on the example inputs.

The same way functions are found while a prepared model runs: the module that calls one, and how often it did before.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from horizon_plugin_pytorch import MissingFact
from horizon_plugin_pytorch.nn.quantized import FloatFunctional
from horizon_plugin_pytorch.quantization.stubs import DeQuantStub, QuantStub

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Functions that become modules -> the method of a FloatFunctional, or the class of a module.
METHODS = {"add": "add", "sub": "sub", "mul": "mul", "matmul": "matmul", "cat": "cat", "concat": "cat"}
MODULES = {"relu": nn.ReLU, "relu6": nn.ReLU6, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "silu": nn.SiLU}
# Functions that pass values on; they get no module and no qconfig.
PASSING = frozenset({
    "flatten", "reshape", "view", "permute", "transpose", "__getitem__", "contiguous", "squeeze", "unsqueeze", "chunk",
    "split", "expand", "clone", "detach",
})  # fmt: skip
# Functions that compute no tensor of the model's.
SILENT = frozenset({"size", "dim", "__get__", "is_floating_point", "numel", "__len__", "stride", "__set__"})


def is_leaf(module):
    torchs = type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, CONTAINERS)
    return torchs or isinstance(module, (QuantStub, DeQuantStub, FloatFunctional))


@dataclass(eq=False)
class Node:
    """One call: of the module at `path`, or of a function in the module `scope`."""

    name: str
    module: nn.Module | None = None
    scope: str = ""
    function: str = ""
    count: int = 0
    method: str = ""
    inputs: list = field(default_factory=list)
    """Producer by position of the tensor arguments; None for a tensor that no call has made."""
    constants: list = field(default_factory=list)
    """Positions of float tensors that no call has made and that are no input of the model."""
    users: list = field(default_factory=list)

    def is_a(self, *kinds):
        return self.module is not None and isinstance(self.module, kinds)


def function_name(function):
    """`x + y`, torch.add(x, y) and x.add_(y) are the function `add`."""
    name = function.__name__
    if name.startswith("__") and name.strip("_") in METHODS | {"radd": 0, "rmul": 0, "iadd": 0, "imul": 0}:
        name = name.strip("_")
    name = {"radd": "add", "iadd": "add", "rmul": "mul", "imul": "mul"}.get(name, name)
    return name.rstrip("_") if not name.startswith("__") else name


class Calls(TorchFunctionMode):
    """Calls `on_module` and `on_function` for what the model itself calls; what leaves call inside stays unseen."""

    def __init__(self, model):
        super().__init__()
        self.model, self.scopes, self.depth, self.counts = model, [], 0, {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.depth or function_name(function) in SILENT:
            return function(*args, **kwargs)
        name, scope = function_name(function), self.scopes[-1] if self.scopes else ""
        count = self.counts.get((scope, name), 0)
        self.counts[scope, name] = count + 1
        self.depth += 1
        try:
            return self.on_function(scope, name, count, function, args, kwargs)
        finally:
            self.depth -= 1

    @contextmanager
    def hooked(self):
        """Follow the scopes of the model's own modules, and its leaves."""
        handles = []
        for path, module in self.model.named_modules():
            leaf = is_leaf(module) or hasattr(module, "qat_source")
            if leaf and not path:
                raise MissingFact("a model that is a single module")
            inside = any(path.startswith(f"{p}.") for p, m in self.model.named_modules() if p and is_leaf(m))
            if inside:
                continue
            enter, leave = (self._enter, self._leave) if leaf else (self._open, self._close)
            handles.append(module.register_forward_pre_hook(lambda m, a, k, p=path, f=enter: f(p), with_kwargs=True))
            handles.append(module.register_forward_hook(
                lambda m, a, k, out, p=path, f=leave: f(p, m, a, k, out), with_kwargs=True, always_call=True,
            ))  # fmt: skip
        try:
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path):
        self.depth += 1

    def _leave(self, path, module, args, kwargs, out):
        self.depth -= 1
        if self.depth == 0 and out is not None:
            self.on_module(path, module, args, kwargs, out)

    def _open(self, path):
        self.scopes.append(path)

    def _close(self, path, module, args, kwargs, out):
        self.scopes.pop()

    def on_module(self, path, module, args, kwargs, out):
        pass


class Tracer(Calls):
    """Records the nodes of one run."""

    def __init__(self, model, given):
        super().__init__(model)
        self.nodes, self.producers, self.kept = [], {}, list(given)
        self.given = {id(tensor) for tensor in given}

    def _record(self, node, args, kwargs, out):
        for position, value in enumerate(v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)):
            producer = self.producers.get(id(value))
            node.inputs.append(producer)
            if producer is not None:
                producer.users.append(node)
            elif id(value) not in self.given and value.is_floating_point():
                node.constants.append(position)
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self.kept.append(value)  # else another tensor may get its id
                self.producers[id(value)] = node
        self.nodes.append(node)

    def on_module(self, path, module, args, kwargs, out):
        method = args[0] if isinstance(module, FloatFunctional) else ""
        self._record(Node(path, module, method=method), args, kwargs, out)

    def on_function(self, scope, name, count, function, args, kwargs):
        out = function(*args, **kwargs)
        self._record(Node("", None, scope, name, count), args, kwargs, out)
        return out


class Dispatch(Calls):
    """Sends functions to the modules that prepare has made for them."""

    def on_function(self, scope, name, count, function, args, kwargs):
        found = self.model.qat_functions.get((scope, name, count))
        if found is None:
            return function(*args, **kwargs)
        module = self.model.get_submodule(found)
        method = METHODS.get(name)
        return getattr(module, method)(*args, **kwargs) if method else module(args[0])


def traced(model, args, kwargs):
    """The nodes of `model` in the order of their calls."""
    given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
    tracer = Tracer(model, given)
    with torch.no_grad(), tracer.hooked():
        model(*args, **kwargs)
    return tracer.nodes


def quantized_region(nodes):
    """The nodes after a QuantStub and before a DeQuantStub, both included."""
    after, before = set(), set()
    for node in nodes:
        if node.is_a(QuantStub) or any(p in after and not p.is_a(DeQuantStub) for p in node.inputs if p):
            after.add(node)
    for node in reversed(nodes):
        if node.is_a(DeQuantStub) or any(u in before and not u.is_a(QuantStub) for u in node.users):
            before.add(node)
    return [node for node in nodes if node in after and node in before]
