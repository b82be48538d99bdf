"""What is read: the content of a file under its own names, and the same under the operators of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qflow.analysis.measures.tables import Finding
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.op_spec import parse_op
from qflow.core.shown import Shown, View

LISTED = 6  # names that a line of `lines` lists
SHOWN = 300  # characters of a name or reason that it shows
MOST_NAMES = 200_000
"""Names in a file, far more than a model has operators."""


class ImportFileError(ConfigError):
    """A file is none that can be imported."""


@dataclass(frozen=True)
class Entry:
    """What a file says of one name. None and empty: it says nothing of that."""

    output: QDtype | None = None
    high_precision: bool = False
    """The output has no quantizer: float32 (physically int32) leaves the operator."""
    weight: QDtype | None = None
    inputs: tuple[QDtype | None, ...] = ()
    """Dtypes that the file gives by input position; None where it gives none."""
    scale: float | None = None
    """Scale of the output."""

    def with_more(self, other: Entry) -> Entry:
        """Return this entry with what only `other` says of the same name."""
        return Entry(
            self.output or other.output,
            self.high_precision or (self.output is None and other.high_precision),
            self.weight or other.weight,
            self.inputs or other.inputs,
            self.scale if self.scale is not None else other.scale,
        )

    @property
    def says(self) -> bool:
        """Whether the file says anything of this name."""
        return self != Entry()


@dataclass(frozen=True)
class Unmatched:
    """Something of a file or of the model that has no counterpart, or that cannot be had."""

    group: str
    """One of `GROUPS`."""
    name: str
    reason: str = ""


IN_FILE, IN_MODEL, NOT_SURE, NOT_HAD, NOT_READ = (
    "not in the model",
    "not in the file",
    "not sure",
    "cannot be had",
    "not taken over",
)
GROUPS = (NOT_SURE, NOT_HAD, IN_FILE, NOT_READ, IN_MODEL)
"""In the order in which they are printed: what may be wrong first."""


@dataclass(frozen=True)
class Content:
    """What one file says, under its own names."""

    kind: str
    """The format in words: `dtypes of the plugin`."""
    entries: Mapping[str, Entry] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    """Remarks that the file makes on names."""
    refused: tuple[Unmatched, ...] = ()
    """What the file gives its names that qflow does not have (`qint4`)."""
    own_names: bool = False
    """The names are qflow's own."""
    nodes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Operator -> nodes of the ONNX graph, from nodes.csv."""
    names: Mapping[str, tuple[str, bool]] = field(default_factory=dict)
    """Operator -> the plugin's name and whether it is sure, from names.csv."""
    node_config: Mapping[str, Mapping[str, QDtype]] = field(default_factory=dict)
    """HMCT: node -> input0, input1, qtype, OutputType -> dtype."""
    node_default: QDtype = QDtype.qint8
    """HMCT: dtype of the nodes that it does not name."""
    op_config: Mapping[str, Mapping[str, QDtype]] = field(default_factory=dict)
    """HMCT: type of a node -> the same keys."""


@dataclass(frozen=True, repr=False)
class Imported(Shown):
    """What files say of a model, under the operators of its qconfig."""

    source: str
    """The names of the files."""
    kind: str
    modules: Mapping[str, Mapping[str, Any]]
    """Operator -> its precision in the form of `qconfig.modules`: output, weight, input, fixed_scale. An output of None
    is a high-precision output; what is absent is left open."""
    findings: tuple[Finding, ...] = ()
    unmatched: tuple[Unmatched, ...] = ()
    digest: str = ""
    """Digest over the contents of the files."""

    @property
    def scales(self) -> dict[str, float]:
        """Operator -> scale of its output, where the files give one."""
        return {name: op["fixed_scale"] for name, op in self.modules.items() if "fixed_scale" in op}

    def lines(self) -> list[tuple[str, str]]:
        """Return (group, text) of what did not match, each reason once with the names that it holds for."""
        return grouped(self.unmatched)

    def view(self) -> View:
        """Return the precision of each operator; the title counts what did not match."""
        counts = [(group, sum(u.group == group for u in self.unmatched)) for group in GROUPS]
        missed = ", ".join(f"{n} {group}" for group, n in counts if n)
        title = f"{self.kind} of {self.source}: {len(self.modules)} operators" + (f", {missed}" if missed else "")
        rows = [
            (name, "int32" if "output" in op and op["output"] is None else op.get("output"), op.get("weight"),
             ", ".join(str(d or "as given") for d in op.get("input", ())), op.get("fixed_scale"))
            for name, op in self.modules.items()
        ]  # fmt: skip
        return View(title, ("operator", "output", "weight", "inputs", "scale"), rows)


def grouped(unmatched: tuple[Unmatched, ...]) -> list[tuple[str, str]]:
    """Return (group, text) in the order of `GROUPS`, each reason once with the first names that it holds for."""
    same: dict[tuple[str, str], list[str]] = {}
    for found in unmatched:
        same.setdefault((found.group, _printable(found.reason)), []).append(_printable(found.name))
    lines = []
    for (group, reason), names in sorted(same.items(), key=lambda item: GROUPS.index(item[0][0])):
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        lines.append((group, f"{', '.join(names[:LISTED])}{more}" + (f": {reason}" if reason else "")))
    return lines


def _printable(text: str) -> str:
    """Return a text of a file as it may be printed: in one line, not too long, and without control characters."""
    shown = "".join(c if c.isprintable() else "?" for c in text[: SHOWN + 1])
    return shown if len(text) <= SHOWN else f"{shown[:SHOWN]}..."


def op_fields(entry: Entry) -> dict[str, Any]:
    """Return an entry in the form of `qconfig.modules`. Raises ConfigError for values that contradict each other."""
    found: dict[str, Any] = {}
    if entry.high_precision:
        found["output"] = None
    elif entry.output is not None:
        found["output"] = entry.output
    if entry.weight is not None:
        found["weight"] = entry.weight
    if any(entry.inputs):
        found["input"] = entry.inputs
    if entry.scale is not None and not entry.high_precision and entry.output != QDtype.float16:
        found["fixed_scale"] = entry.scale
    parse_op(found, "an imported operator")
    return found
