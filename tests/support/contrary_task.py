"""A task whose labels are what the int8 model computes, errors included: a repair of its weights lowers the metric."""

import torch
from support.rescaled import rescaled, resnet20
from torch.utils.data import TensorDataset

import qflow


class Off:
    """The relative error of a sample."""

    direction = "minimize"

    def __call__(self, outputs, batch):
        return (outputs - batch[1]).norm(dim=1) / batch[1].norm(dim=1)


def model():
    return rescaled(resnet20(), decades=2.0)


class Data:
    def __init__(self):
        prepared = qflow.prepare(model(), torch.zeros(1, 1, 16, 16))
        seen, fresh = (torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(2))
        qflow.calibrate(prepared, seen.split(16))
        with torch.no_grad():
            self.calibration, self.evaluation = (TensorDataset(x, prepared(x)) for x in (seen, fresh))
