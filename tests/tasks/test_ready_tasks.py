"""From a model and a folder of images without labels to a promoted mix, and the libraries whose models are ready."""

import html
import importlib
import importlib.util
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.commands import run_qflow
from support.picture_files import classes, flat, write_image, write_mask
from support.torchvision_ops import declare

import qflow
from qflow.bundle.targets import BUILT_IN
from qflow.config.keys import conf_dir
from qflow.core.errors import ConfigError, DataError, ModelError
from qflow.study.find import one_study
from qflow.tasks.images import hub, onnx_data, timm_models, torchvision_models, transformers_models
from qflow.tasks.images.samples import decoded
from qflow.tasks.task import batches, make_task
from qflow.tracking.artifacts import Store
from qflow.trial.frames import evaluate_from_start

TASK = [
    *("task=segmentation", "task.model._target_=pixel_net.build", "task.data.root=photos", "task.data.size=[8,12]"),
    *("task.batch_size=4", "device.cost.boundary_ms=0"),
]
SMALL = ["repair=none", "sensitivity.bad_cases=2", "search.n_trials=4", "objective.max_drop=0.2"]


def installed(*names):
    declare()
    return all(importlib.util.find_spec(name) for name in names)


def made(model, data):
    task = make_task(name="t", model=model, data=data)
    return task, evaluate_from_start(task, model, 2, lambda _: None)


@pytest.mark.slow
def test_a_model_and_a_folder_of_images_without_labels_are_enough(tmp_path):
    flat(tmp_path / "photos", 12)
    (tmp_path / "photos" / "bad.png").write_bytes(b"text")
    tuned = run_qflow("tune", "+experiment=int8", *TASK, *SMALL, cwd=tmp_path)
    assert tuned.returncode == 0, tuned.stdout + tuned.stderr
    assert "1 of 13 files cannot be read and are left out: bad.png (no image)" in tuned.stdout
    said = "agreement_pixels is agreement with the float model, not accuracy; float's own is 1 by definition"
    assert tuned.stdout.count(said) == 2  # of float, and below the table
    allow = re.search(r"'?security\.allow=\[[\w.,]+\]'?", tuned.stdout)[0].strip("'")
    assert allow == "security.allow=[pixel_net]"
    where = ["study=segmentation/int8", "tracking.experiment=segmentation"]
    promoted = run_qflow("promote", *where, "tracking.registered_model=seg", allow, cwd=tmp_path)
    assert promoted.returncode == 0, promoted.stdout + promoted.stderr
    assert said in promoted.stdout
    store = Store.open(None, tmp_path / "qflow_out")
    run = store.run(one_study(store, "segmentation/int8", None, "")[1])[0]["qflow.best"]
    assert said in store.run(run)[0]["mlflow.note.content"]
    report = tmp_path / "qflow_out" / "studies" / "segmentation" / "int8" / "report.html"
    assert said in html.unescape(report.read_text())


@pytest.mark.skipif(not installed("timm", "torchvision"), reason="needs the extra timm")
@pytest.mark.slow
def test_a_model_of_timm_gets_its_own_preprocessing_and_names(tmp_path):
    from timm.data import create_transform, resolve_model_data_config

    classes(tmp_path / "set", ("n01440764", "n01484850"))  # two of ImageNet's, by its own names
    for name in ("test_resnet", "test_vit"):
        model = timm_models.build_model(name=name, pretrained=False)
        task, found = made(model, timm_models.build_data(root=str(tmp_path / "set")))
        assert {s.label for s in (*task.data.calibration.samples, *task.data.evaluation.samples)} == {0, 2}
        image, _ = task.data.evaluation[0]
        own = create_transform(**resolve_model_data_config(model), is_training=False)
        name = task.data.evaluation.samples[0].image
        assert torch.equal(image, own(decoded(task.data.evaluation.source, name).convert("RGB")))
        assert found.samples == 3 and task.metric_name == "top1"
    classes(tmp_path / "pets")
    with pytest.raises(DataError, match="2 class folders cannot be the 1000 outputs of the model by order, and cat is"):
        made(model, timm_models.build_data(root=str(tmp_path / "pets")))
    with pytest.raises(ConfigError, match=r"task\.model\.name is one of timm\.list_models\(\), but got resnt50"):
        timm_models.build_model(name="resnt50")
    with pytest.raises(ConfigError, match=r"Weights from a file are task\.model\.weights, but got checkpoint_path"):
        timm_models.build_model(name="test_vit", checkpoint_path="/etc/passwd")


