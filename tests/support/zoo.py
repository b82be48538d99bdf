"""Fourteen and more small networks of the kinds that perception engineers bring, alive in every layer.

Each entry is a builder without arguments and example inputs at batch 2; `revive` gives live statistics, because an
equality on zero heads or untouched batch norms would say nothing (random weights of the usual size otherwise).
"""
# Long: one table of networks that several test files iterate over.

import torch
import torch.nn.functional as F
from support.models import ResNet, Shared, TwoInputs, UNet, revive
from torch import nn


def conv_bn(inner, outer, kernel=3, stride=1, groups=1, act=nn.ReLU6):
    layers = [nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outer)]
    return nn.Sequential(*layers, *([act(inplace=True)] if act else []))


class InvertedResidual(nn.Module):
    def __init__(self, inner, outer, stride):
        super().__init__()
        wide = inner * 4
        self.skip = stride == 1 and inner == outer
        self.conv = nn.Sequential(
            conv_bn(inner, wide, 1), conv_bn(wide, wide, 3, stride, wide), conv_bn(wide, outer, 1, act=None)
        )

    def forward(self, x):
        return x + self.conv(x) if self.skip else self.conv(x)


class MobileNet(nn.Sequential):
    """Depthwise convolutions and inverted residuals."""

    def __init__(self):
        super().__init__(
            conv_bn(3, 8, 3, 2),
            InvertedResidual(8, 8, 1),
            InvertedResidual(8, 12, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(12, 4),
        )


class SqueezeExcite(nn.Module):
    """Channel attention: pooled gate, sigmoid, hardswish, product."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 8, act=nn.Hardswish)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)), inplace=True)))
        return self.head(x * gate)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Depthwise 7x7, channels-last layer norm in a subclass of torch's own, GELU, layer scale."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.norm0 = LayerNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm = nn.LayerNorm(8)
        self.wide, self.narrow = nn.Linear(8, 32), nn.Linear(32, 8)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm0(self.stem(x))
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(F.gelu(self.wide(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean([-2, -1]))


class VisionTransformer(nn.Module):
    """Class token, position embedding, fused attention function, several heads."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width) * 0.5)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        n, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv.unbind(0), is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(n, length, width))
        x = x + self.mlp(self.norm2(x))
        return self.head(x[:, 0])


class Detr(nn.Module):
    """nn.TransformerEncoderLayer and cross-attention from learnt queries, with a padding mask; a dict of outputs."""

    def __init__(self, width=16):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.encoder = nn.TransformerEncoderLayer(width, 2, 32, batch_first=True)
        self.cross = nn.MultiheadAttention(width, 2, batch_first=True)
        self.queries = nn.Embedding(5, width)
        self.boxes, self.classes = nn.Linear(width, 4), nn.Linear(width, 3)

    def forward(self, image, padding):
        memory = self.encoder(self.patch(image).flatten(2).transpose(1, 2))
        queries = self.queries.weight.unsqueeze(0).repeat(image.shape[0], 1, 1)
        found, _ = self.cross(queries, memory, memory, key_padding_mask=padding)
        return {"boxes": self.boxes(found).sigmoid(), "classes": self.classes(found)}


class Bev(nn.Module):
    """Two cameras sampled on a bird's-eye grid, gathered by score: grid_sample, sigmoid, permute, topk, gather."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(conv_bn(3, 8, 3, 2, act=nn.ReLU), nn.Conv2d(8, 6, 1))
        self.height = nn.Conv2d(8 - 2, 1, 1)
        self.register_buffer("grid", torch.rand(1, 4, 4, 2) * 2 - 1)
        self.head = nn.Linear(6, 3)

    def forward(self, cameras, shift):
        n, c = cameras.shape[:2]
        features = self.image(cameras.flatten(0, 1))
        grid = (self.grid + shift.view(n, 1, 1, 2)).repeat_interleave(c, 0)
        bev = F.grid_sample(features, grid, align_corners=False).view(n, c, 6, 4, 4).sum(1)
        score = torch.sigmoid(self.height(bev)).flatten(1)
        best, index = score.topk(3, dim=1)
        cells = bev.flatten(2).permute(0, 2, 1)
        chosen = cells.gather(1, index.unsqueeze(-1).expand(-1, -1, 6))
        return self.head(chosen), (best, bev)


class FunctionalNet(nn.Module):
    """Everything functional: parameters as weights, operator forms, scalars on both sides, in-place operators."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3) * 0.3)
        self.weight, self.bias = nn.Parameter(torch.randn(4, 6) * 0.3), nn.Parameter(torch.randn(4))

    def forward(self, x):
        y = F.relu(F.conv2d(x, self.kernel, padding=1))
        y = F.avg_pool2d(y, 2)
        y += 0.5
        y = 1.0 - y / 3.0
        y = y * y.abs().sqrt().clamp(min=0.1)
        y *= 2.0
        return F.linear(y.mean(dim=(2, 3)), self.weight, self.bias)


class Fpn(nn.Module):
    """Feature pyramid with one head called on every level (a shared module), list input to torch.cat."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = conv_bn(3, 8, 3, 2, act=nn.ReLU), conv_bn(8, 8, 3, 2, act=nn.ReLU)
        self.lateral = nn.ModuleList([nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)])
        self.head = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x):
        c1 = self.c1(x)
        c2 = self.c2(c1)
        p2 = self.lateral[1](c2)
        p1 = self.lateral[0](c1) + F.interpolate(p2, size=c1.shape[-2:], mode="nearest")
        return [self.head(p1), self.head(p2), torch.cat([p.flatten(2) for p in (p1, p2)], dim=2).amax(-1)]


class PointPillars(nn.Module):
    """Linear with batch norm on points, max over points, scatter to a canvas by index, integer input."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8)
        self.head = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, points, cells):
        n, pillars, per, _ = points.shape
        x = F.relu(self.norm(self.linear(points.flatten(0, 2)))).view(n, pillars, per, -1).max(dim=2)[0]
        canvas = torch.zeros(n, 8, 16, device=x.device, dtype=x.dtype)
        canvas = canvas.scatter(2, cells.unsqueeze(1).expand(-1, 8, -1), x.transpose(1, 2))
        return self.head(canvas.view(n, 8, 4, 4))


