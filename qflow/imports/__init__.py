"""What other tools' files say of a model, read as data and matched with its operators: the export's other direction.

A module for each format reads names and dtypes as the file has them (records.py), matching.py finds the operators by
their names in Horizon's plugin, and read.py tells formats apart.
"""

__all__ = ["matching", "read", "records", "sensitivity"]
