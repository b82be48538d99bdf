"""Accuracy and speed of the cost model: `python -m benchmarks.cost [--data FILE] [--plot docs/cost-model.png]`.

Fits the published rows and validates the fit blindly: families, networks and a board are left out, and all that decides
a prediction and its interval comes from the other rows. Rows of int16 are predicted with the range of the int16 factor.
Networks that others published are predicted from their operators; no row and no price was chosen by their times.
`--data` takes other rows with the same columns, which the shipped parameters predict as well. The speed is that of one
qconfig of a network of about 300 operators, after tracing, in time of the processor.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import cost_published
from benchmarks.networks import ResNet
from qflow.config.device_file import load_cost
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.resolve import resolve
from qflow.core.setter import SensitiveSetter, TemplateSetter
from qflow.cost_model.features import features
from qflow.cost_model.fit import KINKS, NEVER, Fit, fit_networks, predict_network
from qflow.cost_model.latency import Pricer
from qflow.cost_model.model import CostModel
from qflow.cost_model.networks import Network, read_networks
from qflow.cost_model.predictions import SHORT_MS, Prediction, errors_of
from qflow.quant.model.plan import make_plan
from qflow.quant.trace.trace import trace

DATA = Path(__file__).parent / "data" / "j6m-networks.csv"


def validation(fit: Fit) -> list[str]:
    """A table of the BPU's time and one of the latency, with a line for each way to leave rows out, and for each
    family.
    """
    lines = []
    for title, left_out in (("BPU time", fit.left_out), ("latency, one thread", fit.latencies)):
        lines += ["", f"| {title}: left out {HEADING}", "|---|---|---|---|---|---|---|---|"]
        lines += [_line(how, predictions) for how, predictions in left_out.items() if predictions]
        for family in fit.families:
            found = [p for p in left_out.get("family", ()) if p.family == family]
            lines += [_line(f"family {family}", found)] if found else []
    return lines


HEADING = "| rows | median | p90 | worst | inside the 90 % interval | its width | Spearman |"


def regimes(fit: Fit) -> list[str]:
    """Coverage of the intervals of short and of longer networks, with families left out, and the shipped ones."""
    lines = []
    for name, band in (("short", fit.bands.short), ("longer", fit.bands.longer)):
        rows = [p for p in fit.left_out.get("family", ()) if (p.predicted < SHORT_MS) == (name == "short")]
        inside = sum(p.low <= p.measured <= p.high for p in rows)
        lines.append(f"{name} networks: interval [{band[0]:.3f}, {band[1]:.3f}], {inside} of {len(rows)} rows inside")
    for march, host in sorted(fit.hosts.items()):
        ends = f"[{host.band[0]:.3f}, {host.band[1]:.3f}]"
        lines.append(f"host of {march}: {host.fixed_ms:.3f} + {host.output_ms:.4f} * outputs ms, interval {ends}")
    return lines


def threads(networks: Sequence[Network]) -> list[str]:
    """Latency at two threads over the larger of the latency with one thread and twice the BPU time."""
    ratios = [
        n.latencies_2[m] / max(n.latencies[m], 2 * t)
        for n in networks
        for m, t in n.times.items()
        if n.dtype == "int8" and m in n.latencies_2 and m in n.latencies
    ]
    if not ratios:
        return []
    low, middle, high = np.percentile(ratios, [5, 50, 95])
    return [f"latency at two threads, {len(ratios)} rows: {middle:.2f} of the rule [{low:.2f}, {high:.2f}] (90 %)"]


def coarse(networks: Sequence[Network]) -> list[str]:
    """The hardest split: all YOLO families, which are similar, predicted from the others, and the others from them."""
    two = [replace(n, family="YOLO" if n.family.startswith("yolo") else "others") for n in networks]
    return [_line("YOLO from the others and back", fit_networks(two).left_out["family"])] if _kinds(two) > 1 else []


def _kinds(networks: Sequence[Network]) -> int:
    return len({n.family for n in networks if n.dtype == "int8" and n.times})


def kinks(networks: Sequence[Network]) -> list[str]:
    """Errors with families left out, for fixed starts of the surcharge on large GEMMs and without it."""
    lines = ["", "| large GEMMs from (GMAC) | median | p90 | worst |", "|---|---|---|---|"]
    for kink in KINKS if _kinds(networks) > 1 else ():
        e = fit_networks(networks, kink=kink).errors("family")
        name = f"{kink:g}" if kink < NEVER else "no surcharge"
        lines.append(f"| {name} | {e.median:.1%} | {e.p90:.1%} | {e.worst:.1%} |")
    return lines


def _line(name: str, predictions: Sequence[Prediction]) -> str:
    e = errors_of(predictions)
    ranks = ", ".join(f"{march} {value:.3f}" for march, value in e.spearman.items())
    worst = f"{e.worst:.1%} ({e.worst_name})"
    return f"| {name} | {e.rows} | {e.median:.1%} | {e.p90:.1%} | {worst} | {e.inside:.0%} | {e.width:.2f} | {ranks} |"


def shipped(networks: Sequence[Network]) -> list[str]:
    """Errors of the shipped parameters on all int8 rows, and on int16 rows with the lowest, likely, highest factor."""
    lines = []
    models = {march: load_cost(march) for march in ("nash-e", "nash-m")}
    int8 = [_shipped(n, march, t, models[march]) for n in networks if n.dtype == "int8" for march, t in n.times.items()]
    lines.append(f"shipped parameters: {errors_of(int8)}")
    for n in (n for n in networks if n.dtype == "int16"):
        for march, t in n.times.items():
            low, likely, high = (_int16(n, march, k) for k in range(3))
            lines.append(
                f"int16 {n.name} on {march}: measured {t:.3f} ms, predicted {likely:.3f} [{low:.3f}, {high:.3f}] by "
                f"the factors, {likely / t - 1:+.0%}"
            )
    return lines


def _shipped(network: Network, march: str, measured: float, model: CostModel) -> Prediction:
    ms = predict_network(network, march, model)
    low, high = model.short_interval if ms < SHORT_MS else model.interval
    return Prediction(network.name, network.family, march, measured, ms, ms * low, ms * high)


def _int16(network: Network, march: str, which: int) -> float:
    """Time of an all-int16 network: MACs, look-ups, softmax slower by their factors, weights in int8; no layer norm."""
    model = load_cost(march)
    mac, vector = model.mac_factors["qint16/qint8"][which], model.vector_factors["qint16"][which]
    slower = replace(
        model,
        gmac_per_ms_ghz=model.gmac_per_ms_ghz / mac,
        large_gmac_per_ms_ghz=model.large_gmac_per_ms_ghz / mac,
        attention_gmac_per_ms_ghz=model.attention_gmac_per_ms_ghz / mac,
        lut_melem_per_ms_ghz=model.lut_melem_per_ms_ghz / vector,
        softmax_melem_per_ms_ghz=model.softmax_melem_per_ms_ghz / model.softmax_factors["qint16"][which],
    )
    return predict_network(network, march, slower)


def speed() -> list[str]:
    """Milliseconds for one qconfig, and for the costs of raising each operator alone."""
    torch.set_num_threads(1)
    model = ResNet(33).eval()
    graph = make_plan(trace(model, torch.randn(1, 3, 32, 32)), model).graph
    names = [n.name for n in graph.quantized]
    rng = random.Random(0)
    qconfigs = [
        resolve(
            graph, [SensitiveSetter({}, rng.sample(names, len(names)), 0.3), TemplateSetter(QDtype.qint8)], "nash-m"
        )
        for _ in range(50)
    ]
    model_of = load_cost("nash-m")
    pricer = Pricer(graph, model_of)
    taken = {
        "work": lambda _: Pricer(replace(graph), model_of),
        "features": partial(features, graph),
        "BPU time": pricer.bpu_ms,
        "report": pricer.report,
        "promotions": pricer.promotions,
    }
    lines = []
    for name, call in taken.items():
        seconds = []
        for qconfig in qconfigs * 2:
            start = time.process_time()
            call(qconfig)
            seconds.append(time.process_time() - start)
        lines.append(f"{name} of {len(graph.nodes)} operators: {statistics.median(seconds) * 1e3:.2f} ms")
    return lines


def plot(fit: Fit, path: Path) -> None:
    """Plot measured times over those predicted with the family left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 5.2), constrained_layout=True)
    left_out = fit.left_out.get("family", fit.left_out["network"])
    ends = (0.12, 30.0)
    low, high = fit.bands.longer
    label = f"[{low:.2f}, {high:.2f}]"
    axes.fill_between(ends, [low * e for e in ends], [high * e for e in ends], color="#d8e4f0", label=label)
    axes.plot(ends, ends, color="#7f8c9a", linewidth=1)
    for i, family in enumerate(fit.families):
        for march, marker in (("nash-e", "o"), ("nash-m", "x")):
            chosen = [p for p in left_out if p.family == family and p.march == march]
            if chosen:
                points = [p.predicted for p in chosen], [p.measured for p in chosen]
                axes.scatter(*points, s=26, marker=marker, color=f"C{i}", label=f"{family}, {march}")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set_xlabel("predicted BPU time, its family left out (ms)")
    axes.set_ylabel("measured (ms)")
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Validate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    try:
        networks, skipped = read_networks(options.data)
        fit = fit_networks(networks)
    except ConfigError as error:
        parser.error(str(error))
    lines = [*validation(fit), "", *regimes(fit), *threads(networks)]
    lines += ["", f"| other splits {HEADING}", "|---|---|---|---|---|---|---|---|", *coarse(networks), *kinks(networks)]
    lines += ["", *shipped(networks), f"not fitted: {'; '.join(skipped)}", *cost_published.lines(), "", *speed()]
    print("\n".join(lines).lstrip())
    if options.plot:
        plot(fit, options.plot)


if __name__ == "__main__":
    main()
