"""Bytes a frame, by hand on a small network, and what a smaller chip makes of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qflow.core.dtype import QDtype
from qflow.core.graph import ModelGraph, OpKind, OpNode
from qflow.core.resolve import resolve
from qflow.core.setter import TemplateSetter
from qflow.cost_model.features import features
from qflow.cost_model.traffic import traffic

SIZE = 8 * 8 * 8


def residual():
    """x -> a -> b, then a + b through a view: a must outlive b."""
    shape = (1, 8, 8, 8)
    nodes = (
        OpNode("x", OpKind.input, "QuantStub", (), shape, "x"),
        OpNode("a", OpKind.lut, "SiLU", ("x",), shape, "a"),
        OpNode("v", OpKind.move, "view", ("a",), (1, 512), None),
        OpNode("b", OpKind.lut, "SiLU", ("v",), (1, 512), "b"),
        OpNode("c", OpKind.add, "add", ("v", "b"), (1, 512), "c"),
    )
    return ModelGraph(nodes, (("0", "c"),))


def rows(dtype=QDtype.qint8):
    graph = residual()
    return features(graph, resolve(graph, [TemplateSetter(dtype)], "nash-m"))


def test_without_a_size_of_the_chip_nothing_spills_and_it_says_so():
    found = traffic(rows(), None)
    assert found.lower_bound
    assert (found.input_bytes, found.output_bytes, found.spilled_bytes, found.weight_bytes) == (SIZE, SIZE, 0, 0)
    assert found.peak_bytes == 3 * SIZE  # a (once, though viewed), b and c
    assert found.bytes == 2 * SIZE
    assert found.bandwidth(30.0) == pytest.approx(2 * SIZE * 30 / 2**30)


def test_what_is_read_last_leaves_first_and_costs_twice_its_bytes():
    assert traffic(rows(), 3 * SIZE * 1e-6).spilled_bytes == 0
    found = traffic(rows(), 2 * SIZE * 1e-6)
    assert not found.lower_bound
    assert found.spilled_bytes == 2 * SIZE
    assert sum(spilled for *_, spilled in found.by_op.values()) == 2 * SIZE


def test_int16_doubles_the_bytes_of_activations():
    for size in (None, 4 * SIZE * 1e-6):
        narrow, wide = traffic(rows(), size and size / 2), traffic(rows(QDtype.qint16), size)
        assert wide.bytes == 2 * narrow.bytes
        assert wide.peak_bytes == 2 * narrow.peak_bytes


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5 * SIZE), st.integers(0, 5 * SIZE))
def test_a_larger_chip_never_moves_more(a, b):
    small, large = sorted((a, b))
    assert traffic(rows(), large * 1e-6).bytes <= traffic(rows(), small * 1e-6).bytes
