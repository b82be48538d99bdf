"""The perception task: its pictures, its metric on outputs made by hand, the weights that ship with it."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from qflow.tasks.perception.data import GROUND_BORDER, PerceptionData, Pictures, build_data, tight_boxes
from qflow.tasks.perception.metric import Found, decode, loss, overlap
from qflow.tasks.perception.model import WEIGHTS, build_model

FLOAT_METRIC = 0.9154
"""What the README states for the shipped weights on the 1,536 evaluation pictures."""


@pytest.fixture(scope="module")
def data() -> PerceptionData:
    return build_data()


def outputs_for(box: Tensor, label: int, cell: tuple[int, int] = (5, 6)) -> tuple[Tensor, Tensor]:
    """Outputs for one picture whose best-scored cell (row, column) claims `label` and `box` [4] in pixels."""
    scores, distances = torch.zeros(1, 5, 12, 12), torch.zeros(1, 4, 12, 12)
    y, x = (8 * index + 4 for index in cell)
    scores[0, label, cell[0], cell[1]] = 1.0
    distances[0, :, cell[0], cell[1]] = torch.stack([x - box[0], y - box[1], box[2] - x, box[3] - y]) / 8
    return scores, distances


def batch_for(box: Tensor, label: int) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.zeros(1, 3, 96, 96), {"label": torch.tensor([label]), "box": box[None]}


def test_splits_have_the_stated_sizes_and_samples(data: PerceptionData) -> None:
    assert [len(split) for split in (data.train, data.calibration, data.evaluation)] == [9744, 256, 1536]
    image, target = data.calibration[3]
    assert image.shape == (3, 96, 96)
    assert image.dtype == target["box"].dtype == torch.float32
    assert 0 < image.max() <= 1
    assert target["label"].dtype == torch.int64


def test_no_item_is_in_two_splits(data: PerceptionData) -> None:
    train, calibration, evaluation = (
        {item.numpy().tobytes() for item in split.items} for split in (data.train, data.calibration, data.evaluation)
    )
    assert train.isdisjoint(calibration | evaluation)
    assert calibration.isdisjoint(evaluation)


def test_evaluation_ground_is_apart_from_the_others(data: PerceptionData) -> None:
    assert data.train.grounds.shape[2] == data.calibration.grounds.shape[2] == GROUND_BORDER
    assert data.evaluation.grounds.shape[2] == 640 - GROUND_BORDER


def test_pictures_follow_from_the_seed(data: PerceptionData) -> None:
    again, other = build_data().calibration, build_data(seed=1).calibration
    assert torch.equal(again[7][0], data.calibration[7][0])
    assert not torch.equal(other[7][0], data.calibration[7][0])


def test_each_epoch_places_the_items_anew(data: PerceptionData) -> None:
    pictures = Pictures(data.train.items[:8], data.train.labels[:8], data.train.grounds, seed=0)
    first = pictures[0][1]["box"]
    pictures.set_epoch(1)
    moved = pictures[0][1]["box"]
    pictures.set_epoch(0)
    assert not torch.equal(first, moved)
    assert torch.equal(first, pictures[0][1]["box"])


def test_boxes_are_tight_and_inside(data: PerceptionData) -> None:
    item = torch.zeros(1, 28, 28, dtype=torch.uint8)
    item[0, 3:10, 5:21] = 9
    assert tight_boxes(item).tolist() == [[5, 3, 21, 10]]
    _, boxes = data.calibration.rendered
    assert ((boxes > -1e-3) & (boxes < 96 + 1e-3)).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_box_frames_the_pixels_that_were_drawn() -> None:
    item = torch.full((1, 28, 28), 240, dtype=torch.uint8)
    black = torch.zeros(1, 96, 96, 3, dtype=torch.uint8)
    images, boxes = Pictures(item, torch.zeros(1, dtype=torch.int64), black, seed=3).rendered
    rows, columns = np.nonzero(images[0].amax(dim=0).numpy())
    drawn = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert (drawn - boxes[0]).abs().max() <= 2  # an edge pixel or two is blended away or in


@pytest.mark.parametrize("sizes", [{"calibration_size": 0}, {"evaluation_size": 1537}])
def test_sizes_out_of_range_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(sizes))}={next(iter(sizes.values()))}"):
        build_data(**sizes)


@pytest.mark.parametrize(("height", "width"), [(96, 96), (384, 640)])
def test_model_is_fully_convolutional(height: int, width: int) -> None:
    with torch.no_grad():
        scores, distances = build_model(weights=None)(torch.zeros(1, 3, height, width))
    assert scores.shape == (1, 5, height // 8, width // 8)
    assert distances.shape == (1, 4, height // 8, width // 8)


def test_decode_gives_the_box_that_was_encoded() -> None:
    box = torch.tensor([20.0, 30.0, 70.0, 50.0])
    _, distances = outputs_for(box, 0)
    assert torch.allclose(decode(distances)[0, 5 * 12 + 6], box)


def test_overlap_by_hand() -> None:
    box, other = torch.tensor([0.0, 0.0, 4.0, 2.0]), torch.tensor([2.0, 0.0, 6.0, 2.0])
    assert overlap(box, other)[0].item() == pytest.approx(4 / 12)
    assert overlap(box, box + 100)[1] < overlap(box, box + 10)[1] < 0  # apart: the farther the worse


BOX = torch.tensor([20.0, 30.0, 70.0, 50.0])  # 50 pixels wide


@pytest.mark.parametrize(
    ("label", "shift", "score"),
    [
        pytest.param(2, 0.0, 1.0, id="right class, exact box"),
        pytest.param(1, 0.0, 0.0, id="wrong class"),
        pytest.param(2, 50 * (1 - 0.80) / 1.80 - 0.05, 1.0, id="IoU just above the threshold"),
        pytest.param(2, 50 * (1 - 0.80) / 1.80 + 0.05, 0.0, id="IoU just below the threshold"),
    ],
)
def test_found(label: int, shift: float, score: float) -> None:
    """Moved sideways by s, a box of width w overlaps itself by (w - s) / (w + s)."""
    moved = BOX + torch.tensor([shift, 0.0, shift, 0.0])
    assert Found(iou=0.80)(outputs_for(moved, label), batch_for(BOX, 2)).tolist() == [score]


def test_loss_prefers_the_right_answer_and_reaches_every_weight(data: PerceptionData) -> None:
    right, wrong = outputs_for(BOX, 2), outputs_for(BOX + 9, 1)
    assert loss(right, batch_for(BOX, 2)) < loss(wrong, batch_for(BOX, 2))
    model = build_model(weights=None).train()
    batch = next(iter(DataLoader(data.calibration, 4)))
    loss(model(batch[0]), batch).backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


@pytest.mark.slow
def test_shipped_weights_are_small_and_give_the_stated_metric(data: PerceptionData) -> None:
    assert WEIGHTS.stat().st_size <= 2_000_000
    model, metric = build_model(), Found()
    with torch.no_grad():
        scores = [metric(model(batch[0]), batch) for batch in DataLoader(data.evaluation, 64)]
    assert torch.cat(scores).mean().item() == pytest.approx(FLOAT_METRIC, abs=0.002)
