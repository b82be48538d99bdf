"""Small graphs as data."""

from qflow.core.graph import ModelGraph, OpKind, OpNode


def chain(*kinds, outputs=None):
    """A graph of operators in a row: op0 -> op1 -> ..."""
    nodes = []
    for i, kind in enumerate(kinds):
        weighted = kind in (OpKind.conv, OpKind.linear)
        nodes.append(
            OpNode(
                name=f"op{i}",
                kind=kind,
                op_type=kind.value,
                inputs=(f"op{i - 1}",) if i else (),
                shape=(1, 8, 4, 4),
                quantizer=None if kind == OpKind.move else f"op{i}",
                weight=f"op{i}" if weighted else None,
            )
        )
    return ModelGraph(tuple(nodes), (("0", outputs or nodes[-1].name),))
