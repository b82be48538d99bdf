"""The commands of the one command line: what each is for, how it is called, and what its exit codes mean.

A new command is one entry here, beside its file in qflow/commands/, its schema and its conf/<name>.yaml.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MISTAKE = "a mistake in the command line, the configuration or the data"
DEFECT, DEFECT_TEXT = 3, "an unforeseen error, with its traceback"
INTERRUPTED, INTERRUPTED_TEXT = 130, "interrupted; what is finished is kept"
CLOSED_PIPE = 141  # the shell's code for SIGPIPE; 1 would mean a missed goal


@dataclass(frozen=True)
class Command:
    """One command: `qflow <name>`, or `python -m qflow.<name>`."""

    summary: str
    """One line for `qflow --help`."""
    usage: tuple[str, ...]
    """What may follow the name, one line for each form."""
    done: str
    """Meaning of exit code 0."""
    not_done: str
    """Meaning of exit code 1."""
    words: str = ""
    """The key that words without `=` are the values of, such as runs, folders or files; empty if there is none."""
    also: tuple[str, ...] = ()
    """What may be written beside its keys: other names of them, and first words."""
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Key -> the values that it takes, alone or in a list."""

    def meaning(self, code: int) -> str:
        """Return what an exit code of the command says."""
        fixed = {2: MISTAKE, DEFECT: DEFECT_TEXT, INTERRUPTED: INTERRUPTED_TEXT}
        return fixed.get(code) or (self.not_done if code else self.done)


COMMANDS: dict[str, Command] = {
    "init": Command(
        "write a task of your own into this folder, which runs as it is",
        ("[classification|detection|module]",),
        "written",
        "not done",
        also=("classification", "detection", "module"),
        values={"kind": ("classification", "detection", "module")},
    ),
    "tune": Command(
        "run a study: baselines, sensitivities, search, and the best mix",
        ("+experiment=<name> [key=value ...]",),
        "the goal is met",
        "the goal is missed; the nearest miss is named with what to relax",
    ),
    "check": Command(
        "check a model under a qconfig for the device, before it is tuned",
        ("[+experiment=<name>] [key=value ...]",),
        "no finding is an error",
        "a finding is an error",
    ),
    "cost": Command(
        "predict time, traffic and memory of every operator under a qconfig",
        ("[+experiment=<name>] [qconfig.template=qint16] [fps=30]", "fit data=<file.csv> [out=<device.yaml>]"),
        "the prediction is within what was validated, or the fit is done",
        "outside what was validated",
        also=("fit",),
    ),
    "analyze": Command(
        "show where the accuracy is lost, and which settings mend it",
        ("[+experiment=<name>] [stages=[badcase,layers,sensitivity,advice]]", "qat_debug qat=<name>"),
        "done",
        "qat_debug: a stage is at fault",
        also=("qat_debug",),
        values={"stages": ("badcase", "layers", "sensitivity", "advice", "qat_debug")},
    ),
    "trial": Command(
        "run one trial by hand, tracked like the others; or one again",
        ("'qconfig.modules={<operator>: qint16}' [key=value ...]", "from_run=<run, alias or folder>"),
        "the mix meets the goal; from_run: all is as it was stored",
        "the mix misses the goal; from_run: something differs, and each difference is named",
    ),
    "compare": Command(
        "compare trials: metrics with their noise, cost, and operators",
        (
            "<run, alias, folder or file> <another> [<another> ...] [--check] [out=compare.html]",
            "--engine <run, alias or folder>",
        ),
        "compared; with --check: equal",
        "with --check: something differs",
        words="sources",
    ),
    "promote": Command(
        "rebuild the best trial, verify every number, and register it",
        ("[study=<name> | run=<run id>] [--dry-run] [key=value ...]", "rollback [study=<name>]"),
        "registered, or this run is the champion already",
        "refused, with every reason",
        also=("rollback",),
    ),
    "report": Command(
        "render the report of a study again, from its runs alone",
        ("[study=<name>] [tracking.uri=<uri>] [root=<folder>]",),
        "written",
        "not done",
    ),
    "doctor": Command(
        "examine studies, runs, leases, cache and registry; --fix mends",
        ("[--fix] [root=<folder>] [tracking.uri=<uri>] [search.storage=<url>]", "plugin"),
        "all is well",
        "something is wrong, and each thing is named",
        also=("plugin",),
    ),
    "export": Command(
        "write a trial to the files that a tool chain takes",
        (
            "[target=<name>,...] [from=<run|version|folder>] [out=<folder>]",
            "study=<name> bundle=<.zip> [search.storage=<url>]",
            "import=<.zip> [search.storage=<url>]",
        ),
        "written",
        "strict=true, and a target does not say all that was judged",
        also=("from=", "import="),
        values={"target": ("plugin", "plugin35", "hmct", "onnx", "torch", "qflow")},
    ),
    "describe": Command(
        "say as JSON what a command takes, and what it gives with --json",
        ("[<command> [<group or key>]] [--result]",),
        "printed",
        "not done",
        words="about",
    ),
}


def named(command: str) -> Command:
    """Return the entry of a command; one that is not a `qflow <command>` (train_float) gets the general meanings."""
    return COMMANDS.get(command) or Command("", ("+experiment=<name> [key=value ...]",), "done", "not done")
