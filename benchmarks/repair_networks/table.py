"""The tables of the records, and their medians."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from benchmarks.repair_networks.records import BEYOND, REPAIRS, Record, Result, worse

NONE = "-"
SHARE = "recovered at 1.10 x the time"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows]]


def points(value: float) -> str:
    """A drop in points of the metric."""
    return f"{round(100 * value, 2) + 0.0:.2f}"


def tables(records: Sequence[Record]) -> list[str]:
    """Lines of a table of the drops for each number of bits, one of the mixes, and one of another tool."""
    lines: list[str] = []
    for bits in sorted({record.bits for record in records}, reverse=True):
        chosen = [record for record in records if record.bits == bits]
        labels = list(dict.fromkeys(label for record in chosen for label in record.results))
        if all(r.results["all"] == r.results["without training"] for r in chosen):
            labels.remove("without training")
        header = ["network", "float", f"all int8, weights at {bits} bits", *labels, "error of the outputs", "FFE"]
        lines += [*table(header, (_drops(record, labels) for record in chosen)), ""]
    repairs = " -> ".join(REPAIRS)
    header = ["network", "weights", f"int16 operators for the goal, {repairs}", "drop of all int16", SHARE]
    lines += table(header, (_mixes(record) for record in records))
    others = [record for record in records if record.peer]
    if others:
        labels = list(dict.fromkeys(label for record in others for label in record.peer))
        rows = ([_named(r), *(points(r.peer[x]) if x in r.peer else NONE for x in labels)] for r in others)
        lines += ["", *table(["network", *labels], rows)]
    return lines


def _named(record: Record) -> str:
    return f"{record.network}, {record.bits} bits"


def _drops(record: Record, labels: Sequence[str]) -> list[str]:
    last = record.results["all"]
    return [
        record.network,
        f"{record.float_metric:.4f} ({record.metric}, {record.samples})",
        f"{points(record.drop)} ± {points(record.noise)}",
        *(_cell(record, record.results[label]) if label in record.results else NONE for label in labels),
        f"{record.error:.4f} -> {last.error:.4f}",
        f"{record.results['without training'].passes:.1f}"
        + (f", {last.passes:.1f}" if last != record.results["without training"] else ""),
    ]


def _cell(record: Record, result: Result) -> str:
    return f"{points(result.drop)} ± {points(result.noise)}{' worse' if worse(record, result) else ''}"


def _mixes(record: Record) -> list[str]:
    counts = ["goal missed" if count is None else str(count) for count in record.int16]
    shares = [NONE if math.isnan(share) else f"{share:.0%}" for share in recovered(record)]
    return [
        record.network,
        f"{record.bits} bits",
        " -> ".join(counts),
        " -> ".join(map(points, record.int16_drop)),
        " -> ".join(shares) if any(share != NONE for share in shares) else NONE,
    ]


def recovered(record: Record) -> tuple[float, ...]:
    """Share of the int8 loss that the best mix at 1.10 x the time recovers, after each of REPAIRS.

    NaN where the loss is not beyond its noise.
    """
    if not record.drop > BEYOND * record.noise:
        return (math.nan,) * len(REPAIRS)
    return tuple(1.0 - least / record.drop for least in record.least)


def summary(records: Sequence[Record]) -> list[str]:
    """Lines with the medians over all networks for each number of bits."""
    bits = sorted({record.bits for record in records}, reverse=True)
    return [line for b in bits for line in [f"Weights at {b} bits:", *_medians([r for r in records if r.bits == b])]]


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def _medians(records: Sequence[Record]) -> list[str]:
    """Of the networks with a loss beyond its noise where a share is meant."""
    lost = [record for record in records if record.drop > BEYOND * record.noise]
    lines = [f"- {len(lost)} of {len(records)} networks lose more than twice the noise at all int8"]
    for label in ("basic", "without training", "all"):
        shares = [1.0 - record.results[label].drop / record.drop for record in lost]
        passes = [record.results[label].passes for record in records]
        if shares:
            median, low, high = (f"{round(share, 2) + 0.0:.0%}" for share in _spread(shares))
            lines.append(
                f"- {label}: their drop is reduced by {median} in the median ({low} to {high}), at "
                f"{statistics.median(passes):.1f} FFE (at most {max(passes):.1f})"
            )
    for label in REPAIRS[1:]:
        lines += _mixed(records, label)
    harm = [f"{r.network} ({label})" for r in records for label, result in r.results.items() if worse(r, result)]
    return [*lines, f"- worse beyond the noise: {', '.join(harm) if harm else 'none'}"]


def _mixed(records: Sequence[Record], label: str) -> list[str]:
    """The mixes after one of REPAIRS, against those without a repair."""
    place = REPAIRS.index(label)
    counts = [(record.int16[0], record.int16[place]) for record in records]
    wanted = [(low, high) for low, high in counts if low != 0]
    fewer = [(low, high) for low, high in wanted if low is not None and high is not None]
    mended = sum(low is None and high is not None for low, high in wanted)
    lines = [
        f"- {label}, int16 operators: {len(counts) - len(wanted)} networks need none before the repair; of the others "
        f"{mended} reach the goal only after it, {sum(high is None for _, high in wanted)} never"
        + (f", the rest keeps {statistics.median(h / w for w, h in fewer):.0%} of them in the median" if fewer else "")
    ]
    after = [share for share in (recovered(r)[place] for r in records if r.located) if not math.isnan(share)]
    if after:
        lines.append(
            f"- {label}, recovered at 1.10 x the time: median {statistics.median(after):.0%}, worst {min(after):.0%}, "
            f"of {len(after)} networks"
        )
    return lines
