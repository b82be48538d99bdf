"""Codes by GPTQ's rule, and the columns that a weight is multiplied with."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qflow.quant.model.runtime import leaf_class
from qflow.repair.weights import columns as columns_module
from qflow.repair.weights import second_order as second_order_module
from qflow.repair.weights.columns import POSITIONS, as_rows, columns, from_rows
from qflow.repair.weights.second_order import Grid, second_order

OPERATORS = {
    "groups": (nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2, bias=False), (3, 4, 9, 8)),
    "depthwise": (nn.Conv2d(4, 4, (3, 1), padding="same", dilation=2, groups=4, bias=False), (3, 4, 9, 8)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect", bias=False), (3, 4, 9, 8)),
    "one dim": (nn.Conv1d(4, 6, 3, padding=2, bias=False), (3, 4, 9)),
    "three dims": (nn.Conv3d(4, 6, 3, padding=2, stride=2, bias=False), (3, 4, 9, 5, 6)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, bias=False), (3, 4, 5, 6)),
    "transposed, cut": (nn.ConvTranspose2d(4, 6, 4, padding=3, dilation=2, bias=False), (3, 4, 7, 6)),
    "linear": (nn.Linear(4, 6, bias=False), (3, 4)),
    "tokens": (nn.Linear(4, 6, bias=False), (3, 5, 2, 4)),
}


def as_leaf(module):
    module.__class__ = leaf_class(module)
    return module


@pytest.mark.parametrize("name", OPERATORS)
@torch.no_grad()
def test_a_weight_times_its_columns_is_the_output(name, monkeypatch):
    monkeypatch.setattr(columns_module, "POSITIONS", 10**6)
    module, shape = OPERATORS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = module(x)
    leaf = as_leaf(module)
    rows = as_rows(leaf, leaf.weight)
    found = rows @ columns(leaf, x, torch.Generator())
    channels_first = y.reshape(-1, y.shape[-1]).T if isinstance(module, nn.Linear) else y.flatten(2).transpose(0, 1)
    torch.testing.assert_close(found.flatten(), channels_first.flatten(), rtol=1e-5, atol=1e-6)
    assert torch.equal(from_rows(leaf, rows), leaf.weight)


def test_of_many_positions_some_are_taken_and_the_same_of_each_sample():
    leaf = as_leaf(nn.Conv2d(1, 1, 1, bias=False))
    picture = torch.arange(64.0 * 64).view(1, 1, 64, 64)
    found = columns(leaf, torch.cat([picture, picture]), torch.Generator().manual_seed(0)).view(2, -1)
    assert found.shape[1] == POSITIONS == len(found[0].unique())
    assert torch.equal(found[0], found[1])
    assert len((found[0] % 64).unique()) > 32, "columns of the picture are missing"


def test_a_batch_in_parts_has_the_same_moments(monkeypatch):
    leaf = as_leaf(nn.Conv2d(3, 4, 3, bias=False))
    x = torch.randn(5, 3, 7, 7)
    monkeypatch.setattr(columns_module, "POSITIONS", 10**6)
    whole = columns(leaf, x, torch.Generator())
    parts = torch.cat([columns(leaf, part, torch.Generator()) for part in x.split(2)], 2)
    torch.testing.assert_close(whole @ whole.transpose(1, 2), parts @ parts.transpose(1, 2))


def problem(seed, inputs, rows=3, groups=2):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, inputs, inputs, generator=generator, dtype=torch.float64)
    x = mixing @ torch.randn(groups, inputs, 4 * inputs, generator=generator, dtype=torch.float64)
    weight = torch.randn(groups, rows, inputs, generator=generator, dtype=torch.float64)
    size = weight.abs().amax(2, keepdim=True)
    grid = Grid(weight, (size / 128).expand_as(weight), weight.abs() == size)
    return grid, x @ x.transpose(1, 2) + 1e-3 * torch.eye(inputs, dtype=torch.float64)


def column_by_column(grid, moments):
    """Each column in turn is rounded, and the columns that are left take the values of least D H D^T."""
    codes = torch.zeros_like(grid.weight)
    for g in range(len(moments)):
        order = moments[g].diagonal().argsort(descending=True, stable=True)
        for row in range(grid.weight.shape[1]):
            best = grid.weight[g, row].clone()
            for done in range(1, len(order) + 1):
                column, left, fixed = order[done - 1], order[done:], order[:done]
                own = Grid(
                    *(t[g, row].view(1, 1, -1) for t in (grid.weight, grid.scale, grid.held)), stride=grid.stride
                )
                codes[g, row, column] = own.nearest(best.view(1, 1, -1))[0, 0, column]
                change = (codes * grid.scale - grid.weight)[g, row, fixed]
                cross, rest = moments[g][left][:, fixed], moments[g][left][:, left]
                best[left] = grid.weight[g, row, left] - torch.linalg.solve(rest, cross @ change)
    return codes


@given(st.integers(0, 1000), st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_the_columns_that_are_left_take_the_values_of_least_error(seed, inputs):
    grid, moments = problem(seed, inputs)
    torch.testing.assert_close(second_order(grid, moments), column_by_column(grid, moments))


def test_the_errors_of_a_block_reach_the_blocks_after_it(monkeypatch):
    grid, moments = problem(0, 30)
    whole = second_order(grid, moments)
    assert grid.errors(whole, moments).sum() < grid.errors(grid.nearest(grid.weight), moments).sum() / 2
    monkeypatch.setattr(second_order_module, "BLOCK", 7)
    assert torch.equal(second_order(grid, moments), whole)


def test_inputs_that_have_nothing_in_common_leave_every_code_the_nearest():
    grid, moments = problem(0, 6)
    alone = torch.diag_embed(moments.diagonal(dim1=1, dim2=2))
    assert torch.equal(second_order(grid, alone), grid.nearest(grid.weight))


@given(st.integers(0, 1000), st.sampled_from([1, 4, 16]), st.sampled_from([-128, -127]))
@settings(max_examples=20, deadline=None)
def test_codes_are_those_of_the_grid_and_the_largest_keeps_its_own(seed, stride, lowest):
    grid, moments = problem(seed, 5)
    grid = Grid(grid.weight, grid.scale, grid.held, lowest, stride)
    codes = second_order(grid, moments)
    others = codes[~grid.held]
    assert not (others % stride).any()
    assert others.min() >= lowest
    assert others.max() <= 127
    assert torch.equal(codes[grid.held], (grid.weight.sign() * 128)[grid.held].clamp(-128, 127))
