"""What the runs of an archive must be before a store is opened: every key, type, range and text that a store takes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qflow.core.names import CONTROL
from qflow.core.stored_text import stored_text
from qflow.tracking.limits import KEY, PARAM, TAG, joined

ENDED = ("FINISHED", "FAILED", "KILLED")
LATEST = 10**14
"""Milliseconds since 1970, in the year 5138."""
NOT_FINITE = ("nan", "inf", "-inf")
"""Metrics that JSON has no number for."""
INPUT = {"name": 500, "digest": 36, "source_type": 36, "source": 65535, "profile": 1 << 24}
"""Most characters that MLflow takes for each field of a data set; those of a tag are 255 and 500."""


def check_runs(records: Sequence[Mapping[str, Any]], study: str) -> None:
    """Raise LookupError, TypeError or ValueError for runs that are not a study and its trials, as they are exported."""
    ids = [str(record["id"]) for record in records]
    if not ids:
        raise ValueError("no runs")
    if len(set(ids)) < len(ids) or not all(re.fullmatch("[0-9a-f]{32}", text) for text in ids):
        raise ValueError("ids of runs that are not 32 hexadecimal digits each")
    for number, record in enumerate(records):
        _check_values(record)
        tags = joined(record["tags"])
        if (tags["qflow.kind"], tags["qflow.study"]) != ("trial" if number else "study", study):
            raise ValueError("runs of another study")
        if number and tags["mlflow.parentRunId"] != ids[0]:
            raise ValueError("a trial of another study's run")
        if number:
            trial_number(record)
        elif tags.get("qflow.best") and tags["qflow.best"] not in ids[1:]:
            raise ValueError("a best trial that is none of the study's")
        if record["status"] not in ENDED:
            raise ValueError(f"the status {record['status']!s:.20}")


def trial_number(record: Mapping[str, Any]) -> int:
    """Return the number of a trial's run; those by hand are below 0. Raises ValueError for another text."""
    number = int(text := record["tags"]["qflow.trial"])
    if not re.fullmatch(r"0|-?[1-9]\d{0,8}", text):
        raise ValueError(f"a trial with the number {text!a:.20}")
    return number


def check_text(text: Any, most: int, name: bool = False) -> None:
    """Raise ValueError unless `text` is one that every store takes: UTF-8 without NUL, of at most `most` characters.

    A `name` has no line breaks and other control characters.
    """
    if not isinstance(text, str) or len(text) > most or stored_text(text) != text or (name and CONTROL.search(text)):
        raise ValueError(f"the text {text!a:.40} where a store takes another")


def _check_values(record: Mapping[str, Any]) -> None:
    if not isinstance(record["name"], str) or not all(type(record[at]) is int for at in ("start", "end")):
        raise ValueError("a run without name, start or end")
    check_text(record["name"], KEY, name=True)
    for time in (record["start"], record["end"]):
        _check_integer(time, 0, LATEST)
    for values, most in ((record["params"], PARAM), (record["tags"], TAG)):
        for key, text in values.items():
            check_text(key, KEY, name=True)
            check_text(text, most)
    for key, rows in record["metrics"].items():
        check_text(key, KEY, name=True)
        for value, time, step in rows:
            _check_integer(time, 0, LATEST)
            _check_integer(step, -(2**63), 2**63 - 1)
            if (not math.isfinite(float(value)) and value not in NOT_FINITE) or isinstance(value, bool):
                raise ValueError(f"the metric {value!a:.20}")
    for data in record["inputs"]:
        if set(data) != {*INPUT, "tags"}:
            raise ValueError("a data set with other fields")
        for key, most in INPUT.items():
            check_text(data[key] or "", most)
        for key, text in data["tags"].items():
            check_text(key, 255, name=True)
            check_text(text, 500)


def _check_integer(value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!a:.20} for a time or step")
