"""An ONNX file goes the way of any model; without onnx2torch the user is told what to install."""

import importlib.util

import pytest
import torch

import qflow
from qflow.core.errors import ConfigError, ModelError
from qflow.tasks.onnx_model import load


def converts():
    try:
        import onnx2torch  # noqa: F401
    except (ImportError, RuntimeError):
        return False
    return importlib.util.find_spec("onnx") is not None


@pytest.mark.skipif(converts(), reason="onnx2torch is here")
def test_without_the_extra_it_says_what_to_install(tmp_path):
    with pytest.raises(ConfigError, match=r"pip install 'qflow\[onnx\]'"):
        load(tmp_path / "model.onnx")


@pytest.mark.skipif(not converts(), reason="needs the extra onnx")
def test_an_onnx_file_is_prepared_under_its_node_names(tmp_path):
    import numpy
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = numpy.random.default_rng(0)
    weight = numpy_helper.from_array(rng.normal(size=(8, 3, 3, 3)).astype("float32"), "w")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], name="conv"),
        helper.make_node("Sigmoid", ["c"], ["y"], name="gate"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", c, 8, 8]) for n, c in (("x", 3), ("y", 8))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "m.onnx")
    prepared = qflow.prepare(load(tmp_path / "m.onnx"), torch.randn(2, 3, 8, 8))
    assert [n.name for n in prepared.graph.nodes][1:] == ["conv", "gate"]
    (tmp_path / "bad.onnx").write_bytes(b"no protobuf")
    with pytest.raises(ModelError, match="onnx2torch converts, but got"):
        load(tmp_path / "bad.onnx")
    with pytest.raises(ModelError, match="An ONNX model is a file"):
        load(tmp_path / "none.onnx")
