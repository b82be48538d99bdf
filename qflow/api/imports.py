"""`qflow.read_mix` and `qflow.read_sensitivity`: what other tools' files say of a prepared model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qflow.analysis.measures.tables import SensitivityTable
from qflow.api.prepared import Prepared
from qflow.imports.read import read_mix_files, read_sensitivity_file
from qflow.imports.records import Imported


def read_mix(paths: str | Path | Sequence[str | Path], prepared: Prepared) -> Imported:
    """Return the precisions that files of Horizon's tools, or of qflow, give the operators of `prepared`.

    The files are `qconfig_dtypes.pt`, `model_check_result.txt`, the state dict of a calibrated model (its scales), a
    quant_config of HMCT, `qconfig.json`, or `qconfig_j6m.py` of an export; several if they belong together, as dtypes
    and scales do, or a quant_config and nodes.csv. `modules` of the result goes into
    `qflow.ModuleNameQconfigSetter`; `unmatched` lists what has no counterpart, what is not sure and what cannot be had.
    Raises ConfigError, in one line, for a file that is none of these or names no operator of the model.
    """
    found = [paths] if isinstance(paths, (str, Path)) else list(paths)
    return read_mix_files(found, prepared, prepared.sample)


def read_sensitivity(path: str | Path, prepared: Prepared) -> SensitivityTable:
    """Return a sensitivity table of the plugin (`output_..._sensitive_ops.pt`) under the operators' names.

    The rows are the most sensitive first, whatever their order in the file; its findings say which names did not match.
    The plugin need not be installed, and nothing of the file runs. Raises ConfigError, in one line, for another file
    and for the table of another model.
    """
    return read_sensitivity_file(path, prepared, prepared.sample)
