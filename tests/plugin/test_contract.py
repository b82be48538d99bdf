"""`qflow doctor plugin`: what an installed plugin is checked for, and what is said where it differs."""

import pytest
import torch
from support.compose import compose
from support.documents import fits
from support.installed_plugin import installed

from qflow.commands.doctor import doctor
from qflow.plugin.contract import check_contract
from qflow.plugin.public import Public


@pytest.fixture
def plugin():
    with installed():
        import horizon_plugin_pytorch.quantization as quantization

        yield quantization


def differing():
    return {one.what: one.got for one in check_contract(Public()) if not one.ok}


def test_a_plugin_that_keeps_the_contract_gets_code_0(plugin, capsys):
    code, record = fits("doctor", doctor(compose("plugin=true", name="doctor")))
    assert code == 0 and len(record["checks"]) > 50
    assert capsys.readouterr().out.splitlines()[0] == "plugin      horizon_plugin_pytorch 3.0.17"
    assert "weight scales" in {one["what"] for one in record["checks"]}


def test_another_divisor_shows_in_every_scale(plugin, monkeypatch, capsys):
    from horizon_plugin_pytorch.quantization import observer_v2

    monkeypatch.setattr(observer_v2, "scale_of", lambda low, high, dtype: torch.maximum(-low, high) / -dtype.min)
    assert set(differing()) == {
        "scale of an int8 input", "scale of an int16 input", "weight scale of the batch norm folded in",
    }  # fmt: skip
    assert doctor(compose("plugin=true", name="doctor"))[0] == 1
    assert "scale of an int8 input: the contract has 0.0158431, the plugin 0.0157812" in capsys.readouterr().out


def test_a_missing_fallback_another_name_and_another_rounding_are_named(plugin, monkeypatch):
    from horizon_plugin_pytorch.quantization import canonicalize, fake_quantize

    monkeypatch.setattr(canonicalize, "INPUT_INT8", ())
    monkeypatch.setattr(canonicalize, "OUTPUT_INT8", ())
    monkeypatch.setattr(canonicalize, "_lower", lambda node: None)
    assert differing() == {"dtype of conv1": "qint16"}
    monkeypatch.undo()
    monkeypatch.setattr(
        fake_quantize, "rounded", lambda x, s, dtype: torch.clamp(torch.floor(x / s + 0.5), dtype.min, dtype.max) * s
    )
    assert differing() == {"rounding of 0.5, 1.5, 2.5, ... steps": "[1, 2, 3, 0, -1, 127, -128, 3]"}
    monkeypatch.undo()
    monkeypatch.delattr(plugin, "PrepareMethod")
    assert differing() == {"PrepareMethod": "none"}


def test_what_the_plugin_raises_is_a_difference(plugin, monkeypatch):

    def broken(*args, **kwargs):
        raise RuntimeError("no such march")

    monkeypatch.setattr(plugin, "set_march", broken, raising=False)
    found = differing()
    assert found["a tiny model"].startswith("The plugin's set_march takes what its contract says, but got RuntimeError")
