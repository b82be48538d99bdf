"""Writes the files of an analysis: the guide's tables as text, CSV, `.pt` and JSON, pictures, and one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from qflow.analysis.advice.text import advice_text
from qflow.analysis.badcases.files import BadcaseInputs, badcase_text, save_badcases
from qflow.analysis.layers.text import layers_csv, layers_text
from qflow.analysis.measures.advice import Advice, Fidelity
from qflow.analysis.measures.tables import BadcaseTable, LayerTable, SensitivityTable
from qflow.analysis.sensitivity.sensitive_ops import write_sensitive_ops
from qflow.core.record import to_json
from qflow.report.analysis_page import Analysis, analysis_page
from qflow.report.array_pictures import badcase_grid, layer_histogram
from qflow.report.files import write_rows
from qflow.report.pictures import error_along_network, sensitivity_bars
from qflow.trial.diagnosis import Diagnosis, histogram_of

OWN = (
    *("badcase*", "all_badcase_info.pt", "compare_per_layer*", "error_along_network.png", "sensitivity*"),
    *("output_*_sensitive_ops.*", "advice.*", "histogram_*.png", "findings.json", "analysis.html"),
)
"""Names of all files that an analysis writes."""
HISTOGRAMS = 4  # activations with an advice whose histogram is drawn


def write_badcases(folder: Path, table: BadcaseTable, inputs: BadcaseInputs | None) -> dict[str, Path]:
    """Write badcase.txt, the table as JSON, the inputs as the plugin's `.pt` files, and a picture of the cases."""
    (folder / "badcase.txt").write_text(badcase_text(table))
    (folder / "badcase_record.json").write_text(to_json(table))
    if inputs is None or not inputs.samples:
        return {}
    save_badcases(folder, table, inputs)
    shown = [i for i in table.chosen if i in inputs.samples]
    leaves = [[t for t in tree_leaves(inputs.samples[i]) if isinstance(t, Tensor) and t.ndim > 1] for i in shown]
    if not all(leaves):
        return {}  # an input without any image or vector cannot be drawn
    images = [found[0][0].float().numpy() for found in leaves]
    what = "frame" if table.sequences else "sample"
    captions = [f"{what} {table.shown(i)}{' (worst)' * (i == table.worst.get(table.metric))}" for i in shown]
    badcase_grid(images, captions, folder / "badcases.png")
    return {"Bad cases": folder / "badcases.png"}


def write_layers(folder: Path, table: LayerTable, shown: LayerTable | None = None) -> dict[str, Path]:
    """Write compare_per_layer_out.txt and .csv (of `shown`, the filtered table), rows for MLflow, the table as
    JSON, and the picture.
    """
    shown = shown or table
    (folder / "compare_per_layer_out.txt").write_text(layers_text(shown))
    (folder / "compare_per_layer_out.csv").write_text(layers_csv(shown))
    write_rows(shown.rows, folder / "compare_per_layer.json")
    (folder / "compare_per_layer_record.json").write_text(to_json(table))
    error_along_network(table, folder / "error_along_network.png")
    return {"Error along the network": folder / "error_along_network.png"}


def write_sensitivity(folder: Path, table: SensitivityTable) -> dict[str, Path]:
    """Write sensitivity.txt, the plugin's files of each output, rows for MLflow, the table as JSON, and the picture."""
    (folder / "sensitivity.txt").write_text(table.text())
    write_rows(table.rows, folder / "sensitivity.json")
    (folder / "sensitivity_record.json").write_text(to_json(table))
    write_sensitive_ops(table, folder)
    sensitivity_bars(table, folder / "sensitivity.png")
    return {"Sensitivity": folder / "sensitivity.png"}


def write_advice(
    folder: Path,
    advice: Sequence[Advice],
    fidelity: Fidelity | None,
    histogram: Callable[[str], Mapping[str, Any]],
) -> dict[str, Path]:
    """Write advice.txt with the effect of following it, the advice as JSON, and histograms of the first activations."""
    (folder / "advice.txt").write_text(advice_text(advice, fidelity))
    (folder / "advice.json").write_text(to_json([asdict(a) for a in advice], indent=1))
    pictures = {}
    drawn = [a.op for a in advice if a.source in ("activation", "input")][:HISTOGRAMS]
    for number, op in enumerate(drawn):
        path = folder / f"histogram_{number}.png"
        layer_histogram(**histogram(op), title=op, path=path)
        pictures[f"Values of {op} on the calibration data"] = path
    return pictures


def write_analysis(
    diagnosis: Diagnosis, folder: Path, title: str, prefixes: Sequence[str] = (), types: Sequence[str] = ()
) -> dict[str, Path]:
    """Write all files of the steps that were run, and analysis.html; returns the pictures by caption.

    `prefixes` and `types` choose rows of the layer table's text. Raises ConfigError if they choose none.
    """
    shown = diagnosis.shown_layers(prefixes, types)
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in OWN:  # files of an earlier analysis, perhaps of other stages, would be taken for files of this one
        for path in folder.glob(pattern):
            path.unlink()
    badcases, layers, table = diagnosis.badcases, diagnosis.layers, diagnosis.sensitivity
    advice, fidelity, findings = diagnosis.advice, diagnosis.fidelity, diagnosis.all_findings
    pictures: dict[str, Path] = {}
    if badcases is not None:
        pictures |= write_badcases(folder, badcases, diagnosis.inputs)
    if layers is not None:
        pictures |= write_layers(folder, layers, shown)
    if table is not None:
        pictures |= write_sensitivity(folder, table)
    if advice is not None:
        pictures |= write_advice(folder, advice, fidelity, lambda op: histogram_of(diagnosis.evaluator, op))
    write_rows(findings, folder / "findings.json")
    found = Analysis(layers, table, badcases, advice, fidelity, findings)
    drawn = ("Error along the network", "Sensitivity")  # charts of the page show these
    inside = {caption: file for caption, file in pictures.items() if caption not in drawn}
    analysis_page(folder / "analysis.html", title, found, inside)
    return pictures
