"""What of a mix an assignment says, what names say, and what the device does not run."""

import time

import pytest
from support.compose import BASE, compose

from qflow.core.errors import ConfigError
from qflow.study.start import open_session
from qflow.study.start_mix import open_start

DIGITS = ["task=digits", "calibration.batch_size=8", "calibration.steps=2", "repair=basic"]


@pytest.fixture
def opened(tmp_path):
    """Open `search.start` in a session of the digits; return its mix, and the qconfig of its trial."""

    def act(name, text, *more):
        (tmp_path / name).write_text(text)
        config = compose(BASE, f"root={tmp_path}", f"search.start={tmp_path / name}", *DIGITS, *more)
        with open_session(config, time.perf_counter()) as session:
            session.evaluator.measure_float()
            open_start(session)
            point = {**session.base(), **session.start.values}
            return session.start, session.evaluator.precisions.resolve(session.qconfig_at(point))[1]

    return act


def module(**operators):
    return f"OPERATORS = {{{', '.join(f'{name!r}: dict({text})' for name, text in operators.items())}}}"


def test_int16_outputs_and_weights_are_an_assignment_from_which_the_search_goes_on(opened):
    mix, applied = opened("mix.py", module(conv1="output=qint16", conv3="output=qint8, weight=qint16"))
    assert set(mix.values) == {"qconfig.int16_ratio", "qconfig.assignment", "qconfig.sensitive_type"}
    assert (applied.ops["conv1"].output, applied.ops["conv3"].weight) == ("qint16", "qint16")
    assert applied.names("qint16") == ("conv1",) and applied.weights("qint16") == ("conv3",)
    assert not [u for u in mix.imported.unmatched if u.group == "cannot be had"]


def test_scales_are_fixed_in_names_for_the_float_weights_as_they_are(opened):
    mix, applied = opened("mix.py", module(conv1="output=qint16, scale=0.001", dense="output=qint8, scale=0.25"))
    assert mix.fixed == 2 and mix.values["qconfig.modules"] == {"conv1": "qint16@0.001", "dense": "qint8@0.25"}
    assert {key for key in mix.values if key.startswith("repair.") and mix.values[key] is False}
    assert (applied.ops["conv1"].output, applied.ops["conv1"].fixed_scale) == ("qint16", 0.001)


def test_what_the_device_refuses_or_lowers_is_said_with_the_reason_and_the_rest_is_kept(opened):
    mix, applied = opened("mix.py", module(conv1="output=float16", conv2="output=qint16", conv3="output=qint16"))
    lost = {u.name: u.reason for u in mix.imported.unmatched if u.group == "cannot be had"}
    assert "fp16 on nash-m is for" in lost["conv1"] and applied.ops["conv1"].output == "qint8"
    assert set(lost) == {"conv1"} | {n for n in ("conv2", "conv3") if applied.ops[n].output != "qint16"}


def test_files_that_say_no_dtypes_of_the_model_are_refused(opened):
    with pytest.raises(ConfigError, match="A mix names operators of the model, but got 'other' and no other in mix.py"):
        opened("mix.py", module(other="output=qint8"))
