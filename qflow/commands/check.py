"""python -m qflow.check: check a model under a qconfig for the device, before it is tuned.

Traces, calibrates and checks the model. Writes model_check_result.txt with the guide's sections and model_check.json
with the same as records, and prints the findings above the level info. Exit code 0: no finding is an error; 1: a
finding is an error; 2: a mistake in the command line or configuration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qflow.config.command import Result, run_command

if TYPE_CHECKING:
    from omegaconf import DictConfig

SHOWN = 12  # findings on the console; the file has all


def main() -> None:
    """Entry point."""
    run_command("check", check)


def check(config: DictConfig) -> Result:
    """Check the task's model under `qconfig` and `calibration`. Returns 1 where a finding is an error."""
    from qflow.config.settings import root_dir, trial_settings
    from qflow.study.checks import check_config, require_no_workers, require_own_engine

    require_own_engine(config, "check")
    check_config(config)
    require_no_workers(config, "check")
    from qflow.analysis.checks.model_check import check_text
    from qflow.core.record import to_json
    from qflow.study.assemble import make_evaluator
    from qflow.trial.findings import checked

    root, settings = root_dir(config), trial_settings(config)
    evaluator = make_evaluator(config)
    evaluator.check_data()
    if settings.qconfig.needs_ranking:
        evaluator.rank()
    requested, applied = evaluator.resolve(settings.qconfig)
    result = checked(evaluator, requested, applied, settings.calibration)
    folder = root / "check" / evaluator.task.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_check_result.txt").write_text(check_text(result))
    (folder / "model_check.json").write_text(to_json(result, indent=1))
    lowered = sum(row.applied != row.requested for row in result.rows)
    print(f"{'model':<12}{result.operators} operators, float graph proven equal; march {applied.march}")
    print(f"{'qconfig':<12}{len(result.rows)} rows, {lowered} not as requested; digest {applied.digest}")
    notable = [f for f in result.findings if f.level != "info"]
    for finding in notable[:SHOWN]:
        print(f"{finding.level:<12}{finding.op}: {finding.message}")
    more = f", {len(notable) - SHOWN} more" if len(notable) > SHOWN else ""
    print(f"{'findings':<12}{len(notable)} to look at{more}, {len(result.findings) - len(notable)} notes")
    print(f"{'written':<12}{folder / 'model_check_result.txt'}")
    record = {
        "qconfig": applied.digest,
        "march": applied.march,
        "operators": result.operators,
        "rows": len(result.rows),
        "not_as_requested": lowered,
        "findings": notable,
        "written": str(folder),
    }
    return int(any(f.level == "error" for f in result.findings)), record
