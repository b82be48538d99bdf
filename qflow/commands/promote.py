"""python -m qflow.promote: rebuild the best trial from its run alone, judge it, register it, move the alias to it.

The trial is run again from the files of its run, which are verified first. Every figure and file must come out as it
was stored, bit for bit, and the model that is registered must compute the same metric once more. The verdict is ACCEPT,
REJECT (a rule of the gate), INFEASIBLE (the goal is missed) or ANOMALOUS (something was not rebuilt), with every
reason; only ACCEPT registers. What is registered are the rebuilt files.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qflow.config.command import Result, run_command
from qflow.config.settings import patience, plain, root_dir
from qflow.core.errors import ConfigError, PromotionError, QflowError
from qflow.core.temporary import TemporaryFolder

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from qflow.bundle.stored import StoredTrial
    from qflow.search.objective import Goal
    from qflow.study.gate import Judged, Rules, Scores
    from qflow.study.rebuild import Rebuilt
    from qflow.study.verdict import Verdict
    from qflow.tasks.task import Task
    from qflow.tracking.artifacts import Store
    from qflow.tracking.registry import Version

WORDS = {"rollback": "rollback=true"}
"""What may be written instead of an override."""
OF_ROLLBACK = ("rollback", "study", "tracking", "root", "dry_run")
SHOWN = ("accuracy/drop", "cost/latency_ms", "qconfig/int16_ratio")
JUDGED = "qflow.judged"
"""Tag of a version: the figures that the next one is compared with."""


def main() -> None:
    """Entry point."""
    run_command("promote", promote, [WORDS.get(word, word) for word in sys.argv[1:]])


def promote(config: DictConfig) -> Result:
    """Pick, rebuild, judge, register. Returns 0, or 1 with every reason printed, and the result for scripts."""
    from qflow.bundle.source import of_run
    from qflow.study.find import place_of_run
    from qflow.study.gate import Rules, check_goal
    from qflow.tracking.artifacts import Store
    from qflow.tracking.limits import model_name
    from qflow.tracking.registry import champion, check_alias

    require_used(config)
    check_goal(plain(config.objective))
    if config.tracking.alias is not None:
        check_alias(config.tracking.alias)
    rules, stated = Rules(**plain(config.gate)), config.tracking.registered_model
    if stated is not None:
        model_name(stated)
    store = Store.open(config.tracking.uri, root_dir(config), patience(config))
    if config.rollback:
        return roll_back(store, config)
    run_id = config.run or to_promote(store, config.study, config.tracking.experiment)
    trial = of_run(store, run_id)
    name, alias = place_of_run(store, config, trial.config, run_id)
    before, source = champion(store, name, alias), f"models:/{name}@{alias}"
    study = trial.tags.get("qflow.study", "?")
    print(f"{'run':<12}{run_id}, qconfig {trial.qconfig.digest}, of {study}, for {name}@{alias}")
    with TemporaryFolder() as folder:
        verdict, promotion = judge(config, store, trial, Path(folder), before, rules)
        verdict.show()
        record = verdict.record(run=run_id, model=name, version=None, alias=alias, source=None)
        if verdict.word != "ACCEPT" or promotion is None:
            return 1, record
        if before is not None and before.run_id == run_id:
            print(f"{'champion':<12}{name} version {before.number} is this run already; alias {alias} stays")
            show_how_to_load(config, trial, store, source)
            return 0, {**record, "version": before.number, "source": source}
        if config.dry_run:
            print(f"{'dry run':<12}nothing is registered; alias {alias} of {name} stays")
            return 0, record
        version = promotion.register(store, name, alias, before)
    came = f", before it version {before.number}" if before else ""
    print(f"{'champion':<12}{name} version {version}, alias {alias} moved{came}")
    show_how_to_load(config, trial, store, source)
    return 0, {**record, "version": version, "source": source}


def require_used(config: DictConfig) -> None:
    """Raise ConfigError for a key of the command line that this form of the command does not read."""
    from qflow.config.compose import overridden, require_only

    if config.rollback:
        require_only(OF_ROLLBACK, "rollback moves an alias back and judges nothing")
    if config.run and not config.run.isalnum():
        raise ConfigError(
            f"run is an MLflow run id of letters and digits, but got {config.run!r}. Copy it from MLflow."
        )
    if config.run and any(text.startswith(("study=", "tracking.experiment=")) for text in overridden()):
        raise ConfigError(
            f"run names a trial, study the one to take its best of, but got both with run={config.run}. Leave one out."
        )


def to_promote(store: Store, study: str, experiment: str | None) -> str:
    """Return the run of a study's best trial. Raises TrackingError for an unknown study, PromotionError without one."""
    from qflow.study.find import best_run, one_study

    _, run_id = one_study(store, study, experiment, "A study must exist to be promoted")
    if (best := best_run(store, run_id)) is None:
        why = "missed its goal" if store.run(run_id)[0].get("qflow.goal") == "missed" else "has not ended yet"
        raise PromotionError(
            f"A study is promoted by its best trial, but {study} {why}. Tune further, or name run=<id>."
        )
    return best


