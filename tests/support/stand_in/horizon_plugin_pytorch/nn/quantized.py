"""Functionals as modules: what `x + y` becomes."""

import torch
from torch import nn


class FloatFunctional(nn.Module):
    """Its method decides what it computes; all methods go through forward, where hooks see them."""

    COMPUTES = {
        "add": torch.add, "sub": torch.sub, "mul": torch.mul, "matmul": torch.matmul, "cat": torch.cat,
    }  # fmt: skip
    last_method = None

    def forward(self, method, *args, **kwargs):
        self.last_method = method
        return self.COMPUTES[method](*args, **kwargs)

    def add(self, x, y):
        return self("add", x, y)

    def sub(self, x, y):
        return self("sub", x, y)

    def mul(self, x, y):
        return self("mul", x, y)

    def matmul(self, x, y):
        return self("matmul", x, y)

    def cat(self, tensors, dim=0):
        return self("cat", tensors, dim=dim)
