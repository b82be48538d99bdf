"""python -m qflow.compare A B [C ...]: trials side by side, each against the first.

A source is a run id, `runs:/ID`, `models:/NAME@ALIAS`, a folder, a .zip, a .json with a qconfig, or a file of the
plugin (`qconfig_dtypes.pt`, `model_check_result.txt`) or of an export (`qconfig_j6m.py`), whose names are matched with
the operators of the other source. Prints metrics with their noise, the cost, and the operators that differ with what
each difference gains; `out=compare.html` writes a page.
`compare --engine A` runs one trial with qflow's engine and with the installed plugin, and prints where they differ.
Exit code 0: compared; 1: with --check, something differs; 2: a mistake in the command line or configuration.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from qflow.config.command import Result, run_command
from qflow.core.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from qflow.study.comparison import Comparison, Side
    from qflow.tracking.patience import Patience

SHOWN = 20  # operators on the console; the page and --json have all
MAIN = ("accuracy/", "cost/latency_ms")
"""Metrics that are shown although they are equal."""
COLUMNS = f"{'':<24}{'first':>12}{'other':>12}{'change':>13}   noise"


def main() -> None:
    """Entry point."""
    run_command("compare", compare)


def compare(config: DictConfig) -> Result:
    """Compare every source with the first. Returns 1 where something differs and `check` asks for it."""
    if config.engine:
        return compare_engines(config)
    if len(config.sources) < 2:
        got = config.sources[0] if config.sources else "none"
        raise ConfigError(f"At least two trials are compared, but got {got}. Name them: qflow compare <run> <another>.")
    from qflow.config.settings import patience, root_dir
    from qflow.study import comparison

    root, waiting = root_dir(config), patience(config)
    sides = sides_of(config.sources, lambda text: side(text, config.tracking.uri, root, waiting))
    found = [comparison.compare(sides[0], other) for other in sides[1:]]
    for one in found:
        print_comparison(one)
    out = Path(os.path.expanduser(config.out)).absolute() if config.out is not None else None
    if out is not None:
        from qflow.study.comparison_page import write_page

        write_page(out, found)
        print(f"{'written':<12}{config.out}")
    equal = all(one.equal for one in found)
    print(f"{'equal' if equal else 'differs':<12}{'in everything that is compared' if equal else 'see above'}")
    record = {"equal": equal, "comparisons": found, "written": str(out) if out else None}
    return int(bool(config.check) and not equal), record


def compare_engines(config: DictConfig) -> Result:
    """Run one trial with qflow's engine and with the plugin's, and print where they differ, most first."""
    if len(config.sources) != 1 or config.out is not None:
        got = f"out={config.out}" if config.out is not None else f"{len(config.sources)} trials"
        raise ConfigError(f"--engine compares two engines on one trial, as text, but got {got}. Name one run.")
    from qflow.bundle.source import fetch
    from qflow.config.settings import patience, root_dir
    from qflow.study.engines import on_two_engines

    trial = fetch(config.sources[0], uri=config.tracking.uri, root=root_dir(config), patience=patience(config))
    found = on_two_engines(trial, allow=config.security.allow)
    print(f"{'trial':<12}{trial.source}, qconfig {trial.qconfig.digest}")
    for engine, metric in zip(found.engines, found.metrics, strict=True):
        print(f"{'engine':<12}{engine}: {found.metric_name} {metric:.6g} on {found.samples} samples")
    differ = [row for row in found.rows if row.differs]
    print(f"{'operators':<12}{len(differ)} of {len(found.rows)} differ, by their outputs on {found.batch} samples")
    width = max([len(row.op) for row in found.rows[:SHOWN]], default=0)
    print(f"{'':<12}{'operator':<{width}}  {'output':>8}  {'scale':>8}  {'weights':>8}  dtypes")
    for row in found.rows[:SHOWN]:
        parts = (row.output, row.scale, row.weight_scale)
        shown = "  ".join(f"{'-' if part is None else f'{part:.2%}':>8}" for part in parts)
        print(f"{'':<12}{row.op:<{width}}  {shown}  {' and '.join(dict.fromkeys(row.dtypes))}")
    if len(found.rows) > SHOWN:
        print(f"{'':<12}and {len(found.rows) - SHOWN} more: --json has all")
    for text in found.notes:
        print(f"{'note':<12}{text}")
    return int(bool(config.check) and bool(differ)), {**asdict(found), "engines": list(found.engines)}


def sides_of(sources: Sequence[str], stored: Callable[[str], Side]) -> list[Side]:
    """Return the sides in their order; those that are files take the operators of the first other one."""
    from qflow.study.imported_side import SUFFIXES, notes, side_of_file

    foreign = [text.endswith(SUFFIXES) for text in sources]
    found = [None if is_file else stored(text) for text, is_file in zip(sources, foreign, strict=True)]
    against = next((one for one in found if one is not None), None)
    sides = []
    for text, one in zip(sources, found, strict=True):
        if one is None:
            one, imported = side_of_file(Path(os.path.expanduser(text)), against)
            for note in notes(imported):
                print(f"{'file':<12}{note}")
        sides.append(one)
    return sides


def side(source: str, uri: str | None, root: Path, patience: Patience) -> Side:
    """Return what is compared of a source. Raises BundleError or TrackingError for one that cannot be read."""
    from qflow.bundle.source import fetch
    from qflow.study.comparison import side_of, side_of_json

    if source.endswith(".json"):
        return side_of_json(Path(source))
    return side_of(fetch(source, uri=uri, root=root, patience=patience))


def print_comparison(found: Comparison) -> None:
    """One comparison as text."""
    print(f"{'first':<12}{found.before}\n{'other':<12}{found.after}")
    for text in found.differences:
        print(f"{'differs':<12}{text}")
    for note in found.notes:
        print(f"{'note':<12}{note}")
    if found.metrics:
        print(COLUMNS)
    shown = [m for m in found.metrics if m.change or m.name.startswith(MAIN)]
    for metric in shown:
        a, b, by = (f"{v:.6g}" if v is not None else "-" for v in (metric.before, metric.after, metric.change))
        print(f"{metric.name:<24}{a:>12}{b:>12}{by:>13}   {metric.verdict}".rstrip())
    if len(found.metrics) > len(shown):
        print(f"{'':<12}{len(found.metrics) - len(shown)} further metrics are equal")
    for how in dict.fromkeys(metric.how for metric in found.metrics if metric.how):
        print(f"{'noise':<12}{how}")
    if found.bpu is not None:
        print(f"{'cost':<12}the other takes {found.bpu.ratio:.3f} of the first's BPU time "
              f"[{found.bpu.low:.3f}, {found.bpu.high:.3f}]")  # fmt: skip
    print(f"{'operators':<12}{len(found.operators)} of {found.count} differ")
    for op in found.operators[:SHOWN]:
        share = f", {op.share:.1%} of the int8 sensitivity" if op.share is not None and "%" not in op.gain else ""
        print(f"{'':<12}{op.op}: {op.before} -> {op.after}; {op.gain}{share}")
    if len(found.operators) > SHOWN:
        print(f"{'':<12}and {len(found.operators) - SHOWN} more: out=compare.html lists all")
    print()
