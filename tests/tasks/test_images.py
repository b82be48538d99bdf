"""Images of the user's as data: folders, archives, labels, masks, splits, and files that cannot be read."""

import os
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from support.picture_files import classes, flat, write_image, write_mask
from torch import nn

from qflow.core.errors import ConfigError, DataError, ModelError
from qflow.tasks.files.listing import choose
from qflow.tasks.files.sources import source_of
from qflow.tasks.files.weights import load_weights
from qflow.tasks.identity import of_task
from qflow.tasks.images.own_models import build_data
from qflow.tasks.metrics.agreement import Agreement
from qflow.tasks.metrics.labels import MeanIoU
from qflow.tasks.task import batches, make_task
from qflow.trial.frames import evaluate_from_start

SIZE = [8, 10]


class Net(nn.Module):
    """Scores of classes for each pixel, or for the whole image."""

    def __init__(self, outputs, dense):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.dense = nn.Conv2d(3, outputs, 1), dense

    def forward(self, image):
        scores = self.conv(image)
        return {"out": scores} if self.dense else scores.mean((2, 3))


def task_of(root, outputs=2, dense=False, metric=None, **settings):
    data = build_data(root=str(root), size=SIZE, dense=dense, **settings)
    return make_task(name="t", model=Net(outputs, dense).eval(), data=data, metric=metric)


def inputs(task, split="evaluation"):
    return torch.stack([s if isinstance(s, torch.Tensor) else s[0] for s in getattr(task.data, split)])


def evaluated(task, batch_size=2):
    return evaluate_from_start(task, task.model, batch_size, lambda _: None)


# ---- where they lie


def test_a_folder_and_archives_of_it_hold_the_same_samples(tmp_path):
    folder = classes(tmp_path / "set")
    (folder / "cat" / ".hidden.png").write_bytes(b"")
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as tar:
        tar.add(folder, arcname="above/set")
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(folder, arcname=".")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as packed:
        for path in sorted(folder.rglob("*.png"), reverse=True):  # in another order
            packed.write(path, f"above/{path.relative_to(folder)}")
    expected = task_of(folder)
    for name in ("set.tar.gz", "set.tar", "set.zip"):
        task = task_of(tmp_path / name)
        assert [s.label for s in task.data.evaluation.samples] == [s.label for s in expected.data.evaluation.samples]
        assert torch.equal(inputs(task), inputs(expected))


