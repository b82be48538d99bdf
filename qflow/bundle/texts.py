"""Texts of a run, archive or model version: no control characters, which would add lines to a terminal or change it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qflow.config.build import texts
from qflow.core.errors import BundleError
from qflow.core.names import CONTROL, check_study_name, check_task_name

NAME = 500  # characters


def check_texts(value: Any, where: str) -> None:
    """Raise BundleError for a key or text with control characters other than line breaks and tabs."""
    for text in texts(value):
        if found := CONTROL.search(text.translate({9: " ", 10: " "})):
            part = text[max(found.start() - 20, 0) : found.start() + 20]
            raise BundleError(f"{where} holds texts that a terminal shows, but got {part!a}. Take another source.")


def check_names(config: Mapping[str, Any], tags: Mapping[str, str], metrics: Mapping[str, float]) -> None:
    """Raise BundleError or ConfigError for a name of a run that is no name: they are printed and registered.

    `config` is the run's, `tags` and `metrics` are its own by name.
    """
    check_task_name(config["task"]["name"])
    for name in filter(None, (config["study"], tags.get("qflow.study"))):
        check_study_name(name)
    stated = {f"tracking.{key}": config["tracking"][key] for key in ("experiment", "registered_model", "alias")}
    for where, name in [*stated.items(), *(("a metric", key) for key in metrics)]:
        if CONTROL.search(name) or len(name) > NAME:
            raise BundleError(f"A name is one line of at most {NAME} characters, but got {name:.60!a} for {where}.")
