"""The rows of a layer table by operator of the qconfig: a fused group is one row, under the operator's name."""

from __future__ import annotations

from dataclasses import replace

from qflow.analysis.measures.tables import LayerRow, LayerTable

IDENTITY = "torch.nn.modules.linear.Identity"


def by_operator(table: LayerTable) -> tuple[LayerTable, dict[int, str]]:
    """Return the table without the calls that a fused group leaves empty, and the members of each group by row index.

    The values of a group stand at its last call, and its qconfig names the first, which a reader looks for.
    """
    heads = {row.quantizer for row in table.rows}
    rows: list[LayerRow] = []
    members: dict[int, str] = {}
    waiting: list[str] = []
    for row in table.rows:
        if row.analy_op_type == IDENTITY != row.base_op_type and row.error is None:
            waiting.append(row.mod_name)
            continue
        if row.quantizer != row.mod_name and row.quantizer in waiting:
            begin = waiting.index(row.quantizer)
            own = [name for i, name in enumerate(waiting) if i == begin or (i > begin and name not in heads)]
            members[row.index] = ", ".join([*own[1:], row.mod_name])
            waiting = [name for name in waiting if name not in own]
            row = replace(row, mod_name=row.quantizer)
        rows.append(row)
    return replace(table, rows=tuple(rows)), members
