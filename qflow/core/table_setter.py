"""The setter that promotes the most sensitive quantizers of a sensitivity table. There are two ways of counting:

    operators   (qflow's) the rows that can be promoted are selected first, by type, origin dtype and candidates, and
                of a weight and its input, which the device takes at int16 only one at a time, the row that comes first;
                then the first k = ceil(selected x ratio) are promoted, so that ratio 1.0 promotes all
    rows        (the plugin's) the first k = ceil(rows x ratio) rows of the table are taken, including weight rows and
                rows that are int16 already; then those of another type or dtype are discarded, so that 20 % can
                promote far fewer than 20 % of the operators

Source of the plugin's rule: reference, section 2.7. Rows keep the order of the table, most sensitive first.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import ModelGraph, OpNode
from qflow.core.nearest import did_you_mean
from qflow.core.qconfig import OpQConfig
from qflow.core.setter import Answer, Overlay, share_of

COUNTINGS = ("operators", "rows")
SENSITIVE_TYPES = ("activation", "weight", "both")


@dataclass(frozen=True)
class TableRow:
    """The fields of a row that a setter needs; `quant_dtype` is empty if the table lacks it (4 columns)."""

    op_name: str
    sensitive_type: str
    quant_dtype: str = ""


def table_rows(table: Any) -> tuple[TableRow, ...]:
    """Return the rows of a SensitivityTable, or of the plugin's lists: op_name, sensitive_type, op_type, value
    [, quant_dtype [, flops]]. Constants are left out, because they follow their readers. Raises ConfigError.
    """
    found = []
    for i, row in enumerate(getattr(table, "rows", table)):
        if isinstance(row, (list, tuple)):
            if not 4 <= len(row) <= 6:
                raise ConfigError(f"A row of a sensitivity table has 4 to 6 columns, but got {len(row)} in row {i}.")
            cells = (row[0], row[1], row[4] if len(row) > 4 else "")
        else:
            cells = (row.op_name, row.sensitive_type, row.quant_dtype)
        made = TableRow(*(str(cell) for cell in cells))
        if made.sensitive_type not in ("activation", "weight"):
            raise ConfigError(
                f"A sensitive_type is activation or weight, but got {made.sensitive_type!r} in row {i} of the table."
            )
        if not made.op_name.startswith("const["):
            found.append(made)
    return tuple(found)


@dataclass(frozen=True)
class TableSetter:
    """Sets the top rows of a sensitivity table to int16: the output for an activation row, the weight for a weight row.

    Exactly one of `topk` and `ratio` is given. With `qconfig` (the plugin's default_qconfig), the operator gets this
    qconfig for a row of either type. A row of a value inside a norm or softmax stands for the whole operator.
    `candidates` are the operators that can be int16 on the device; None takes all.
    """

    rows: tuple[TableRow, ...]
    topk: int | None = None
    ratio: float | None = None
    sensitive_type: str = "activation"
    counting: str = "operators"
    origin: QDtype = QDtype.qint8
    dtype: QDtype = QDtype.qint16
    candidates: Sequence[str] | None = None
    qconfig: OpQConfig | None = None
    weights: Mapping[str, Collection[str]] | None = None
    """Operators whose weight can be int16 on the device, each with those whose outputs must be int8 then; None takes
    all weights. It holds for counting=operators."""

    def __post_init__(self) -> None:
        _one_of("counting", self.counting, COUNTINGS)
        _one_of("sensitive_type", self.sensitive_type, SENSITIVE_TYPES)
        if (self.topk is None) == (self.ratio is None):
            raise ConfigError(
                f"A sensitivity setter takes topk or ratio, but got topk {self.topk} and ratio {self.ratio}. Give one."
            )
        if self.ratio is not None and not 0.0 <= self.ratio <= 1.0:
            raise ConfigError(f"A ratio lies between 0 and 1, but got {self.ratio:g}. 0.2 promotes one in five.")
        if self.topk is not None and self.topk < 1:
            raise ConfigError(f"topk is at least 1, but got {self.topk}. Leave the setter out to promote none.")

    def _fits(self, row: TableRow) -> bool:
        return self.sensitive_type in ("both", row.sensitive_type) and row.quant_dtype in ("", self.origin.value)

    @cached_property
    def counted(self) -> tuple[TableRow, ...]:
        """The rows that ratio or topk counts."""
        if self.counting == "rows":
            return self.rows
        allowed = None if self.candidates is None else set(self.candidates)
        found, int16, held = [], set[str](), set[str]()
        for row in filter(self._fits, self.rows):
            if row.sensitive_type == "weight" and self.weights is not None:
                inputs = self.weights.get(row.op_name)
                if inputs is None or not int16.isdisjoint(inputs):
                    continue
                held.update(inputs)
            elif row.sensitive_type == "activation":  # rules against int16 outputs do not apply to weights
                if row.op_name in held or (allowed is not None and row.op_name not in allowed):
                    continue
                int16.add(row.op_name)
            found.append(row)
        return tuple(found)

    @cached_property
    def chosen(self) -> tuple[TableRow, ...]:
        """The promoted rows, most sensitive first."""
        if self.ratio is None:
            count = self.topk
        elif self.counting == "rows":
            count = math.ceil(len(self.counted) * self.ratio)  # keeps the rounding error of the plugin
        else:
            count = share_of(self.ratio, len(self.counted))
        return tuple(row for row in self.counted[:count] if self._fits(row))

    @cached_property
    def ranks(self) -> dict[str, dict[str, int]]:
        """Operator -> sensitive type -> rank of its promoted row, from 1."""
        found: dict[str, dict[str, int]] = {}
        for k, row in enumerate(self.chosen, 1):
            found.setdefault(row.op_name, {}).setdefault(row.sensitive_type, k)
        return found

    def check(self, graph: ModelGraph) -> None:
        """Raise ConfigError for a table of another model."""
        known = {node.name for node in graph.quantized}
        missing = [
            row.op_name
            for row in self.rows
            if row.op_name not in known and not any(node.contains(row.op_name) for node in graph.quantized)
        ]
        if missing:
            raise ConfigError(
                f"A sensitivity table names operators of this model, but got {', '.join(missing[:3])}. Measure it on "
                "this model, or rename its rows."
            )

    def __call__(self, node: OpNode, graph: ModelGraph) -> Answer:
        named = (types for name, types in self.ranks.items() if name == node.name or node.contains(name))
        found = next(named, None)
        if not found:
            return None
        asked = f"topk {self.topk}" if self.ratio is None else f"{self.ratio:.3g}"
        unit = "" if self.counting == "operators" else " rows"
        rule = f"sensitive {asked}: rank {min(found.values())} of {len(self.counted)}{unit}"
        if self.qconfig is not None:
            return replace(self.qconfig, weight=self.qconfig.weight if node.weight else None, rule=rule)
        weight = self.dtype if "weight" in found else QDtype.qint8
        if "activation" in found:
            return OpQConfig(output=self.dtype, weight=weight if node.weight else None, rule=rule)
        return Overlay({"weight": weight}, f"{rule}, weight")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is one of {', '.join(allowed)}, but got {value!r}.{did_you_mean(value, allowed)}")
