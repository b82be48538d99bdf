"""Every number that a command takes has limits in its type, and a value beyond them is refused by its own key."""

import math
from dataclasses import fields

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from support.compose import BASE, compose, ended

from qflow.config.command_schema import SCHEMAS, TuneSchema
from qflow.config.device_file import cost_of
from qflow.config.explain import explain
from qflow.config.json_schema import settings
from qflow.config.key_limits import limits_of
from qflow.core.errors import ConfigError
from qflow.core.limits import LARGEST, check_value
from qflow.cost_model.model import CostModel

VALUES = ("nan", "1e400", "-1", "1" + 30 * "0", "abc", "[1]")
FORMS = [f"device.cost.{f.name}" for f in fields(CostModel) if "Sequence" in str(f.type)]
"""Ranges, which are [lowest, likely, highest], or one number for all three, and intervals around 1."""


def numbers(schema, path=""):
    """(key, schema of its number) of every key that holds a number, a list or a mapping of them, as described."""
    for name, found in schema.get("properties", {}).items():
        yield from numbers(found, f"{path}{name}.")
        inner = found
        while isinstance(inner.get("items") or inner.get("additionalProperties"), dict):
            inner = inner.get("items") or inner.get("additionalProperties")
        types = inner.get("type", [])
        if {"integer", "number"} & set([types] if isinstance(types, str) else types):
            yield f"{path}{name}", inner


def plain_value(config, key):
    found = OmegaConf.select(config, key)
    return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found


def refusal(config, key, value, hint, command):
    """The line that refuses a value of a key as the composition and the checks do; "" if it is taken."""
    before = plain_value(config, key)
    try:
        OmegaConf.update(config, key, value, merge=False)
        if hint is None:
            return cost_refusal(config)
        check_value(key, plain_value(config, key), hint)
    except OmegaConfBaseException as error:
        return explain(error, command)
    except ConfigError as error:
        return str(error)
    finally:
        if command == "tune":  # a whole configuration, whose cost model is judged as one
            OmegaConf.update(config, key, before, merge=False)
    return ""


def cost_refusal(config):
    """The line of the cost model, whose factors and intervals have a form of their own."""
    try:
        cost_of(config.device)
    except ConfigError as error:
        return f"device.{error}"
    return ""


@pytest.mark.parametrize("command", sorted(SCHEMAS))
def test_every_number_has_limits_and_what_is_beyond_them_is_refused_by_its_key(command):
    schema, parser = SCHEMAS[command], OverridesParser.create()
    inherited = limits_of(TuneSchema) if schema is not TuneSchema and issubclass(schema, TuneSchema) else {}
    config = compose(BASE, "task=digits", "root=here") if command == "tune" else OmegaConf.structured(schema)
    for key, limit in numbers(settings(command)):
        hint = limits_of(schema).get(key)  # a number without a limit in its type has no entry
        if hint is None:
            assert key in FORMS
            low, high = 0, LARGEST
        else:
            low, high = limit.get("minimum", limit.get("exclusiveMinimum")), limit["maximum"]
        assert -math.inf < low < high < math.inf, key
        if key in inherited or (key in FORMS and command != "tune"):  # tested with tune
            continue
        for text in VALUES:
            value = parser.parse_override(f"{key}={text}").value()
            if line := refusal(config, key, value, hint, command):
                assert key in line and "\n" not in line and line.isprintable(), line
            else:
                held = value if isinstance(value, list) else [value]
                assert all(low <= number <= high for number in map(float, held)), (key, text)


def test_a_composition_is_held_to_the_limits_whatever_the_command(capsys):
    asked = {"report": "tracking.patience=nan", "tune": "repair.batch_size=1" + 30 * "0"}
    for command, text in asked.items():
        more = ["+experiment=int8", "task=digits"] if command == "tune" else []
        code, error = ended(capsys, command, lambda config: 0, *more, text)
        assert (code, error.count("\n")) == (2, 1)
        assert error.startswith(f"qflow: {text.partition('=')[0]} "), error