class Temporal(nn.Module):
    """Conv1d and Conv3d, a loop over a shape, a batch norm over time."""

    def __init__(self):
        super().__init__()
        self.video = nn.Sequential(nn.Conv3d(1, 4, (2, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(4), nn.ReLU())
        self.time = nn.Sequential(nn.Conv1d(4, 6, 3, padding=1, bias=False), nn.BatchNorm1d(6), nn.ReLU())
        self.cell = nn.Linear(12, 6)

    def forward(self, clip):
        x = self.time(self.video(clip).mean(dim=(3, 4)))
        state = torch.zeros_like(x[..., 0])
        for t in range(x.shape[-1]):
            state = torch.tanh(self.cell(torch.cat([x[..., t], state], dim=1)))
        return state


class DenseBlock(nn.Module):
    """Every layer reads all before it (densenet): concat chains, batch norm before convolution, pooling."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict(
            {
                f"l{i}": nn.Sequential(nn.BatchNorm2d(4 + 4 * i), nn.ReLU(), nn.Conv2d(4 + 4 * i, 4, 3, 1, 1))
                for i in range(2)
            }
        )
        self.stem, self.pool = nn.Conv2d(3, 4, 3, 1, 1), nn.MaxPool2d(2)
        self.head = nn.ConvTranspose2d(12, 2, 2, 2)

    def forward(self, x):
        found = [self.stem(x)]
        for layer in self.layers.values():
            found.append(layer(torch.cat(found, 1)))
        return self.head(self.pool(torch.cat(found, 1)))


class LinearAttention(nn.Module):
    """einsum, elu features, a gated unit, group norm, pixel shuffle."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(3, 16, 1)
        self.norm = nn.GroupNorm(4, 16)
        self.qkv = nn.Conv2d(16, 48, 1)
        self.out = nn.Conv2d(16, 16, 1)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x):
        x = F.leaky_relu(self.norm(self.inner(x)), 0.1)
        q, k, v = self.qkv(x).flatten(2).chunk(3, dim=1)
        context = torch.einsum("bcn,bdn->bcd", F.elu(k) + 1, v)
        y = torch.einsum("bcd,bcn->bdn", context, (F.elu(q) + 1).softmax(1)).view_as(x)
        return self.shuffle(F.glu(torch.cat([self.out(y), x], 1), dim=1))


class Masked(nn.Module):
    """MultiheadAttention, sequence first, with a float mask held as a buffer and averaged weights returned."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4)
        self.register_buffer("mask", torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -30.0))

    def forward(self, x):
        x = x.transpose(0, 1)
        out, weights = self.attention(x, x, x, attn_mask=self.mask)
        return (out + x).transpose(0, 1), weights


def build(name):
    """(model in eval mode with live statistics, example inputs at batch 2)."""
    torch.manual_seed(0)
    image = torch.randn(2, 3, 16, 16)
    points = torch.rand(2, 5, 5, 2) * 2 - 1
    padding = torch.zeros(2, 16, dtype=torch.bool)
    padding[1, 12:] = True
    entries = {
        "resnet": (ResNet, image),
        "mobilenet": (MobileNet, image),
        "squeeze_excite": (SqueezeExcite, image),
        "unet": (UNet, image),
        "convnext": (ConvNeXt, image),
        "vision_transformer": (VisionTransformer, image),
        "detr": (Detr, {"image": image, "padding": padding}),
        "bev": (Bev, {"cameras": torch.randn(2, 3, 3, 8, 8), "shift": torch.rand(2, 2) * 0.2}),
        "functional": (FunctionalNet, image),
        "fpn": (Fpn, image),
        "point_pillars": (PointPillars, (torch.randn(2, 5, 3, 4), torch.randint(0, 16, (2, 5)))),
        "temporal": (Temporal, torch.randn(2, 1, 4, 6, 6)),
        "dense": (DenseBlock, image),
        "linear_attention": (LinearAttention, image),
        "two_inputs": (TwoInputs, {"image": image, "points": points}),
        "shared": (Shared, torch.randn(2, 4, 8, 8)),
    }
    cls, example = entries[name]
    model = revive(cls())
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm3d)):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model, example


NAMES = [
    "resnet", "mobilenet", "squeeze_excite", "unet", "convnext", "vision_transformer", "detr", "bev", "functional",
    "fpn", "point_pillars", "temporal", "dense", "linear_attention", "two_inputs", "shared",
]  # fmt: skip
