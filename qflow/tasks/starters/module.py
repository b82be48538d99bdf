"""My module as a task of qflow, without labels: what counts is how far its outputs agree with those in float.

Lines with CHANGE are yours to change.
"""

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """CHANGE: your module. It may have several inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU())
        self.pose = nn.Linear(6, 32)
        self.near, self.far = nn.Conv2d(32, 8, 1), nn.Conv2d(32, 8, 1)

    def forward(self, image: Tensor, pose: Tensor) -> dict[str, Tensor]:
        """From images [B, 3, 32, 32] and poses [B, 6] two maps [B, 8, 8, 8]."""
        x = self.image(image) * self.pose(pose)[:, :, None, None].sigmoid()
        return {"near": self.near(x), "far": self.far(x)}


def build_model() -> nn.Module:
    """Return the float module with its weights."""
    torch.manual_seed(0)
    model = Net()  # CHANGE: model.load_state_dict(torch.load("my_weights.pt", weights_only=True))
    return model.eval()


class Data:
    """CHANGE: your inputs, preprocessed as at inference: dicts whose keys are the arguments of `forward`."""

    def __init__(self) -> None:
        self.calibration = samples(256, seed=0)  # a few hundred that represent all
        self.evaluation = samples(256, seed=1)


def samples(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Random inputs, which real ones are better than: scales follow from them."""
    torch.manual_seed(seed)
    images, poses = torch.rand(count, 3, 32, 32), torch.randn(count, 6)
    return [{"image": image, "pose": pose} for image, pose in zip(images, poses, strict=True)]
