"""The user's present mix (`search.start`) as a point of the study.

The point says with an assignment what an assignment can say, so that the search may go on from it, and names the other
operators (`qconfig.modules`). So the configuration of its trial holds the whole mix, and the files are not needed
again. Scales from the files are fixed in it, and belong to the float weights as they are: such a trial has no repair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qflow.config.settings import MODULES, current, owner
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.qconfig import OpQConfig, QConfig
from qflow.imports.read import read_mix_files
from qflow.imports.records import NOT_HAD, Imported, Unmatched
from qflow.search.strategies import ASSIGNMENT, ERROR_SHARE, FLOAT16, RATIO, SENSITIVE_TYPE
from qflow.study.session import Session
from qflow.study.start_files import StartMix, start_files


def open_start(session: Session) -> None:
    """Read `search.start`, and say once what of it did not match. Raises ConfigError for files that say nothing."""
    files = start_files(session.config)
    if not files:
        return
    evaluator = session.evaluator
    imported = read_mix_files(files, evaluator.prepared, evaluator.example)
    if not any("output" in op or "weight" in op for op in imported.modules.values()):
        raise ConfigError(
            f"search.start says dtypes, but got the {imported.kind} in {imported.source} alone. Give the file with the "
            "dtypes too: search.start=[qconfig_dtypes.pt,calibrated.pt]."
        )
    found = session.start = _mix(session, imported)
    scales = "they give no scales: qflow calibrates its own"
    if found.fixed:
        scales = f"{found.fixed} scales are kept, for the float weights as they are (no repair)"
    say, counted = session.console.say, sum("output" in op for op in imported.modules.values())
    kind, count = imported.kind, evaluator.graph.n_operators
    say(f"{'start':<12} {imported.source}, {kind}: {counted} of {count} operators; {scales}")
    for group, text in found.imported.lines():
        say(f"{'':<12} {group}: {text}")


def _mix(session: Session, imported: Imported) -> StartMix:
    """Return the values that give the mix, with what of it the device does not run among `unmatched`."""
    wanted = imported.modules
    values, lost = _assigned(session, wanted)
    requested = _resolved(session, values)[0]
    odd = {name: op for name, op in wanted.items() if "fixed_scale" in op or not _says(requested.ops[name], op)}
    kept, refused = _accepted(session, values, odd)
    fixed = sum("fixed_scale" in op for op in kept.values())
    values |= _named(session, kept)
    if fixed:
        values |= {f"repair.{step}": False for step in session.evaluator.default_repair.steps}
    requested, applied = _resolved(session, values)
    lowered = {name: _lowered(op, requested, applied, name) for name, op in wanted.items()}
    reasons = {**{name: text for name, text in lowered.items() if text}, **lost, **refused}
    unmatched = (*imported.unmatched, *(Unmatched(NOT_HAD, name, text) for name, text in reasons.items()))
    return StartMix(replace(imported, unmatched=unmatched), values, fixed)


def _resolved(session: Session, values: Mapping[str, Any]) -> tuple[QConfig, QConfig]:
    return session.evaluator.precisions.resolve(session.qconfig_at({**session.base(), **values}))


def _assigned(session: Session, wanted: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values that set int16 outputs and weights, and why the device refuses some of these weights."""
    precisions = session.evaluator.precisions
    outputs = [n for n in precisions.promotable if wanted.get(n, {}).get("output") == QDtype.qint16]
    weights = [n for n in precisions.weighted if wanted.get(n, {}).get("weight") == QDtype.qint16]
    plain_values = {ERROR_SHARE: None, FLOAT16: 0, "qconfig.counting": "operators", "qconfig.ranking": "score"}
    values: dict[str, Any] = {k: v for k, v in plain_values.items() if current(session.config, k) != v}
    values |= {RATIO: 0.0, **({SENSITIVE_TYPE: "both"} if weights else {})}
    for key in session.study.space:
        if owner(key) == MODULES:
            values[key] = _text(wanted.get(key.removeprefix(f"{MODULES}."), {"output": QDtype.qint8}))

    def at(chosen: list[str]) -> dict[str, Any]:
        settings = session.qconfig_at({**session.base(), **values})
        return {**values, ASSIGNMENT: precisions.mix(settings, outputs, chosen)}

    lost = _refusals(session, {name: at([name]) for name in weights}) if _refusal(session, at(weights)) else {}
    return at([name for name in weights if name not in lost]), lost


def _accepted(
    session: Session, values: Mapping[str, Any], odd: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
    """Return the operators to name that the device runs, and why it refuses the others.

    Raises ConfigError if it refuses them together, though not one by one.
    """
    lost = {}
    if odd and _refusal(session, {**values, **_named(session, odd)}):
        lost = _refusals(session, {name: {**values, **_named(session, {name: op})} for name, op in odd.items()})
    kept = {name: op for name, op in odd.items() if name not in lost}
    if reason := _refusal(session, {**values, **_named(session, kept)}):
        raise ConfigError(f"search.start is a mix that {session.config.device.march} runs, but got: {reason}")
    return kept, lost


def _refusals(session: Session, points: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {name: reason for name, point in points.items() if (reason := _refusal(session, point))}


def _refusal(session: Session, values: Mapping[str, Any]) -> str:
    try:
        _resolved(session, values)
    except ConfigError as error:
        return str(error)
    return ""


def _named(session: Session, ops: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    searched = {key.removeprefix(f"{MODULES}."): key for key in session.study.space if owner(key) == MODULES}
    own = {searched[name]: _text(op) for name, op in ops.items() if name in searched}
    rest = {name: _text(op) for name, op in ops.items() if name not in searched}
    return {**own, **({MODULES: rest} if rest else {})}


def _text(op: Mapping[str, Any]) -> Any:
    """Return a precision as `qconfig.modules` takes it: a text, or a mapping where a text cannot say it."""
    if op.get("output") is None or "input" in op:
        return {key: _plain(value) for key, value in op.items()}
    scale = f"@{op['fixed_scale']!r}" if "fixed_scale" in op else ""
    weight = f"/{op['weight']}" if op.get("weight") not in (None, QDtype.qint8) else ""
    return f"{op['output']}{scale}{weight}"


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, QDtype) else value


def _says(op: OpQConfig, wanted: Mapping[str, Any]) -> bool:
    """Return whether a qconfig has the dtypes that are wanted."""
    same = all(getattr(op, key) == wanted[key] for key in ("output", "weight") if key in wanted)
    inputs = {i: dtype for i, dtype in enumerate(wanted.get("input", ())) if dtype is not None}
    return same and inputs == {i: dtype for i, dtype in enumerate(op.input or ()) if dtype is not None}


def _lowered(wanted: Mapping[str, Any], requested: QConfig, applied: QConfig, name: str) -> str:
    """Return what the device makes of the dtype of an output, and why; empty if it is the one that is wanted."""
    got = applied.ops[name]
    if "output" not in wanted or got.output == wanted["output"]:
        return ""
    reason = got.fallback or requested.ops[name].rule
    return f"{wanted['output'] or 'int32'} -> {got.output or 'int32'}, {reason}"
