"""python -m qflow.cost [+experiment=<name>]: what a qconfig costs on the device; `fit data=...` fits the parameters.

Without `fit` the task's model is traced at its deployed shape and its cost under `qconfig` is predicted: a table with
a row for each operator, the traffic, and what raising each operator to int16 would cost. The results are printed,
written to a folder and logged to an MLflow run. Exit code 0: done; 1: outside what the model was validated on (the
reason is printed); 2: a mistake in the command line or configuration.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qflow.config.command import Result, run_command
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from qflow.core.qconfig import QConfig
    from qflow.cost_model.records import CostReport
    from qflow.tracking.mlflow_tracker import MlflowTracker
    from qflow.trial.evaluator import Evaluator

SHOWN = 12  # operators on the console; the file has all


def main() -> None:
    """Entry point."""
    run_command("cost", cost)


def cost(config: DictConfig) -> Result:
    """Report or fit. Returns 1 where the prediction should not be published."""
    from qflow.config.device_file import require_cost
    from qflow.study.checks import check_config, require_no_workers, require_own_engine

    require_cost(config.device, config.device.march)
    if config.mode == "fit":
        return fit(config)
    if config.data is not None or config.out is not None:
        raise ConfigError("data and out are those of a fit, but got one without it. Write qflow.cost fit data=<file>.")
    require_own_engine(config, "cost")
    check_config(config)
    require_no_workers(config, "cost")
    return report(config)


def report(config: DictConfig) -> Result:
    """Predict the cost of the task's model under `qconfig`."""
    from qflow.config.settings import patience, root_dir, trial_settings
    from qflow.core.raisable import kept_alone
    from qflow.cost_model.table import cost_metrics, cost_text
    from qflow.study.assemble import make_evaluator
    from qflow.tracking.mlflow_tracker import MlflowTracker

    settings = trial_settings(config)
    root = root_dir(config)
    tracker = MlflowTracker.open(config.tracking.uri, root, config.tracking.experiment, patience(config))
    evaluator = make_evaluator(config)
    if settings.qconfig.needs_ranking:
        evaluator.rank()
    requested, applied = evaluator.resolve(settings.qconfig)
    found, priced = evaluator.cost(applied), evaluator.pricer.promotions(applied)
    promotions = {name: priced[name] for name in kept_alone(evaluator.graph, evaluator.rules, requested, list(priced))}
    folder = root / "cost" / evaluator.task.name
    write(folder, found, promotions, config)
    print(cost_text(found, SHOWN, config.fps), end="")
    print_comparisons(evaluator, applied, found, promotions)
    if held := len(priced) - len(promotions):
        print(f"{'':<12}not priced: {held} operators, because {config.device.march} would not keep int16 on them alone")
    name, run = tracked(tracker, evaluator, applied, found, folder, config)
    print(f"{'written':<12}{folder / 'cost.csv'}; MLflow run {name}")
    record = {
        "qconfig": applied.digest,
        "metrics": cost_metrics(found),
        "refusal": found.refusal,
        "int16_costs_ms": dict(promotions),
        "run": run,
        "written": str(folder),
    }
    return int(bool(found.refusal)), record


def tracked(
    tracker: MlflowTracker, evaluator: Evaluator, applied: QConfig, found: CostReport, folder: Path, config: DictConfig
) -> tuple[str, str]:
    """Log values and files to a run; return its name and id."""
    from qflow.cost_model.table import cost_metrics
    from qflow.tracking.ended import own_runs

    name = f"{evaluator.task.name}/cost-{applied.digest[:8]}"  # one run for each qconfig, so that the UI compares them
    refusal = {"qflow.cost_refusal": found.refusal} if found.refusal else {}
    with own_runs(tracker) as own:
        run = tracker.open_study(
            name,
            tags={"qflow.workflow": "cost", **refusal, **own},
            params={
                "task": evaluator.task.name,
                "march": config.device.march,
                "qconfig": applied.digest,
                "qconfig.template": config.qconfig.template,
                "qconfig.int16_ratio": config.qconfig.int16_ratio,
            },
            description=f"Cost of {evaluator.task.name} on {config.device.march}: cost.png is the picture, "
            "cost.json and cost.csv the table, promotions.json what int16 would cost for each operator that keeps it.",
        )
        tracker.log_study(run, folder=folder, metrics=cost_metrics(found))
    return name, run


