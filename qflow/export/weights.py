"""The weights of the float model as files: under its own names, as plain tensors, trained ones included."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qflow.api.prepared import Prepared
from qflow.quant.model.weighted import WeightedLeaf


def float_tensors(prepared: Prepared) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors of the float model's state dict, and the names of its entries that are no tensors.

    The tensors are copies on the CPU, so that two names of one parameter are two tensors.
    """
    state = prepared.float_state_dict()
    tensors = {
        name: value.detach().cpu().clone().contiguous() for name, value in state.items() if isinstance(value, Tensor)
    }
    return tensors, tuple(name for name in state if name not in tensors)


def write_weights(prepared: Prepared, folder: Path) -> tuple[str, ...]:
    """Write `weights.safetensors` and `weights.pt`; return the entries that are no tensors and were left out."""
    tensors, others = float_tensors(prepared)
    save_file(tensors, folder / "weights.safetensors")
    torch.save(tensors, folder / "weights.pt")
    return others


def other_axes(prepared: Prepared) -> dict[str, int]:
    """Return the weights of modules with a scale for each index of another axis than 0: transposed convolutions."""
    return {
        name: axis
        for name, (_, axis) in prepared.weight_shapes.items()
        if axis != 0 and (dtype := prepared.weights[name].dtype) is not None and dtype.is_integer
    }


def scale_differences(prepared: Prepared, divisor: float) -> dict[str, float]:
    """Return the weights whose scales are not max |w| / divisor for each output channel, and by how much (0.01: 1 %).

    `divisor` is that of int8, 127.5 for the plugin; for int16 it is as much below 32768. A weight with one scale for
    all its channels differs too. Weights of functionals belong to no module and are left out.
    """
    found = {}
    prepared.follow_weights()
    for leaf in (module for module in prepared.model.modules() if isinstance(module, WeightedLeaf)):
        quantizer = prepared.weights.get(leaf.qflow_path)
        if quantizer is None or quantizer.dtype is None or not quantizer.dtype.is_integer:
            continue
        axis = prepared.weight_shapes[leaf.qflow_path][1]
        with torch.no_grad():
            weight = leaf.folded()[0].double()
            largest = weight.abs().amax([i for i in range(weight.ndim) if i != axis], keepdim=True)
        expected = (largest / (-quantizer.dtype.qmin - (128 - divisor))).clamp_min(torch.finfo(torch.float32).eps)
        off = float((quantizer.scale.double() / expected - 1.0).abs().max())
        if off > 1e-5:
            found[leaf.qflow_path] = off
    return found
