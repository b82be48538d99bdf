"""Frames of sequences are read in order, equal sequences in parallel; a split says where its sequences begin."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.temporal import ConvGru, made
from torch import nn

from qflow.core.errors import ConfigError
from qflow.tasks.sequences import in_batches, in_parallel
from qflow.tasks.task import batches, make_task

LENGTHS = st.lists(st.integers(1, 5), min_size=1, max_size=8)


@given(LENGTHS, st.integers(1, 4))
def test_every_frame_comes_once_right_after_the_one_before_it(lengths, batch_size):
    steps = in_parallel(lengths, batch_size)
    assert sorted(i for step in steps for i in step.samples) == list(range(sum(lengths)))
    firsts = {sum(lengths[:s]) for s in range(len(lengths))}
    for before, step in zip([None, *steps], steps, strict=False):
        assert len(step.samples) <= batch_size
        if step.begins:
            assert set(step.samples) <= firsts
        else:
            assert list(step.samples) == [i + 1 for i in before.samples]


@given(st.lists(st.integers(0, 99), max_size=9), st.integers(1, 4))
def test_other_samples_come_in_batches(samples, batch_size):
    steps = in_batches(samples, batch_size)
    assert [i for step in steps for i in step.samples] == samples
    assert all(len(step.samples) == batch_size for step in steps[:-1])


class Frames(torch.utils.data.TensorDataset):
    def __init__(self, lengths, *, held=None):
        super().__init__(torch.arange(float(sum(lengths))).expand(3, 8, 8, -1).movedim(-1, 0))
        if held is not False:
            self.sequences = lengths if held is None else held


class Data:
    def __init__(self, calibration, evaluation):
        self.calibration, self.evaluation = calibration, evaluation


def score(outputs, batch):
    return torch.ones(len(batch[0]))


score.direction = "maximize"


def task_of(calibration, evaluation, **stated):
    data = Data(calibration, evaluation)
    return make_task(name="t", model=made(ConvGru), data=data, metric=score, cached_attrs=("hidden",), **stated)


def test_a_task_reads_sequences_in_parallel_and_says_where_they_begin():
    task, begun = task_of(Frames([2]), Frames([3, 3, 2])), []
    read = []
    for (x,), size in batches(task, "evaluation", 2, begin=lambda: begun.append(len(read))):
        read.append(x[:, 0, 0, 0].tolist())
        assert size == len(x)
    assert read == [[0, 3], [1, 4], [2, 5], [6], [7]]
    assert begun == [0, 3]


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (False, r"reads frames in order, but got no sequences in task.data.evaluation. Give the dataset the attribute"),
        ([3, 3], r"hold its samples, 5, but got lengths with a sum of 6 in task.data.evaluation"),
        ([5, 0], r"hold its samples, 5, but got lengths with a sum of 5"),
    ],
)
def test_a_split_of_frames_names_all_its_sequences(held, message):
    with pytest.raises(ConfigError, match=message):
        task_of(Frames([2]), Frames([5], held=held))


def test_a_model_without_state_needs_no_sequences():
    plain = Data(Frames([4], held=False), Frames([4], held=False))
    task = make_task(name="t", model=nn.Conv2d(3, 2, 1), data=plain, metric=score)
    assert [len(x) for (x,), _ in batches(task, "evaluation", 3)] == [3, 1]
