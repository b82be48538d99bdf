"""The float model as teacher: a loss without labels, from what it computes on the same inputs.

    loss = mean over outputs of  sum (student - teacher)^2 / sum teacher^2      +  the same over features

or, for classification logits at a temperature T, T^2 KL(softmax(teacher / T) | softmax(student / T)) (Hinton et al.
2015). Relative squared errors suit outputs of any structure and unit. Entries where the teacher is not finite (masks)
have no part in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qflow.core.errors import ConfigError
from qflow.core.nearest import did_you_mean
from qflow.core.settings import TeacherSettings
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.model.weighted import WeightedLeaf
from qflow.quant.trace.calling import call_model, named_tensors

Named = Mapping[str, Tensor]


class Teacher:
    """A float model in eval mode; no gradient reaches it, and its own mode is restored after each call."""

    def __init__(self, model: nn.Module, settings: TeacherSettings) -> None:
        require_features(model, settings.features)
        self.model, self.settings = model, settings
        self.findings: tuple[str, ...] = ()
        """What of the first batch was not compared."""

    @torch.no_grad()
    def answers(self, inputs: object) -> tuple[Named, Named]:
        """Return outputs and features of the teacher by name."""
        modes = {module: module.training for module in self.model.modules()}
        device = next((p.device.type for p in self.model.parameters()), "cpu")
        self.model.eval()
        try:
            with recorded(self.model, self.settings.features) as features, torch.autocast(device, enabled=False):
                outputs = call_model(self.model, inputs)
        finally:
            for module, mode in modes.items():
                module.training = mode
        return dict(named_tensors(outputs)), features

    def loss(self, outputs: object, features: Named, answers: tuple[Named, Named]) -> Tensor:
        """The loss of a student's outputs and features. Raises ConfigError if none has a counterpart."""
        parts = []
        for ours, theirs, distance in (
            (dict(named_tensors(outputs)), answers[0], self._of_outputs),
            (features, answers[1], _relative),
        ):
            pairs = [(name, student, theirs[name]) for name, student in ours.items() if _alike(student, theirs, name)]
            parts += [torch.stack([distance(*pair) for pair in pairs]).mean()] if pairs else []
            self._tell(ours, theirs, [name for name, *_ in pairs])
        if not parts:
            raise ConfigError(
                "A teacher is compared by outputs of the same names and shapes in train and eval mode, but got none. "
                "Name modules: qat.teacher.features=[<name>]."
            )
        return torch.stack(parts).sum()

    def _tell(self, ours: Named, theirs: Named, compared: Sequence[str]) -> None:
        left = [name for name, out in {**ours, **theirs}.items() if out.is_floating_point() and name not in compared]
        if left and compared and not self.findings:
            self.findings = (
                f"the teacher has no counterpart of the same shape for {len(left)} outputs, {left[0]} first: they have "
                "no part in its loss",
            )

    def _of_outputs(self, name: str, student: Tensor, teacher: Tensor) -> Tensor:
        heat = self.settings.temperature
        if not heat:
            return _relative(name, student, teacher)
        if teacher.ndim != 2:
            raise ConfigError(
                f"qat.teacher.temperature is for logits of (batch, classes), but got {tuple(teacher.shape)} for output "
                f"{name}. Set qat.teacher.temperature=0, which compares squared errors."
            )
        known, own = F.log_softmax(teacher.float() / heat, 1), F.log_softmax(student.float() / heat, 1)
        return heat**2 * F.kl_div(own, known, log_target=True, reduction="batchmean")


def _relative(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    finite = torch.isfinite(teacher)
    known = torch.where(finite, teacher, 0.0).float()
    error = (torch.where(finite, student, 0.0).float() - known).square().sum()
    power = known.square().sum()
    return error / torch.where(power > 0.0, power, 1.0)


def _alike(student: Tensor, theirs: Named, name: str) -> bool:
    teacher = theirs.get(name)
    return teacher is not None and student.is_floating_point() and student.shape == teacher.shape


@contextmanager
def recorded(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within the context, the tensors that the named modules return are kept as `name`, `name(1)`, ... by call."""
    found: dict[str, Tensor] = {}
    calls = dict.fromkeys(names, 0)

    def keep(name: str, out: object) -> None:
        call, calls[name] = calls[name], calls[name] + 1
        for path, tensor in named_tensors(out):
            found[f"{name}({call}) {path}"] = tensor

    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: keep(name, out))
        for name in names
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def require_features(model: nn.Module, names: Sequence[str]) -> None:
    """Raise ConfigError for a feature that is no module of the model."""
    known = [name for name, _ in model.named_modules() if name]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"qat.teacher.features names modules, but got {name!r}.{did_you_mean(name, known)} The model check "
                "lists them."
            )


def require_comparable(student: QuantizedModel, settings: TeacherSettings, mode: str) -> None:
    """Raise ConfigError for a feature that is another value in the quantized model: before its folded batch norm."""
    for name in settings.features:
        module = student.model.get_submodule(name)
        if mode == "fuse_bn" and isinstance(module, WeightedLeaf) and module.qflow_norm_path:
            raise ConfigError(
                f"qat.teacher.features names modules whose outputs float and quantized model share, but got {name}, "
                f"into which {module.qflow_norm_path} is folded. Name {module.qflow_norm_path} instead."
            )
