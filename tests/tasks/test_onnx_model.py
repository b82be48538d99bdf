"""An ONNX file goes the way of any model; without onnx2torch the user is told what to install."""

import importlib.util

import pytest
import torch
from support.torchvision_ops import declare

import qflow
from qflow.core.errors import ConfigError, ModelError
from qflow.tasks.onnx_model import load


def converts():
    declare()
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


def written(path, nodes, shapes, constants):
    """The loaded model of an ONNX file with one input `x` and one output `y`."""
    import onnx
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return load(path)


def tensors(**shapes):
    import numpy
    from onnx import numpy_helper

    rng = numpy.random.default_rng(0)
    return {n: numpy_helper.from_array(rng.normal(size=s).astype("float32"), n) for n, s in shapes.items()}


@pytest.mark.skipif(not converts(), reason="needs the extra onnx")
def test_weights_may_be_constant_nodes_or_copies_and_any_node_name_is_taken(tmp_path):
    from onnx import helper

    held = tensors(w=(4, 3, 3, 3), b=(4,))
    nodes = [
        helper.make_node("Constant", [], ["w2"], value=held["w"], name="c0"),
        helper.make_node("Identity", ["b"], ["b2"], name="copy"),
        helper.make_node("Conv", ["x", "w2", "b2"], ["c"], name="backbone.conv"),
        helper.make_node("Constant", [], ["k"], value_float=0.5, name="c1"),
        helper.make_node("Mul", ["c", "k"], ["y"], name="half"),
    ]
    model = written(tmp_path / "m.onnx", nodes, {"x": ["n", 3, 8, 8], "y": ["n", 4, 6, 6]}, [held["b"]])
    graph = qflow.prepare(model, torch.randn(2, 3, 8, 8)).graph
    assert [n.name for n in graph.nodes][1:] == ["backbone/conv", "half_[mul]"]
    assert graph.by_name["backbone/conv"].weight == "backbone/conv"


@pytest.mark.skipif(not converts(), reason="needs the extra onnx")
def test_a_file_that_is_exported_at_batch_1_runs_at_any_batch(tmp_path):
    import numpy
    from onnx import helper, numpy_helper

    constants = tensors(w=(4, 3, 3, 3), b=(4,), g=(576, 10))
    for name, shape in {"flat": (1, -1), "rows": (-1, 5), "back": (1, 2, 5), "sizes": (1, 4, 12, 12)}.items():
        constants[name] = numpy_helper.from_array(numpy.array(shape, dtype="int64"), name)
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv"),
        helper.make_node("Resize", ["c", "", "", "sizes"], ["u"], mode="nearest", name="up"),
        helper.make_node("Reshape", ["u", "flat"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "g"], ["z"], name="fc"),
        helper.make_node("Reshape", ["z", "rows"], ["r"], name="anchors"),
        helper.make_node("Reshape", ["r", "back"], ["y"], name="images"),
    ]
    model = written(tmp_path / "m.onnx", nodes, {"x": [1, 3, 8, 8], "y": [1, 2, 5]}, list(constants.values()))
    x = torch.randn(3, 3, 8, 8)
    assert torch.allclose(model(x), torch.cat([model(sample[None]) for sample in x]), atol=1e-5)
    names = [n.name.partition("[")[0] for n in qflow.prepare(model, x).graph.nodes]
    assert names[1:] == ["conv", "up", "flatten", "fc", "anchors", "images"]
