"""Lines that qflow prints reach Hydra as they were meant, through the shell and through Hydra's grammar."""

import subprocess

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from support.compose import BASE, compose, run

from qflow.config.quoting import assignment, mended

TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
ODD = TEXTS | st.text(alphabet="ab\\\"'${}[](),:=~ #&1.", max_size=14)


def in_bash(words):
    """The words as bash splits them."""
    printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {' '.join(words)}"], capture_output=True, check=True)
    return printed.stdout.decode().split("\0")[:-1]


def in_hydra(argument):
    """The text of an override after Hydra and OmegaConf."""
    override = OverridesParser.create().parse_override(argument)
    return OmegaConf.create({"k": override.value()}).k


@settings(deadline=None)  # starts a shell
@given(st.lists(ODD, min_size=1, max_size=20))
def test_a_printed_assignment_gives_its_text_through_bash_and_hydra(texts):
    words = [assignment("k", text) for text in texts]
    assert all(word.isprintable() for word in words)
    assert [in_hydra(word) for word in in_bash(words)] == texts


MENDED = {
    "+task.model.path=ckpt/epoch=9.ckpt": "ckpt/epoch=9.ckpt",
    "+task.model.path=数据/模型.pth": "数据/模型.pth",
    "+task.model.path=a#b": "a#b",
    "+task.model.path=a&b;c": "a&b;c",
    "+task.model.path=it's": "it's",
    r"+task.model.path=C:\new dir\é": r"C:\new dir\é",
    "+task.model.path=[a b, c=d, 'x,y', [é, 1]]": ["a b", "c=d", "x,y", ["é", 1]],
    "+task.model.path={a: b=c, d: 1}": {"a": "b=c", "d": 1},
    "+task.model.path=f(x=1)": "f(x=1)",
    "+task.model.path=a\nb": "a\nb",
}


@pytest.mark.parametrize("argument", MENDED)
def test_a_value_that_hydra_refuses_comes_back_as_a_line_to_paste(argument, capsys):
    code, error = run(capsys, BASE, "task=custom", argument)
    assert (code, error.count("\n")) == (2, 1)
    assert "is in quotes" in error
    (pasted,) = in_bash([error.rstrip("\n").rpartition("Paste: ")[2]])
    assert compose(BASE, "task=custom", pasted).task.model.path == MENDED[argument]


def test_a_home_folder_is_written_out_because_quotes_keep_the_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert mended("+task.model.path=~/x.pth") == "'+task.model.path=\"/home/me/x.pth\"'"


@pytest.mark.parametrize("value", ["[1,2", '"abc', "{a: [1}", "(", "]["])
def test_open_brackets_are_no_text(value, capsys):
    assert mended(f"+task.model.path={value}") is None
    code, error = run(capsys, BASE, f"+task.model.path={value}")
    assert (code, error.count("\n")) == (2, 1)
    assert "closed brackets and quotes" in error


ONE = {
    "qconfig.template=qint8,qint16": "Write qconfig.template=qint8, or 'qconfig.template=\"qint8,qint16\"' for a text",
    "calibration.method=choice(mse,kl)": "Write calibration.method=mse; qflow.tune searches several.",
    "calibration.percentile=interval(99,100)": "Write calibration.percentile=99.0; ",
    "calibration.steps=range(4,20,4)": "Write calibration.steps=4; ",
    "+qconfig.modules.head=qint8,qint16": "Write +qconfig.modules.head=qint8, or ",
    "device=nash-e,nash-m": "Write device=nash-e, or ",
    "calibration=glob(*)": "Write calibration=<value>; ",
    "-m": "runs one configuration, but got -m. Leave it out.",
    "--multirun": "but got --multirun",
}


@pytest.mark.parametrize("argument", ONE)
@pytest.mark.parametrize("command", ["check", "cost", "analyze", "promote", "train_float"])
def test_a_command_that_searches_nothing_takes_one_value(command, argument, capsys):
    code, error = run(capsys, argument, command=command)
    assert (code, error.count("\n")) == (2, 1)
    assert ONE[argument] in error
    assert ("workflows.train_float" if command == "train_float" else f"qflow.{command}") in error


def test_the_space_of_a_study_does_not_disturb_other_commands():
    assert compose(BASE, "search.space.calibration.method=choice(mse,kl)", name="check").task.name == "perception"
