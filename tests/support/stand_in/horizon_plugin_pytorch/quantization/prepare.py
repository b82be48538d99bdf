"""prepare: trace, functions to modules, fuse, qconfigs, canonicalise, fake quantizers, check."""

import copy
import warnings
from enum import Enum
from functools import partial

from horizon_plugin_pytorch import MissingFact
from horizon_plugin_pytorch.march import get_march
from horizon_plugin_pytorch.nn.quantized import FloatFunctional
from horizon_plugin_pytorch.quantization import trace
from horizon_plugin_pytorch.quantization.canonicalize import canonicalize
from horizon_plugin_pytorch.quantization.check_qat_model import _positional, check_qat_model
from horizon_plugin_pytorch.quantization.fake_quantize import FakeQuantize
from horizon_plugin_pytorch.quantization.fuse_modules import fuse, put
from horizon_plugin_pytorch.quantization.observer_v2 import FixedScaleObserver
from horizon_plugin_pytorch.quantization.qat_modules import PASSING, POOLS, convert
from horizon_plugin_pytorch.quantization.qconfig import QConfig
from horizon_plugin_pytorch.quantization.stubs import QuantStub


class PrepareMethod(Enum):
    EAGER = "eager"
    SYMBOLIC = "symbolic"
    JIT = "jit"
    JIT_STRIP = "jit-strip"


def prepare(model, example_inputs=None, qconfig_setter=None, method=PrepareMethod.JIT_STRIP, example_kw_inputs=None):
    get_march()
    if example_kw_inputs is not None and not isinstance(example_kw_inputs, dict):
        raise TypeError("example_kw_inputs is a dict")
    if method is not PrepareMethod.JIT_STRIP:
        raise MissingFact(f"the stand-in prepares by JIT_STRIP, not by {method}")
    if example_inputs is None and not example_kw_inputs:
        raise ValueError("JIT_STRIP needs example inputs")
    setters = qconfig_setter if isinstance(qconfig_setter, (tuple, list)) else (qconfig_setter,)
    made = copy.deepcopy(model)
    _own_functionals(made)
    nodes = trace.quantized_region(trace.traced(made, _positional(example_inputs), example_kw_inputs or {}))
    if not nodes:
        raise MissingFact("a model without a QuantStub and a DeQuantStub")
    functions = _to_modules(made, nodes)
    nodes = fuse(made, nodes)
    owners = [node for node in nodes if node.module is not None]
    for setter in setters:
        setter.set_qconfig(made, owners)
    _require_qconfigs(owners)
    canonicalize(owners, setters)
    for node in owners:
        _fix_stub(node)
        if not hasattr(type(node.module), "qat_source"):
            convert(node.module)
    training = made.training
    made.__class__ = type(type(made).__name__, (_Prepared, type(made)), {})
    made.qat_functions, made.qat_nodes, made._prepare_method = functions, owners, method
    made.train(training)
    try:
        check_qat_model(made, example_inputs, example_kw_inputs, save_results=True)
    except Exception as error:
        warnings.warn(f"check_qat_model failed: {error}", stacklevel=2)
    return made


class _Prepared:
    """A model whose functions run as the modules that were made of them."""

    def __call__(self, *args, **kwargs):
        with trace.Dispatch(self).hooked():
            return super().__call__(*args, **kwargs)


def _own_functionals(model):
    for path, module in list(model.named_modules()):
        if type(module).__name__ in ("FloatFunctional", "FFFunctional") and not isinstance(module, FloatFunctional):
            put(model, path, FloatFunctional())


def _to_modules(model, nodes):
    """Make a module of each function of the region; return (scope, function, count) -> its path."""
    found, counts = {}, {}
    for node in nodes:
        if node.module is not None or node.function in trace.PASSING:
            continue
        kind = trace.METHODS.get(node.function)
        if kind is None and node.function not in trace.MODULES:
            raise MissingFact(f"the module that the function {node.function} becomes")
        node.module = FloatFunctional() if kind else trace.MODULES[node.function]()
        node.method = kind or ""
        name = f"_generated_{kind or node.function}_"
        number = counts.get((node.scope, name), 0)
        counts[node.scope, name] = number + 1
        parent = model.get_submodule(node.scope) if node.scope else model
        parent.add_module(f"{name}{number}", node.module)
        node.name = f"{node.scope}.{name}{number}".lstrip(".")
        found[node.scope, node.function, node.count] = node.name
    return found


def _require_qconfigs(nodes):
    for node in nodes:
        if not hasattr(node.module, "qconfig") and not isinstance(node.module, (*PASSING, *POOLS)):
            raise MissingFact(f"a module that no setter has reached: {node.name}")


def _fix_stub(node):
    if isinstance(node.module, QuantStub) and node.module.fixed is not None:
        dtype = node.module.qconfig.activation.keywords["dtype"]
        fixed = partial(FakeQuantize, observer=FixedScaleObserver, scale=node.module.fixed, dtype=dtype)
        node.module.qconfig = QConfig(activation=fixed)
