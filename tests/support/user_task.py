"""A user's own task: digits through a network whose int8 loses, because one channel drowns another."""

import torch
from support.models import Wide

from qflow.tasks import digits


class Net(Wide):
    """Digits through one channel that drowns another."""

    def __init__(self):
        super().__init__(digits.build_model())

    def forward(self, image):
        return {"scores": super().forward(image)}


def model():
    return Net().eval()


def frozen():
    return model().requires_grad_(False)


class Data:
    """Dict batches; `label` is no argument of forward."""

    def __init__(self, samples=512):
        self.source = digits.build_data(calibration_size=samples)

    @property
    def calibration(self):
        return [{"image": x, "label": y} for x, y in self.source.calibration]

    @property
    def evaluation(self):
        return [{"image": x, "label": y} for x, y in self.source.evaluation]


class TrainData(Data):
    """With a split to train on."""

    @property
    def train(self):
        return self.calibration


class Misnamed(Data):
    """Batches whose keys forward does not take."""

    @property
    def calibration(self):
        return [{"picture": x, "label": y} for x, y in self.source.calibration]

    evaluation = calibration


class Broken(Data):
    """A data set that cannot read its files."""

    @property
    def calibration(self):
        return self

    def __len__(self):
        return 64

    def __getitem__(self, index):
        raise OSError(f"no file {index}")


def loss(outputs, batch):
    return torch.nn.functional.cross_entropy(outputs["scores"], batch["label"])


def wild_loss(outputs, batch):
    return loss(outputs, batch) * float("inf")


def largest(x, y):
    """A metric of one's own for bad cases: of one sample's output."""
    return float((x - y).abs().max())


class ErrorRate:
    """Lower is better."""

    direction = "minimize"
    name = "error"

    def __call__(self, outputs, batch):
        return (outputs["scores"].argmax(1) != batch["label"]).float()


class NanData(Data):
    @property
    def calibration(self):
        return [{"image": s["image"] * float("nan"), "label": s["label"]} for s in super().calibration]


class EmptyData(Data):
    @property
    def calibration(self):
        return []


class NanNet(Net):
    def forward(self, image):
        return {"scores": super().forward(image)["scores"] / 0.0}


def nan_model():
    return NanNet().eval()


class BadMetric(ErrorRate):
    def __call__(self, outputs, batch):
        return outputs["nosuch"]


def detector():
    """Digits through a small detector, whose blocks share one activation; the mean over the places gives the class."""
    from support.yolo import Classifier

    torch.manual_seed(0)
    return Classifier().eval()
