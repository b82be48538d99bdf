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
    assert torch.allclose(model(x), torch.cat([model(sample[None]) for sample in x]), atol=1e-3)  # of values up to 500
    names = [n.name.partition("[")[0] for n in qflow.prepare(model, x).graph.nodes]
    assert names[1:] == ["conv", "up", "flatten", "fc", "anchors", "images"]


def patches(batch, token="class"):
    """Nodes, sizes and constants of a small vision transformer's beginning and end, as it is exported at `batch`."""
    import numpy
    from onnx import helper, numpy_helper

    constants = tensors(w=(8, 3, 4, 4), token=(1, 1, 8), place=(1, 5, 8), g=(8, 10))
    for name, values in {"rows": (batch, 8, 4), "one": (1, 1, 8), "at": (0,), "end": (1,), "flat": (batch, 8)}.items():
        constants[name] = numpy_helper.from_array(numpy.array(values, dtype="int64"), name)
    expand = [helper.make_node("Expand", ["token", "one"], ["tokens"], name="expand")]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], strides=[4, 4], name="patch"),
        helper.make_node("Reshape", ["c", "rows"], ["r"], name="rows"),
        helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1], name="turn"),
        *(expand if token == "expanded" else []),
        helper.make_node("Concat", ["tokens" if token == "expanded" else "token", "t"], ["k"], axis=1, name="join"),
        helper.make_node("Add", ["k", "place"], ["p"], name="add"),
        helper.make_node("Slice", ["p", "at", "end", "end"], ["s"], name="first"),
        helper.make_node("Reshape", ["s", "flat"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "g"], ["y"], name="fc"),
    ]
    return nodes, {"x": [1 if batch == 1 else "n", 3, 8, 8], "y": [1 if batch == 1 else "n", 10]}, constants


@pytest.mark.skipif(not converts(), reason="needs the extra onnx")
@pytest.mark.parametrize("token", ["class", "expanded"])
def test_a_constant_that_is_joined_to_each_sample_follows_the_batch(token, tmp_path):
    nodes, shapes, constants = patches(1, token)
    model = written(tmp_path / "m.onnx", nodes, shapes, list(constants.values()))
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model(x), torch.cat([model(sample[None]) for sample in x]), atol=1e-5)
    prepared = qflow.prepare(model, x)
    qflow.calibrate(prepared, [x])
    right = model(x)
    assert float((prepared(x) - right).norm() / right.norm()) < 0.2  # int8 on three samples
    assert "join[cat]" in prepared.graph.by_name


@pytest.mark.skipif(not converts(), reason="needs the extra onnx")
def test_a_batch_that_cannot_be_freed_is_refused_and_an_open_one_is_taken(tmp_path):
    import numpy
    from onnx import helper, numpy_helper

    constants = tensors(w=(8, 3, 4, 4), more=(1, 8, 2, 2))
    constants["rows"] = numpy_helper.from_array(numpy.array((0, 8, 4), dtype="int64"), "rows")
    conv = helper.make_node("Conv", ["x", "w"], ["c"], strides=[4, 4], name="patch")
    across = [conv, helper.make_node("Softmax", ["c"], ["y"], axis=0, name="across")]  # at batch 1 it gives ones
    joined = [conv, helper.make_node("Concat", ["c", "more"], ["y"], axis=0, name="samples")]
    for nodes, count in ((across, 1), (joined, 2)):
        with pytest.raises(ModelError, match=r"batch 1 and gives: other numbers at batch 2\. .*dynamic_axes") as caught:
            written(tmp_path / "m.onnx", nodes, {"x": [1, 3, 8, 8], "y": [count, 8, 2, 2]}, list(constants.values()))
        assert "\n" not in str(caught.value)
    opened = [conv, helper.make_node("Reshape", ["c", "rows"], ["y"], name="rows")]
    model = written(tmp_path / "n.onnx", opened, {"x": ["n", 3, 8, 8], "y": ["n", 8, 4]}, list(constants.values()))
    assert qflow.prepare(model, torch.randn(2, 3, 8, 8)).graph.by_name["patch"].kind == "conv"