def test_loading_by_processes_changes_nothing(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as packed:
        for path in sorted(flat(tmp_path / "set").iterdir()):
            packed.write(path, path.name)
    one, two = (task_of(tmp_path / "set.zip", workers=workers) for workers in (0, 2))
    assert evaluated(one) == evaluated(two)
    for (a, _), (b, _) in zip(batches(one, "evaluation", 1), batches(two, "evaluation", 1), strict=True):
        assert torch.equal(a, b)
    assert of_task(one).content == of_task(two).content


def test_nothing_at_root_is_said(tmp_path):
    for root, words in ((None, "but got none"), (tmp_path / "no", "not there"), (tmp_path, "but got none in")):
        with pytest.raises(DataError, match=words):
            make_task(name="t", model=Net(2, False), data=build_data(root=root and str(root), size=SIZE))
    (tmp_path / "x.tar").write_text("no archive")
    with pytest.raises(DataError, match=r"a \.zip or a \.tar, but got .*x\.tar"):
        source_of(str(tmp_path / "x.tar"))


# ---- which calibrate and which evaluate


def test_one_folder_is_split_into_disjoint_parts_that_any_order_of_files_gives(tmp_path):
    task = task_of(flat(tmp_path / "set", 7), calibration_size=3)
    parts = [{s.image for s in split.samples} for split in (task.data.calibration, task.data.evaluation)]
    assert [len(part) for part in parts] == [3, 4] and parts[0].isdisjoint(parts[1])
    assert "3 of 7 calibrate, 4 others evaluate" in task.notes[0]
    names = [f"{i}.png" for i in range(7)]
    assert choose(names, 3, None, "").calibration == tuple(sorted(parts[0]))
    more = choose([*names, "new.png"], 3, None, "")
    assert len(parts[0] & set(more.calibration)) >= 2  # a new file moves one at most


def test_folders_of_the_usual_names_are_the_splits(tmp_path):
    classes(tmp_path / "train", ("bus", "train"))  # a class may be called so
    classes(tmp_path / "val", ("bus", "train"), 2)
    task = task_of(tmp_path, evaluation_size=3)
    assert all(s.image.startswith("train/") for s in task.data.calibration.samples)
    assert [s.image.split("/")[0] for s in task.data.evaluation.samples] == ["val"] * 3
    assert {s.image.split("/")[1]: s.label for s in task.data.calibration.samples} == {"bus": 0, "train": 1}


# ---- labels


def test_class_folders_are_outputs_by_order_or_by_a_file(tmp_path):
    classes(tmp_path / "set")
    task = task_of(tmp_path / "set")
    assert task.metric_name == "top1" and "2 class folders are the outputs, by order" in task.notes[-1]
    assert task.data.sample_classes(next(batches(task, "evaluation", 6))[0]) == [
        s.label for s in task.data.evaluation.samples
    ]
    (tmp_path / "names.txt").write_text("bird\ndog\ncat\n")
    named = task_of(tmp_path / "set", outputs=3, classes=str(tmp_path / "names.txt"))
    assert {
        s.image.split("/")[0]: s.label for s in [*named.data.calibration.samples, *named.data.evaluation.samples]
    } == {"cat": 2, "dog": 1}
    (tmp_path / "names.txt").write_text("cat\n")
    with pytest.raises(DataError, match=r"names\.txt without dog"):
        task_of(tmp_path / "set", classes=str(tmp_path / "names.txt"))


def test_without_labels_the_metric_is_agreement_and_said(tmp_path):
    task = task_of(flat(tmp_path / "set"))
    assert task.metric_name == "agreement_top1"
    assert "no class folders; without labels the metric is agreement with float" in task.notes[-1]
    assert evaluated(task).metric == 1.0


def test_images_in_class_folders_and_beside_them_are_refused(tmp_path):
    write_image(classes(tmp_path / "set") / "alone.png")
    with pytest.raises(DataError, match=r"but got both alone\.png and cat/"):
        task_of(tmp_path / "set")


# ---- files that cannot be read


def test_a_broken_file_is_named_and_counted_and_the_others_are_used(tmp_path):
    folder = flat(tmp_path / "set", 12)
    for i in range(1, 5):
        content = (folder / f"{i}.png").read_bytes()
        (folder / f"{i}.png").write_bytes(content[: len(content) // 2] if i > 1 else b"text")
    task = task_of(folder)
    lines = [text for text in task.notes if "cannot be read" in text]
    assert len(lines) == 1 and "4 of 12 files cannot be read and are left out: " in lines[0]
    assert lines[0].endswith(" and 1 more")
    assert (
        len(task.data.calibration) + len(task.data.evaluation)
        == 8
        == len(inputs(task)) + len(inputs(task, "calibration"))
    )
    for path in folder.iterdir():
        path.write_bytes(b"text")
    with pytest.raises(DataError, match=r"got none to calibrate with, of 12 in .*no image"):
        task_of(folder)


def test_a_file_that_breaks_later_is_named(tmp_path):
    task = task_of(flat(tmp_path / "set"))
    name = task.data.evaluation.samples[0].image
    (tmp_path / "set" / name).write_bytes(b"")
    with pytest.raises(DataError, match=f"but got {name}: no image"):
        list(batches(task, "evaluation", 2))


# ---- masks


def test_miou_of_masks_is_that_of_its_definition_and_names_each_class(tmp_path):
    for i in range(6):
        write_image(tmp_path / "images" / f"{i}.jpg", i)
        write_mask(tmp_path / "masks" / f"{i}.png", i)
    (tmp_path / "names.txt").write_text("road\ncar\nsky\n")
    task = task_of(tmp_path, outputs=3, dense=True, classes=str(tmp_path / "names.txt"))
    found = evaluated(task)
    images, masks = next(batches(task, "evaluation", 6))[0]
    counted, classes_found = masks != 255, task.model(images)["out"].argmax(1)
    iou = []
    for c in range(3):
        ours, theirs = (classes_found == c) & counted, (masks == c) & counted
        iou.append(float((ours & theirs).sum() / (ours | theirs).sum()))
    assert not counted.all()
    assert found.metric == pytest.approx(np.mean(iou))
    assert found.details == pytest.approx(dict(zip(("iou/road", "iou/car", "iou/sky"), iou, strict=True)))
    assert found == evaluated(task)  # nothing is left of the first


def test_miou_leaves_out_what_does_not_occur_and_refuses_classes_that_are_none():
    metric, masks = MeanIoU(), torch.tensor([[[0, 1], [255, 1]]])
    scores = nn.functional.one_hot(torch.tensor([[[0, 1], [3, 0]]]), 4).permute(0, 3, 1, 2).float()
    metric.update(scores, (None, masks))
    assert metric.details() == {"iou/class 0": 0.5, "iou/class 1": 0.5} and metric.compute() == 0.5
    with pytest.raises(DataError, match="Masks hold classes 0 to 3 and the ignore index 255, but got 9"):
        metric.update(scores, (None, masks.clamp(max=9)))


def test_masks_that_are_missing_or_colours_are_refused(tmp_path):
    for i in range(4):
        write_image(tmp_path / "images" / f"{i}.jpg", i)
        write_image(tmp_path / "masks" / f"{i}.png", i)
    with pytest.raises(DataError, match=r"a mask holds one class|A mask holds one class number a pixel"):
        inputs(task_of(tmp_path, dense=True))
    (tmp_path / "masks" / "2.png").unlink()
    with pytest.raises(DataError, match=r"but got images/2\.jpg without one"):
        task_of(tmp_path, dense=True)
    shutil.rmtree(tmp_path / "masks")
    assert task_of(tmp_path, dense=True).metric_name == "agreement_pixels"
    assert isinstance(task_of(tmp_path, dense=True, metric=Agreement(by="cosine")).metric, Agreement)


# ---- weights


def test_weights_come_from_a_file_of_tensors_alone(tmp_path):
    source = Net(4, False)
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "w.pth"
    )
    model = Net(4, False)
    nn.init.zeros_(model.conv.weight)
    load_weights(model, tmp_path / "w.pth")
    assert torch.equal(model.conv.weight, source.conv.weight)
    with pytest.raises(ModelError, match=r"have another shape of conv\.weight \(2 such names\)"):
        load_weights(Net(5, False), tmp_path / "w.pth")
    torch.save({"conv.weight": os.system}, tmp_path / "code.pth")
    with pytest.raises(ModelError, match="a .pth file of tensors alone, but got"):
        load_weights(model, tmp_path / "code.pth")


def test_a_preprocessing_that_is_not_stated_is_asked_for():
    with pytest.raises(ConfigError, match=r"task\.data\.size is \[height, width\], but got None"):
        build_data(root="x")


def test_the_preprocessing_is_the_stated_one(tmp_path):
    Image.new("RGB", (30, 30), (255, 0, 128)).save(tmp_path / "1.png")
    Image.new("RGB", (30, 30), (255, 0, 128)).save(tmp_path / "2.png")
    task = make_task(
        name="t",
        model=Net(2, False),
        data=build_data(root=str(tmp_path), size=SIZE, mean=[0, 0, 0.5], std=[1, 1, 0.5], dense=False),
    )
    assert inputs(task).shape == (1, 3, *SIZE)
    assert inputs(task).mean((0, 2, 3)).tolist() == pytest.approx([1, 0, 128 / 255 / 0.5 - 1], abs=1e-6)
