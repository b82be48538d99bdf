"""What a target of the export is: one module of this package with one function.

    def export(subject: Subject, folder: Path) -> Exported: ...

The function reads `subject` and changes nothing in it, writes its files into `folder` (which exists and is empty), and
returns what it wrote and what the files do not say. targets.py lists them, and tests/export/test_contract.py holds each
to these rules:

    files        `Exported.files` names all files in the folder and no others, relative to it, with `/`
    equal bytes  two exports of one subject are equal byte for byte: no time, no random name, no order of a set
    no paths     no file holds the path of a folder of the machine that wrote it
    names        operators are called as in the qconfig; another tool's names stand beside them, never instead
    not silent   a part of the qconfig that the files cannot hold is in `unexpressed`, and a change that the tool chain
                 will make is in `fallbacks`; an operator is not left out of both

A target imports what it needs of an extra inside its function, and turns a missing package into the one line of
`missing_extra`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qflow.analysis.measures.tables import SensitivityTable
from qflow.api.prepared import Prepared
from qflow.core.errors import QflowError


class ExportError(QflowError):
    """A model cannot be exported to a target."""


@dataclass(frozen=True)
class Subject:
    """What is exported: a calibrated model and what is known about it."""

    prepared: Prepared
    """Calibrated. `applied` is the qconfig of its figures, `float_state_dict()` holds the weights, trained ones
    included, and `sample` is one example input."""
    sensitivity: SensitivityTable | None = None
    origin: Mapping[str, str] = field(default_factory=dict)
    """Where the model comes from, for the README: study, run, version of a registered model. Same export, same text."""

    @property
    def sample(self) -> Any:
        """One example input in the form of the example inputs: a tensor, a tuple to splat or a dict of keywords."""
        return self.prepared.sample


@dataclass(frozen=True)
class Fallback:
    """A change that the tool chain makes to the requested precision of an operator."""

    op: str
    change: str
    """What becomes of it: `qint16 -> qint8`."""
    reason: str
    judged: bool = True
    """True if the model computes with this change too, so that its figures hold; False if they do not know it."""


@dataclass(frozen=True)
class Unexpressed:
    """A part of the qconfig that the target's files cannot hold."""

    op: str
    what: str
    """The part, with its value: `input 1 qint8`, `fixed scale 0.05`, `output float16`."""
    reason: str
    way_out: str
    """What the user can do about it."""


@dataclass(frozen=True)
class Exported:
    """The files of one target, and what they do not say."""

    target: str
    files: tuple[str, ...]
    """Paths relative to the folder, with `/`, sorted."""
    fallbacks: tuple[Fallback, ...] = ()
    unexpressed: tuple[Unexpressed, ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences for the user: what is not known about the tool chain, what to do next."""

    @property
    def faithful(self) -> bool:
        """True if the tool chain computes what was judged: all is expressed, and every fallback was judged."""
        return not self.unexpressed and all(fallback.judged for fallback in self.fallbacks)


def applied_fallbacks(prepared: Prepared) -> tuple[Fallback, ...]:
    """Return the fallbacks that the device rules predicted; the figures of the model include them."""
    found = []
    for name, op in prepared.applied.ops.items():
        if op.fallback:
            asked = prepared.requested.ops[name]
            same = (asked.output, asked.input) == (op.output, op.input)
            change = "kept" if same else f"{_precision(asked)} -> {_precision(op)}"
            found.append(Fallback(name, change, op.fallback))
    return tuple(found)


def _precision(op: Any) -> str:
    inputs = "" if not op.input else f" with inputs {', '.join(str(d or 'as given') for d in op.input)}"
    return f"{op.output or 'high precision'}{inputs}"


def origin_text(subject: Subject) -> str:
    """Return where the model comes from as lines of a list for a README."""
    return "".join(f"- {key}: {value}\n" for key, value in subject.origin.items())


def written(folder: Path) -> tuple[str, ...]:
    """Return all files below `folder` in the form of `Exported.files`."""
    return tuple(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))


def missing_extra(target: str, error: ImportError) -> ExportError:
    """Return the error for a package of the extra `export` that is not installed."""
    return ExportError(
        f"The target {target} needs the extra export, but got no module {error.name}. Install it: "
        "pip install 'qflow[export]'."
    )
