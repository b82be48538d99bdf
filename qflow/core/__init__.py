"""The basic records: a model as a graph, a qconfig (the precision of every operator), device rules, settings.

This package uses the standard library only, so that a qconfig can be built, compared and logged without torch.
"""

__all__ = [
    "agreement",
    "credentials",
    "device",
    "device_rules",
    "dtype",
    "engine",
    "errors",
    "graph",
    "installed",
    "known_range",
    "limits",
    "names",
    "nearest",
    "op_spec",
    "qconfig",
    "raisable",
    "record",
    "repair_settings",
    "resolve",
    "setter",
    "settings",
    "shown",
    "signature",
    "store",
    "stored_text",
    "table_setter",
    "template",
    "temporary",
    "text_file",
    "version",
    "weight_inputs",
]
