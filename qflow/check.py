"""python -m qflow.check: what the device will make of a model under a qconfig, before anything is tuned.

Traces, calibrates and checks; writes model_check_result.txt with the guide's sections, the same as records, and
prints what deserves a look. Exit code 0: nothing wrong; 1: an error-level finding; 2: a mistake in what was asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qflow import config as conf
from qflow.core.callable_module import call_as

if TYPE_CHECKING:
    from omegaconf import DictConfig

SHOWN = 12  # findings on the console; the file has all


def main() -> None:
    """Entry point."""
    conf.run_door("check", check)


def check(config: DictConfig) -> int:
    """Check the task's model under `qconfig` and `calibration`. Returns 1 where a finding is an error."""
    from qflow.analysis.calibration_check import calibration_findings
    from qflow.analysis.model_check import check_model, check_text
    from qflow.core.record import to_json
    from qflow.quant.calibrate import apply_scales
    from qflow.tune import check_config, make_bench

    check_config(config)
    settings = conf.trial_settings(config)
    bench = make_bench(config)
    bench.peek()
    if settings.qconfig.needs_ranking:
        bench.rank()
    requested, applied = bench.resolve(settings.qconfig)
    stats = bench.calibrate(settings.calibration)
    silent = apply_scales(bench.prepared, stats, applied, settings.calibration)
    found = calibration_findings(bench.prepared, stats, applied, silent)
    result = check_model(bench.graph, requested, applied, found, settings.calibration.method)
    folder = conf.root_dir(config) / "check" / bench.task.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_check_result.txt").write_text(check_text(result))
    (folder / "model_check.json").write_text(to_json(result, indent=1))
    lowered = sum(row.applied != row.requested for row in result.rows)
    print(f"{'model':<12}{len(bench.graph.nodes)} operators, float graph proven equal; march {applied.march}")
    print(f"{'qconfig':<12}{len(result.rows)} rows, {lowered} not as asked; digest {applied.digest}")
    notable = [f for f in result.findings if f.level != "info"]
    for finding in notable[:SHOWN]:
        print(f"{finding.level:<12}{finding.op}: {finding.message}")
    more = f", {len(notable) - SHOWN} more" if len(notable) > SHOWN else ""
    print(f"{'findings':<12}{len(notable)} to look at{more}, {len(result.findings) - len(notable)} notes")
    print(f"{'written':<12}{folder / 'model_check_result.txt'}")
    return int(any(f.level == "error" for f in result.findings))


if __name__ == "__main__":
    main()
else:
    call_as(__name__, "qflow.library.check")
