"""The vocabulary: a model as a graph, a choice of precisions, device rules, records.

Standard library only: a choice can be built, hashed, compared, costed, searched and logged without importing torch.
"""

__all__ = [
    "device",
    "dtype",
    "errors",
    "graph",
    "known_range",
    "op_spec",
    "qconfig",
    "record",
    "resolve",
    "setter",
    "settings",
    "signature",
    "store",
    "table_setter",
    "template",
]
