"""The commands that a study prints as the next ones, with all settings that differ from the defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig

from qflow.bundle.targets import own_packages
from qflow.config.quoting import assignment, word
from qflow.config.settings import plain
from qflow.core.credentials import masked
from qflow.report.console import python_command


def promote_command(config: DictConfig, root: Path, run: str = "") -> str:
    """Return the command that promotes the best trial of a study with `config` in `root`, or the trial of `run`."""
    named = {
        **({"run": (run, "")} if run else {"study": (config.study, "perception/int8_int16")}),
        **_store(config, root),
        "tracking.experiment": (config.tracking.experiment, "perception"),
        "tracking.registered_model": (config.tracking.registered_model, "perception"),
        "tracking.alias": (config.tracking.alias, "champion"),
    }
    words = _words(named)
    if own := own_packages(plain(config)):  # what a run names is not run unless the caller allows it
        words.append(word(f"security.allow=[{','.join(own)}]"))
    return " ".join([f"{python_command()} -m qflow.promote", *words])


def compare_command(config: DictConfig, root: Path, *runs: str) -> str:
    """Return the command that compares `runs` in the store of `config` and `root`."""
    return " ".join([f"{python_command()} -m qflow.compare", *runs, *_words(_store(config, root))])


def report_command(config: DictConfig, root: Path) -> str:
    """Return the command that renders the report of a study with `config` in `root`."""
    named = {"study": (config.study, "perception/int8_int16"), **_store(config, root)}
    return " ".join([f"{python_command()} -m qflow.report", *_words(named)])


def _store(config: DictConfig, root: Path) -> dict[str, tuple[str, str]]:
    """The settings that name the store, each with its default."""
    default = Path(os.environ.get("QFLOW_HOME") or "qflow_out")
    return {
        "root": (str(root), str(default.expanduser().resolve())),
        "tracking.uri": (masked(config.tracking.uri or ""), ""),
    }


def _words(named: Mapping[str, tuple[str, str]]) -> list[str]:
    """Overrides of the settings that differ from their defaults."""
    return [assignment(key, value) for key, (value, usual) in named.items() if value != usual]
