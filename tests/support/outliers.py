"""A small transformer that reads digits, with channels that stand out as they do in large trained ones."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        n, length, width = x.shape
        heads = self.qkv(self.norm1(x)).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*heads.unbind(0))
        x = x + self.proj(y.transpose(1, 2).reshape(n, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class SmallTransformer(nn.Module):
    """Sixteen patches of 2x2 pixels, one block, the mean of all tokens."""

    def __init__(self, width=32, heads=4, depth=1):
        super().__init__()
        self.patch, self.position = nn.Conv2d(1, width, 2, 2), nn.Parameter(torch.randn(1, 16, width) * 0.1)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        x = self.blocks(self.patch(x).flatten(2).transpose(1, 2) + self.position)
        return self.head(self.norm(x).mean(1))


@torch.no_grad()
def standing_out(model, norms=0, attention=0, seed=0):
    """Channels times 2^k, k from 0 to `norms` behind layer norms and 0 to `attention` in queries and values.

    What reads them is divided by it, so float is unchanged. Half of the channels keep k = 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def factors(count, most):
        some = torch.rand(count, generator=generator) < 0.5
        return torch.where(some, 2.0 ** torch.randint(0, most + 1, (count,), generator=generator), 1.0)

    for block in model.blocks:
        for norm, reader in ((block.norm1, block.qkv), (block.norm2, block.up)):
            f = factors(len(norm.weight), norms)
            norm.weight.mul_(f), norm.bias.mul_(f), reader.weight.div_(f)
        width = len(block.norm1.weight)
        f, g = factors(width, attention), factors(width, attention)
        for part, scale in zip(range(3), (f, 1 / f, g), strict=True):
            rows = slice(part * width, (part + 1) * width)
            block.qkv.weight[rows].mul_(scale[:, None]), block.qkv.bias[rows].mul_(scale)
        block.proj.weight.div_(g)
    return model
