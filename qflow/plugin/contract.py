"""What the engine relies on of an installed plugin, checked: names, signatures, defaults, behaviour on a tiny model.

The contract was written from published facts about OpenExplorer 3.0.x and some later releases (docs/plugin-engine.md).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from qflow.core.errors import QflowError
from qflow.plugin.behaviour import behaviour
from qflow.plugin.checked import Checked
from qflow.plugin.public import NAMES, Public

SIGNATURES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "prepare": {
        "model": (),
        "example_inputs": ("None",),
        "qconfig_setter": ("None",),
        "method": ("JIT_STRIP",),
        "example_kw_inputs": ("None",),
    },
    "check_qat_model": {
        "model": (),
        "example_inputs": ("None",),
        "example_kw_inputs": ("None",),
        "save_results": ("False",),
        "out_dir": ("None",),
    },
    "get_qconfig": {
        "observer": ("MinMaxObserver", "HistogramObserver"),  # HistogramObserver and in_dtype=qint8: from 3.3 on
        "in_dtype": ("None", "qint8"),
        "weight_dtype": ("qint8",),
        "out_dtype": ("qint8",),
        "fix_scale": ("False",),
    },
    "set_fake_quantize": {"model": (), "fake_quant_state": (), "state": ()},
    "ModuleNameQconfigSetter": {"module_name_to_qconfig": ()},
}
"""Name -> parameter -> the defaults that are known, as text; no default is checked where there is none."""
BY_POSITION = frozenset({"set_fake_quantize", "ModuleNameQconfigSetter"})
"""These are called by position, so that the names of their parameters do not matter."""
MEMBERS = {
    "PrepareMethod": ("EAGER", "SYMBOLIC", "JIT", "JIT_STRIP"),
    "FakeQuantState": ("QAT", "CALIBRATION", "VALIDATION", "_FLOAT"),
}
NOT_RUN = ("MSEObserver", "PercentileObserver", "KLObserver", "MixObserver", "ClipObserver", "ClipStdObserver")
"""The tiny model does without these."""
RANGES = {"qint8": (-128, 127), "qint16": (-32768, 32767)}


def check_contract(public: Public) -> list[Checked]:
    """Return every check of the installed plugin, in order; behaviour is left out where names are missing."""
    found = [*_names(public), *_signatures(public), *_members(public)]
    if all(public.find(name) is not None for name in NAMES if name not in NOT_RUN):
        try:
            found += behaviour(public)
        except QflowError as error:
            found.append(Checked("a tiny model", "is prepared, calibrated and run", str(error), False))
    return found


def _names(public: Public) -> Iterator[Checked]:
    for name in NAMES:
        there = public.find(name) is not None
        yield Checked(name, "a public name", "found" if there else "none", there)


def _signatures(public: Public) -> Iterator[Checked]:
    for name, parameters in SIGNATURES.items():
        if (function := public.find(name)) is None:
            continue
        try:
            own = inspect.signature(function).parameters
        except (TypeError, ValueError) as error:
            yield Checked(f"{name}(...)", "has a signature", str(error), False)
            continue
        if name in BY_POSITION:
            count = len([p for p in own.values() if p.default is p.empty and p.kind != p.VAR_KEYWORD])
            wanted = 2 if name == "set_fake_quantize" else 1
            yield Checked(f"{name}(...)", f"{wanted} arguments", f"{count}", count == wanted)
            continue
        for parameter, defaults in parameters.items():
            there = parameter in own
            got = _text(own[parameter].default) if there else "no such parameter"
            expected = f"default {' or '.join(defaults)}" if defaults else "there"
            yield Checked(f"{name}({parameter})", expected, got, there and (not defaults or got in defaults))


def _members(public: Public) -> Iterator[Checked]:
    for name, members in MEMBERS.items():
        kind = public.find(name)
        missing = [member for member in members if kind is not None and not hasattr(kind, member)]
        if kind is not None:
            yield Checked(name, f"has {', '.join(members)}", f"lacks {missing}" if missing else "all", not missing)
    for name, (low, high) in RANGES.items():
        dtype = public.find(name)
        got = (getattr(dtype, "min", None), getattr(dtype, "max", None))
        if dtype is not None:
            yield Checked(name, f"{low}..{high}", f"{got[0]}..{got[1]}", got == (low, high) and dtype == name)


def _text(value: Any) -> str:
    """Return a default as text: the name of a class or of an enum's member, else the value."""
    return str(getattr(value, "name", None) or getattr(value, "__name__", None) or value)
