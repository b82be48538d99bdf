"""Settings of the training after calibration (quant/train)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from qflow.core.errors import ConfigError
from qflow.core.limits import LARGEST, LARGEST_SEED, Between, OneOf, check_limits
from qflow.core.record import plain

NORM_MODES = ("fuse_bn", "with_bn", "with_bn_reverse_fold")

SINCE = ("learned_scales", "teacher", "ema", "dampening", "cosine_decay")
"""Settings that left trainings as they were when they were added: at their defaults they have no part in digests."""


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """The float model as teacher (quant/train/teacher.py)."""

    weight: Annotated[float, Between(0.0, 1e9)] = 0.0
    """Weight of its loss; 0 is no teacher."""
    features: tuple[str, ...] = ()
    """Modules whose outputs are compared too, beside those of the model."""
    temperature: Annotated[float, Between(0.0, 1000.0)] = 0.0
    """0 compares by relative squared error; above 0 outputs are logits (batch, classes), compared by KL at it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(self.features))
        check_limits(self, "qat.teacher")
        if not self.weight and (self.features or self.temperature):
            raise ConfigError(
                "A teacher has a weight above 0, but got qat.teacher.weight=0 with features or a temperature. Set "
                "qat.teacher.weight=1."
            )


@dataclass(frozen=True, kw_only=True)
class QatSettings:
    """Quantization-aware training after calibration, with the guide's defaults; 0 steps is no training."""

    steps: Annotated[int, Between(0, 10_000_000)] = 0
    """Training steps; 0 is no training."""
    apply: Annotated[str, OneOf(("every_trial", "after_search"))] = "every_trial"
    """`every_trial` trains each trial after its calibration; `after_search` trains in a stage after the search."""
    batch_size: Annotated[int, Between(1, 65536)] = 64
    """Training batch size."""
    augment: bool = False
    """Train on `task.data.train_augmented`, not `train`; the guide asks for less augmentation than in float."""
    learning_rate: Annotated[float, Between(0.0, 10.0)] = 1e-4
    """Fixed unless there is a scheduler or `cosine_decay`; there is no warm-up."""
    weight_decay: Annotated[float, Between(0.0, 10.0)] = 0.0
    """Weight decay of the optimizer."""
    rates: Mapping[str, Annotated[float, Between(0.0, 10.0)]] = field(default_factory=dict)
    """Module name prefix -> learning rate of what is below it; the longest prefix wins. Where a search changes
    learning_rate, they keep their ratio to it."""
    loss: Mapping[str, object] = field(default_factory=dict)
    """`_target_` of the user's loss, which returns a scalar for (model outputs, batch)."""
    optimizer: Mapping[str, object] = field(default_factory=lambda: {"_target_": "torch.optim.AdamW"})
    """`_target_` of the optimizer, and its arguments."""
    scheduler: Mapping[str, object] = field(default_factory=dict)
    """`_target_` of a scheduler, called with the optimizer and stepped each step; empty for a fixed rate."""
    cosine_decay: bool = False
    """Without a scheduler, the rate falls to 0 over the steps along half a cosine (Loshchilov and Hutter 2017)."""
    scheduled: bool = True
    """False keeps the rate fixed although there is a scheduler; the rates are compared this way."""
    mode: Annotated[str, OneOf(NORM_MODES)] = "fuse_bn"
    """How batch norms are trained (quant/model/weighted.py)."""
    moving: bool = True
    """Activation scales follow the data; false keeps the calibrated ones (suits a good calibration)."""
    moving_weights: bool = True
    """Weight scales follow the weights; false keeps them."""
    averaging_constant: Annotated[float, Between(0.0, 1.0)] = 0.01
    """Constant of the moving average by which activation scales follow the data."""
    freeze: tuple[str, ...] = ()
    """Module name prefixes that are not trained: no gradients, eval mode, scales kept."""
    float_steps: Annotated[int, Between(1, 1_000_000_000)] | None = None
    """Steps of the float training; QAT takes at most `max_share` of them."""
    max_share: Annotated[float, Between(0.0, 1.0)] = 0.2
    """Largest share of `float_steps` that QAT takes."""
    clip_gradients: Annotated[float, Between(1e-12, LARGEST)] | None = None
    """Largest norm of all gradients together."""
    divergence: Annotated[float, Between(1.0, LARGEST)] = 10.0
    """A loss of more than this times the median of the first `first_losses` stops the training."""
    first_losses: Annotated[int, Between(1, 1000)] = 5
    """How many losses at the start give the median for `divergence`."""
    checkpoint_every: Annotated[int, Between(0, 10_000_000)] = 0
    """Steps between checkpoints; 0 writes one only at the end or at an interruption."""
    learned_scales: Annotated[float, Between(0.0, 100_000.0)] = 0.0
    """Above 0, int8 activation scales are trained (LSQ) instead of moving, at so many times `learning_rate`. The
    logarithm is trained: with Adam, one step at a rate of 0.001 changes a scale by about 0.1 %. int16 scales stay."""
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    """The float model as a loss, alone (without `loss`) or beside it."""
    ema: Annotated[float, Between(0.0, 0.999999)] = 0.0
    """Decay of a moving average of the weights, which is evaluated and stored instead of the last ones; 0 is none."""
    dampening: Annotated[float, Between(0.0, 1e9)] = 0.0
    """Weight of a loss that keeps weights from oscillating between two codes; 0 is none."""
    amp: bool = False
    """bfloat16 autocast; refused with int16, because 98 % of the outputs would be wrong."""
    seed: Annotated[int, Between(0, LARGEST_SEED)] = 0
    """Seed of the training: the order of the data, and the random choices of the model."""

    def __post_init__(self) -> None:
        if isinstance(self.teacher, Mapping):  # as a configuration gives it
            object.__setattr__(self, "teacher", TeacherSettings(**self.teacher))
        check_limits(self, "qat")

    @property
    def unchecked(self) -> str:
        """A hint if nothing says how long the float training was, so that the guide's share cannot be checked."""
        if not self.steps or self.float_steps is not None:
            return ""
        return (
            f"whether {self.steps} steps are at most {self.max_share * 100:g} % of the float training is not checked: "
            "state its steps, qat.float_steps=<n>"
        )

    def rates_at(self, learning_rate: float) -> dict[str, float]:
        """Return `rates` at another learning rate: they keep their ratio to it, as the guide asks."""
        before = self.learning_rate
        return {n: float(f"{rate * learning_rate / before:.12g}") if before else rate for n, rate in self.rates.items()}

    def capped(self) -> tuple[int, list[str]]:
        """Return the number of steps, and a finding if they are cut to the guide's share of the float steps."""
        cap = self.steps if self.float_steps is None else max(int(self.float_steps * self.max_share), 1)
        if self.steps <= cap:
            return self.steps, []
        share = f"{self.max_share * 100:g} % of {self.float_steps} float steps"
        return cap, [f"QAT takes at most {share}: {self.steps} steps cut to {cap}"]

    def decisive(self) -> dict[str, object]:
        """Return the settings as builtins, without those of SINCE that are at their defaults."""
        found: dict[str, object] = plain(self)
        return {key: value for key, value in found.items() if key not in SINCE or value != plain(_DEFAULTS[key])}


_DEFAULTS = vars(QatSettings())
