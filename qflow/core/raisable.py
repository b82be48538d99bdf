"""Which int8 operators a march can run at int16: those that a finding may advise to raise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qflow.core.device import apply_rules
from qflow.core.device_rules import DeviceRules
from qflow.core.dtype import QDtype
from qflow.core.graph import ModelGraph
from qflow.core.qconfig import QConfig
from qflow.core.resolve import resolve
from qflow.core.setter import HighPrecisionOutput, TemplateSetter


def raisable(graph: ModelGraph, rules: DeviceRules, names: Sequence[str]) -> tuple[str, ...]:
    """Return those of `names` whose output stays int16 on the device, in all-int16 or where they alone are int16.

    The second case is that of a matmul's inputs, of which the device takes a limited number at int16.
    """
    if not names:
        return ()
    wide = _applied(graph, rules, _template(graph, QDtype.qint16, rules))
    kept = set(wide.names(QDtype.qint16))
    rest = [name for name in names if name not in kept]
    if rest and rules.matmul_int16_inputs:
        both = _applied(graph, replace(rules, matmul_int16_inputs=2), _template(graph, QDtype.qint16, rules))
        low = _template(graph, QDtype.qint8, rules)
        for name in (n for n in rest if both.ops[n].output == QDtype.qint16):
            alone = low.with_ops({name: replace(low.ops[name], output=QDtype.qint16)})
            if _applied(graph, rules, alone).ops[name].output == QDtype.qint16:
                kept.add(name)
    return tuple(name for name in names if name in kept)


def kept_alone(graph: ModelGraph, rules: DeviceRules, requested: QConfig, names: Sequence[str]) -> tuple[str, ...]:
    """Return those of `names` whose output stays int16 on the device if it alone is raised in `requested`."""

    def kept(name: str) -> bool:
        raised = requested.with_ops({name: replace(requested.ops[name], output=QDtype.qint16)})
        return _applied(graph, rules, raised).ops[name].output == QDtype.qint16

    return tuple(name for name in names if kept(name))


def _template(graph: ModelGraph, dtype: QDtype, rules: DeviceRules) -> QConfig:
    return resolve(graph, [HighPrecisionOutput(), TemplateSetter(dtype)], rules.march)


def _applied(graph: ModelGraph, rules: DeviceRules, requested: QConfig) -> QConfig:
    return apply_rules(graph, requested, rules)
