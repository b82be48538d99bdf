"""Leaf modules with a weight, and the batch norm that follows them.

With the weight quantizer off, both run as in the float model, so that a prepared model with all quantizers off equals
the float model bit for bit. With it on, a batch norm in eval mode is folded exactly:

    factor = gamma / sqrt(running_var + eps)
    y = conv(x, fq(w * factor)) + (b - running_mean) * factor + beta            and the norm is the identity

Training uses one of the plugin's three modes. All keep the parameters of the float model, so that its state dict loads
back without loss:

    fuse_bn               The norm stays in eval mode and its gamma is constant: the formula above with a factor
                          that never changes, in which w and the bias (beta) are trained. Learning rates act on w, not
                          on the folded w * factor. (The plugin removes the norm and trains the folded weight.)
    with_bn               y = BN(conv(x, fq(w), b)); the statistics are updated. Evaluation folds the norm. With one
                          scale per channel this changes only rounding and the end codes (a negative factor turns -128
                          into 128); with one scale for all channels it changes results visibly.
    with_bn_reverse_fold  y = BN(conv(x, fq(w * factor) / factor, b)); the statistics are updated. The plugin divides
                          the output instead, which gives the same sum but processes a whole activation more.
                          Evaluation folds exactly.

The factor has no gradient (with an exact fq it would cancel). A channel with |factor| < 1e-5 is dead (zero-init
residuals); it trains with factor 1, so that it can become active.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qflow.core.errors import ConfigError
from qflow.core.settings import NORM_MODES
from qflow.quant.model.leaf import Leaf
from qflow.quant.model.run import Run, current_run
from qflow.quant.values.fake_quant import FakeQuant

DEAD = 1e-5  # with a smaller factor the scale of the folded weight would be clamped to its minimum


class FoldableNorm(Leaf):
    """A module with running statistics that the operator before it can fold into its weight."""

    qflow_fixed = False
    """True: the norm stays in eval mode when the model is put into train mode."""
    training: bool

    def train(self, mode: bool = True) -> Any:
        """Train or eval mode; a fixed norm stays in eval mode."""
        return super().train(mode and not self.qflow_fixed)  # type: ignore[misc]


class NormScope(FoldableNorm):
    """A module of the user's that calls `F.batch_norm` on its own statistics: the call is folded (runtime.py)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return super(Leaf, self).forward(*args, **kwargs)  # type: ignore[misc]


class NormLeaf(FoldableNorm):
    """A batch norm; it is the identity if the operator before it has folded it into its weight."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The norm; if it is folded, the input, through the output quantizer of the norm if it has one."""
        run = current_run()
        if run is None or run.depth or self.qflow_path not in run.folded or not run.plain or not args:
            return super().forward(*args, **kwargs)
        name = run.leaf_call(self.qflow_path)
        run.folded.discard(self.qflow_path)
        return run.finish(name, args[0], None) if name in run.plan.output_at else args[0]

    def compute(self, run: Run, name: str, *args: Any, **kwargs: Any) -> Any:
        if self.qflow_path in run.folded:
            run.folded.discard(self.qflow_path)
            return args[0] if args else kwargs["input"]
        return super().compute(run, name, *args, **kwargs)


