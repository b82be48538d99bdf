"""python -m qflow.trial: one trial, by hand or again.

    qflow trial 'qconfig.modules={box_head: qint16}'    a mix of your own, tracked beside the trials of its study
    qflow trial from_run=<run>                          a trial again from its run alone: equal, or the differences

Exit code 0: the mix meets the goal, or every figure and file is equal; 1: it does not, or something differs (each
difference is named); 2: a mistake in the command line or configuration.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qflow.config.command import Result, run_command
from qflow.core.temporary import TemporaryFolder

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from qflow.search.outcome import FinishedTrial
    from qflow.study.by_hand import ByHand

SHOWN = 12  # operators on the console; qflow.compare lists all
OF_AGAIN = ("from_run", "root", "tracking", "security", "task")
"""What may be set beside from_run: everything else is the run's."""


def main() -> None:
    """Entry point."""
    run_command("trial", trial)


def trial(config: DictConfig) -> Result:
    """Run a trial again if `from_run` names one, else the trial of the configuration."""
    return again(config) if config.from_run else by_hand(config)


def by_hand(config: DictConfig) -> Result:
    """Evaluate and track the trial of the configuration. Returns 1 where it misses the goal."""
    from qflow.config.device_file import require_cost
    from qflow.study.checks import check_config, require_no_workers

    check_config(config)
    require_no_workers(config, "trial")
    require_cost(config.device, config.device.march)
    from qflow.search.objective import meets
    from qflow.study.by_hand import ByHand
    from qflow.study.outcome import trial_line
    from qflow.study.result import trial_fields, trial_record

    hand = ByHand.open(config)
    done = hand.run()
    print(trial_line(done, f"accuracy/{hand.evaluator.task.metric_name}"))
    by = {name: excess for name, excess in done.outcome.constraints.items() if excess > 0}
    missed = "missed, " + ", ".join(f"{name} by {excess:.4g}" for name, excess in by.items())
    print(f"{'goal':<12}{hand.goal}: {missed if by else 'met'}")
    best = print_against_best(hand, done)
    record = {
        **trial_fields(done),
        "goal": str(hand.goal),
        "missed": by,
        "study": config.study,
        "best": trial_record(best),
        "next": print_next(hand, done, best),
    }
    return int(not meets(done)), record


def print_against_best(hand: ByHand, done: FinishedTrial) -> FinishedTrial | None:
    """What differs from the best trial of the study; return that."""
    found = hand.best()
    if found is None:
        print(f"{'best':<12}{hand.config.study} has no best trial yet")
        return None
    best, theirs = found
    ours = hand.qconfig(done.run_id)
    drop, latency = (
        done.outcome.metrics[name] - best.outcome.metrics[name] for name in ("accuracy/drop", "cost/latency_ms")
    )
    change = hand.evaluator.pricer.change(theirs, ours)
    print(
        f"{'best':<12}trial {best.number}: this one has drop {drop:+.4f}, {latency:+.3f} ms, {change.ratio:.2f} of its "
        f"BPU time [{change.low:.2f}, {change.high:.2f}]"
    )
    differ = ours.diff(theirs)
    for name, (own, other) in list(differ.items())[:SHOWN]:
        shown = [f"{op.output or 'int32'}{f'/{op.weight}' if op.weight else ''}" if op else "-" for op in (other, own)]
        print(f"{'':<12}{name}: {shown[0]} in the best, here {shown[1]}")
    if len(differ) > SHOWN:
        print(f"{'':<12}and {len(differ) - SHOWN} more")
    return best


def print_next(hand: ByHand, done: FinishedTrial, best: FinishedTrial | None) -> list[str]:
    """The commands that follow, which are returned, and the address of the trials, with the view of `tune`."""
    from qflow.report.console import python_command
    from qflow.search.objective import meets
    from qflow.study.next_steps import compare_command, promote_command
    from qflow.tracking.views import known_view, study_url, ui_host

    config = hand.config
    lines = [compare_command(config, hand.root, best.run_id, done.run_id)] if best else []
    if meets(done):
        lines.append(promote_command(config, hand.root, done.run_id))
    ui = hand.tracker.ui_command()
    for number, line in enumerate([*lines, f"{python_command()} -m {ui}" if ui.startswith("mlflow") else ui]):
        print(f"{'' if number else 'next':<12}{line}")
    host = ui_host(hand.tracker.uri)
    key = known_view(hand.tracker, config.study)
    print(f"{'then open':<12}{study_url(host, hand.tracker.experiment_id, config.study, key)}")
    return lines


def again(config: DictConfig) -> Result:
    """Run the trial of a run again. Returns 1 where anything differs from what was stored."""
    from qflow.config.compose import require_only
    from qflow.config.settings import patience, plain, root_dir

    require_only(OF_AGAIN, "from_run=<run> runs a trial with the settings of its run")
    from qflow.bundle.source import fetch
    from qflow.study.rebuild import rebuild

    stored = fetch(config.from_run, uri=config.tracking.uri, root=root_dir(config), patience=patience(config))
    print(f"{'run':<12}{stored.run_id}, qconfig {stored.qconfig.digest}, of {stored.tags.get('qflow.study', '?')}")
    print(f"{'again':<12}the trial, from its run and your code", flush=True)
    with TemporaryFolder() as folder:
        found = rebuild(stored, Path(folder), allow=config.security.allow, own=plain(config))
    for name, (before, now) in found.figures.items():
        print(f"{name:<26}{'-' if before is None else f'{before:.6g}':>14} stored {now:>14.6g} again")
    for text in found.differences:
        print(f"{'differs':<12}{text}")
    if not found.differences:
        print(f"{'equal':<12}every figure, scale and file is as it was stored")
    figures = {name: {"stored": before, "again": now} for name, (before, now) in found.figures.items()}
    record = {"run": stored.run_id, "equal": not found.differences, "differences": list(found.differences)}
    return int(bool(found.differences)), {**record, "figures": figures}
