"""Temporal models for tests: each keeps its state on the module in another form."""

from collections import deque
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FromNone(nn.Module):
    """A plain attribute that becomes a tensor in the first call and is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix, self.state = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(16, 8, 1), None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.state is None or self.state.shape != x.shape:
            self.state = torch.zeros_like(x)
        self.state = self.mix(torch.cat([x, self.state], 1)).detach()
        return self.state


class Buffer(nn.Module):
    """A buffer of batch 1 that broadcasts in the first call; it lies in a submodule, and is not returned."""

    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1, 8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen * 0.9 + x * 0.1
            return x - self.seen

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.memory, self.head = nn.Conv2d(3, 8, 3, padding=1), self.Memory(), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.memory(self.conv(x))))


class Queue(nn.Module):
    """A deque of the last three features, which another operator than the output's computes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.keep, self.mix = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(20, 4, 1)
        self.queue: deque[Tensor] = deque(maxlen=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        past = [x[:, :4]] * (3 - len(self.queue)) + list(self.queue)
        self.queue.append(self.keep(x).detach())
        return self.mix(torch.cat([x, *past], 1))


class Listed(Queue):
    """The same in a list that is cut by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = []  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.queue = self.queue[-3:]  # type: ignore[assignment, index]
        return out


class ConvGru(nn.Module):
    """The hidden map of a ConvGRU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.gates, self.fresh = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)
        self.hidden = None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.stem(x))
        h = torch.zeros_like(x) if self.hidden is None else self.hidden
        reset, update = self.gates(torch.cat([x, h], 1)).sigmoid().chunk(2, 1)
        fresh = self.fresh(torch.cat([x, reset * h], 1)).tanh()
        self.hidden = (1 - update) * h + update * fresh
        return {"map": self.head(self.hidden)}


class Bev(nn.Module):
    """The last BEV map, moved by the ego motion, in a dict that also holds the last pose."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)
        self.prev = {"bev": None, "pose": None}

    def forward(self, x: Tensor, pose: Tensor) -> Tensor:
        bev = F.relu(self.conv(x))
        if self.prev["bev"] is not None:
            shift = pose - self.prev["pose"]
            theta = torch.eye(2, 3).repeat(len(x), 1, 1)
            theta = torch.cat([theta[:, :, :2], shift[:, :, None]], 2)
            moved = F.grid_sample(
                self.prev["bev"], F.affine_grid(theta, bev.shape, align_corners=True), align_corners=True
            )
        else:
            moved = torch.zeros_like(bev)
        bev = F.relu(self.mix(torch.cat([bev, moved], 1)))
        self.prev = {"bev": bev, "pose": pose}
        return self.head(bev)


class Ring(nn.Module):
    """A ring buffer that is written in place at a position which is a Python number; its batch is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.out = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("memory", torch.zeros(3, 2, 4))
        self.place = 0

    def forward(self, x: Tensor) -> Tensor:
        self.memory[self.place] = self.lin(x)
        self.place = (self.place + 1) % 3
        return self.out(self.memory.mean(0))


class Bank(nn.Module):
    """State in an object that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bank = nn.Conv2d(3, 8, 3, padding=1), SimpleNamespace(last=None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        last, self.bank.last = self.bank.last, x
        return F.relu(x if last is None else x + last)


IMAGE = (2, 3, 8, 8)
KINDS: dict[type[nn.Module], tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]] = {
    FromNone: (("state",), (IMAGE,)),
    Buffer: (("memory.seen",), (IMAGE,)),
    Queue: (("queue",), (IMAGE,)),
    Listed: (("queue",), (IMAGE,)),
    ConvGru: (("hidden",), (IMAGE,)),
    Bev: (("prev",), (IMAGE, (2, 2))),
    Ring: (("memory", "place"), ((2, 4),)),
    Bank: (("bank.last",), (IMAGE,)),
}
"""Model -> the attributes that hold its state, and the shapes of its inputs."""


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def frames(kind: type[nn.Module], count: int, seed: int = 0) -> list[tuple[Tensor, ...]]:
    """The frames of a sequence."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(shape, generator=generator) for shape in KINDS[kind][1]) for _ in range(count)]
