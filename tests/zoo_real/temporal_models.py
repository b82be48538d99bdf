"""Networks over several frames: a tracker that correlates a template, and bird's-eye attention with a memory."""

import torch
import torch.nn.functional as F
from torch import nn
from zoo_real.registry import Entry, images


class Siamese(nn.Module):
    """One backbone on template and search image; the template's features are the weight of a grouped convolution."""

    def __init__(self, width=16):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.box, self.score = nn.Conv2d(width, 4, 1), nn.Conv2d(width, 1, 1)

    def forward(self, template, search):
        kernel, x = self.backbone(template), self.backbone(search)
        n, width = kernel.shape[:2]
        x = F.conv2d(x.flatten(0, 1).unsqueeze(0), kernel.flatten(0, 1).unsqueeze(1), groups=n * width)
        x = x.view(n, width, *x.shape[-2:])
        return self.box(x), self.score(x)


class BevLayer(nn.Module):
    """Queries attend to the memory, sample image features at learnt offsets, and pass a feed-forward network."""

    def __init__(self, width):
        super().__init__()
        self.memory = nn.MultiheadAttention(width, 2, batch_first=True)
        self.offset, self.weight = nn.Linear(width, 8), nn.Linear(width, 4)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, queries, memory, image, reference):
        queries = self.norms[0](queries + self.memory(queries, memory, memory, need_weights=False)[0])
        n, cells, _ = queries.shape
        places = reference.view(1, cells, 1, 2) + 0.1 * self.offset(queries).view(n, cells, 4, 2).tanh()
        seen = F.grid_sample(image, places, align_corners=False)  # [n, width, cells, 4]
        seen = (seen * self.weight(queries).softmax(-1).unsqueeze(1)).sum(-1).transpose(1, 2)
        queries = self.norms[1](queries + seen)
        return self.norms[2](queries + self.narrow(F.relu(self.wide(queries))))


class BevFormer(nn.Module):
    """The bird's-eye features of the last frame are the memory of the next; they stay on the model between calls."""

    def __init__(self, width=16, side=4):
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, width, 3, 4, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.queries = nn.Parameter(torch.randn(side * side, width))
        self.register_buffer("reference", torch.rand(side * side, 2) * 2 - 1)
        self.layers = nn.ModuleList(BevLayer(width) for _ in range(2))
        self.classes, self.box = nn.Linear(width, 3), nn.Linear(width, 4)
        self.memory = None

    def forward(self, image):
        queries = self.queries.unsqueeze(0).expand(image.shape[0], -1, -1)
        memory = queries if self.memory is None else self.memory
        bev = self.seen(image, queries, memory)
        self.memory = bev.detach()
        return {"classes": self.classes(bev), "box": self.box(bev)}

    def seen(self, image, bev, memory):
        features = self.image(image)
        for layer in self.layers:
            bev = layer(bev, memory, features, self.reference)
        return bev


class BevFormerStep(BevFormer):
    """The same network with the memory as an input and an output, as it is deployed."""

    def forward(self, image, memory):
        bev = self.seen(image, self.queries.unsqueeze(0).expand(image.shape[0], -1, -1), memory)
        return {"classes": self.classes(bev), "box": self.box(bev), "memory": bev}


def frames(batch):
    return {"image": torch.randn(batch, 3, 32, 32), "memory": torch.randn(batch, 16, 16)}


def pair(batch):
    return {"template": torch.randn(batch, 3, 16, 16), "search": torch.randn(batch, 3, 32, 32)}


ENTRIES = (
    Entry("siamese_tracker", lambda: (Siamese(), pair)),
    Entry("bevformer", lambda: (BevFormer(), images(32, 32)), cached_attrs=("memory",)),
    Entry("bevformer_step", lambda: (BevFormerStep(), frames)),
)
