"""python -m qflow.export: write a trial to the files that a tool chain, or another program, takes.

The trial is loaded as `qflow.load` does: its files are verified, and its code comes from this command line, from a
built-in task or from a package that is allowed. Each target writes to a folder of its own name in `out`. What the tool
chain will change, and what the files do not say, is printed in groups and stands in `export.json`. Exit code 0: done;
1: with strict=true, a target does not say all that was judged; 2: a mistake, or a model that a target does not take.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from qflow.config.command import run_command
from qflow.config.settings import patience, plain, root_dir
from qflow.core.credentials import masked
from qflow.core.errors import ConfigError, TrackingError
from qflow.core.nearest import did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from qflow.api.prepared import Prepared
    from qflow.bundle.stored import StoredTrial
    from qflow.export.contract import Exported
    from qflow.tracking.artifacts import Store

SHOWN = 4  # operators of one group
WHOLE: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def main() -> None:
    """Entry point."""
    run_command("export", export, [rewritten(argument) for argument in sys.argv[1:]])


def rewritten(argument: str) -> str:
    """Return `from=x` as `source=x`, and `target=plugin,hmct` as the list that Hydra does not take for a sweep."""
    if re.fullmatch(r"target=\w+(,\w+)+", argument):
        return f"target=[{argument.removeprefix('target=')}]"
    return re.sub("^import=", "unpack=", re.sub("^from=", "source=", argument))


def export(config: DictConfig) -> tuple[int, dict[str, Any]]:
    """Load the trial and write it for every target. The exit code is 1 under `strict` if one does not say all."""
    if config.bundle or config.unpack:
        return 0, carried(config)
    if config.search.storage:
        raise ConfigError(
            f"search.storage is for a study that is bundled or imported, but got {masked(config.search.storage)} "
            "without. Add bundle=<.zip> or import=<.zip>, or leave it out."
        )
    names = targets_of(config.target)
    from qflow.bundle.source import fetch
    from qflow.export.model import export_model
    from qflow.tracking.artifacts import Store

    root, waiting = root_dir(config), patience(config)
    source = config.source or default_source(Store.open(config.tracking.uri, root, waiting), config)
    trial = fetch(source, uri=config.tracking.uri, root=root, patience=waiting)
    prepared = loaded(config, trial)
    origin = {"study": trial.tags.get("qflow.study", ""), "run": trial.run_id}
    print(f"{'trial':<12}{source}, qconfig {trial.qconfig.digest}, of {origin['study'] or 'an unnamed study'}")
    out, made = Path(config.out or root / "export").absolute(), {}
    for name in names:
        folder = out / name
        made[name] = export_model(prepared, name, folder, sensitivity=trial.sensitivities, origin=origin)
        print(f"{name:<12}{len(made[name].files)} files in {folder}")
        for line in report(made[name]):
            print(textwrap.indent(textwrap.fill(line, 67, subsequent_indent="    ", **WHOLE), " " * 12))
    missed = config.strict and not all(exported.faithful for exported in made.values())
    if missed:
        print(f"{'strict':<12}not everything that was judged is in the files: exit code 1")
    return int(missed), {**origin, "folder": str(out), "targets": made}


def carried(config: DictConfig) -> dict[str, Any]:
    """Write the study to a file, or add the study of a file to the store."""
    from qflow.config.compose import require_only
    from qflow.study.archive import pack, unpack

    require_only(("bundle", "unpack", "study", "root", "tracking", "search"), "A study is bundled or imported whole")
    if config.bundle and config.unpack:
        raise ConfigError("One study is bundled or imported, but got bundle and import. Leave one out.")
    root, waiting = root_dir(config), patience(config)
    searches, path = config.search.storage or root, Path(config.bundle or config.unpack)
    if config.bundle:
        study = config.study
        count = pack(config.tracking.uri, root, study, path, stated_experiment(config), waiting, searches)
        print(f"{'bundled':<12}{study} with {count} trials in {path}, {path.stat().st_size / 1e6:.1f} MB")
    else:
        study, count = unpack(config.tracking.uri, root, path, waiting, searches)
        print(f"{'imported':<12}{study} with {count} trials; promote, export and compare find it, tune continues it")
    return {"study": study, "trials": count, "written": str(path.absolute()) if config.bundle else None}


def targets_of(stated: Any) -> list[str]:
    """Return the targets by name. Raises ConfigError for an unknown one, or none."""
    from qflow.export.targets import TARGETS

    names = plain(stated) if OmegaConf.is_config(stated) else str(stated).split(",")
    found = list(dict.fromkeys(str(name).strip() for name in names))
    unknown = [name for name in found if name not in TARGETS]
    if unknown or not found:
        near = did_you_mean(unknown[0], TARGETS) if unknown else ""
        raise ConfigError(f"A target is one of {', '.join(TARGETS)}, but got {', '.join(unknown) or 'none'}.{near}")
    return found


def default_source(store: Store, config: DictConfig) -> str:
    """Return the champion of the registered model, or the best trial of the study where the study is named.

    Raises TrackingError if there is neither.
    """
    from qflow.study.find import best_run, one_study
    from qflow.tracking.limits import model_name

    unresolved: Any = OmegaConf.to_container(config, resolve=False)
    name, alias = model_name(config.tracking.registered_model), config.tracking.alias
    if "${" in unresolved["study"]:  # the default follows task.name
        with suppress(TrackingError):
            store.version(name, alias=alias)
            return f"models:/{name}@{alias}"
    experiment = stated_experiment(config)
    if store.studies(config.study, experiment):
        _, run = one_study(store, config.study, experiment, "A study is in the store")
        if best := best_run(store, run):
            return f"runs:/{best}"
    raise TrackingError(
        f"By default the champion is exported, or the best trial of a study, but got neither {name}@{alias} nor a best "
        f"trial of {config.study} in {masked(store.uri)}. Name one: from=<run id>."
    )


def stated_experiment(config: DictConfig) -> str | None:
    """Return the experiment that the command line names; None for the default, which follows task.name."""
    unresolved: Any = OmegaConf.to_container(config.tracking, resolve=False)
    return None if "${" in unresolved["experiment"] else unresolved["experiment"]


def loaded(config: DictConfig, trial: StoredTrial) -> Prepared:
    """Return the prepared model of a trial; code that the command line names itself may run."""
    from qflow.api.load import prepared_of

    return prepared_of(trial, allow=tuple(config.security.allow), own={"task": plain(config.task)})


def report(exported: Exported) -> list[str]:
    """Return the lines for the user: fallbacks and what is missing, each reason once with its operators, and notes."""
    lines = []
    lowered = [(f"{f.change}: {f.reason}", f.op) for f in exported.fallbacks if f.judged]
    unjudged = [(f"{f.change}: {f.reason}", f.op) for f in exported.fallbacks if not f.judged]
    for title, pairs in (
        ("lowered by the device, as in the figures", lowered),
        ("lowered by the tool chain, unlike the figures", unjudged),
        ("not in the files", [(f"{u.reason}. {u.way_out}", u.op) for u in exported.unexpressed]),
    ):
        if pairs:
            lines.append(f"{title}: {_counted(pairs)}")
            lines += [f"  {_some(ops)}: {text}" for text, ops in _grouped(pairs)]
    return [*lines, *(f"note: {note}" for note in exported.notes)]


def _grouped(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    found: dict[str, list[str]] = {}
    for text, op in pairs:
        found.setdefault(text, []).append(op)
    return list(found.items())


def _counted(pairs: Sequence[tuple[str, str]]) -> str:
    count = len({op for _, op in pairs})
    return f"{count} operator{'s' * (count != 1)}"


def _some(ops: Sequence[str]) -> str:
    more = f" and {len(ops) - SHOWN} more" if len(ops) > SHOWN else ""
    return ", ".join(ops[:SHOWN]) + more