def print_comparisons(
    evaluator: Evaluator, applied: QConfig, found: CostReport, promotions: Mapping[str, float]
) -> None:
    """The qconfig against all-int8, and what int16 would cost; layers of a measured report that match no operator."""
    int8, int16 = (evaluator.template(dtype)[1] for dtype in (QDtype.qint8, QDtype.qint16))
    if applied.digest != int8.digest:
        change = evaluator.pricer.change(int8, applied)
        print(f"{'to all-int8':<12}{change.ratio:.3f} of its BPU time [{change.low:.3f}, {change.high:.3f}]")
    for layer in evaluator.unmatched:
        print(f"{'unmatched':<12}{layer}")
    dearest = sorted(promotions.items(), key=lambda item: -item[1])[:3]
    if dearest:
        more = evaluator.pricer.bpu_ms(int16) - found.bpu_ms
        alone = ", ".join(f"{name} {ms * 1e3:+.1f} us" for name, ms in dearest)
        print(f"{'int16 costs':<12}{more:+.3f} ms for all that the device runs in it; most for one alone: {alone}")


def write(folder: Path, found: CostReport, promotions: Mapping[str, float], config: DictConfig) -> None:
    """The report's files: text, picture, tables, CSV, the full record and the configuration."""
    from qflow.config.settings import resolved_yaml
    from qflow.core.record import to_json
    from qflow.cost_model.table import cost_csv, cost_json, cost_text, promotions_csv, promotions_json
    from qflow.report.cost_picture import cost_bars

    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "config.yaml": resolved_yaml(config),
        "cost.txt": cost_text(found, fps=config.fps),
        "cost.csv": cost_csv(found),
        "cost.json": cost_json(found),
        "cost_record.json": to_json(found, indent=1),
        "promotions.csv": promotions_csv(promotions, "qint16"),
        "promotions.json": promotions_json(promotions, "qint16"),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    cost_bars(found, folder / "cost.png")


def fit(config: DictConfig) -> Result:
    """Fit the parameters to `data`, print the validation, and write `out`."""
    from qflow.config.device_cost import cost_section, write_cost
    from qflow.config.device_file import cost_of, rules_of
    from qflow.cost_model.fit import fit_networks
    from qflow.cost_model.networks import CLOCKS, read_networks

    march = config.device.march
    if config.data is None:
        raise ConfigError("A fit needs measured networks, but got none. Give data=<file.csv>.")
    if march not in CLOCKS:
        raise ConfigError(f"A fit is for {', '.join(CLOCKS)}, but got {march}. Choose device=nash-m.")
    networks, skipped = read_networks(config.data)
    found = fit_networks(networks)
    print(f"{'rows':<24}{found.rows} times of {len(found.families)} families: {', '.join(found.families)}")
    for line in skipped:
        print(f"{'not taken':<24}{line}")
    for how in found.left_out:
        name = how if how not in ("family", "network") else f"{how} left out"
        print(f"{name:<24}{found.errors(how)}")
    fitted = found.apply(cost_of(config.device))
    print(cost_section(fitted), end="")
    out = Path(os.path.expanduser(config.out)).absolute() if config.out is not None else None
    if out is not None:
        write_cost(fitted, out, rules_of(config.device))
        print(f"{'written':<24}{config.out}")
    errors = {how: str(found.errors(how)) for how in found.left_out}
    record = {"rows": found.rows, "families": list(found.families), "errors": errors}
    return 0, {**record, "written": str(out) if out else None}
