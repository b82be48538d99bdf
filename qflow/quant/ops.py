"""What each torch operator is to the device: module types and function names -> OpKind, in one table."""

from __future__ import annotations

from torch import Tensor, nn

from qflow.core.graph import OpKind

MODULE_KINDS: dict[type[nn.Module], OpKind] = {
    nn.Conv1d: OpKind.conv,
    nn.Conv2d: OpKind.conv,
    nn.Conv3d: OpKind.conv,
    nn.ConvTranspose1d: OpKind.conv_transpose,
    nn.ConvTranspose2d: OpKind.conv_transpose,
    nn.ConvTranspose3d: OpKind.conv_transpose,
    nn.Linear: OpKind.linear,
    nn.BatchNorm1d: OpKind.norm,
    nn.BatchNorm2d: OpKind.norm,
    nn.BatchNorm3d: OpKind.norm,
    nn.SyncBatchNorm: OpKind.norm,
    nn.LayerNorm: OpKind.layer_norm,
    nn.GroupNorm: OpKind.layer_norm,
    nn.ReLU: OpKind.relu,
    nn.ReLU6: OpKind.relu,
    nn.LeakyReLU: OpKind.lut,
    nn.PReLU: OpKind.lut,
    nn.ELU: OpKind.lut,
    nn.SiLU: OpKind.lut,
    nn.GELU: OpKind.lut,
    nn.Mish: OpKind.lut,
    nn.Sigmoid: OpKind.lut,
    nn.Tanh: OpKind.lut,
    nn.Hardswish: OpKind.lut,
    nn.Hardsigmoid: OpKind.lut,
    nn.Softplus: OpKind.lut,
    nn.Softmax: OpKind.softmax,
    nn.MaxPool1d: OpKind.max_pool,
    nn.MaxPool2d: OpKind.max_pool,
    nn.AdaptiveMaxPool2d: OpKind.max_pool,
    nn.AvgPool1d: OpKind.avg_pool,
    nn.AvgPool2d: OpKind.avg_pool,
    nn.AdaptiveAvgPool1d: OpKind.avg_pool,
    nn.AdaptiveAvgPool2d: OpKind.avg_pool,
    nn.Upsample: OpKind.resize,
    nn.UpsamplingNearest2d: OpKind.resize,
    nn.UpsamplingBilinear2d: OpKind.resize,
    nn.Identity: OpKind.move,
    nn.Dropout: OpKind.move,
    nn.Dropout2d: OpKind.move,
    nn.Flatten: OpKind.move,
    nn.Unflatten: OpKind.move,
    nn.PixelShuffle: OpKind.move,
    nn.PixelUnshuffle: OpKind.move,
    nn.ZeroPad2d: OpKind.move,
    nn.ChannelShuffle: OpKind.move,
}

_FUNCTIONS: dict[OpKind, str] = {
    OpKind.conv: "conv1d conv2d conv3d",
    OpKind.conv_transpose: "conv_transpose1d conv_transpose2d conv_transpose3d",
    OpKind.linear: "linear",
    OpKind.matmul: "matmul bmm mm",
    OpKind.norm: "batch_norm",
    OpKind.layer_norm: "layer_norm group_norm instance_norm rms_norm",
    OpKind.relu: "relu relu6 clamp clip clamp_min clamp_max hardtanh threshold",
    OpKind.lut: "silu gelu sigmoid logsigmoid tanh hardswish hardsigmoid leaky_relu elu prelu mish softplus exp log "
    "sqrt rsqrt reciprocal sin cos erf pow square abs",
    OpKind.softmax: "softmax log_softmax",
    OpKind.add: "add",
    OpKind.mul: "mul",
    OpKind.arithmetic: "sub rsub div truediv neg maximum minimum addcmul floor_divide remainder where masked_fill",
    OpKind.concat: "cat concat concatenate stack hstack vstack",
    OpKind.resize: "interpolate upsample",
    OpKind.max_pool: "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d",
    OpKind.avg_pool: "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d",
    OpKind.grid_sample: "grid_sample",
    OpKind.reduce: "mean sum amax amin max min var std norm cumsum",
    OpKind.order: "topk sort argsort argmax argmin gather index_select take_along_dim",
    OpKind.move: "reshape view view_as flatten unflatten permute transpose swapaxes movedim t squeeze unsqueeze "
    "expand expand_as repeat tile chunk split unbind getitem narrow select contiguous clone detach roll flip pad "
    "pixel_shuffle pixel_unshuffle dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout identity to "
    "float half double bfloat16 type type_as unfold T mT H mH data",
}
FUNCTION_KINDS: dict[str, OpKind] = {name: kind for kind, names in _FUNCTIONS.items() for name in names.split()}

# Results whose values do not come from the arguments: constants, whatever their shape is taken from.
CONSTANTS = frozenset(
    ["zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "requires_grad"]
    + ["new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"]
)
# A Python value taken out of a tensor: what follows may depend on the data.
DATA_DEPENDENT = frozenset(["item", "bool", "int", "float", "index", "tolist", "numpy", "nonzero", "len", "contains"])
# Writes whose result is a constant fill.
FILLS = frozenset(["zero", "fill"])

ALIASES = {"truediv": "div", "multiply": "mul", "subtract": "sub", "divide": "div", "iadd": "add", "imul": "mul"}

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def function_name(function: object) -> str:
    """Canonical name of a torch function: `__radd__`, `add_` and `Tensor.add` are all `add`."""
    name = str(getattr(function, "__name__", type(function).__name__))
    if name == "__get__":  # an attribute such as Tensor.shape
        return str(getattr(getattr(function, "__self__", None), "__name__", "get"))
    dunder = name.startswith("__") and name.endswith("__")
    core = name.strip("_")
    if dunder and core not in FUNCTION_KINDS and core[:1] in "ir" and core[1:] in FUNCTION_KINDS:
        core = core[1:]
    return ALIASES.get(core, core)


def module_kind(module: nn.Module) -> OpKind | None:
    """Kind of a leaf module (subclasses count as their base), or None for a container or an unknown module."""
    for cls in type(module).__mro__:
        if cls in MODULE_KINDS:
            return MODULE_KINDS[cls]
    return None


def is_leaf(module: nn.Module) -> bool:
    """True where the module is one operator: a known type whose forward is torch's own."""
    for cls in type(module).__mro__:
        if cls in MODULE_KINDS:
            return getattr(type(module).forward, "__module__", "").startswith("torch.nn")
    return False


def is_operator(out: object) -> bool:
    """True where a function call counts as an operator: tape and runtime must agree, or names would drift."""
    return isinstance(out, Tensor) or (isinstance(out, (tuple, list)) and any(isinstance(t, Tensor) for t in out))
