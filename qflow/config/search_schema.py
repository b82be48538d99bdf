"""The group `search` of a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from qflow.core.limits import Above, Between, OneOf


@dataclass(kw_only=True)
class SearchSchema:
    """Which trials are run: sampler, budget, space."""

    strategy: Annotated[str, OneOf(("optuna", "ratio", "assign"))] = "optuna"
    """optuna: the sampler proposes; ratio: the fewest promotions that meet the goal; assign: operator by operator."""
    sampler: Annotated[str, OneOf(("tpe", "gp", "nsga2", "random"))] = "tpe"
    """Optuna sampler that proposes the trials: tpe, gp, nsga2 or random."""
    n_trials: Annotated[int, Between(2, 1_000_000)] = 16
    """Finished trials of the whole study, the two baselines (all-int16, all-int8) included."""
    timeout: Annotated[float, Above(0.0)] | None = None
    """Seconds after which no further trial starts."""
    max_evaluations: Annotated[int, Between(1, 1_000_000_000)] | None = None
    """Evaluations of the whole study after which no further trial starts; a qconfig evaluated before counts none."""
    early_stop: bool = False
    """End an evaluation once the goal is out of reach, where only that matters (ratio strategy, demotion);
    the metric states its `bounds`."""
    storage: str | None = None
    """Database of the search, such as postgresql://HOST/NAME; null takes optuna.db in `root`. Folders and hosts
    that name the same database and the same `tracking.uri` continue one study."""
    rates: list[Annotated[float, Above(0.0), Between(0.0, 10.0)]] = field(
        default_factory=lambda: [1e-3, 1e-4, 1e-5, 1e-6]
    )
    """Learning rates that the training stage tries after `qat.learning_rate`, each for `probe_share` of its steps."""
    probe_share: Annotated[float, Above(0.0), Between(0.0, 1.0)] = 0.2
    """Share of the training steps for which each rate is compared."""
    weight_decays: list[Annotated[float, Between(0.0, 10.0)]] = field(default_factory=lambda: [0.0])
    """Weight decays that it compares, each with moving and with fixed activation scales."""
    space: dict[str, Any] = field(default_factory=dict)
    """Configuration key -> choice(...), interval(...), range(...) or tag(log, interval(...)), in Hydra's grammar."""
    when: dict[str, Any] = field(default_factory=dict)
    """Searched key -> {key that it depends on: value, list of values, interval(...) or range(...)}."""
    start: Any = None
    """File with the present mix, which is measured right after the baselines and is the one to beat. It is
    qconfig_dtypes.pt or model_check_result.txt of the plugin, quant_config of HMCT, qconfig.json, or an exported
    qconfig_j6m.py; a list, if several belong together (dtypes and scales; quant_config and nodes.csv)."""
    enqueue: list[dict[str, Any]] = field(default_factory=list)
    """Points tried right after the baselines, before the sampler's own."""
