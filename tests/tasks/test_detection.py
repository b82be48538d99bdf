"""The detection task: a COCO folder as data, boxes from outputs, and mAP equal to that of pycocotools by hand."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from qflow.core.errors import ConfigError, DataError, NotFiniteError
from qflow.tasks.detection.adapters import UltralyticsBoxes, UltralyticsMaps
from qflow.tasks.detection.annotations import read
from qflow.tasks.detection.boxes import best_boxes, letterbox, overlaps, to_picture
from qflow.tasks.detection.data import CocoData, Pictures
from qflow.tasks.detection.example import CATEGORIES, write_example
from qflow.tasks.detection.metric import MeanAP

IDS = list(CATEGORIES)
FAR = torch.tensor([[0.0, 0, 8, 8], [1, 0, 9, 8], [40, 40, 60, 60]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("coco")
    write_example(made, 24, seed=1)
    return made


def data_of(folder, **more):
    given = {"size": 96, "calibration_size": 4, **more}
    return CocoData(str(folder / "instances.json"), str(folder / "images"), **given)


def changed(folder, tmp_path, change):
    """A copy of the annotations after `change`."""
    content = json.loads((folder / "instances.json").read_text())
    change(content)
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(content))
    return str(file)


# ---- data


def test_pictures_are_letterboxed_and_boxes_come_back_to_the_picture(folder):
    data = data_of(folder)
    assert (len(data.calibration), len(data.evaluation)) == (4, 20)
    images, truths = data.collate([data.evaluation[i] for i in range(20)])
    assert images.shape == (20, 3, 96, 96)
    assert images.min() >= 0 and images.max() <= 1
    assert any(len(truth["boxes"]) == 0 for truth in truths) and any(bool(truth["crowd"].any()) for truth in truths)
    # the corners of the letterboxed picture are those of the picture itself
    for image, truth in zip(images, truths, strict=True):
        scale, left, top, width, height = truth["place"].tolist()
        inside = torch.tensor([[left, top, left + scale * width, top + scale * height]])
        assert torch.allclose(to_picture(inside, truth["place"]), torch.tensor([[0, 0, width, height]]).double())
        grey = (image * 255).round() == 114
        assert bool(grey[:, : int(top)].all()) and bool(grey[:, :, : int(left)].all())


@pytest.mark.parametrize("size", [(160, 120), (50, 700), (3, 3), (1, 2000)])
def test_a_picture_of_any_shape_fits(size):
    fit = letterbox(size, (64, 96))
    assert 1 <= fit.scaled[0] <= 96 and 1 <= fit.scaled[1] <= 64
    box = torch.tensor([[*fit.corner, fit.corner[0] + fit.scaled[0], fit.corner[1] + fit.scaled[1]]])
    assert torch.allclose(to_picture(box, fit.place)[0, 2:], torch.tensor(size).double(), atol=1 / fit.scale)


def test_broken_files_are_named_counted_and_left_out(tmp_path):
    write_example(tmp_path, 8)
    whole = (tmp_path / "images/0001.jpg").read_bytes()
    (tmp_path / "images/0001.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "images/0002.jpg").unlink()
    Image.new("RGB", (31, 30)).save(tmp_path / "images/0003.jpg")
    data = data_of(tmp_path, calibration_size=1, workers=2)
    assert len(data.evaluation) + len(data.calibration) == 5
    first, said = data.notes
    assert first.endswith("instances.json: 8 pictures, of which 1 calibrate")
    assert said.startswith("data         3 of 8 files cannot be read and are left out: ")
    for file, why in (("1.jpg", "image file is truncated"), ("2.jpg", "No such file"), ("3.jpg", "31x30 instead of")):
        assert f"{file} ({why}" in said


def test_a_turned_picture_is_read_as_its_annotations_say(folder, tmp_path):
    content = json.loads((folder / "instances.json").read_text())
    image = next(i for i in content["images"] if i["width"] > i["height"])
    upright = Image.open(folder / "images" / image["file_name"])
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / image["file_name"], exif=exif)
    straight, turned = (read(folder / "instances.json", root).pictures for root in (folder / "images", tmp_path))
    (k,) = [k for k, one in enumerate(straight) if one.file.endswith(image["file_name"])]
    look = torch.zeros(3, 1, 1), torch.ones(3, 1, 1), 114
    (straight, _), (turned, truth) = (Pictures([(k, one[k])], (96, 96), look)[0] for one in (straight, turned))
    assert truth["place"][3:].tolist() == [image["width"], image["height"]]
    assert (straight - turned).abs().mean() < 0.02


def test_another_file_to_train_on(folder, tmp_path):
    write_example(tmp_path, 6, seed=2)
    more = {"train_annotations": str(tmp_path / "instances.json"), "train_root": str(tmp_path / "images")}
    data = data_of(folder, evaluation_size=7, **more)
    assert (len(data.train), len(data.calibration), len(data.evaluation)) == (6, 4, 7)
    assert all(str(tmp_path) in picture.file for _, picture in data.calibration.pictures)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(annotations=[]), "needs some to find, but got none in 20 pictures"),
        (lambda c: [a.update(iscrowd=1) for a in c["annotations"]], "needs some to find, but got none in 20"),
        (lambda c: c.pop("categories"), "lists images, annotations, categories, but got no categories"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, -3, 4]), r"but got the box \[1, 2, -3, 4\] for left, top"),
        (lambda c: c["annotations"][0].update(category_id=1), "but got the unknown category 1"),
        (lambda c: c["images"][0].pop("file_name"), "but got no 'file_name'"),
        (lambda c: c["images"][0].update(id=None), "'<' not supported"),
    ],
)
def test_annotations_that_cannot_be_used_are_refused_in_a_line(folder, tmp_path, change, said):
    with pytest.raises(DataError, match=said):
        CocoData(changed(folder, tmp_path, change), str(folder / "images"), size=96, calibration_size=4)


def test_missing_files_are_refused_in_a_line(folder, tmp_path):
    with pytest.raises(DataError, match="but got .*none.json: No such file or directory. Correct the path."):
        CocoData(str(tmp_path / "none.json"), str(tmp_path))
    with pytest.raises(DataError, match="but got none to calibrate with, of 24 in .*No such file"):
        CocoData(str(folder / "instances.json"), str(tmp_path))
    with pytest.raises(ConfigError, match="Set task.data.annotations and task.data.root"):
        CocoData(None, None)
    with pytest.raises(ConfigError, match=r"Write size=\[480,640\]"):
        data_of(folder, size=[96])


# ---- boxes and adapters


def test_double_boxes_of_a_class_are_left_out_best_first():
    scores = torch.tensor([[0.9, 0.2], [0.8, 0.3], [0.5, 0.0]])
    found = best_boxes(FAR, scores, least_score=0.1, most_overlap=0.6)
    assert found["labels"].tolist() == [0, 0, 1]
    assert found["scores"].tolist() == pytest.approx([0.9, 0.5, 0.3])
    assert torch.equal(found["boxes"], FAR[[0, 2, 1]])
    assert overlaps(FAR)[0, 1] == pytest.approx(7 / 9)
    assert len(best_boxes(FAR, scores, least_score=0.95, most_overlap=0.6)["boxes"]) == 0


def test_outputs_of_a_yolo_decoded_or_as_maps():
    """A map whose softmax lies on one bin says that distance; the decoded form says the same box."""
    logits = torch.full((1, 4 * 4 + 2, 2, 4), -20.0)
    for side, cells in enumerate((1, 0, 2, 1)):  # left, top, right, bottom of the cell (0, 1)
        logits[0, side * 4 + cells, 0, 1] = 20.0
    logits[0, 16 + 1, 0, 1] = 3.0
    (maps,) = UltralyticsMaps(bins=4)([logits], (16, 32))
    assert maps["boxes"][0].tolist() == pytest.approx([4.0, 4.0, 28.0, 12.0])
    assert (maps["labels"].tolist(), maps["scores"].tolist()) == ([1], pytest.approx([0.9526], abs=1e-4))
    decoded = torch.tensor([16.0, 8, 24, 8, 0.0, 0.9526])[None, :, None]
    (found,) = UltralyticsBoxes()((decoded, "features"), (16, 32))
    assert found["boxes"][0].tolist() == maps["boxes"][0].tolist()
    with pytest.raises(ConfigError, match=r"takes a tensor \[B, 4 \+ C, N\], but got \[1, 18, 2, 4\]"):
        UltralyticsBoxes()(logits, (16, 32))


# ---- mAP


pycocotools = pytest.importorskip("pycocotools.coco", reason="the extra `detection` is not installed")


def guessed(truths, seed=0):
    """What an imperfect detector finds: boxes of the input beside the true ones, doubled, some of other classes."""
    random = np.random.default_rng(seed)
    found = []
    for truth in truths:
        scale, left, top = truth["place"][:3].tolist()
        boxes, labels = truth["boxes"].numpy().repeat(2, 0), truth["categories"].tolist() * 2
        boxes = boxes + random.normal(0, 3, boxes.shape)
        boxes[:, 2:] = boxes[:, :2] + np.maximum(boxes[:, 2:], 1)
        moved = torch.from_numpy(boxes * scale + [left, top, left, top])
        index = [IDS.index(label) if random.random() < 0.8 else int(random.integers(3)) for label in labels]
        scores = torch.from_numpy(random.random(len(index)).round(1))  # with ties
        found.append({"boxes": moved, "scores": scores, "labels": torch.tensor(index, dtype=torch.int64)})
    return found


def by_hand(file, evaluated, truths, found):
    """The twelve figures of COCO, from the annotation file itself and from results in its own form."""
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = pycocotools.COCO(str(file))
        images, rows = sorted(truth.getImgIds()), []
        for one, guess in zip(truths, found, strict=True):
            scale, left, top, width, height = one["place"].tolist()
            for (x0, y0, x1, y1), score, label in zip(
                *(guess[k].tolist() for k in ("boxes", "scores", "labels")), strict=True
            ):
                x0, x1 = (min(max((x - left) / scale, 0.0), width) for x in (x0, x1))
                y0, y1 = (min(max((y - top) / scale, 0.0), height) for y in (y0, y1))
                where = images[int(one["index"])]
                row = {"image_id": where, "category_id": IDS[label], "bbox": [x0, y0, x1 - x0, y1 - y0]}
                rows.append({**row, "score": score})
        evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluation.params.imgIds = [images[index] for index in evaluated]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def test_map_is_that_of_pycocotools_by_hand(folder):
    data = data_of(folder)
    samples = [data.evaluation[i] for i in range(len(data.evaluation))]
    found = guessed([truth for _, truth in samples])
    parts = iter([found[:7], found[7:14], found[14:]])
    metric = MeanAP(lambda outputs, size: next(parts), str(folder / "instances.json"))
    for first in (0, 7, 14):
        metric.update(None, data.collate(samples[first : first + 7]))
    truths = [truth for _, truth in samples]
    hand = by_hand(folder / "instances.json", [int(t["index"]) for t in truths], truths, found)
    assert metric.compute() == hand.stats[0] > 0.1
    details = metric.details()
    assert [details[k] for k in ("map50", "map75", "small", "medium", "large")] == [max(v, -1) for v in hand.stats[1:6]]
    for k, name in enumerate(CATEGORIES.values()):
        own = hand.eval["precision"][:, :, k, 0, 2]
        assert details[f"class/{name}"] == np.mean(own[own > -1])
    metric.reset()
    with pytest.raises(DataError, match="mAP needs boxes to find"):
        metric.compute()


def metric_on(folder, found, **more):
    data = data_of(folder)
    metric = MeanAP(lambda outputs, size: [found], str(folder / "instances.json"), **more)
    metric.update(None, data.collate([data.evaluation[0]]))
    return metric


def test_labels_are_places_or_ids_of_categories(folder):
    one = {"boxes": FAR[:1], "scores": torch.ones(1), "labels": torch.tensor([2])}
    assert [metric_on(folder, one, labels=k)._found[0]["category_id"] for k in (None, "id", [5, 6, 2])] == [7, 2, 2]
    with pytest.raises(ConfigError, match="one of 3 categories, 0 to 2, but got 7. If labels are category ids"):
        metric_on(folder, {**one, "labels": torch.tensor([7])})
    with pytest.raises(NotFiniteError, match="Check the adapter"):
        metric_on(folder, {**one, "scores": torch.tensor([float("nan")])})
    with pytest.raises(ConfigError, match="task.metric.adapter._target_="):
        MeanAP(None, str(folder / "instances.json"))
