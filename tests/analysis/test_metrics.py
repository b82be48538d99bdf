import math

import pytest
import torch

from qflow.analysis.metrics import distance, worst_first
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