@dataclass
class Promotion:
    """A rebuilt trial that may be registered, with the folder of its MLflow model."""

    rebuilt: Rebuilt
    model: Path
    files: str
    """Digest over the files of the bundle."""
    judged: Judged

    def register(self, store: Store, name: str, alias: str, before: Version | None) -> int:
        """Upload and register the model, and move the alias; return the version."""
        from qflow.bundle.source import BUNDLE_TAG
        from qflow.core.record import to_json
        from qflow.core.version import VERSION
        from qflow.tracking.model_files import logged_model
        from qflow.tracking.registry import register

        trial = self.rebuilt.trial
        figures = {key: trial.metrics[key] for key in SHOWN}
        tags = {
            BUNDLE_TAG: self.files,
            JUDGED: to_json(self.judged),
            "qflow.qconfig": trial.qconfig.digest,
            "qflow.run": trial.run_id,
            "qflow.study": trial.tags.get("qflow.study", ""),
            "qflow.verdict": "ACCEPT",
            "qflow.promoted": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "qflow.version": VERSION,
            **{key: f"{value:.6g}" for key, value in figures.items()},
        }
        came = f" Before it: version {before.number}." if before else ""
        text = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
        with logged_model(store, self.model, _plain_name(name), trial.run_id, {"qflow.run": trial.run_id}) as model:
            return register(
                store, name, model, alias, before, tags,
                f"{text}. Rebuilt bit for bit from run {trial.run_id} and accepted by the gate.{came}",
            )  # fmt: skip


def judge(
    config: DictConfig, store: Store, trial: StoredTrial, folder: Path, before: Version | None, rules: Rules
) -> tuple[Verdict, Promotion | None]:
    """Rebuild the trial, load the files that would be registered, and judge them."""
    from qflow.api.load import prepared_of
    from qflow.api.registered import write_registered
    from qflow.bundle.source import of_folder
    from qflow.bundle.write import write_bundle
    from qflow.core.engine import EngineName
    from qflow.study.gate import Judged, misses, score, stricter
    from qflow.study.rebuild import rebuild
    from qflow.study.verdict import Verdict
    from qflow.trial.record import run_metrics
    from qflow.trial.training import float_weights

    goal = stricter(plain(trial.config.objective), plain(config.objective))
    _, logged, _ = store.run(trial.run_id)
    (folder / "files").mkdir()
    print(f"{'rebuild':<12}the trial, from its run and your code", flush=True)
    rebuilt = rebuild(trial, folder / "files", allow=config.security.allow, logged=logged)
    verdict, result, evaluator = Verdict(anomalous=list(rebuilt.differences)), rebuilt.result, rebuilt.evaluator
    verdict.notes += rebuilt.notes
    if result is None:
        return verdict, None
    accuracy = f"accuracy/{evaluator.task.metric_name}"
    for name in (accuracy, "accuracy/drop", "cost/latency_ms"):
        stored, value = rebuilt.figures[name]
        print(f"{name:<18}{'-' if stored is None else f'{stored:.6g}':>12} logged {value:>12.6g} rebuilt")
    verdict.infeasible += misses(goal, run_metrics(result, accuracy))
    if verdict.anomalous:
        return verdict, None
    files = write_bundle(folder / "bundle", trial, folder / "files", float_weights(evaluator.task.model))
    loaded = prepared_of(
        of_folder(folder / "bundle", "the rebuilt trial", files),
        model=evaluator.task.model,
        device=evaluator.task.device,
    )
    again = score(evaluator.task, loaded, "evaluation", evaluator.eval_batch)
    if again.metric != result.metric and evaluator.engine.name == EngineName.qflow:
        verdict.anomalous.append(f"loaded again, {accuracy} is {again.metric:.6g} instead of {result.metric:.6g}")
    elif again.metric != result.metric:  # what is registered is qflow's model with the plugin's dtypes and scales
        verdict.notes.append(f"loaded by qflow, {accuracy} is {again.metric:.6g}; by the plugin {result.metric:.6g}")
        only, drop = type(goal)(max_drop=goal.max_drop), evaluator.task.drop(evaluator.float_metric, again.metric)
        verdict.infeasible += misses(only, {"accuracy/drop": drop}, " where qflow loads it")
    on_samples(verdict, rebuilt, loaded, again, goal, rules)
    judged = Judged(result.metric, result.cost.latency_ms, trial.manifest.get("data", ""))
    against(verdict, before, judged, rules, evaluator.task, config.tracking.registered_model is not None)
    write_registered(folder / "model", loaded, folder / "bundle")
    return verdict, Promotion(rebuilt, folder / "model", files, judged)