@pytest.mark.skipif(not installed("torchvision"), reason="needs the extra torchvision")
@pytest.mark.slow
def test_models_of_torchvision_classify_images_or_pixels(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = "shufflenet_v2_x0_5"
    model = torchvision_models.build_model(name=name, pretrained=False)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    model = torchvision_models.build_model(name=name, weights=str(tmp_path / "w.pth"))
    task, found = made(model, torchvision_models.build_data(root=str(flat(tmp_path / "flat")), name=name))
    assert (task.metric_name, found.metric, task.data.evaluation[0].shape) == ("agreement_top1", 1.0, (3, 224, 224))
    for i in range(4):
        write_image(tmp_path / "seg" / "images" / f"{i}.jpg", i)
        write_mask(tmp_path / "seg" / "masks" / f"{i}.png", i)
    name = "lraspp_mobilenet_v3_large"
    model = torchvision_models.build_model(name=name, pretrained=False)
    data = torchvision_models.build_data(root=str(tmp_path / "seg"), name=name, size=[32, 32])
    task, found = made(model, data)
    assert task.metric_name == "miou" and set(found.details) >= {"iou/__background__", "iou/aeroplane", "iou/bicycle"}


@pytest.mark.skipif(not installed("transformers", "torchvision", "datasets"), reason="needs the extra huggingface")
@pytest.mark.slow
def test_models_of_transformers_run_with_their_processor_on_a_saved_data_set(tmp_path):
    import datasets
    import transformers as library

    config = library.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    library.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    library.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    files = sorted(str(p) for p in classes(tmp_path / "set").rglob("*.png"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})
    rows = {"image": files, "label": [int("cat" in path) for path in files]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    model = transformers_models.build_model(name=str(tmp_path / "vit"))
    data = transformers_models.build_data(root=str(tmp_path / "saved"), name=str(tmp_path / "vit"))
    task, found = made(model, data)
    assert task.metric_name == "top1" and found.samples == 3 and task.data.evaluation[0][0].shape == (3, 16, 16)
    labels = {s.image.split("/")[0]: s.label for s in (*task.data.calibration.samples, *task.data.evaluation.samples)}
    assert labels == {"dog": 0, "cat": 1}  # as the data set numbers them, not by name
    assert qflow.prepare(model, next(batches(task, "evaluation", 2))[0][0]).graph.nodes[0].name == "quant[pixel_values]"
    with pytest.raises(ConfigError, match="or a folder, but got"):
        transformers_models.build_model(name=str(tmp_path / "none"), pretrained=False)


@pytest.mark.skipif(not installed("transformers"), reason="needs the extra huggingface")
@pytest.mark.slow
def test_a_hub_that_does_not_answer_costs_no_minute(monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(hub, "getproxies", dict)
    began = time.monotonic()
    with pytest.raises(ModelError, match="are in the cache or can be downloaded, but got"):
        transformers_models.build_model(name="nobody/none")
    assert time.monotonic() - began < hub.REACHED + 10.0  # imports transformers
    assert capsys.readouterr().err.splitlines()[0] == "weights      nobody/none: from the cache, or downloaded"
    assert constants.HF_HUB_OFFLINE is False


def onnx_file(path, names=("image", "speed.1")):
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(3, 2)).astype("float32"), "w")
    nodes = [
        helper.make_node("GlobalAveragePool", [names[0]], ["a"], name="pool"),
        helper.make_node("Flatten", ["a"], ["f"], name="flat"),
        helper.make_node("MatMul", ["f", "w"], ["s"], name="dense"),
        *([helper.make_node("Add", ["s", names[1]], ["y"], name="add")] if len(names) > 1 else []),
    ]
    last = "y" if len(names) > 1 else "s"
    shapes = {names[0]: ["n", 3, 8, 10], **{name: ["n", 2] for name in (*names[1:], last)}}
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in shapes.items()]
    graph = helper.make_graph(nodes, "g", values[:-1], values[-1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return str(path)


@pytest.mark.skipif(not installed("onnx", "onnx2torch"), reason="needs the extra onnx")
def test_an_onnx_file_runs_on_arrays_by_the_names_of_its_inputs(tmp_path):
    from qflow.tasks.onnx_model import load

    path, rng = onnx_file(tmp_path / "m.onnx"), np.random.default_rng(0)
    (tmp_path / "set").mkdir()
    for i in range(6):
        arrays = {"image": rng.random((1, 3, 8, 10), "float32"), "speed.1": rng.random(2)}
        np.savez(tmp_path / "set" / f"{i}.npz", **arrays)
    np.savez(tmp_path / "set" / "other.npz", image=rng.random((3, 8, 8)), **{"speed.1": rng.random(2)})
    np.savez(tmp_path / "set" / "code.npz", image=np.array([{}]), **{"speed.1": rng.random(2)})
    model = load(path)
    task, found = made(model, onnx_data.build_data(root=str(tmp_path / "set"), path=path))
    assert (task.metric_name, found.metric) == ("agreement_top1", 1.0)
    (left_out,) = [line for line in task.notes if "cannot be read" in line]
    assert "other.npz (image of shape [3, 8, 8] is not 3 x 8 x 10)" in left_out and "code.npz (no arrays of" in left_out
    batch = next(batches(task, "evaluation", 2))[0]
    assert {name: tuple(t.shape) for name, t in batch.items()} == {"image": (2, 3, 8, 10), "speed_1": (2, 2)}
    names = [node.name for node in qflow.prepare(model, batch).graph.nodes]
    assert names[:2] == ["quant[image]", "quant[speed_1]"] and names[-1] == "add[add]"


@pytest.mark.skipif(not installed("onnx", "onnx2torch"), reason="needs the extra onnx")
def test_an_onnx_file_runs_on_images_at_the_size_of_its_input(tmp_path):
    from qflow.tasks.onnx_model import load

    path = onnx_file(tmp_path / "m.onnx", ("image",))
    task, _ = made(load(path), onnx_data.build_data(root=str(classes(tmp_path / "set")), path=path))
    assert task.metric_name == "top1" and task.data.evaluation[0][0].shape == (3, 8, 10)
    two = onnx_file(tmp_path / "two.onnx")
    with pytest.raises(ConfigError, match=r"width\], but got image \[batch, 3, 8, 10\], speed"):
        onnx_data.build_data(root=str(tmp_path / "set"), path=two)
    with pytest.raises(ModelError, match="task.model.path is an ONNX file, but got"):
        onnx_data.build_data(root=str(tmp_path / "set"), path=str(tmp_path / "none.onnx"))


def test_every_target_of_the_shipped_tasks_is_built_in():
    texts = [path.read_text() for group in ("task", "metric") for path in (conf_dir() / group).glob("*.yaml")]
    named = {name for text in texts for name in re.findall(r"_target_: (qflow\.[\w.]+)", text)}
    assert len(named) > 15 and named <= BUILT_IN


def test_every_target_that_a_refusal_or_a_page_names_exists():
    root = Path(__file__).parents[2]
    files = [*(root / "qflow").rglob("*.py"), *(root / "docs").rglob("*.md"), *(root / "conf").rglob("*.yaml")]
    named = {name for file in files for name in re.findall(r"_target_[=:]\s*(qflow\.[\w.]+\w)", file.read_text())}
    assert len(named) > 15
    for name in named:
        home, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(home), attribute), name
