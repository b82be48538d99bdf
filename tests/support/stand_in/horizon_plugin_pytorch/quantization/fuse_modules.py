"""Fusion on the graph: conv or linear -> batch norm -> add -> ReLU or ReLU6."""

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from horizon_plugin_pytorch.nn.quantized import FloatFunctional
from horizon_plugin_pytorch.quantization.qat_modules import GEMMS

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fuse(model, nodes):
    """Fuse in place; return the nodes without those that were absorbed. The graph's links follow."""
    calls = {}
    for node in nodes:
        calls.setdefault(id(node.module), []).append(node)
    gone, single = set(), [n for n in nodes if n.is_a(*GEMMS) and len(calls[id(n.module)]) == 1]
    for node in nodes:
        if node.is_a(*GEMMS):
            node.module.fused_relu, node.module.fused_add = None, None
    for node in single:  # a shared one is kept
        norm = _only_user(node, gone)
        if norm and norm.is_a(*NORMS) and len(calls[id(norm.module)]) == 1:
            _fold(node.module, norm.module)
            _drop(model, norm, node, gone)
        add = _only_user(node, gone)
        if (
            add
            and add.is_a(FloatFunctional)
            and add.method == "add"
            and len(add.inputs) == 2
            and None not in add.inputs
        ):
            _stand_at_the_add(model, node, add, gone)
    for relus in calls.values():  # a ReLU has no state: a shared one is fused if all its calls can be
        before = [relu.inputs[0] for relu in relus if relu.is_a(nn.ReLU, nn.ReLU6)]
        if before and all(n in single and _only_user(n, gone) in relus for n in before):
            for relu, node in zip(relus, before, strict=True):
                node.module.fused_relu = type(relu.module)()
                _drop(model, relu, node, gone)
    return [node for node in nodes if node not in gone]


def _only_user(node, gone):
    users = [user for user in node.users if user not in gone]
    return users[0] if len(users) == 1 and users[0].inputs.count(node) == 1 else None


def _fold(module, norm):
    fold = fuse_linear_bn_weights if isinstance(module, nn.Linear) else fuse_conv_bn_weights
    module.weight, module.bias = fold(
        module.weight, module.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )


def put(model, path, module):
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def _drop(model, node, before, gone):
    """Put an Identity where `node` was; its users read `before`."""
    put(model, node.name, nn.Identity())
    _relink(node, before, gone)


def _relink(node, before, gone):
    gone.add(node)
    before.users = [user for user in before.users if user is not node] + node.users
    for user in node.users:
        user.inputs = [before if producer is node else producer for producer in user.inputs]


def _stand_at_the_add(model, node, add, gone):
    """Move the fused module to the place of its add, which reads the other operand too."""
    module, operand = node.module, add.inputs.index(node)
    other = add.inputs[1 - operand]
    put(model, node.name, nn.Identity())
    put(model, add.name, module)
    module.fused_add = operand
    node.name = add.name
    _relink(add, node, gone)
    other.users = [node if user is add else user for user in other.users]
    node.users = [user for user in node.users if user is not node]
    node.inputs = [other, node.inputs[0]] if operand else [node.inputs[0], other]
