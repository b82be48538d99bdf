"""Leaf modules that own a weight, and the batch norm that follows them.

With the weight quantizer off both run as in the float model, so that a prepared model with all quantizers off is
the float model bit for bit. With it on, where the batch norm is in eval mode, it is folded exactly:

    factor = gamma / sqrt(running_var + eps)
    y = conv(x, fq(w * factor)) + (b - running_mean) * factor + beta            and the norm is the identity

Training is done in one of the plugin's three modes (4.1). All keep the float model's own parameters, so that
the state dict loads back without loss:

    fuse_bn               The norm stays in eval mode and its gamma is constant: the formula above with a factor
                          that never changes, where w and the bias (beta) are trained. Rates act on w, not on the
                          folded w * factor: the plugin, which throws the norm away, trains the latter.
    with_bn               y = BN(conv(x, fq(w), b)); the statistics go on. Evaluation folds: with a scale a channel
                          that moves only rounding and the end codes (a negative factor turns -128 into 128), with
                          one scale for all channels it changes results visibly.
    with_bn_reverse_fold  y = BN(conv(x, fq(w * factor) / factor, b)); the statistics go on. The plugin divides the
                          output instead, which is the same sum, a whole activation more. Evaluation folds exactly.

The factor carries no gradient (with an exact fq it would cancel). Where |factor| < 1e-5 the channel is dead
(zero-init residuals) and trains with factor 1, so that it can come to life; P6.
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

DEAD = 1e-5  # below it the folded weight would drown in the floor of the scale


class NormLeaf(Leaf):
    """A batch norm: the identity where the operator before it has already folded it in."""

    qflow_fixed = False
    """Stays in eval mode whatever the model does."""
    training: bool

    def train(self, mode: bool = True) -> Any:
        """Train or eval mode; a fixed norm stays in eval mode."""
        return super().train(mode and not self.qflow_fixed)  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The norm; nothing at all where it is folded and its result is no operator's output."""
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
    """A convolution or linear layer: fake-quantizes its weight, batch norm folded in."""

    weight: Tensor
    bias: Tensor | None
    qflow_norm: nn.Module | None
    qflow_norm_path: str | None
    qflow_mode = "with_bn_reverse_fold"
    qflow_asleep: list[Tensor]
    """Parameters that fuse_bn keeps from being trained."""

    def factor(self) -> Tensor:
        """What the batch norm multiplies by: gamma / sqrt(running_var + eps), one entry an output channel."""
        norm: Any = self.qflow_norm
        factor: Tensor = torch.rsqrt(norm.running_var + norm.eps)
        return factor if norm.weight is None else norm.weight * factor

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the batch norm's running statistics folded in (plain ones without a norm)."""
        norm: Any = self.qflow_norm
        if norm is None:
            return self.weight, self.bias
        factor = self.factor()
        shift = -norm.running_mean if self.bias is None else self.bias - norm.running_mean
        bias = shift * factor if norm.bias is None else norm.bias + shift * factor
        return self.weight * self._along_output(factor), bias

    def _along_output(self, vector: Tensor) -> Tensor:
        if getattr(self, "transposed", False):
            groups = int(getattr(self, "groups", 1))
            per_group = vector.view(groups, 1, -1).expand(groups, self.weight.shape[0] // groups, -1)
            return per_group.reshape(self.weight.shape[0], -1, *[1] * (self.weight.ndim - 2))
        return vector.view(-1, *[1] * (self.weight.ndim - 1))

    def compute(self, run: Run, name: str, *args: Any, **kwargs: Any) -> Any:
        quantizer = run.weights.get(self.qflow_path)
        if quantizer is None or not quantizer.active:  # None: no output depends on it
            return super().compute(run, name, *args, **kwargs)
        run.ran.add(quantizer.name)
        if self.qflow_norm is not None and self.qflow_norm.training:
            return self.run_with(self._beside_norm(run, name, quantizer), self.bias, *args, **kwargs)
        if self.qflow_norm_path is not None:
            run.folded.add(self.qflow_norm_path)
        weight, bias = self._quantized(quantizer)
        return self.run_with(weight, bias, *args, **kwargs)

    def _beside_norm(self, run: Run, name: str, quantizer: FakeQuant) -> Tensor:
        """The weight for training with a live batch norm behind it."""
        # A recomputation (activation checkpointing) finds other statistics: it takes the factor of the first pass.
        with torch.no_grad():
            factor = run.kept(f"{name}.factor", self.factor)
            factor = self._along_output(torch.where(factor.abs() < DEAD, torch.ones_like(factor), factor))
        if self.qflow_mode == "with_bn_reverse_fold":
            folded: Tensor = quantizer(self.weight * factor)
            return folded / factor
        if quantizer.averaging_constant:
            scale = None if not quantizer.dtype or not quantizer.dtype.is_integer else quantizer.measured(self.weight)
        else:
            scale = quantizer.scale / factor.abs()  # the scale that is kept is that of the folded weight
        quantized: Tensor = quantizer(self.weight, scale)
        return quantized

    def _quantized(self, quantizer: FakeQuant) -> tuple[Tensor, Tensor | None]:
        """Folded weight, quantized, and bias; without gradients kept until a source changes.

        The key is each source itself, its version and its storage (P12: an address alone may be a new tensor's).
        A write through `.data` leaves no trace: it is seen at the next switch of the quantizer.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            quantizer.cached = None
            weight, bias = self.folded()
            return quantizer(weight), bias
        sources, settings = self._sources(quantizer), self._settings(quantizer)
        identities = [id(source) for source in sources]
        if quantizer.cached is not None:
            known, tensors, views, versions, kept_settings, result = quantizer.cached
            if (
                known == identities
                and versions == [t._version for t in tensors]
                and views == [t.data_ptr() for t in tensors]
                and kept_settings == settings
            ):
                found: tuple[Tensor, Tensor | None] = result[0]
                return found
        weight, bias = self.folded()
        quantized = quantizer(weight), bias
        tensors = [source for source in sources if source is not None]
        if not any(t.is_inference() for t in tensors):  # those have no version
            # Views hold the storages, so that no other tensor can get an address while it is compared with; the
            # tensors themselves are held for their identities.
            held = (quantized, [t.detach() for t in tensors])
            addresses, versions = [t.data_ptr() for t in tensors], [t._version for t in tensors]
            quantizer.cached = identities, tensors, addresses, versions, settings, held
        return quantized

    def _sources(self, quantizer: FakeQuant) -> tuple[Tensor | None, ...]:
        """What the folded weight is made of; from the dicts, where nn.Module's attributes take seven times as long."""
        own: Any = self._parameters  # type: ignore[attr-defined]
        norm: Any = self.qflow_norm
        if "weight" not in own:  # parametrized: computed at every look
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
        """The operator with another weight and bias."""
        raise AssertionError("every weighted leaf class defines run_with")


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
    """How folded batch norms train from here on (module docstring). Raises ConfigError for an unknown mode.

    fuse_bn fixes them: eval mode, and no gradient for gamma nor for a convolution's bias where there is a beta
    (one bias is trained, not two that add up). Any other mode takes that back.
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
            # What was frozen before stays frozen afterwards.
            leaf.qflow_asleep = [p for p in (norm.weight, doubled) if p is not None and p.requires_grad]
        for parameter in leaf.qflow_asleep:
            parameter.requires_grad_(not fixed)
        norm.train(getattr(leaf, "training", False))
