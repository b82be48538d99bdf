"""`qflow describe` and `--json`: what the schemas say is what commands take and write."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from omegaconf import OmegaConf
from support.compose import BASE, compose
from support.installed_plugin import installed

from qflow.config.command_schema import SCHEMAS
from qflow.config.command_table import COMMANDS
from qflow.config.executor_schema import check_executor
from qflow.config.json_output import Problem, document
from qflow.config.json_schema import document_schema, part, settings
from qflow.config.key_limits import require_limits
from qflow.config.keys import keys
from qflow.config.settings import patience, plain
from qflow.core.errors import ConfigError
from qflow.core.qconfig import METHODS
from qflow.search.strategies import STRATEGIES
from qflow.study.checks import check_config
from qflow.study.fingerprint import FREE

CASES = (Path(__file__).parents[1] / "commands" / "bad_inputs.txt").read_text().splitlines()


@pytest.mark.parametrize("name", sorted({*SCHEMAS, *COMMANDS}))
def test_every_command_is_described_whole(name):
    """A new command needs an entry of its result; every key has its explanation, and every field of the document."""
    described = settings(name)
    Draft202012Validator.check_schema(described)
    for key in keys(name):
        found = part(described, key.path)
        assert found["description"], key.path
        assert "type" in found or "anyOf" in found or key.type == "Any", key.path
    written = document_schema(name)
    Draft202012Validator.check_schema(written)
    *forms, _text = written["then"]["properties"]["result"]["anyOf"]
    assert forms
    for schema in (written, *forms):
        assert all(field["description"] for field in schema["properties"].values())


def test_a_key_says_its_choices_and_whether_a_study_continues_with_another_value():
    described = settings("tune", FREE)
    assert part(described, "calibration.method")["enum"] == list(METHODS)
    assert part(described, "search.strategy")["enum"] == list(STRATEGIES)
    assert part(described, "task")["x-write"] == "task=<choice>" and "digits" in part(described, "task")["x-choices"]
    assert part(described, "experiment")["x-write"] == "+experiment=<choice>"
    changing = [part(described, key)["x-may-change"] for key in ("search.n_trials", "calibration.method")]
    assert changing == [True, False]
    assert part(settings("promote"), "dry_run")["x-switch"] == "--dry-run"


# ---- the limits that a schema states are those of the checks ---------------------------------------------------------

WITH = {
    "qconfig.float16_count": {"sensitivity.dtypes": ["qint8", "qint16", "float16"]},
    "qat.steps": {"qat.teacher.weight": 1.0},
    "qat.teacher.temperature": {"qat.teacher.weight": 1.0},
    "executor.workers": {"executor.kind": "process"},
    "executor.trial_timeout": {"executor.kind": "process"},
}
"""What else a value needs: limits hold for a key alone."""
TOGETHER = ("calibration.clip_min", "calibration.clip_max", "executor.gpus")
"""Keys that cannot have the ends of their limits: one lies below the other, and GPUs are reserved by Ray alone."""


def check_tune(config):
    check_config(config)
    patience(config)


def check_promote(config):
    from qflow.study.gate import Rules, check_goal

    check_goal(plain(config.objective))
    Rules(**plain(config.gate))
    patience(config)


CHECKS = {
    "tune": ([BASE, "task=digits"], check_tune),
    "promote": ([], check_promote),
    "train_float": (["+experiment=train_perception"], check_executor),
}


def limited(schema, path=()):
    """(path, schema) of every key with a limit; of lists and mappings the limit of what they hold."""
    for name, found in schema.get("properties", {}).items():
        yield from limited(found, (*path, name))
        inner = found.get("items") or found.get("additionalProperties") or found
        if isinstance(inner, dict) and {"enum", "minimum", "exclusiveMinimum", "maximum"} & set(inner):
            yield ".".join([*path, name]), found, inner


def values(limit):
    """Values at the ends of a limit, and values just beyond them."""
    if "enum" in limit:
        return [value for value in limit["enum"] if value is not None], ["no-such-value"]
    whole = "integer" in limit["type"]
    low, high = limit.get("minimum"), limit.get("maximum")
    inside, outside = [end for end in (low, high) if end is not None], []
    if "exclusiveMinimum" in limit:
        inside = [1e-9, *inside[1:]]
        outside.append(0.0)
    if low is not None:
        outside.append(low - (1 if whole else max(1e-9, abs(low) * 1e-9)))
    if high is not None:
        outside.append(high + (1 if whole else abs(high) * 1e-9))
    return inside, outside


def stored(config, key):
    """The value of a key, apart from the configuration."""
    value = OmegaConf.select(config, key)
    return plain(value) if OmegaConf.is_config(value) else value


def wrapped(found, value):
    """The value as what the key holds: alone, in a list, or in a mapping."""
    if found["type"] == "array":
        return [value]
    return {"accuracy/drop": value} if found["type"] == "object" else value


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_a_value_within_the_limits_is_taken_and_one_beyond_them_refused(name):
    with installed():  # engine=plugin needs one
        require_true_limits(name)


def require_true_limits(name):
    overrides, own = CHECKS[name]
    config = compose(*overrides, *(["root=here"] if name != "train_float" else ["training.output=here"]), name=name)

    def check(config):  # as a command does: at the composition, then by itself
        require_limits(config, SCHEMAS[name])
        own(config)

    check(config)
    seen = 0
    for key, found, limit in limited(settings(name)):
        if key in TOGETHER or (name == "train_float" and key.startswith("task.")):  # it reads none of them
            continue
        before = {k: stored(config, k) for k in (key, *WITH.get(key, {}))}
        for other, value in WITH.get(key, {}).items():
            OmegaConf.update(config, other, value, merge=False)
        inside, outside = values(limit)
        if find_spec("ray") is None:  # refused for that
            inside = [value for value in inside if not str(value).startswith("ray")]
        for value in [*inside, *([None] if "null" in found["type"] else [])]:
            OmegaConf.update(config, key, value if value is None else wrapped(found, value), merge=False)
            check(config)
        for value in outside:
            OmegaConf.update(config, key, wrapped(found, value), merge=False)
            with pytest.raises(ConfigError, match=key.rpartition(".")[2]):
                check(config)
        for other, value in before.items():
            OmegaConf.update(config, other, value, merge=False)
        seen += 1
    assert seen >= {"tune": 70, "promote": 10, "train_float": 8}[name]
    check(config)


# ---- the document ----------------------------------------------------------------------------------------------------


def test_the_parts_of_a_line_are_the_whole_line():
    lines = [line.removeprefix("qflow: ") for line in CASES[1::2]]
    whole = [Problem("ConfigError", line).fields() for line in lines]
    for line, found in zip(lines, whole, strict=True):
        if found["rule"] is not None:
            said = f"{found['rule']}, but got {found['got']}. {found['way_out'] or ''}".rstrip()
            assert said == line.replace("but got: ", "but got ") or said == f"{line}."
    assert sum(found["rule"] is not None for found in whole) >= 0.97 * len(lines)
    found = Problem("ConfigError", "A name has no dot, but got 'a. B'. Use 'a'.").fields()
    assert (found["got"], found["way_out"]) == ("'a. B'", "Use 'a'.")


def test_a_number_that_json_does_not_have_is_null_and_its_place_says_what_it_was():
    record = {"metrics": {"a/b~": math.inf, "c": 1.5}, "rows": [{"x": math.nan}, {"x": -math.inf}], "none": None}
    found = json.loads(document("cost", 0, "done", record, None))
    assert found["result"] == {"metrics": {"a/b~": None, "c": 1.5}, "rows": [{"x": None}, {"x": None}], "none": None}
    assert found["not_finite"] == {
        "/result/metrics/a~1b~0": "inf", "/result/rows/0/x": "nan", "/result/rows/1/x": "-inf",
    }  # fmt: skip
