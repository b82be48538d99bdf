"""The network as a picture: places of its operators and edges as plain data, which assets/network.js draws.

Operators stand in columns by their longest path from the inputs; what runs in parallel stands below each other. Columns
are broken into rows like a text, so that a long chain fills a page instead of a line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qflow.core.graph import ModelGraph, OpKind, OpNode
from qflow.core.qconfig import QConfig
from qflow.report.drawing import shorten
from qflow.report.study_record import Mix
from qflow.report.words import rule_words

WIDE, HIGH = 132, 34  # of a box
STEP, LANE, BREAK = 168, 46, 30  # from column to column, from lane to lane, and between two rows
SHAPE = 2.2  # width over height that the picture aims at
LETTERS = 19
BAR = WIDE - 12  # longest bar inside a box


def network_picture(graph: ModelGraph, mix: Mix, scores: Mapping[str, float]) -> dict[str, Any]:
    """Boxes coloured by output dtype, with a bar for the int8 sensitivity (log scale) and one for the time."""
    columns = _columns(graph)
    lanes = _lanes(graph, columns)
    places, width, height = _places(columns, lanes)
    slowest = max((ms for ms, _, _ in mix.times.values()), default=0.0)
    known = [s for s in scores.values() if 0.0 < s < math.inf]
    least, most = (max(min(known), max(known) * 1e-4), max(known)) if known else (0.0, 0.0)
    ops = []
    for node in graph.nodes:
        x, y = places[node.name]
        score, ms = scores.get(node.name, 0.0), mix.times.get(node.name, (0.0, 0.0, 0.0))[0]
        ops.append(
            {"x": x, "y": y, "short": shorten(node.name, LETTERS), "dtype": _class(dtype_of(graph, mix.qconfig, node)),
             "sensitive": _log_bar(score, least, most), "time": round(BAR * ms / slowest, 1) if slowest else 0,
             "text": operator_text(graph, mix, node, score)}
        )  # fmt: skip
    edges = [
        _edge(places[source], places[node.name]) for node in graph.nodes for source in node.inputs if source in places
    ]
    return {
        "kind": "network", "label": f"The network: {len(ops)} operators", "width": width, "height": height,
        "box": [WIDE, HIGH], "ops": ops, "edges": edges,
        "legend": [["int8", "qint8"], ["int16", "qint16"], ["fp16", "float16"], ["int32 output", "int32"],
                   ["no quantizer", "none"], ["int8 sensitivity (log)", "sensitive"], ["time", "time"]],
    }  # fmt: skip


def operator_text(graph: ModelGraph, mix: Mix, node: OpNode, score: float) -> str:
    """What the tooltip of an operator shows."""
    op = mix.qconfig.ops.get(node.name)
    lines = [node.name, f"{node.op_type.rsplit('.', 1)[-1]}, {' x '.join(map(str, node.shape))}"]
    if node.fused:
        lines.append(f"with {', '.join(node.fused)}")
    lines.append(f"output {dtype_of(graph, mix.qconfig, node)}" + (f", weight {op.weight}" if op and op.weight else ""))
    if op and (op.fallback or rule_words(op.rule)):
        lines.append(op.fallback or rule_words(op.rule))
    if score:
        lines.append(f"int8 sensitivity {score:.4g}")
    if node.name in mix.times:
        ms, low, high = mix.times[node.name]
        lines.append(f"{ms:.4f} ms [{low:.4f}, {high:.4f}]")
    return "\n".join(lines)


def dtype_of(graph: ModelGraph, qconfig: QConfig, node: OpNode) -> str:
    """Dtype of an operator's output: its own, int32 for a high-precision output, or that of what it passes on."""
    op = qconfig.ops.get(node.name)
    if op is not None:
        return str(op.output) if op.output is not None else "int32"
    for source in graph.sources(node.name):
        found = qconfig.ops.get(source)
        if found is not None and node.quantizer is None and found.output is not None:
            return str(found.output)
    shared = [n.name for n in graph.nodes if node.quantizer and n.quantizer == node.quantizer and n.name in qconfig.ops]
    return str(qconfig.ops[shared[0]].output) if shared else "no quantizer"


def _class(dtype: str) -> str:
    return dtype if dtype in ("qint8", "qint16", "float16", "int32") else "none"


def _log_bar(score: float, least: float, most: float) -> float:
    if score <= 0.0 or most <= least:
        return float(BAR) if score > 0.0 else 0.0
    share = math.log(max(min(score, most), least) / least) / math.log(most / least)
    return round(max(BAR * share, 2.0), 1)


def _columns(graph: ModelGraph) -> dict[str, int]:
    """Operator -> its column: one behind the last of its inputs; a constant stands right before its first reader."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        found[node.name] = max((found.get(source, -1) for source in node.inputs), default=-1) + 1
    for node in graph.nodes:
        readers = graph.consumers.get(node.name, ())
        if not node.inputs and node.kind != OpKind.input and readers:
            found[node.name] = max(min(found[name] for name in readers) - 1, 0)
    return found


def _lanes(graph: ModelGraph, columns: Mapping[str, int]) -> dict[str, int]:
    """Operator -> its lane in its column, in the order of the lanes of its inputs, so that branches stay straight."""
    found: dict[str, int] = {}
    for column in range(max(columns.values(), default=0) + 1):
        here = [node for node in graph.nodes if columns[node.name] == column]
        wish = {n.name: min((found[s] for s in n.inputs if s in found), default=0) for n in here}
        taken = -1
        for node in sorted(here, key=lambda n: wish[n.name]):
            taken = max(taken + 1, wish[node.name] if len(here) > 1 else 0)
            found[node.name] = taken
    return found


def _places(columns: Mapping[str, int], lanes: Mapping[str, int]) -> tuple[dict[str, tuple[int, int]], int, int]:
    """Upper left corners of the boxes, and width and height of the whole."""
    count = max(columns.values(), default=0) + 1
    deep = [1 + max((lanes[n] for n in columns if columns[n] == c), default=0) for c in range(count)]
    mean = sum(deep) / count
    across = min(count, max(4, round(math.sqrt(SHAPE * count * (mean * LANE + BREAK) / STEP))))
    heights = [max(deep[start : start + across]) * LANE + BREAK for start in range(0, count, across)]
    tops = [sum(heights[:row]) for row in range(len(heights))]
    places = {
        name: (6 + column % across * STEP, 6 + tops[column // across] + lanes[name] * LANE)
        for name, column in columns.items()
    }
    return places, across * STEP - (STEP - WIDE) + 12, sum(heights) - BREAK + 12


def _edge(start: tuple[int, int], end: tuple[int, int]) -> list[Any]:
    """(path, whether it leads to another row): from the right of a box to the left of the next."""
    x, y, to_x, to_y = start[0] + WIDE, start[1] + HIGH // 2, end[0], end[1] + HIGH // 2
    if to_x >= x:
        bend = (to_x - x) / 2
        return [f"M{x} {y}C{x + bend} {y} {to_x - bend} {to_y} {to_x} {to_y}", to_x - x > STEP]
    middle = (start[1] + HIGH + end[1]) / 2  # down, back to the left, and into the next row
    return [f"M{x} {y}h9V{middle}H{to_x - 9}V{to_y}h9", True]
