"""Samples that see each other: found out, said, and never cut or run side by side."""

import pytest
import torch
import torch.nn.functional as F
from support.replays import Made, calibrated, full
from torch import nn

from qflow.analysis.measures.distances import Distances
from qflow.analysis.sensitivity.candidates import candidates
from qflow.analysis.sensitivity.measure import sensitivity
from qflow.core.settings import SensitivitySettings


@pytest.fixture(autouse=True)
def estimates_always_pay(monkeypatch):
    """So few rows are measured sooner than estimated."""
    monkeypatch.setattr("qflow.analysis.sensitivity.measure.passes", lambda samples, draws: 0.0)


def model(between, **modules):
    layers = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 4)}
    return Made(lambda m, x: m.c(F.relu(m.b(between(m, F.relu(m.a(x)))))), **layers, **modules).eval()


def without(y, begin, end=None):
    z = y.clone()
    z[begin:end] = 0
    return z


def with_frames_before(y):
    z = y.clone()
    z[2:] = z[2:] + y[:-2]
    return z


def less_the_mean(y):
    z = y.clone()
    z[2:] = z[2:] - y.mean(0)
    return z


MIXED = {
    "rolled along the batch": lambda m, y: y + y.roll(4, 0),
    "frames of one sequence": lambda m, y: with_frames_before(y),
    "the mean over the batch": lambda m, y: less_the_mean(y),
    "statistics of the batch": lambda m, y: m.norm(y),
    "nothing behind the second": lambda m, y: without(y, 2),
    "nothing behind the seventh": lambda m, y: without(y, 7),
    "nothing in the middle": lambda m, y: without(y, 3, 5),
    "a triangle of samples": lambda m, y: y.triu(-1),
}


@pytest.mark.parametrize("method", ["exact", "screened"])
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 33])
@pytest.mark.parametrize("case", MIXED)
@torch.no_grad()
def test_measured_rows_are_those_of_full_forwards(case, size, method):
    if case == "statistics of the batch" and size == 1:
        pytest.skip("torch has no statistics of one sample")
    torch.manual_seed(0)
    mixing, x = model(MIXED[case], norm=nn.BatchNorm1d(8, track_running_stats=False)), torch.randn(size, 6)
    prepared = calibrated(mixing, x if size > 1 else torch.randn(2, 6))
    rows = candidates(prepared)
    distances = Distances("L1", len(rows))
    distances.reference({"0": mixing(x)}, size)
    for i, got in enumerate(full(prepared, x, [row.variant for row in rows])):
        distances.add(i, got)
    wanted = {(row.node.name, row.sensitive_type): distances.result(i)[0] for i, row in enumerate(rows)}
    table = sensitivity(mixing, prepared, [x], settings=SensitivitySettings(method=method, draws=size))
    measured = [row for row in table.rows if row.exact]
    assert measured
    for row in measured:
        assert row.score == pytest.approx(wanted[row.op_name, row.sensitive_type], rel=5e-3, abs=1e-7), row.op_name
    if size == 16 and case != "nothing in the middle":
        assert any("the bad cases are not cut into smaller batches" in finding.message for finding in table.findings)


@torch.no_grad()
def test_spectra_keep_samples_apart():
    """Complex values of another batch size differ in their last bits, as others do."""
    torch.manual_seed(0)
    gains = torch.randn(17, 8) * (1 + 0.5j)
    filtered = model(lambda m, y: torch.fft.irfft(torch.fft.rfft(y, dim=1) * gains, n=33, dim=1))
    x = torch.randn(4, 33, 6)
    table = sensitivity(filtered, calibrated(filtered, x), [x])
    assert not any("mixes the samples" in finding.message for finding in table.findings)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.lstm = nn.Linear(6, 8), nn.Linear(8, 4), nn.LSTM(8, 8, batch_first=True)

    def forward(self, x):
        return self.b(self.lstm(self.a(x))[0][:, -1])


def sequence_first(m, y):
    turned = y.transpose(0, 1)
    return F.relu(turned.flatten(0, 1)).unflatten(0, turned.shape[:2]).transpose(0, 1)


APART = {
    "an LSTM, whose states torch does not check": lambda: (Recurrent().eval(), (5, 6)),
    "the sequence first, folded with the batch": lambda: (model(sequence_first), (5, 6)),
    "two views in one batch": lambda: (model(lambda m, y: sum(torch.cat([y, y.flip(-1)]).chunk(2))), (6,)),
}


@pytest.mark.parametrize("method", ["exact", "screened", "estimate"])
@pytest.mark.parametrize("size", [1, 4, 7, 20])
@pytest.mark.parametrize("case", APART)
@torch.no_grad()
def test_samples_that_do_not_see_each_other_are_cut(case, size, method):
    torch.manual_seed(0)
    apart, shape = APART[case]()
    x = torch.randn(size, *shape)
    prepared = calibrated(apart, x)
    table = sensitivity(apart, prepared, [x], settings=SensitivitySettings(method=method, draws=size))
    assert not any("not cut" in finding.message for finding in table.findings)
    rows = {(row.node.name, row.sensitive_type): row.variant for row in candidates(prepared)}
    distances = Distances("L1", len(rows))
    distances.reference({"0": apart(x)}, size)
    for i, got in enumerate(full(prepared, x, list(rows.values()))):
        distances.add(i, got)
    wanted = {key: distances.result(i)[0] for i, key in enumerate(rows)}
    for row in [row for row in table.rows if row.exact]:
        assert row.score == pytest.approx(wanted[row.op_name, row.sensitive_type], rel=5e-3, abs=1e-7), row.op_name


@torch.no_grad()
def test_a_larger_batch_runs_no_wider_than_was_proven():
    torch.manual_seed(0)
    tail = model(lambda m, y: without(y, 9))
    batches = [torch.randn(1, 6), torch.randn(8, 6)]
    prepared = calibrated(tail, batches[1])
    rows = candidates(prepared)
    distances = Distances("L1", len(rows))
    for x in batches:
        distances.reference({"0": tail(x)}, len(x))
        for i, got in enumerate(full(prepared, x, [row.variant for row in rows])):
            distances.add(i, got)
    wanted = {(row.node.name, row.sensitive_type): distances.result(i)[0] for i, row in enumerate(rows)}
    for row in sensitivity(tail, prepared, batches).rows:
        assert row.score == pytest.approx(wanted[row.op_name, row.sensitive_type], rel=5e-3, abs=1e-7), row.op_name


@torch.no_grad()
def test_a_batch_that_cannot_be_cut_is_estimated_only_where_that_fits():
    torch.manual_seed(0)
    rolled, x = model(MIXED["rolled along the batch"]), torch.randn(4000, 6)
    prepared = calibrated(rolled, x)
    tight = SensitivitySettings(method="estimate", memory_mb=2)
    table = sensitivity(rolled, prepared, [x], settings=tight)
    assert table.exact and any("an uncut batch holds" in finding.message for finding in table.findings)
    assert not sensitivity(rolled, prepared, [x], settings=SensitivitySettings(method="estimate")).exact
