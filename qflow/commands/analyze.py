"""python -m qflow.analyze [stages=[badcase,layers,sensitivity,advice]]: where a quantized model loses its accuracy.

    badcase      the samples on which the quantized model differs most from float
    layers       every operator on these samples, float against calibrated: where the error starts
    sensitivity  every quantizer alone: how far it moves the outputs
    advice       the causes, the settings that mend them, and a second measurement with these settings
    qat_debug    if QAT fails: which part is at fault (analysis/advice/qat_debug.py)

The first four analyse the model under `qconfig` (a template, modules by name, an int16 ratio, ...) and `calibration`.
The command writes tables, pictures and a page into a folder and logs them to an MLflow run.

Exit code 0: done; 1: qat_debug found a fault; 2: a mistake in the command line or configuration. A stage of qat_debug
may lose `objective.max_drop` against its reference (at rate 0 nothing). If a training without fault misses the goal,
the verdict says so, and the exit code is 0.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qflow.config.command import Result, run_command
from qflow.core.errors import ConfigError
from qflow.core.nearest import did_you_mean
from qflow.core.settings import QConfigSettings

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from qflow.analysis.advice.qat_debug import QatDebug
    from qflow.core.qconfig import QConfig
    from qflow.report.console import Console
    from qflow.trial.diagnosis import Diagnosis


def main() -> None:
    """Entry point."""
    run_command("analyze", analyze)


def analyze(config: DictConfig) -> Result:
    """Run the stages of `config.stages`. Returns 1 where qat_debug finds a fault."""
    from qflow.config.command_schema import STAGES
    from qflow.study.checks import check_config, require_no_workers, require_own_engine

    unknown = [stage for stage in config.stages if stage not in STAGES]
    if unknown or not config.stages:
        near = did_you_mean(unknown[0], STAGES) if unknown else ""
        raise ConfigError(f"stages are of {', '.join(STAGES)}, but got {list(config.stages)}.{near or ' Name one.'}")
    require_own_engine(config, "analyze")
    check_config(config)
    require_no_workers(config, "analyze")
    stages = [stage for stage in STAGES if stage in config.stages]
    code, record = debug_qat(config) if "qat_debug" in stages else (0, {})
    rest = [stage for stage in stages if stage != "qat_debug"]
    if rest:
        record |= diagnose(config, rest)
    return code, record


def diagnose(config: DictConfig, stages: list[str]) -> dict[str, Any]:
    """Bad cases, layers, sensitivity and advice of the task's model under `qconfig`; return the result's fields."""
    from qflow.config.settings import patience, root_dir, trial_settings
    from qflow.report.analysis_files import write_analysis
    from qflow.report.console import Console
    from qflow.study.assemble import make_evaluator
    from qflow.tracking.ended import own_runs
    from qflow.tracking.mlflow_tracker import MlflowTracker
    from qflow.trial.diagnosis import Diagnosis

    settings = trial_settings(config).qconfig
    check_filters(config, stages)
    root = root_dir(config)
    tracker = MlflowTracker.open(config.tracking.uri, root, config.tracking.experiment, patience(config))
    evaluator = make_evaluator(config)
    evaluator.check_data()
    console = Console()
    evaluator.searches, evaluator.cache.say = root / "cache" / "searches", console.say
    if evaluator.default_repair.steps:
        with console.stage("repair") as say:
            found = evaluator.repair()
            say(found.table.view().title if found else "nothing to repair")
    if settings.needs_ranking:
        with console.stage("ranking") as say, console.bar("ranking", evaluator.quantizers, "rows") as advance:
            rows = evaluator.rank(advance).rows
            say(f"{len(rows)} rows of the all-int8 model: qconfig picks operators by their order")
    diagnosis = Diagnosis(evaluator, settings)
    what, suffix = named(settings, diagnosis.qconfig({}))
    run_stages(diagnosis, stages, console, lambda: diagnosis.shown_layers(config.prefixes, config.types))
    folder = root / "analyze" / f"{evaluator.task.name}{suffix}"
    pictures = write_analysis(
        diagnosis, folder, f"{evaluator.task.name}: {what}", list(config.prefixes), list(config.types)
    )
    name = f"{evaluator.task.name}/analyze{suffix}"
    with own_runs(tracker) as own:
        run = tracker.open_study(
            name,
            tags={"qflow.workflow": "analyze", "qflow.stages": ",".join(stages), **own},
            params={"task": evaluator.task.name, "march": config.device.march, "template": config.qconfig.template},
            description=f"Analysis of {evaluator.task.name}, {what}: analysis.html has all results.",
        )
        tracker.clear(run)  # files of an earlier analysis with other stages would look like results of this one
        tracker.log_study(run, folder=folder)
    console.say(f"{'written':<12} {folder / 'analysis.html'} and {len(pictures)} pictures; MLflow run {name}")
    return {"analysed": what, "run": run, "written": str(folder), **fields(diagnosis)}


def fields(diagnosis: Diagnosis) -> dict[str, Any]:
    """What the stages found: the worst samples, the most sensitive rows first, and the advice."""
    cases, ranked = diagnosis.badcases, diagnosis.sensitivity
    return {
        "metric": cases.metric if cases else None,
        "worst_samples": list(cases.chosen) if cases else [],
        "sensitivity": list(ranked.rows) if ranked else [],
        "advice": list(diagnosis.advice or ()),
        "fidelity": {"before": f.before, "after": f.after, "line": f.line} if (f := diagnosis.fidelity) else None,
    }


def check_filters(config: DictConfig, stages: list[str]) -> None:
    """Raise ConfigError for filters that none of the stages uses."""
    if (config.prefixes or config.types) and not {"layers", "advice"} & set(stages):
        raise ConfigError(
            f"prefixes and types choose rows of the layer table, but got stages {', '.join(stages)}. Add layers."
        )


def named(settings: QConfigSettings, applied: QConfig) -> tuple[str, str]:
    """(what is analysed, in words; the end of its folder's name): a mix is named by its digest, as tune prints it."""
    if settings == QConfigSettings(template=settings.template):
        return f"all {settings.template}", "" if settings.template == "qint8" else f"-{settings.template}"
    int16 = sum(op.output == "qint16" for op in applied.ops.values())
    float16 = sum(op.output == "float16" for op in applied.ops.values())
    mix = f"qconfig {applied.digest} with {int16} outputs int16 and {float16} float16 of {len(applied.ops)}"
    return mix, f"-{applied.digest[:8]}"


def run_stages(
    diagnosis: Diagnosis, stages: list[str], console: Console, on_layers: Callable[[], object] = lambda: None
) -> None:
    """Each stage with its bar and its line; `on_layers` runs before the long stages and may refuse the layer table."""
    from qflow.analysis.layers.text import layers_line

    evaluator = diagnosis.evaluator
    with console.stage("bad cases") as say, console.bar("bad cases", evaluator.badcase_stage.steps, "steps") as advance:
        table = diagnosis.find_badcases(advance)
        shown = ", ".join(map(table.shown, table.chosen[:6]))
        say(f"the {len(table.chosen)} worst of {table.samples} samples by {table.metric}: [{shown}]")
    for finding in table.findings:
        console.say(f"{'':<12} {finding.op}: {finding.message}")
    if "layers" in stages or "advice" in stages:
        with console.stage("layers") as say:
            say(layers_line(diagnosis.compare_layers()))
            on_layers()
    if "sensitivity" in stages or "advice" in stages:
        with console.stage("sensitivity") as say, console.bar("sensitivity", evaluator.quantizers, "rows") as advance:
            ranked = diagnosis.rank(advance)
            top = ranked.rows[0]
            say(f"{len(ranked.rows)} rows, most sensitive: {top.op_name} ({top.sensitive_type} {top.score:.3g})")
        console.say(f"{'':<12} {ranked.method}")
        for finding in ranked.findings:
            console.say(f"{'':<12} {finding.message}")
    if "advice" in stages:
        with console.stage("advice") as say:
            advice = diagnosis.advise()
            say(f"{len(advice)} operators stand out" if advice else "nothing stands out")
        for a in advice[:6]:
            what = shlex.quote(a.line) if a.line else a.text
            console.say(f"{'':<12} {a.op}: {a.cause} ({a.source}, {a.gain:.0%})  {what}")
        if any(a.line for a in advice):
            with console.stage("fidelity") as say:
                found = diagnosis.check_advice()
                say(f"following it changes the outputs' distance to float from {found.before:.3g} to {found.after:.3g}")
            together = [f"all together: {shlex.quote(found.line)}"] if found.line else []
            for text in (*together, *found.left_out):
                console.say(f"{'':<12} {text}")


def debug_qat(config: DictConfig) -> tuple[int, dict[str, Any]]:
    """The debug stages of QAT on the task, under `qconfig`, `calibration` and `qat`."""
    from torch import nn

    from qflow.analysis.advice.qat_debug import qat_debug
    from qflow.config.settings import root_dir, trial_settings
    from qflow.core.record import to_json
    from qflow.quant.model.calibrate import apply_scales
    from qflow.study.assemble import make_evaluator
    from qflow.tasks.task import evaluate
    from qflow.trial.training import TrainBatches, check_training

    settings = trial_settings(config)
    evaluator = make_evaluator(config)
    if evaluator.training is None or not settings.qat.steps:
        raise ConfigError(
            "qat_debug needs a training, but got none. Choose a qat=<name> with steps and a loss._target_."
        )
    training, task = evaluator.training, evaluator.task
    check_training(task, training, settings.qat)
    _, applied = evaluator.resolve(settings.qconfig)
    apply_scales(evaluator.prepared, evaluator.calibrate(settings.calibration), applied, settings.calibration)

    def metric(model: nn.Module) -> float:
        return evaluate(task, model, evaluator.eval_batch)[0]

    found = qat_debug(
        task.model,
        evaluator.prepared,
        lambda: TrainBatches(task, settings.qat, training.loss is not None),
        training.loss,
        lambda groups: training.optimizer(groups, lr=settings.qat.learning_rate),
        metric,
        settings.qat,
        qconfig=applied,
        calibration=settings.calibration,
        tolerance=config.objective.max_drop,
        goal=config.objective.max_drop,
        maximize=task.direction == "maximize",
    )
    folder = root_dir(config) / "analyze" / task.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "qat_debug.json").write_text(to_json(found, indent=1))
    print_debug(found)
    print(f"{'written':<18}{folder / 'qat_debug.json'}")
    return int(not all(stage.passed for stage in found.stages)), {"qat_debug": found, "written": str(folder)}


def print_debug(found: QatDebug) -> None:
    """Each stage against its reference, and the verdict."""
    print(f"{'float':<18}{found.float_metric:.4f}")
    print(f"{'calibrated':<18}{found.calibrated_metric:.4f}")
    for stage in found.stages:
        value = "stopped" if stage.metric is None else f"{stage.metric:.4f}"
        verdict = "passes" if stage.passed else "at fault"
        print(f"{stage.name:<18}{value:<9} against {stage.reference:.4f}  {verdict}  {stage.note}".rstrip())
    print(f"{'tolerance':<18}{found.tolerance:g} for each stage (objective.max_drop), 0 at rate 0")
    print(f"{'verdict':<18}{found.verdict}")
