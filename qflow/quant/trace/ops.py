"""The kind of each torch operator on the device: one table from module types and function names to OpKind."""

from __future__ import annotations

from torch import Tensor, nn

from qflow.core.graph import OpKind

_MODULES: dict[OpKind, str] = {
    OpKind.conv: "Conv1d Conv2d Conv3d",
    OpKind.conv_transpose: "ConvTranspose1d ConvTranspose2d ConvTranspose3d",
    OpKind.linear: "Linear",
    OpKind.norm: "BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm",
    OpKind.layer_norm: "LayerNorm GroupNorm RMSNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d LocalResponseNorm",
    OpKind.relu: "ReLU ReLU6 Hardtanh Threshold",
    OpKind.lut: "LeakyReLU PReLU ELU CELU SELU SiLU GELU Mish Sigmoid LogSigmoid Tanh Hardswish Hardsigmoid Softplus "
    "Softsign GLU",
    OpKind.softmax: "Softmax Softmax2d LogSoftmax",
    OpKind.max_pool: "MaxPool1d MaxPool2d MaxPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d",
    OpKind.avg_pool: "AvgPool1d AvgPool2d AvgPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d",
    OpKind.resize: "Upsample UpsamplingNearest2d UpsamplingBilinear2d",
    OpKind.move: "Identity Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout Flatten Unflatten "
    "Unfold PixelShuffle PixelUnshuffle ChannelShuffle ZeroPad1d ZeroPad2d ZeroPad3d ReflectionPad1d ReflectionPad2d "
    "ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d",
}
MODULE_KINDS: dict[type[nn.Module], OpKind] = {
    getattr(nn, name): kind for kind, names in _MODULES.items() for name in names.split()
}

_FUNCTIONS: dict[OpKind, str] = {
    OpKind.conv: "conv1d conv2d conv3d",
    OpKind.conv_transpose: "conv_transpose1d conv_transpose2d conv_transpose3d",
    OpKind.linear: "linear",
    OpKind.matmul: "matmul bmm mm mv dot inner tensordot einsum",
    OpKind.norm: "batch_norm",
    OpKind.layer_norm: "layer_norm group_norm instance_norm rms_norm normalize local_response_norm",
    OpKind.relu: "relu relu6 clamp clip clamp_min clamp_max hardtanh threshold",
    OpKind.lut: "silu gelu sigmoid logsigmoid tanh hardswish hardsigmoid leaky_relu elu celu selu prelu mish softplus "
    "softsign glu exp expm1 log log1p log2 log10 sqrt rsqrt reciprocal sin cos tan atan asin acos sinh cosh erf pow "
    "square abs sign round floor ceil trunc rdiv rpow",
    OpKind.softmax: "softmax log_softmax",
    OpKind.add: "add",
    OpKind.mul: "mul",
    OpKind.arithmetic: "sub rsub div neg maximum minimum addcmul addcdiv lerp floor_divide remainder fmod where "
    "masked_fill atan2 scatter scatter_add index_add index_put fold eq ne gt ge lt le logical_and logical_or "
    "logical_xor logical_not bitwise_and bitwise_or bitwise_xor bitwise_not bitwise_left_shift bitwise_right_shift "
    "isnan isinf isneginf isposinf isfinite isclose any all",
    OpKind.concat: "cat concat concatenate stack hstack vstack dstack",
    OpKind.resize: "interpolate upsample",
    OpKind.max_pool: "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d",
    OpKind.avg_pool: "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d",
    OpKind.grid_sample: "grid_sample",
    OpKind.reduce: "mean sum amax amin max min var std norm vector_norm cumsum prod logsumexp",
    OpKind.order: "topk sort argsort argmax argmin gather index_select take_along_dim embedding masked_select",
    OpKind.move: "reshape view view_as flatten unflatten ravel permute transpose swapaxes swapdims movedim moveaxis t "
    "squeeze unsqueeze expand expand_as broadcast_to repeat repeat_interleave tile chunk split split_with_sizes "
    "tensor_split hsplit vsplit dsplit fliplr flipud unbind "
    "getitem narrow select diagonal contiguous clone detach roll flip rot90 pad pixel_shuffle pixel_unshuffle "
    "channel_shuffle dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout identity to float half double "
    "bfloat16 long int short char byte bool type type_as unfold tril triu as_strided meshgrid copy T mT H mH data",
}
FUNCTION_KINDS: dict[str, OpKind] = {name: kind for kind, names in _FUNCTIONS.items() for name in names.split()}

