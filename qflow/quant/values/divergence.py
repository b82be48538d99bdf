"""The KL divergence of a histogram from its quantized form, for every place where it can be clipped (Migacz 2017)."""

from __future__ import annotations

import torch
from torch import Tensor

KL_BINS = 1024
KL_LEVELS = 128
KL_WINDOW = 9
MOST_BEYOND = 0.05


def least_divergence(counts: Tensor, beyond: float) -> int:
    """Threshold of least KL divergence, in bins; smoothed over 9 neighbours, the last minimum, as in the plugin.

    A threshold leaves at most 5 % of the values beyond it. Where no value is near 0 (a sigmoid around 0.5), one below
    all values would otherwise be best: both histograms then hold everything in their last bin, and are equal.
    """
    smooth = divergences(counts, beyond).unfold(0, KL_WINDOW, 1).sum(1)
    first = KL_LEVELS + KL_WINDOW // 2
    within = counts.cumsum(0)[first - 1 : first - 1 + len(smooth)]
    smooth[within < (1.0 - MOST_BEYOND) * (counts.sum() + beyond)] = torch.inf
    return first + int((smooth == smooth.min()).nonzero().max())


def divergences(counts: Tensor, beyond: float = 0.0) -> Tensor:
    """KL(P || Q) for every edge 128 .. len(counts): P is clipped at the edge, Q is P in 128 levels.

    P holds the counts below the edge, and those beyond it in its last bin; `beyond` more values lie beyond all edges.
    Q spreads the counts of a level (without those beyond the edge) evenly over its bins that are not empty. Both are
    normalized to 1. The first bin is replaced by the second, because its spike at zero would dominate (measured:
    4.5 dB). With cumulative sums over bins,

        KL = (sum p log p - sum_levels p log q) / N - log N + log N_Q

    takes 128 terms for each edge. If the last bin holds only counts from beyond the edge, Q gets one count there.
    """
    counts = counts.clone()
    counts[0] = counts[1]
    filled = counts > 0
    mass, bins, entropy = (
        torch.cat([torch.zeros(1, dtype=torch.float64), part.to(torch.float64).cumsum(0)])
        for part in (counts, filled, torch.xlogy(counts, counts))
    )
    edges = torch.arange(KL_LEVELS, len(counts) + 1)
    # Bin j belongs to level floor(128 j / edge), so level l starts at bin ceil(l edge / 128).
    starts = -((-torch.arange(KL_LEVELS + 1) * edges.unsqueeze(1)) // KL_LEVELS)
    level_mass, level_bins = mass[starts].diff(dim=1), bins[starts].diff(dim=1)
    level = (level_mass / level_bins.clamp_min(1.0)).clamp_min(0.0)
    total, kept = mass[-1] + beyond, mass[edges]
    rest = total - kept
    last, hollow = counts[edges - 1], ~filled[edges - 1] & (rest > 0)
    p_log_p = entropy[edges] - torch.xlogy(last, last) + torch.xlogy(last + rest, last + rest)
    q_last = torch.where(hollow, torch.ones_like(last), level[:, -1])
    p_log_q = torch.xlogy(level_mass, level).sum(1) + torch.xlogy(rest, q_last)
    size = kept + hollow
    return (p_log_p - p_log_q) / total - total.log() + size.log()