def against(verdict: Verdict, before: Version | None, judged: Judged, rules: Rules, task: Task, named: bool) -> None:
    """Judge against the champion; one of other data is replaced only where the command has `named` its model."""
    from qflow.study.gate import against_champion

    if before is None:
        return
    if (known := _judged(before)) is not None and known.data == judged.data:
        verdict.rejected += against_champion(rules, task, judged, known)
        return
    why = f"not compared with version {before.number}, which was judged on other data or not at all"
    asked = [n for n in ("max_worse_than_champion", "max_slower_than_champion_ms") if getattr(rules, n) is not None]
    if asked:
        verdict.rejected.append(f"{why}, so that gate.{asked[0]} cannot be judged. Set it to null to promote anyway")
    elif not named:
        verdict.rejected.append(f"{why}: name the model that you mean, tracking.registered_model=<name>")
    else:
        verdict.notes.append(why)


def on_samples(verdict: Verdict, rebuilt: Rebuilt, loaded: Any, again: Scores, goal: Goal, rules: Rules) -> None:
    """Judge the goal on held-out samples if the task has them, and the rules on classes and samples."""
    from qflow.core.agreement import meaning
    from qflow.study.gate import HELD_OUT, broken_rules, has_held_out, misses, score

    task, batch, after = rebuilt.evaluator.task, rebuilt.evaluator.eval_batch, again
    verdict.notes += filter(None, [meaning(task.metric_name)])
    if not (held_out := has_held_out(task)):
        verdict.notes.append(f"task.data has no split {HELD_OUT}: the goal is judged on samples that the search saw")
        if not rules.of_samples:
            return
    before = score(task, task.model, HELD_OUT if held_out else "evaluation", batch)
    if held_out:
        after = score(task, loaded, HELD_OUT, batch)
        drop = task.drop(before.metric, after.metric)
        print(f"{HELD_OUT:<18}{before.metric:>12.6g} float  {after.metric:>12.6g} rebuilt, drop {drop:+.6g}")
        only = type(goal)(max_drop=goal.max_drop)
        verdict.infeasible += misses(only, {"accuracy/drop": drop}, f" on data.{HELD_OUT}")
    verdict.rejected += broken_rules(rules, task, before, after)


def roll_back(store: Store, config: DictConfig) -> Result:
    """Move the alias back to the version before, which is in the result.

    No trial is read, as that of the present version may be damaged.
    """
    from qflow.study.find import registered_place
    from qflow.tracking.registry import champion, move_back, version_before

    name, alias = registered_place(store, config)
    print(f"{'alias':<12}{name}@{alias}")
    if config.dry_run:
        left = champion(store, name, alias)
        number = version_before(name, alias, left)
        print(f"{'dry run':<12}{name}@{alias} would go back to version {number}")
        return 0, {"run": None, "model": name, "version": int(number), "alias": alias, "dry_run": True}
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    left, now = move_back(store, name, alias, {"qflow.rolled_back": at})
    print(f"{'champion':<12}{name} version {now.number}, alias {alias} moved back from version {left.number}")
    return 0, {"run": now.run_id, "model": name, "version": now.number, "alias": alias, "dry_run": False}


def show_how_to_load(config: DictConfig, trial: StoredTrial, store: Store, source: str) -> None:
    """Print the two lines that load the registered model."""
    from qflow.core.credentials import masked

    uri = masked(store.uri)
    allow = ", ".join(repr(str(package)) for package in config.security.allow)
    more = f", allow=[{allow}]" if allow else ""
    local = config.tracking.uri is None
    where = f", uri={uri!r}" if not local or str(root_dir(config)) != str(Path("qflow_out").absolute()) else ""
    print(f"{'load it':<12}qflow.load({source!r}{more}{where})")
    print(f"{'':<12}mlflow.pyfunc.load_model({source!r})  # MLFLOW_TRACKING_URI={uri}", end="")
    print(f" QFLOW_ALLOW={','.join(config.security.allow)}" if allow else "")


def _judged(version: Version) -> Judged | None:
    from qflow.bundle.bounded import parse_json
    from qflow.core.record import from_dict
    from qflow.study.gate import Judged

    try:
        return from_dict(Judged, parse_json(version.tags.get(JUDGED, "").encode(), JUDGED))
    except QflowError:
        return None


def _plain_name(name: str) -> str:
    """A logged model's name has no / : . % or quotes."""
    return "".join("-" if c in "/:.%'\"" else c for c in name)
