"""Accuracy and speed of the cost model: `python -m benchmarks.cost [--data FILE] [--plot docs/cost-model.png]`.

Fits the published rows and validates the fit by leaving out families, then networks, and by predicting each march from
the rows of the other. Rows of int16 are predicted with the range of the int16 factor. `--data` takes other rows with
the same columns, which the shipped parameters predict as well. The speed is that of one qconfig of a network of about
300 operators, after tracing.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.networks import ResNet
from qflow.config.device_file import load_cost
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.resolve import resolve
from qflow.core.setter import SensitiveSetter, TemplateSetter
from qflow.cost_model.fit import NEVER, Fit, Prediction, errors_of, fit_networks, predict_network
from qflow.cost_model.latency import Pricer
from qflow.cost_model.networks import Network, read_networks
from qflow.quant.model.plan import make_plan
from qflow.quant.trace.trace import trace

DATA = Path(__file__).parent / "data" / "j6m-networks.csv"


def validation(fit: Fit) -> list[str]:
    """One line for each way to leave rows out, then one for each family that was left out."""
    lines = ["| left out | rows | median | p90 | worst | inside interval | Spearman |", "|---|---|---|---|---|---|---|"]
    for how, predictions in fit.left_out.items():
        lines.append(_line(how, predictions))
    for family in fit.families if "family" in fit.left_out else ():
        lines.append(_line(f"family {family}", [p for p in fit.left_out["family"] if p.family == family]))
    return lines


def coarse(networks: Sequence[Network]) -> list[str]:
    """The hardest split: all YOLO families, which are similar, predicted from the others, and the others from them."""
    two = [replace(n, family="YOLO" if n.family.startswith("yolo") else "others") for n in networks]
    return [_line("YOLO from the others and back", fit_networks(two).left_out["family"])] if _kinds(two) > 1 else []


def _kinds(networks: Sequence[Network]) -> int:
    return len({n.family for n in networks if n.dtype == "int8" and n.times})


def kinks(networks: Sequence[Network]) -> list[str]:
    """Errors with families left out, for other starts of the surcharge on large GEMMs and without it."""
    lines = ["", "| large GEMMs from (GMAC) | median | p90 | worst |", "|---|---|---|---|"]
    for kink in (0.3, 0.4, 0.5, 0.6, 0.8, NEVER) if _kinds(networks) > 1 else ():
        e = fit_networks(networks, kink=kink).errors("family")
        name = f"{kink:g}" if kink < NEVER else "no surcharge"
        lines.append(f"| {name} | {e.median:.1%} | {e.p90:.1%} | {e.worst:.1%} |")
    return lines


def _line(name: str, predictions: Sequence[Prediction]) -> str:
    e = errors_of(predictions)
    ranks = ", ".join(f"{march} {value:.3f}" for march, value in e.spearman.items())
    worst = f"{e.worst:.1%} ({e.worst_name})"
    return f"| {name} | {e.rows} | {e.median:.1%} | {e.p90:.1%} | {worst} | {e.inside:.0%} | {ranks} |"


def shipped(networks: Sequence[Network]) -> list[str]:
    """Errors of the shipped parameters on all int8 rows, and on int16 rows with the lowest, likely, highest factor."""
    lines = []
    models = {march: load_cost(march) for march in ("nash-e", "nash-m")}
    int8 = [
        Prediction(n.name, n.family, march, t, predict_network(n, march, models[march]))
        for n in networks
        if n.dtype == "int8"
        for march, t in n.times.items()
    ]
    lines.append(f"shipped parameters: {errors_of(int8)}")
    for n in (n for n in networks if n.dtype == "int16"):
        for march, t in n.times.items():
            low, likely, high = (_int16(n, march, k) for k in range(3))
            lines.append(
                f"int16 {n.name} on {march}: measured {t:.3f} ms, predicted {likely:.3f} [{low:.3f}, {high:.3f}] by "
                f"the factors, {likely / t - 1:+.0%}"
            )
    return lines


def _int16(network: Network, march: str, which: int) -> float:
    """Time of an all-int16 network: MACs, look-ups and softmax slower by their factors, weights in int8."""
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
    pricer = Pricer(graph, load_cost("nash-m"))
    taken = {"BPU time": pricer.bpu_ms, "report": pricer.report, "promotions": pricer.promotions}
    lines = []
    for name, call in taken.items():
        seconds = []
        for qconfig in qconfigs * 2:
            start = time.perf_counter()
            call(qconfig)
            seconds.append(time.perf_counter() - start)
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
    axes.fill_between(ends, [0.8 * e for e in ends], [1.25 * e for e in ends], color="#d8e4f0", label="[0.80, 1.25]")
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
    lines = [*validation(fit), *coarse(networks), *kinks(networks), "", *shipped(networks)]
    print("\n".join([*lines, f"not fitted: {'; '.join(skipped)}", "", *speed()]))
    if options.plot:
        plot(fit, options.plot)


if __name__ == "__main__":
    main()
