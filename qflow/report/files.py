"""Writes the files of a trial and of a study, with which its run can be read, compared and rebuilt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from qflow.analysis.badcases.files import badcase_text
from qflow.analysis.checks.model_check import check_text
from qflow.analysis.measures.tables import BadcaseTable, ModelCheck, SensitivityTable
from qflow.core.qconfig import QConfig
from qflow.core.record import to_json
from qflow.cost_model.table import cost_json
from qflow.quant.train.report import TrainingReport
from qflow.trial.record import TrialResult

SCORES = "scores.json"  # score of each evaluation sample: of a trial on its run, of the float model on the study's
REPAIR = "repair.json"  # what the repair of a trial tried, kept and refused
CALLS = "plugin_calls.json"  # what was called of the plugin for a trial with engine=plugin
CURVES = ("step", "qat/loss", "qat/learning_rate")  # of a training, by step: a table, and metrics of the run
BUNDLE = "qconfig"  # the artifact folder that a registered model version points at: precisions and scales


def write_rows(rows: Sequence[Any], path: Path) -> None:
    """Write dataclasses of one type as a table for the MLflow UI: pandas' "split" layout, a column per scalar field."""
    names = [f.name for f in fields(rows[0]) if not isinstance(getattr(rows[0], f.name), tuple)] if rows else []
    data = [[_cell(getattr(row, name)) for name in names] for row in rows]
    path.write_text(to_json({"columns": names, "data": data}))


def _cell(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write_trial(
    folder: Path,
    result: TrialResult,
    *,
    config_yaml: str,
    manifest: Mapping[str, Any],
    sensitivities: SensitivityTable | None,
) -> None:
    """Write all artifacts of one trial into `folder`; the first column of a table is the operator."""
    bundle = folder / BUNDLE
    bundle.mkdir()
    (bundle / "qconfig.json").write_text(to_json(result.qconfig, indent=1))
    (bundle / "requested.json").write_text(to_json(result.requested))
    (bundle / "scales.json").write_text(to_json(result.scales))
    (bundle / "quantizers.json").write_text(to_json(result.quantizers))
    (folder / "config.yaml").write_text(config_yaml)
    (folder / "qconfig.txt").write_text(qconfig_text(result.qconfig))
    (folder / "manifest.json").write_text(to_json(manifest, indent=1))
    (folder / "model_check_result.txt").write_text(check_text(result.check))
    write_rows(result.check.rows, folder / "model_check.json")
    (folder / "cost.json").write_text(cost_json(result.cost))
    if result.scores and len(result.scores) == result.samples:
        (folder / SCORES).write_text(to_json(result.scores))
    if result.weights is not None:
        from safetensors.torch import save_file  # imports torch, which would make --help slow

        save_file(result.weights, bundle / "weights.safetensors")
    if result.calls:
        (folder / CALLS).write_text(to_json(result.calls, indent=1))
    if result.repair is not None:
        (folder / REPAIR).write_text(to_json(result.repair, indent=1))
    if result.training is not None:
        (folder / "training.json").write_text(to_json(result.training, indent=1))
        (folder / "training_steps.json").write_text(training_steps(result.training))
    if sensitivities is not None:
        write_rows(sensitivities.rows, folder / "sensitivity.json")
        (folder / "sensitivity_record.json").write_text(to_json(sensitivities))


def training_steps(report: TrainingReport) -> str:
    """Return the loss and the learning rate by step as a table; the tracker logs it as metrics by step too."""
    steps = enumerate(zip(report.losses, report.learning_rates, strict=True), 1)
    data = [[step, _cell(loss), _cell(rate)] for step, (loss, rate) in steps]
    return to_json({"columns": list(CURVES), "data": data})


def write_study(
    folder: Path, sensitivities: SensitivityTable | None, badcases: BadcaseTable | None, check: ModelCheck
) -> None:
    """Write the tables of a study: sensitivities in the guide's layout, bad cases, and the model check."""
    (folder / "model_check_result.txt").write_text(check_text(check))
    write_rows(check.findings, folder / "findings.json")
    if sensitivities is not None:
        write_rows(sensitivities.rows, folder / "sensitivity.json")
        (folder / "sensitivity.txt").write_text(sensitivities.text())
    if badcases is not None:
        (folder / "badcase.txt").write_text(badcase_text(badcases))
        (folder / "badcase_record.json").write_text(to_json(badcases))


def qconfig_text(qconfig: QConfig) -> str:
    """One line per operator, so that two runs can be compared side by side."""
    width = max([len("operator"), *map(len, qconfig.ops)])
    return f"{'operator'.ljust(width)}  {'output':<8} {'weight':<7} rule (what the device changed)\n" + "".join(
        f"{name.ljust(width)}  {op.output or 'int32':<8} {op.weight or '':<7} {op.rule}"
        + (f"  ({op.fallback})" if op.fallback else "")
        + "\n"
        for name, op in qconfig.ops.items()
    )
