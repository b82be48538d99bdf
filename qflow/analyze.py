"""python -m qflow.analyze qat_debug qat=...: when QAT fails, which part is at fault? The guide's order, measured.

Fine-tunes float, then the prepared model with quantizers off, at rate 0, at rate 0 with moving scales, and as
configured; each from the same start, on the same batches. Exit code 0: no stage is at fault; 1: one is; 2: a mistake.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qflow import config as conf
from qflow.core.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """Entry point."""
    conf.run_door("analyze", analyze)


def analyze(config: DictConfig) -> int:
    """Run the stages that were asked for. Returns 1 where one finds a fault."""
    unknown = [stage for stage in config.stages if stage not in STAGES]
    if unknown or not config.stages:
        raise ConfigError(f"stages are of {', '.join(STAGES)}, but got {list(config.stages)}. Name one.")
    return max(STAGES[stage](config) for stage in config.stages)


def debug_qat(config: DictConfig) -> int:
    """The debug order of QAT on the task, under `qconfig`, `calibration` and `qat`."""
    from torch import nn

    from qflow.analysis.qat_debug import qat_debug
    from qflow.core.record import to_json
    from qflow.quant.calibrate import apply_scales
    from qflow.tasks.task import evaluate
    from qflow.training import TrainBatches
    from qflow.tune import make_bench

    settings = conf.trial_settings(config)
    bench = make_bench(config)
    if bench.training is None or not settings.qat.steps:
        raise ConfigError(
            "qat_debug needs a training, but got none. Choose a qat=<name> with steps and a loss._target_."
        )
    training, task = bench.training, bench.task
    _, applied = bench.resolve(settings.qconfig)
    apply_scales(bench.prepared, bench.calibrate(settings.calibration), applied, settings.calibration)

    def metric(model: nn.Module) -> float:
        return evaluate(task, model, bench.eval_batch)[0]

    found = qat_debug(
        task.model,
        bench.prepared,
        lambda: TrainBatches(task, settings.qat.batch_size, settings.qat.seed),
        training.loss,
        lambda groups: training.optimizer(groups, lr=settings.qat.learning_rate),
        metric,
        settings.qat,
        qconfig=applied,
        calibration=settings.calibration,
        tolerance=config.objective.max_drop,
        maximize=task.direction == "maximize",
    )
    folder = conf.root_dir(config) / "analyze" / task.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "qat_debug.json").write_text(to_json(found, indent=1))
    print(f"{'float':<18}{found.float_metric:.4f}")
    print(f"{'calibrated':<18}{found.calibrated_metric:.4f}")
    for stage in found.stages:
        value = "stopped" if stage.metric is None else f"{stage.metric:.4f}"
        verdict = "passes" if stage.passed else "at fault"
        print(f"{stage.name:<18}{value:<9} against {stage.reference:.4f}  {verdict}  {stage.note}".rstrip())
    print(f"{'verdict':<18}{found.verdict}")
    print(f"{'written':<18}{folder / 'qat_debug.json'}")
    return int(not all(stage.passed for stage in found.stages))


STAGES = {"qat_debug": debug_qat}

if __name__ == "__main__":
    main()
