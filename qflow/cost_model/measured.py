"""Assigns the layers of a measured report to the operators of a graph; their times replace the formula.

Names are split at `/` and `.` (an underscore is part of a name), and a scope that is repeated counts once:
`/layer1/layer1.0/conv/Conv` begins with `layer1.0.conv`. A layer belongs to the operator with the longest module path
that its name begins with, in whole parts; among functionals in one scope, to the one with the longest function name
that the last part contains. Origin ops are tried before the layer's own name, and the time is divided evenly among the
operators found. A name that several calls share means all of them, or those that other origin ops of the layer name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from qflow.core.errors import ConfigError
from qflow.core.graph import ModelGraph, OpKind
from qflow.core.qconfig import QConfig
from qflow.cost_model.profile import LayerTime, MeasuredProfile, read_profile
from qflow.cost_model.records import Measured

# These kinds compute nothing on the BPU: a move is a view or merged into its neighbours, a skipped module is host work.
IDLE_KINDS = frozenset({OpKind.input, OpKind.constant, OpKind.move, OpKind.skipped})
SHORTEST, LONGEST = 1e-6, 1e6
"""Bounds of a measured time on the BPU, in ms."""
_FUNCTIONAL = re.compile(r"(.*?)\[(\w+)\]")
_CALL = re.compile(r"\([0-9]+\)$")
_Places = dict[tuple[str, ...], list[tuple[str, str]]]


@dataclass(frozen=True)
class Join:
    """Layers assigned to operators of a graph; `times` and `unmatched` together contain the time of all layers."""

    times: dict[str, float]  # operator -> milliseconds
    unmatched: tuple[LayerTime, ...]  # layers for which no operator was found
    without: tuple[str, ...]  # operators that compute something and have no layer


def join(profile: MeasuredProfile, graph: ModelGraph) -> Join:
    """Times of `profile` by operator of the fused `graph`."""
    places = _places(graph)
    times: dict[str, float] = {}
    unmatched = []
    for layer in profile.layers:
        found = _operators(layer.ops, places) or _operators((layer.name,), places)
        for name in found:
            times[name] = times.get(name, 0.0) + layer.ms / len(found)
        if not found:
            unmatched.append(layer)
    without = tuple(n.name for n in graph.nodes if n.kind not in IDLE_KINDS and n.name not in times)
    return Join(times, tuple(unmatched), without)


def _places(graph: ModelGraph) -> _Places:
    """Module path -> list of (function or "", operator); inputs and constants have no module."""
    places: _Places = {}
    for node in graph.nodes:
        for name in (node.name, *node.fused) if node.kind not in (OpKind.input, OpKind.constant) else ():
            functional = _FUNCTIONAL.match(name)
            path = _components(functional[1] if functional else _CALL.sub("", name))
            if path or functional:
                places.setdefault(path, []).append((_kind(functional[2]) if functional else "", node.name))
    return places


def _operators(names: tuple[str, ...], places: _Places) -> list[str]:
    """Operators that `names` mean; a name that several calls share is resolved by names that mean one operator."""
    found = [_longest(_components(name), places) for name in names]
    certain = set().union(*(few for few in found if len(few) == 1))
    return sorted(set().union(*(certain & some or some for some in found)))


def _longest(path: tuple[str, ...], places: _Places) -> set[str]:
    for length in range(len(path), -1, -1):
        last = _kind(path[-1]) if length < len(path) else ""
        fits = [(len(function), name) for function, name in places.get(path[:length], ()) if function in last]
        if fits:
            return {name for size, name in fits if size == max(fits)[0]}
    return set()


def _components(name: str) -> tuple[str, ...]:
    """Parts of a path; exported names repeat the scope before an index, as in layer1/layer1.0."""
    pieces: list[str] = []
    for piece in name.split("/"):
        if pieces and piece.startswith(f"{pieces[-1]}."):
            pieces.pop()
        pieces.append(piece)
    return tuple(part for piece in pieces for part in piece.split(".") if part)


def _kind(part: str) -> str:
    """A name without underscores and case: `GridSample` and `grid_sample` are one kind."""
    return part.replace("_", "").lower()


def measure(path: str | Path, graph: ModelGraph, reference: QConfig) -> tuple[Measured, tuple[str, ...]]:
    """Measured times of `graph`, whose model was built at `reference`, and messages on layers and operators that do not
    match.

    Nodes on the CPU are counted separately. A log of hrt_model_exec has BPU segments and no operators, so it gives only
    the total. Raises ConfigError for a report that cannot be read, that is of another march, or that has layers but
    none of this model.
    """
    profile = read_profile(path)
    if profile.march and profile.march.lower() != reference.march:
        raise ConfigError(
            f"A profile is measured on {reference.march}, but got one of {profile.march} in {path}. Choose its device."
        )
    log = profile.kind == "hrt_model_exec"
    host, bpu = ([layer for layer in profile.layers if layer.host == on] for on in (True, False))
    joined = join(replace(profile, layers=() if log else tuple(bpu)), graph)
    # A log's latency is the host's, queues included; its segments are the BPU's.
    total = sum(layer.ms for layer in bpu) if log else profile.total_ms
    if not log and not joined.times and (profile.layers or total is None):
        layers = ", ".join(layer.name for layer in profile.layers[:3]) or "none"
        raise ConfigError(
            f"A profile's layers carry the names of the model's modules, but got {layers} in {path}. Measure this "
            "model, with debug=True."
        )
    times = [*(layer.ms for layer in profile.layers if layer.ms), *([] if total is None else [total])]
    wrong = [ms for ms in times if not SHORTEST <= ms <= LONGEST]
    if wrong:
        raise ConfigError(
            f"A measured time is {SHORTEST:g} to {LONGEST:g} ms, but got {wrong[0]:g} in {path}. Measure again."
        )
    unmatched = [f"{layer.name}: {layer.ms:.4f} ms" for layer in joined.unmatched]
    unmatched += [f"{layer.name}: {layer.ms:.4f} ms on the CPU, in the latency only" for layer in host]
    if joined.without:
        more = ", ..." if len(joined.without) > 5 else ""
        unmatched.append(f"{len(joined.without)} operators keep the formula: {', '.join(joined.without[:5])}{more}")
    return Measured(
        times=joined.times,
        reference=reference,
        total_ms=total,
        host_ms=sum(layer.ms for layer in host),
        ddr_bytes=profile.ddr_bytes,
        source=f"{profile.kind} {Path(path).name}" + (f" ({profile.toolchain})" if profile.toolchain else ""),
    ), tuple(unmatched)
