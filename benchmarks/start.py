"""Measures what users wait for before any work is done: `python -m benchmarks.start [row ...] [--against CHECKOUT]`.

start     `import qflow`, a first use of the library, and `--help` of every command
commands  the short commands on the built-in task, and on a finished study of it
restart   `tune` on a finished study: everything is read
advice    advice for real networks with random weights, the analysis before it not counted (needs timm and torchvision)

A command runs on a terminal of its own. `first line` is when it shows something, `whole` when it ends, both in seconds;
the ratios are to `import torch` in the same rounds, in wall time and in processor time, which other programs disturb
less. Medians over the rounds. With `--against` both checkouts take turns, each with a study of its own, and the columns
are those of the other checkout first.
"""

from __future__ import annotations

import argparse
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parents[1]
UNIT = ["-c", "import torch"]
COMMANDS = ("tune", "check", "cost", "analyze", "trial", "compare", "promote", "report", "export")
STUDY = ["+experiment=int8_int16"]
NETWORKS = {"resnet50": 64, "vit_tiny_patch16_224": 224}  # timm's name -> side of the images


@dataclass(frozen=True)
class Taken:
    """Seconds of one process: until its first output, until its end, and of processor time."""

    first: float
    whole: float
    cpu: float


def run(arguments: Sequence[str], checkout: Path, folder: Path) -> Taken:
    """Run Python with `arguments` on a terminal, with the qflow of `checkout`. Exits where it fails."""
    master, slave = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": ""}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave
    )
    os.close(slave)
    shown, first = b"", 0.0
    with suppress(OSError):  # a terminal whose last writer has gone
        while read := os.read(master, 65536):
            first, shown = first or time.perf_counter() - start, shown + read
    _, status, used = os.wait4(process.pid, 0)
    whole = time.perf_counter() - start
    os.close(master)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):  # 1 is a missed goal or a finding
        raise SystemExit(f"{' '.join(arguments)}\n{shown.decode(errors='replace')[-2000:]}")
    return Taken(first or whole, whole, used.ru_utime + used.ru_stime)


def advised(name: str) -> None:
    """Print the seconds of the second advice for a network: the first loads what all later ones share."""
    sys.path.insert(0, str(HERE / "tests"))
    from support.torchvision_ops import declare

    declare()
    import timm
    import torch

    import qflow

    torch.manual_seed(0)
    torch.set_num_threads(1)
    side = NETWORKS[name]
    model, data = timm.create_model(name, pretrained=False).eval(), [torch.randn(2, 3, side, side) for _ in range(2)]
    prepared = qflow.prepare(model, data[0])
    qflow.calibrate(prepared, data)
    with tempfile.TemporaryDirectory() as folder:
        analysis = qflow.QuantAnalysis(model, prepared, out_dir=folder)
        analysis.auto_find_bad_case(data)
        analysis.run()
        analysis.sensitivity(method="estimate")
        analysis.advise()
        start = time.perf_counter(), time.process_time()
        count = len(analysis.advise())
        print(time.perf_counter() - start[0], time.process_time() - start[1], count)


def advice(name: str, checkout: Path, folder: Path) -> Taken:
    """The seconds that `advised` prints in a process with the qflow of `checkout`."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, str(Path(__file__)), "--advice-for", name]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    whole, cpu, _ = map(float, done.stdout.split()[-3:])
    return Taken(whole, whole, cpu)


def rows(sections: Sequence[str], study: Sequence[str]) -> dict[str, list[str]]:
    """The commands by what the table calls them."""
    found: dict[str, list[str]] = {}
    if "start" in sections:
        found["import qflow"] = ["-c", "import qflow"]
        found["qflow.prepare"] = ["-c", "import qflow; qflow.prepare"]
        found |= {f"{name} --help": ["-m", f"qflow.{name}", "--help"] for name in COMMANDS}
        found["train_float --help"] = ["-m", "qflow.workflows.train_float", "--help"]
    if "commands" in sections:
        found |= {name: ["-m", f"qflow.{name}", *study] for name in ("check", "cost")}
        found["report"] = ["-m", "qflow.report", "study=start"]
        found["compare"] = ["-m", "qflow.compare", "all-int16", "all-int8"]
    if "restart" in sections:
        found["tune, finished"] = ["-m", "qflow.tune", *study, "study=start"]
    if "advice" in sections:
        found |= {f"advice, {name}": [name] for name in NETWORKS}
    return found


def baselines(folder: Path) -> dict[str, str]:
    """The runs of the baselines in a folder's store, by label."""
    code = (
        "from pathlib import Path; from qflow.tracking.mlflow_tracker import MlflowTracker as T\n"
        "import mlflow; c = mlflow.MlflowClient('sqlite:///qflow_out/mlflow.db')\n"
        "e = [x.experiment_id for x in c.search_experiments()]\n"
        "for r in c.search_runs(e, \"tags.`qflow.kind` = 'trial'\"): print(r.data.tags['qflow.label'], r.info.run_id)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return dict(line.rsplit(" ", 1) for line in shown.stdout.splitlines() if line.startswith("all-int"))


def median(taken: Sequence[Taken], what: str) -> float:
    return statistics.median(getattr(one, what) for one in taken)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = ("start", "commands", "restart", "advice")
    parser.add_argument("sections", nargs="*", choices=[*sections, []], default=list(sections))
    parser.add_argument("--against", type=Path, help="another checkout, for example of the commit before")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--task", default="perception", help="the built-in task of commands and restart")
    parser.add_argument("--advice-for", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.advice_for:
        advised(options.advice_for)
        return
    study = [*STUDY, f"task={options.task}"]
    chosen = rows(options.sections, study)
    checkouts = [path for path in (options.against, HERE) if path]
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / str(k) for k in range(len(checkouts))]
        for folder, checkout in zip(folders, checkouts, strict=True):
            folder.mkdir()
            if {"commands", "restart"} & {*options.sections}:
                run(["-m", "qflow.tune", *study, "study=start"], checkout, folder)
                run(["-m", "qflow.tune", *study, "study=start"], checkout, folder)  # a restart may fill the cache
        ends = [baselines(folder) if "compare" in chosen else {} for folder in folders]
        taken: dict[tuple[str, int], list[Taken]] = {}
        unit: list[Taken] = []
        for _ in range(options.runs):
            unit.append(run(UNIT, HERE, folders[-1]))
            for name, command in chosen.items():
                for k, (checkout, folder) in enumerate(zip(checkouts, folders, strict=True)):
                    words = [ends[k].get(word, word) for word in command]
                    once = (
                        advice(words[0], checkout, folder)
                        if name.startswith("advice")
                        else run(words, checkout, folder)
                    )
                    taken.setdefault((name, k), []).append(once)
    print(f"import torch: {median(unit, 'whole'):.2f} s, {median(unit, 'cpu'):.2f} s of processor time\n")
    which = " -> ".join(["before", "now"][-len(checkouts) :])
    print(f"| {which} | first line, s | whole, s | over import torch | the same in processor time |")
    print("| --- | --- | --- | --- | --- |")
    for name in chosen:
        found = [taken[name, k] for k in range(len(checkouts))]
        cells = [
            [f"{median(t, what) / scale:.2f}" for t in found]
            for what, scale in (
                ("first", 1.0), ("whole", 1.0), ("whole", median(unit, "whole")), ("cpu", median(unit, "cpu"))
            )
        ]  # fmt: skip
        print(f"| {name} | {' | '.join(' -> '.join(cell) for cell in cells)} |")


if __name__ == "__main__":
    main()
