"""Loops over the samples of a batch, and values that decide what runs or where a result is written."""

import pytest
import torch
from torch import nn

import qflow
from qflow.core.errors import ModelError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.points, self.head = nn.Linear(9, 8), nn.Conv2d(8, 4, 3, padding=1)


class Scatter(Net):
    def forward(self, points, place):
        x, maps = self.points(points).relu(), []
        for b in range(len(x)):
            canvas = torch.zeros(8, 64)
            canvas[:, place[b]] = x[b].t()
            maps.append(canvas)
        return self.head(torch.stack(maps).view(-1, 8, 8, 8))


class Crops(Net):
    def forward(self, points, place):
        maps, crops = self.head(self.points(points).mT.relu().unflatten(2, (4, 5))), []
        for i, at in enumerate(place[:, 0].tolist()):
            crops.append(maps[i, :, at % 3 : at % 3 + 2])
        return torch.stack(crops).sigmoid()


class PerSample(Net):
    def forward(self, points, place):
        return torch.stack([self.points(sample) for sample in points]).sigmoid()


def batch(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    places = [torch.randperm(64, generator=generator)[:20] for _ in range(size)]
    return torch.randn(size, 20, 9, generator=generator), torch.stack(places)


@pytest.mark.parametrize("kind", [Scatter, Crops, PerSample])
def test_a_model_that_loops_over_its_samples_is_priced_at_any_batch(kind):
    prepared = qflow.prepare(kind().eval(), batch(2))
    qflow.calibrate(prepared, [batch(2)])
    costs = [qflow.cost(prepared, inputs) for inputs in (None, batch(2), batch(3))]
    assert not any(cost.refusal for cost in costs)
    alone = qflow.prepare(kind().eval(), batch(1))
    assert costs[0].latency_ms == qflow.cost(alone).latency_ms


@pytest.mark.parametrize("kind", [Scatter, Crops])
def test_an_input_that_decides_where_values_are_written_or_taken_is_no_dead_end(kind):
    prepared = qflow.prepare(kind().eval(), batch(2))
    assert not [note for note in prepared.graph.notes if "no output depends on it" in note]
    unused = qflow.prepare(PerSample().eval(), batch(2)).graph.notes
    assert any(note.startswith("quant[place]: computed, but no output") for note in unused)


def test_what_is_computed_to_decide_a_place_is_quantized():
    class Sorted(Net):
        def forward(self, points):
            x = self.points(points)
            canvas = torch.zeros(len(x), 20, 8)
            canvas[torch.arange(len(x))[:, None], self.points(points * 0.5).mean(2).argsort(1)] = x
            return canvas.sigmoid()

    graph = qflow.prepare(Sorted().eval(), batch(2)[0]).graph
    assert "[argsort]" in graph.by_name
    assert not [note for note in graph.notes if "no output depends on it" in note]


BRANCHES = {"a branch on the size": lambda x: len(x) > 1, "perhaps a branch on a value": lambda x: x.sum() > 0}


@pytest.mark.parametrize("why", BRANCHES)
def test_a_branch_is_named_after_what_it_depends_on(why):
    class Branch(Net):
        def forward(self, points):
            x = self.points(points)
            return self.points((x.tanh() if BRANCHES[why](points) else x).repeat(1, 1, 2)[..., :9])

    one = torch.ones(1, 20, 9)
    prepared = qflow.prepare(Branch().eval(), torch.cat([-one, 3.0 * one]))
    with pytest.raises(ModelError, match=rf"differences at \['\[tanh\]'\]: {why}"):
        qflow.cost(prepared)
