"""Plain fake quantization by hand, which shares no code with qflow's: the reference of the zoo.

    y = min(max(round(x / s), lowest), highest) * s        half to even; s of a weight: max|w| of its channel / -lowest

It acts on a copy of the float model: weights are replaced, with the batch norm behind them folded in, and a hook on a
module quantizes its result. qflow's model with the same quantizers on must give the same outputs. All is in float64, so
that rounding noise does not move a code.
"""

import copy

import torch
from torch import nn

CODES = {"qint8": (-128, 127), "qint16": (-32768, 32767)}


def fake_quantized(x, scale, dtype):
    lowest, highest = CODES[str(dtype)]
    return torch.clamp(torch.round(x / scale), lowest, highest) * scale


def quantized_weight(weight, norm, transposed):
    """The weight as the device holds it, expressed before its batch norm: fold, quantize by channel, unfold."""
    axis = 1 if transposed else 0
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    gain = torch.ones(weight.shape[axis], dtype=weight.dtype)
    if norm is not None:
        gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    folded = weight * gain.view(shape)
    largest = folded.abs().amax([i for i in range(weight.ndim) if i != axis], keepdim=True)
    scale = (largest / 128).float().to(weight.dtype)  # scales are float32 numbers
    return torch.where(largest > 0, fake_quantized(folded, scale, "qint8"), folded) / gain.view(shape)


def comparable(prepared):
    """(output quantizer -> path of the module whose results it quantizes, weight -> path of its batch norm or None).

    An output can be compared where a plain module gives the result of the group and the quantizer acts nowhere else;
    a weight where it is a module's own and has int8 codes.
    """
    modules = dict(prepared.model.named_modules())
    ends, mixed = {}, set()
    for node in prepared.graph.quantized:
        last = (node.fused[-1] if node.fused else node.name).partition("(")[0]
        if last not in modules or node.fused_types[-1:] == ("Add",) or ends.setdefault(node.quantizer, last) != last:
            mixed.add(node.quantizer)
    users = [n.quantizer for n in prepared.graph.quantized]
    groups = {e: n for n, e in ends.items() if n not in mixed}
    outputs = {
        name: end
        for name, end in ends.items()
        if name not in mixed
        and str(prepared.outputs[name].dtype) in CODES
        and prepared.graph.calls.get(end, 1) == users.count(name)
        and groups[end] == name
        and not prepared.outputs[name].keeps_mask
    }
    weights = {
        name: modules[name]
        for name in prepared.weights
        if name in modules and str(prepared.weights[name].dtype) == "qint8"
    }
    return outputs, weights


def by_hand(model, prepared):
    """A float copy of `model` with every comparable quantizer of `prepared` computed by hand; and their names."""
    outputs, weights = comparable(prepared)
    twin = copy.deepcopy(model)
    modules = dict(twin.named_modules())
    with torch.no_grad():
        for name, leaf in weights.items():
            norm = modules.get(getattr(leaf, "qflow_norm_path", None) or "-")
            transposed = isinstance(leaf, nn.modules.conv._ConvTransposeNd)
            weight = quantized_weight(modules[name].weight, norm, transposed)
            modules[name].weight = nn.Parameter(weight)  # a tied parameter stays as it is in the other modules
    for name, path in outputs.items():
        quantizer = prepared.outputs[name]
        scale, dtype = float(quantizer.scale), str(quantizer.dtype)
        modules[path].register_forward_hook(lambda m, i, out, s=scale, d=dtype: fake_quantized(out, s, d))
    return twin, outputs, weights
