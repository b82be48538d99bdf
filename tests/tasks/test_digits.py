"""The digits task: its splits, its metric, and that building its model is repeatable and leaves no trace."""

import pytest
import torch
from support.built_once import built_anew

from qflow.tasks.digits import Accuracy, build_data, build_model


def test_splits_have_the_stated_sizes_and_shapes() -> None:
    data = build_data(calibration_size=100)
    assert [len(split) for split in (data.train, data.calibration, data.evaluation)] == [1200, 100, 597]
    image, label = data.evaluation[0]
    assert image.shape == (1, 8, 8)
    assert image.dtype == torch.float32
    assert image.abs().max() <= 1
    assert label.dtype == torch.int64


def test_calibration_is_taken_from_training_images() -> None:
    data = build_data(calibration_size=100)
    assert torch.equal(data.calibration.tensors[0], data.train.tensors[0][:100])


@pytest.mark.parametrize("size", [0, 1201])
def test_calibration_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=rf"1\.\.1200, .* got {size}"):
        build_data(calibration_size=size)


def test_accuracy_scores_each_sample() -> None:
    outputs = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert Accuracy()(outputs, (torch.empty(2), torch.tensor([1, 1]))).tolist() == [1.0, 0.0]


@pytest.mark.slow
def test_model_is_repeatable_and_good() -> None:
    state = torch.get_rng_state()
    first = build_model(seed=0)
    with built_anew():
        second = build_model(seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    images, labels = build_data().evaluation.tensors
    with torch.no_grad():
        outputs = first(images)
        assert torch.equal(outputs, second(images))
    assert Accuracy()(outputs, (images, labels)).mean() > 0.97
