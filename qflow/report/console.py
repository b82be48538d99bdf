"""Console output of a running study: one line per stage, progress bars on a terminal, and a final table."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tqdm import tqdm

from qflow.core.agreement import meaning
from qflow.core.stored_text import printable


@dataclass
class Console:
    """Prints to stdout. Progress bars are drawn on a terminal only; elsewhere only whole lines are printed."""

    stages: list[tuple[str, float]] = field(default_factory=list)
    best: str = ""
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Wall time since the session began."""
        return time.perf_counter() - self.started

    @property
    def terminal(self) -> bool:
        """True if a bar can be redrawn in place."""
        return sys.stdout.isatty()

    def say(self, text: str) -> None:
        """Print one line, above a running bar if there is one. A closed pipe (`| head`) does not stop the study."""
        text = printable(text)
        try:
            if self.terminal:
                tqdm.write(text, file=sys.stdout)
            else:
                print(text, flush=True)
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[str], None]]:
        """Time a stage and print one line at its end: the text of the last call of the returned function."""
        line = [""]
        start = time.perf_counter()
        yield lambda text: line.__setitem__(0, text)
        seconds = time.perf_counter() - start
        self.stages.append((name, seconds))
        self.say(f"{name:<12} {line[0]:<58} {seconds:5.1f} s")

    @contextmanager
    def bar(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """A progress bar with time left and the best so far; the returned function takes the absolute position."""
        bar = tqdm(
            total=total,
            desc=f"{name:<12}",
            unit=unit,
            leave=False,
            disable=not self.terminal,
            file=sys.stdout,
            dynamic_ncols=True,
            bar_format="{desc} {bar:24} {n_fmt}/{total_fmt} {unit}  left {remaining}{postfix}",
        )

        def advance(position: int) -> None:
            bar.set_postfix_str(self.best, refresh=False)
            bar.update(position - bar.n)

        try:
            yield advance
        finally:
            bar.close()


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def python_command() -> str:
    """The shell's word for this Python: `python` if that is this one, else its path, relative if it is below here."""
    found = shutil.which("python")
    if found and os.path.samefile(found, sys.executable) and os.path.dirname(found) == os.path.dirname(sys.executable):
        return "python"
    relative = os.path.relpath(sys.executable)
    return shlex.quote(sys.executable if relative.startswith("..") else relative)


@dataclass(frozen=True)
class SummaryRow:
    """One line of the final table; `metrics` are those of the trial's run. The float model has no cost metrics."""

    name: str
    metrics: Mapping[str, float]


def summary_table(rows: Sequence[SummaryRow], metric_name: str) -> str:
    """The final table: metric, drop, latency with its interval, int16 ratio."""
    width = max(12, *(len(row.name) + 1 for row in rows))
    first = max(10, len(metric_name) + 2 * (len(metric_name) > 9))
    lines = [f"{'':<{width}}{metric_name:>{first}}{'drop':>10}{'latency ms':>13}{'interval':>17}{'int16 ratio':>14}"]
    for row in rows:
        m = row.metrics
        line = f"{row.name:<{width}}{m[f'accuracy/{metric_name}']:>{first}.4f}"
        if "cost/latency_ms" in m:
            interval = f"[{m['cost/latency_low_ms']:.2f}, {m['cost/latency_high_ms']:.2f}]"
            line += f"{m['accuracy/drop']:>+10.4f}{m['cost/latency_ms']:>13.3f}{interval:>17}"
            line += f"{m['qconfig/int16_ratio']:>14.2f}"
        lines.append(line)
    return "\n".join(filter(None, [*lines, meaning(metric_name)]))