class WeightedLeaf(Leaf):
    """A convolution or linear layer that fake-quantizes its weight, with the batch norm folded in."""

    weight: Tensor
    bias: Tensor | None
    qflow_norm: nn.Module | None
    qflow_norm_path: str | None
    qflow_mode = "with_bn_reverse_fold"
    qflow_frozen: list[Tensor]
    """Parameters whose requires_grad fuse_bn has switched off."""

    def factor(self) -> Tensor:
        """The factor of the batch norm, gamma / sqrt(running_var + eps), one value for each output channel."""
        norm: Any = self.qflow_norm
        factor: Tensor = torch.rsqrt(norm.running_var + norm.eps)
        return factor if norm.weight is None else norm.weight * factor

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the running statistics of the batch norm folded in; unchanged without a norm."""
        norm: Any = self.qflow_norm
        if norm is None:
            return self.weight, self.bias
        factor = self.factor()
        shift = -norm.running_mean if self.bias is None else self.bias - norm.running_mean
        bias = shift * factor if norm.bias is None else norm.bias + shift * factor
        return self.weight * self.along_output(factor), bias

    def along_output(self, vector: Tensor) -> Tensor:
        """`vector`, one value for each output channel, so that it broadcasts over the weight."""
        if getattr(self, "transposed", False):
            groups = int(getattr(self, "groups", 1))
            per_group = vector.view(groups, 1, -1).expand(groups, self.weight.shape[0] // groups, -1)
            return per_group.reshape(self.weight.shape[0], -1, *[1] * (self.weight.ndim - 2))
        return vector.view(-1, *[1] * (self.weight.ndim - 1))

    def compute(self, run: Run, name: str, *args: Any, **kwargs: Any) -> Any:
        quantizer = run.weights.get(self.qflow_path)
        if quantizer is None or not quantizer.active:  # None: no output depends on this operator
            return super().compute(run, name, *args, **kwargs)
        run.ran.add(quantizer.name)
        if self.qflow_norm is not None and self.qflow_norm.training:
            return self.run_with(self._beside_norm(run, name, quantizer), self.bias, *args, **kwargs)
        if self.qflow_norm_path is not None:
            run.folded.add(self.qflow_norm_path)
        weight, bias = self._quantized(quantizer)
        return self.run_with(weight, bias, *args, **kwargs)

    def _beside_norm(self, run: Run, name: str, quantizer: FakeQuant) -> Tensor:
        """The quantized weight for training with a batch norm in train mode after it."""
        # When activation checkpointing recomputes, the statistics have changed: it takes the factor of the first pass.
        with torch.no_grad():
            factor = run.kept(f"{name}.factor", self.factor)
            factor = self.along_output(torch.where(factor.abs() < DEAD, torch.ones_like(factor), factor))
        if self.qflow_mode == "with_bn_reverse_fold":
            folded: Tensor = quantizer(self.weight * factor)
            return folded / factor
        if quantizer.averaging_constant:
            scale = None if not quantizer.dtype or not quantizer.dtype.is_integer else quantizer.measured(self.weight)
        else:
            scale = quantizer.scale / factor.abs()  # the quantizer's scale is that of the folded weight
        quantized: Tensor = quantizer(self.weight, scale)
        return quantized

    def _quantized(self, quantizer: FakeQuant) -> tuple[Tensor, Tensor | None]:
        """The folded weight, quantized, and the bias. Without gradients they are cached until a source changes.

        The key of the cache is the identity, version and address of each source; an address alone may belong to a new
        tensor. A write through `.data` changes none of them: it is noticed by a few values of the weight (on a CPU:
        reading them from a GPU would wait for it), and takes effect at the latest when the quantizer is switched.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            quantizer.cached = None
            weight, bias = self.folded()
            return quantizer(weight), bias
        sources, settings = self._sources(quantizer), self._settings(quantizer)
        identities = [id(source) for source in sources]
        if quantizer.cached is not None:
            known, tensors, views, versions, kept_settings, few, result = quantizer.cached
            if (
                known == identities
                and versions == [t._version for t in tensors]
                and views == [t.data_ptr() for t in tensors]
                and kept_settings == settings
                and few[0].tolist() == few[1]
            ):
                found: tuple[Tensor, Tensor | None] = result[0]
                return found
        weight, bias = self.folded()
        quantized = quantizer(weight), bias
        tensors = [source for source in sources if source is not None]
        if not any(t.is_inference() for t in tensors):  # inference tensors have no version
            # The views keep the storages alive, so that no new tensor gets one of these addresses; the tensors
            # themselves are kept alive for their identities.
            held = (quantized, [t.detach() for t in tensors])
            addresses, versions = [t.data_ptr() for t in tensors], [t._version for t in tensors]
            few = _few_values(tensors[0])
            quantizer.cached = identities, tensors, addresses, versions, settings, (few, few.tolist()), held
        return quantized

    def _sources(self, quantizer: FakeQuant) -> tuple[Tensor | None, ...]:
        """All tensors that decide the quantized weight; nn.Module attributes take seven times as long as its dicts."""
        own: Any = self._parameters  # type: ignore[attr-defined]
        norm: Any = self.qflow_norm
        if "weight" not in own:  # parametrized: the weight is computed at every access
            return self.weight, self.bias, quantizer.scale
        scale = quantizer._buffers["scale"]
        if norm is None:
            return own["weight"], own.get("bias"), scale
        gains, means = norm._parameters, norm._buffers
        if "weight" not in gains or "running_mean" not in means:
            return self.weight, self.bias, scale, norm.weight, norm.bias, norm.running_mean, norm.running_var
        return (
            own["weight"],
            own.get("bias"),
            scale,
            gains["weight"],
            gains["bias"],
            means["running_mean"],
            means["running_var"],
        )

    def _settings(self, quantizer: FakeQuant) -> tuple[Any, ...]:
        return (*quantizer.settings(), self.qflow_norm and self.qflow_norm.eps)

    def run_with(self, weight: Tensor, bias: Tensor | None, input: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        """Run the operator with this weight and bias in place of its own."""
        raise AssertionError("every weighted leaf class defines run_with")


def _few_values(weight: Tensor) -> Tensor:
    """A view of about 16 values from all over a weight; of none on a GPU."""
    if weight.device.type != "cpu" or not weight.is_contiguous():
        return torch.empty(0)
    return weight.detach().view(-1)[:: max(1, weight.numel() // 16)]


class ConvLeaf(WeightedLeaf):
    """Conv1d, Conv2d, Conv3d."""

    def run_with(self, weight: Tensor, bias: Tensor | None, input: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        return self._conv_forward(input, weight, bias)  # type: ignore[attr-defined, no-any-return]


class LinearLeaf(WeightedLeaf):
    """Linear."""

    def run_with(self, weight: Tensor, bias: Tensor | None, input: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        return F.linear(input, weight, bias)


class ConvTransposeLeaf(WeightedLeaf):
    """ConvTranspose1d, 2d, 3d."""

    def run_with(
        self, weight: Tensor, bias: Tensor | None, input: Tensor, *rest: Any, output_size: Any = None, **kwargs: Any
    ) -> Tensor:
        me: Any = self
        output_size = rest[0] if rest else output_size
        spatial = weight.ndim - 2
        padding = me._output_padding(input, output_size, me.stride, me.padding, me.kernel_size, spatial, me.dilation)
        convolve = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[spatial]
        return convolve(input, weight, bias, me.stride, me.padding, padding, me.groups, me.dilation)


def set_norm_mode(model: nn.Module, mode: str) -> None:
    """Set how folded batch norms train (module docstring). Raises ConfigError for an unknown mode.

    fuse_bn fixes them: they stay in eval mode, and gamma gets no gradient, nor does the bias of the convolution if the
    norm has a beta (otherwise two biases that add up would be trained). Any other mode undoes this.
    """
    if mode not in NORM_MODES:
        raise ConfigError(f"qat.mode is one of {', '.join(NORM_MODES)}, but got {mode!r}.")
    fixed = mode == "fuse_bn"
    for leaf in [m for m in model.modules() if isinstance(m, WeightedLeaf)]:
        norm: Any = leaf.qflow_norm
        leaf.qflow_mode = mode
        if norm is None or norm.qflow_fixed == fixed:
            continue
        norm.qflow_fixed = fixed
        if fixed:
            doubled = leaf.bias if norm.bias is not None else None
            # Parameters that were frozen before are left out, so that they stay frozen afterwards.
            leaf.qflow_frozen = [p for p in (norm.weight, doubled) if p is not None and p.requires_grad]
        for parameter in leaf.qflow_frozen:
            parameter.requires_grad_(not fixed)
        norm.train(getattr(leaf, "training", False))
