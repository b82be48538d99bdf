import math

import pytest
import torch

from qflow.analysis.measures.metrics import (
    Custom,
    badness,
    distance,
    distances,
    metric_names,
    smallest_is_worst,
    worst_first,
    worst_key,
)
from qflow.core.errors import ConfigError


def test_formulas_by_hand():
    x, y = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]])
    assert distance("L1", x, y).item() == pytest.approx(0.5)
    assert distance("MSE", x, y).item() == pytest.approx(0.5)
    assert distance("Atol", x, y).item() == pytest.approx(1.0)
    assert distance("Cosine", x, y).item() == pytest.approx(21 / (5 * math.sqrt(18)))
    assert distance("SQNR", x, y).item() == pytest.approx(20 * math.log10(5.0))


def test_kl_is_torchs_with_mean_reduction():
    torch.manual_seed(0)
    for shape, dim in (((3, 5), -1), ((3, 5, 2, 2), 1)):
        x, y = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
        for i in range(3):
            expected = torch.nn.KLDivLoss()(y[i : i + 1].log_softmax(dim), x[i : i + 1].softmax(dim))
            assert distance("KL", x, y)[i].item() == pytest.approx(expected.item())


def test_equal_tensors():
    x = torch.rand(2, 3)
    assert distance("SQNR", x, x).tolist() == [math.inf, math.inf]
    assert distance("Cosine", torch.zeros(1, 3), torch.zeros(1, 3)).item() == 1.0


def test_the_worst_comes_first_in_each_metrics_own_direction():
    values = torch.tensor([0.2, 0.9, 0.5])
    assert worst_first("L1", values).tolist() == [1, 2, 0]
    assert worst_first("Cosine", values).tolist() == [0, 2, 1]
    with pytest.raises(ConfigError, match="Cosine, MSE, L1, KL, SQNR, Atol"):
        distance("L2", values, values)


def test_all_metrics_at_once_are_the_single_ones():
    x, y = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    custom = Custom(lambda a, b: (a - b).flatten(1).abs().sum(1), "descending")
    found = distances(x, y, custom)
    for name, row in zip(metric_names(custom)[:-1], found, strict=False):
        assert torch.equal(row, distance(name, x, y))
    assert torch.allclose(found[-1], 20 * found[2])


def test_badness_is_zero_where_equal_and_larger_is_worse_in_every_direction():
    near, far = torch.tensor([0.99, 20.0]), torch.tensor([0.5, 3.0])
    for metric, i in (("Cosine", 0), ("SQNR", 1)):
        assert badness(metric, far[i]) > badness(metric, near[i]) > 0
    assert badness("Cosine", torch.tensor(1.0)) == badness("SQNR", torch.tensor(math.inf)) == 0
    ascending = Custom(torch.sub, "ascending")
    assert badness("custom", far[0], ascending) > badness("custom", near[0], ascending)
    assert smallest_is_worst("custom", ascending) and smallest_is_worst("SQNR") and not smallest_is_worst("L1")


def test_not_a_number_is_worse_than_infinity_is_worse_than_all_numbers():
    key = worst_key(torch.tensor([1e300, math.nan, -math.inf, math.inf], dtype=torch.float64))
    assert key.argsort(descending=True).tolist() == [1, 3, 0, 2]
