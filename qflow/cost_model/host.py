"""Time on the host for each frame: a constant and a share for each output tensor, fitted to one-thread latencies.

    latency (1 thread) = T_bpu + H + h * outputs
    latency (k threads) = max(latency (1 thread), k * T_bpu)

With several threads the host works on some frames while the BPU computes others, so that a frame waits for those before
it. A march without latencies has the times of the other one, by the ratio of their host clocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qflow.cost_model.networks import Network
from qflow.cost_model.predictions import Band, band_of

HOST_CLOCKS = {"nash-e": 1.5, "nash-m": 2.0}
"""GHz of the CPU beside the BPU, as the boards S100 and S100P have it."""
FEWEST = 5
"""Latencies from which a march has times of its own."""


@dataclass(frozen=True)
class Host:
    """Time of a frame in ms (H), of each output (h), and the interval relative to their sum."""

    fixed_ms: float
    output_ms: float
    band: Band

    def ms(self, outputs: float) -> float:
        """Time for a frame with this many outputs."""
        return self.fixed_ms + self.output_ms * outputs


def host_times(network: Network) -> dict[str, float]:
    """March -> measured time on the host: the latency of one thread less the time of the BPU."""
    found = {m: t - network.times[m] for m, t in network.latencies.items() if m in network.times}
    return {m: t for m, t in found.items() if t > 0.0}


def fit_hosts(networks: Sequence[Network]) -> Mapping[str, Host]:
    """March -> its host; empty where no network has a latency and its number of outputs.

    Least squares of errors relative to the latency, which is what a user reads.
    """
    from scipy.optimize import nnls

    found: dict[str, Host] = {}
    for march in HOST_CLOCKS:
        rows = [
            (n.outputs, host_times(n)[march], n.latencies[march])
            for n in networks
            if n.outputs and march in host_times(n)
        ]
        if len(rows) >= FEWEST:
            design = np.array([[1.0, outputs] for outputs, *_ in rows])
            times, latencies = np.array([t for _, t, _ in rows]), np.array([t for *_, t in rows])
            fixed, output = map(float, nnls(design / latencies[:, None], times / latencies)[0])
            found[march] = Host(fixed, output, band_of([float(r) for r in times / (design @ [fixed, output])]))
    for march in HOST_CLOCKS.keys() - found.keys() if found else ():
        other, host = next(iter(found.items()))
        scale = HOST_CLOCKS[other] / HOST_CLOCKS[march]
        found[march] = Host(host.fixed_ms * scale, host.output_ms * scale, host.band)
    return found
