"""The stages of the tuning guide, which the workflows run. A stage with unchanged inputs is read from the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qflow.analysis.checks.model_check import check_model
from qflow.analysis.checks.shared_check import reach_finding
from qflow.analysis.layers.text import layers_line
from qflow.analysis.measures.tables import BadcaseTable, SensitivityTable
from qflow.config.settings import trial_settings
from qflow.core.agreement import meaning
from qflow.core.dtype import QDtype
from qflow.core.qconfig import QConfig
from qflow.core.record import digest
from qflow.core.temporary import TemporaryFolder
from qflow.report.files import write_study
from qflow.study.kept import log_study
from qflow.study.repair_stage import repair
from qflow.study.session import Session
from qflow.study.start_mix import open_start
from qflow.study.train_stage import leave_for_training
from qflow.trial.diagnosis import Diagnosis
from qflow.trial.findings import checked

FEW_STEPS = 10  # the guide recommends 10 to 100 steps of calibration
ANALYSIS = "qflow.analysis"  # tag of a study's run: the digest of the inputs of its layers and advice


def begin(session: Session) -> None:
    """Run the first stages: float metric, model check, opening of the study, calibration, analysis of all-int8."""
    evaluator, console = session.evaluator, session.console
    task = evaluator.task
    for note in task.notes:
        console.say(note)
    evaluator.check_data()
    with console.stage("float") as say, console.bar("float", len(task.data.evaluation), "samples") as advance:
        metric = evaluator.measure_float(advance)
        samples, meant = f"{evaluator.eval_samples} samples of {task.name}", meaning(task.metric_name)
        say(f"{samples}; {meant}" if meant else f"{task.metric_name} {metric:.4f} on {samples}")
    with console.stage("check") as say:
        say(check(session))
    open_start(session)
    session.open()
    repair(session)
    settings = evaluator.default_calibration
    with console.stage("calibrate") as say, console.bar("calibrate", settings.steps, "steps") as advance:
        stats = evaluator.calibrate(settings, advance)
        asked = settings.batch_size * settings.steps
        whole = f", the whole set (batch_size x steps asks for {asked})" if stats.samples < asked else ""
        say(f"{stats.samples} samples in {stats.steps} steps{whole}, one pass for every method and dtype")
    if stats.steps < FEW_STEPS:
        console.say(
            f"{'hint':<12} the guide asks for 10 to 100 calibration steps, but these are {stats.steps}: take more data "
            "or a smaller calibration.batch_size"
        )
    diagnose(session)
    leave_for_training(session)
    if session.config.search.early_stop:
        console.say(f"{'early stop':<12} in raising int16 or fp16 up to the goal, and in demotion (search.early_stop)")


def check(session: Session) -> str:
    """Trace the model, prove the float graph unchanged, and return a line with the result of the model check."""
    evaluator = session.evaluator
    graph = evaluator.graph
    settings = trial_settings(session.config).qconfig
    unranked = replace(settings, float16_count=0, assignment="", error_share=None)  # nothing is ranked yet
    unranked = replace(unranked, sensitive_type="activation", counting="operators")
    for ratio in (0.0, 1.0):  # settings by name that are not allowed raise here, before ten trials fail
        evaluator.resolve(replace(unranked, int16_ratio=ratio))
    requested, applied = evaluator.template(QDtype.qint16)
    reach = reach_finding(evaluator.prepared, evaluator.rules)
    for finding in reach:
        session.console.say(f"{'shared':<12} {finding.op}: {finding.message}")
    found = check_model(graph, requested, applied, reach).findings
    lowered = sum(op.output != requested.ops[name].output for name, op in applied.ops.items())
    fused = sum(bool(node.fused) for node in graph.quantized)
    report = evaluator.cost(applied)
    if report.refusal:
        session.console.say(f"{'cost':<12} {report.refusal}")
    checks = sum(f.level == "check" for f in found)
    return (
        f"{graph.n_operators} operators ({fused} fused), bit-identical to float; {lowered} int8 only on "
        f"{evaluator.rules.march}, {checks} findings"
    )


def diagnose(session: Session) -> None:
    """Analyse the all-int8 model: bad cases, layer-by-layer comparison, sensitivity and advice.

    Bad cases and sensitivities of an earlier start come from the cache; layers and advice are on the study's run.
    """
    evaluator, console, diagnosis = session.evaluator, session.console, Diagnosis(session.evaluator)
    key = evaluator.analysis_key
    known = bool(key) and session.tracker.run_tags(session.study_run).get(ANALYSIS) == key
    with console.stage("bad cases") as say, console.bar("bad cases", evaluator.badcase_stage.steps, "steps") as advance:
        table = diagnosis.find_badcases(advance)
        say(f"the {len(table.chosen)} worst of {table.samples} samples by {table.metric}")
    with console.stage("layers") as say:
        unchanged = "with the advice on the study's run: nothing that they depend on has changed"
        say(unchanged if known else layers_line(diagnosis.compare_layers()))
    for finding in diagnosis.split_gain:
        console.say(f"{'shared':<12} {finding.op}: {finding.message}")
    with console.stage("sensitivity") as say, console.bar("sensitivity", evaluator.quantizers, "quantizers") as advance:
        ranked = diagnosis.rank(advance)
        top = ranked.rows[0]
        say(f"{len(ranked.rows)} rows, most sensitive: {top.op_name} ({top.sensitive_type} {top.score:.3g})")
    if known:
        return
    with console.stage("advice") as say:
        advice = diagnosis.advise()
        first = f", first {advice[0].op}: {advice[0].cause} ({advice[0].source})" if advice else ""
        log_tables(session, diagnosis, {ANALYSIS: key})
        say(f"{len(advice)} operators stand out{first}")


def log_tables(session: Session, diagnosis: Diagnosis, tags: Mapping[str, str]) -> None:
    """Log sensitivities, bad cases, the model check of all-int16, and the analysis with its page and pictures.

    `tags` are set last, so that they mark a complete upload.
    """
    from qflow.report.analysis_files import write_analysis  # imports matplotlib, which is slow to load

    evaluator = session.evaluator
    with TemporaryFolder() as folder:
        after = ", after the repair" if evaluator.weights.digest else ""
        write_analysis(diagnosis, Path(folder) / "analysis", f"{session.study.name}: all-int8 on its bad cases{after}")
        check = checked(evaluator, *evaluator.template(QDtype.qint16), evaluator.default_calibration)
        write_study(Path(folder), evaluator.sensitivities, evaluator.badcases, check)
        log_study(session, folder=Path(folder), tags=tags)


def rank_again(session: Session, title: str, point: Mapping[str, Any]) -> SensitivityTable:
    """Find the bad cases of the mix at `point` and rank its quantizers: each branch of the guide debugs its own model.

    The ranking decides which operators the branch promotes. Its tables are logged in the folder `title`; a model that
    was ranked before is not ranked or logged again.
    """
    evaluator = session.evaluator
    settings, usual = trial_settings(session.config, point), evaluator.default_calibration
    with evaluator.repaired(settings.repair, settings.calibration):
        requested, applied = evaluator.resolve(settings.qconfig)
    key = digest([applied.digest, settings.calibration, settings.repair])
    if key in session.rankings:
        evaluator.badcases, evaluator.sensitivities = session.rankings[key]
        return evaluator.sensitivities
    with evaluator.repaired(settings.repair, settings.calibration), TemporaryFolder() as folder:
        evaluator.default_calibration = settings.calibration  # that of the mix, which need not be the configured one
        try:
            cases, ranked = _ranked(session, title, applied)
        finally:
            evaluator.default_calibration = usual
        place = Path(folder) / title.replace("/", "_")
        place.mkdir()
        write_study(place, ranked, cases, checked(evaluator, requested, applied, settings.calibration))
        log_study(session, folder=Path(folder))
    session.rankings[key] = cases, ranked
    return ranked


def _ranked(session: Session, title: str, applied: QConfig) -> tuple[BadcaseTable, SensitivityTable]:
    evaluator, console = session.evaluator, session.console
    with console.stage("bad cases") as say, console.bar("bad cases", evaluator.badcase_stage.steps, "steps") as advance:
        cases = evaluator.find_badcases(advance, applied=applied)
        say(f"{title}: the {len(cases.chosen)} worst of {cases.samples} samples by {cases.metric}")
    with console.stage("sensitivity") as say, console.bar("sensitivity", evaluator.quantizers, "quantizers") as advance:
        ranked = evaluator.rank(advance, applied)
        top = ranked.rows[0]
        say(f"{title}: {len(ranked.rows)} rows, most sensitive: {top.op_name} ({top.sensitive_type} {top.score:.3g})")
    return cases, ranked