# Functionals that multiply with a weight, and the name of that argument.
WEIGHT_ARGUMENT = {OpKind.conv: "weight", OpKind.conv_transpose: "weight", OpKind.linear: "weight"}
# Number of tensor arguments that are values. Those after them are biases, statistics, indices or slopes: they are
# inputs only if they are computed from the model's inputs.
VALUE_ARGUMENTS = {OpKind.norm: 1, OpKind.layer_norm: 1, OpKind.lut: 1, OpKind.softmax: 1}
VALUE_ARGUMENTS |= dict.fromkeys(WEIGHT_ARGUMENT, 2)

# Functions whose result does not depend on the values of the arguments: it is a constant.
CONSTANTS = frozenset(
    ["zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "requires_grad", "grad"]
    + ["new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"]
)
# Functions that return a Python value from a tensor: the code after them may depend on the data.
DATA_DEPENDENT = frozenset(
    ["item", "bool", "int", "float", "index", "tolist", "numpy", "nonzero", "contains", "array", "equal", "allclose"]
)
# In-place functions that fill a tensor with a constant.
FILLS = frozenset(["zero", "fill"])

ALIASES = {"true_divide": "div", "multiply": "mul", "subtract": "sub", "divide": "div"}
ALIASES |= {"negative": "neg", "absolute": "abs", "arctan2": "atan2", "fix": "trunc"}
ALIASES |= {f"arc{name}": f"a{name}" for name in ("sin", "cos", "tan")}
ALIASES |= {"linalg_vector_norm": "vector_norm", "scaled_dot_product_attention": "attention"}
ALIASES |= {"safe_softmax": "softmax"}
ALIASES |= {"not_equal": "ne", "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le"}
# Python's operators; `__iand__` and `__rand__` are `and` too.
_SYMBOLS = {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "invert": "bitwise_not"}
_SYMBOLS |= {"lshift": "bitwise_left_shift", "rshift": "bitwise_right_shift"}
_SYMBOLS |= {"truediv": "div", "floordiv": "floor_divide", "mod": "remainder"}


def function_name(function: object) -> str:
    """Canonical name of a torch function: `__radd__`, `add_` and `Tensor.add` are all `add`, `__iand__` `bitwise_and`.

    Reflected functions whose arguments change places keep an `r`: `rsub`, `rdiv`, `rpow`.
    """
    name = str(getattr(function, "__name__", type(function).__name__))
    if name == "__get__":  # an attribute such as Tensor.shape
        return str(getattr(getattr(function, "__self__", None), "__name__", "get"))
    core = name.strip("_")
    if name.startswith("__") and name.endswith("__"):
        core = {"rtruediv": "rdiv"}.get(core, core)
        if core not in FUNCTION_KINDS and core not in _SYMBOLS and core[:1] in "ir":
            core = core[1:] if core[1:] in FUNCTION_KINDS or core[1:] in _SYMBOLS else core
        return _SYMBOLS.get(core, core)
    return ALIASES.get(core, core)


def module_kind(module: nn.Module) -> OpKind | None:
    """Kind of a leaf module (a subclass has the kind of its base), or None for a container or an unknown module."""
    for cls in type(module).__mro__:
        if cls in MODULE_KINDS:
            return MODULE_KINDS[cls]
    return None


def is_leaf(module: nn.Module) -> bool:
    """True if the module is one operator: a known type with torch's own forward, not overridden on the object."""
    if "forward" in module.__dict__:
        return False
    for cls in type(module).__mro__:
        if cls in MODULE_KINDS:
            return getattr(type(module).forward, "__module__", "").startswith("torch.nn")
    return False


def is_operator(out: object) -> bool:
    """True if a function call with this result counts as an operator, both while tracing and in a forward pass."""
    return isinstance(out, Tensor) or (isinstance(out, (tuple, list)) and any(isinstance(t, Tensor) for t in out))
