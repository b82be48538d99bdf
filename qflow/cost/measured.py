"""A measured report joined to a graph: the times that replace the formula."""

from __future__ import annotations

from pathlib import Path

from qflow.core.errors import ConfigError
from qflow.core.graph import ModelGraph
from qflow.core.qconfig import QConfig
from qflow.cost.latency import Measured
from qflow.cost.profile import join, read_profile


def measure(path: str | Path, graph: ModelGraph, reference: QConfig) -> tuple[Measured, tuple[str, ...]]:
    """Measured times of `graph`, whose model was built at `reference`, and lines on the layers that found no operator.

    A report of the whole model only (hrt_model_exec knows BPU segments, no operators) scales nothing but the total.
    Raises ConfigError for a report that cannot be read, or that has layers but none of this model.
    """
    profile = read_profile(path)
    joined = join(profile, graph)
    if not joined.times and (profile.layers or profile.total_ms is None) and profile.kind != "hrt_model_exec":
        layers = ", ".join(layer.name for layer in profile.layers[:3]) or "none"
        raise ConfigError(
            f"A profile's layers carry the names of the model's modules, but got {layers} in {path}. Measure this "
            "model, with debug=True."
        )
    unmatched = tuple(f"{layer.name}: {layer.ms:.4f} ms" for layer in joined.unmatched)
    source = f"{profile.kind} {Path(path).name}" + (f" ({profile.toolchain})" if profile.toolchain else "")
    return Measured(joined.times, reference, profile.total_ms, source), unmatched
