"""The residual network for small images (He et al. 2015, arXiv:1512.03385, section 4.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

MAX_DEPTH = 1202  # the deepest network of He et al. 2015, table 6
GROUPS = 8  # of group normalisation (Wu & He 2018)


class _Sum(torch.autograd.Function):
    """The sum over all processes of a run, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    backward = forward


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation, the training step of which compiles to faster code for a CPU: a fifteenth off the whole step.

    The compiler adds up columns. Of 16 channels they would fill one register and wait for each other, so the columns here are
    the channels of each of the W places of a row; and one pass over the images gives mean and variance.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        if not (self.training and x.is_cpu and torch.compiler.is_compiling()):
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
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
        count = torch.tensor(x.numel() / x.shape[1], dtype=x.dtype, device=x.device)
        dist.all_reduce(count)
        mean: Tensor = _Sum.apply(x.sum((0, 2, 3))) / count  # type: ignore[no-untyped-call]
        centred = x - mean[:, None, None]
        variance: Tensor = _Sum.apply(centred.square().sum((0, 2, 3))) / count  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        out = centred * (self.weight / (variance + self.eps).sqrt())[:, None, None] + self.bias[:, None, None]
        return out.to(dtype)


class Block(nn.Module):
    """Two 3x3 convolutions and the shortcut around them.

    Post-activation (He et al. 2015) normalises and activates after each convolution, and activates the sum;
    pre-activation (He et al. 2016, arXiv:1603.05027) normalises and activates before each convolution.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, norm: Callable[[int], nn.Module], activation: nn.Module,
                 shortcut: bool, conv_bias: bool, pre: bool, first: bool) -> None:  # fmt: skip
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=conv_bias)
        self.norm1 = norm(c_in if pre else c_out)
        self.norm2 = norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=conv_bias)
        self.activation = activation
        self.new_channels, self.stride = c_out - c_in, stride
        self.shortcut, self.pre, self.first = shortcut, pre, first

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, c_in, H, W] to [N, c_out, H / stride, W / stride]."""
        if self.pre:
            out = self.activation(self.norm1(x))
            x = out if self.first else x  # the very first block activates before its shortcut too
            out = self.conv2(self.activation(self.norm2(self.conv1(out))))
        else:
            out = self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x)))))
        if self.shortcut:
            if self.stride > 1:  # every stride-th pixel, new channels zero (He et al. 2015, option A)
                x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
            out = out + x
        return out if self.pre else self.activation(out)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """ResNet of depth 6n + 2: one convolution, three stages of n blocks, average pooling, one linear layer."""

    def __init__(self, depth: int, classes: int = 10, width: int = 16, block: str = "post", shortcut: bool = True,
                 activation: str = "relu", leaky_slope: float = 0.1, normalization: str = "batch",
                 weight_init: str = "he_normal") -> None:  # fmt: skip
        """Build and initialise the network; every argument takes the values that settings.Setting allows.

        Raises:
            ValueError: If depth is not 6n + 2 with n >= 1, or an option is unknown.

        """
        super().__init__()
        n, rest = divmod(depth - 2, 6)
        if rest or not 8 <= depth <= MAX_DEPTH:
            raise ValueError(f"depth {depth} is not 6n + 2 (8, 14, 20, 26, 32, ... {MAX_DEPTH})")
        norm = _choose("normalization", normalization, {
            "batch": BatchNorm2d, "sync_batch": SyncBatchNorm2d,
            "layer": lambda channels: nn.GroupNorm(1, channels),  # over channels and pixels of one image
            "group": lambda channels: nn.GroupNorm(GROUPS, channels),
            "none": lambda channels: nn.Identity(),
        })  # fmt: skip
        pre = _choose("block", block, {"post": False, "pre": True})
        # in place, the backward pass takes the signs from the result; else the compiler saves them by themselves, in slow code
        in_place = not (pre and normalization == "none")  # there the shortcut needs what would be overwritten
        act = _choose("activation", activation, {
            "relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU(leaky_slope, in_place), "gelu": nn.GELU(), "silu": nn.SiLU(),
        })  # fmt: skip
        conv_bias = normalization == "none"  # a normalisation's own shift makes the bias of a convolution useless

        self.widths = (width, 2 * width, 4 * width)  # channels of the three stages, on maps of 32x32, 16x16 and 8x8
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=conv_bias)
        self.norm = nn.Identity() if pre else norm(width)
        blocks: list[nn.Module] = []
        c_in = width
        for stage, c_out in enumerate(self.widths):
            for unit in range(n):
                stride = 2 if stage > 0 and unit == 0 else 1
                blocks.append(Block(c_in, c_out, stride, norm, act, shortcut, conv_bias, pre, first=not blocks))
                c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.final_norm = norm(c_in) if pre else nn.Identity()
        self.activation = act
        self.pre = pre
        self.linear = nn.Linear(c_in, classes)
        self._initialise(weight_init, leaky_slope if activation == "leaky_relu" else 0.0)

    def _initialise(self, weight_init: str, slope: float) -> None:
        init = _choose("weight_init", weight_init, {
            # variance 2 / fan_in keeps the size of activations through ReLU (He et al. 2015, arXiv:1502.01852, eq. 10)
            "he_normal": lambda w: nn.init.kaiming_normal_(w, a=slope, nonlinearity="leaky_relu"),
            "xavier_normal": nn.init.xavier_normal_,  # variance 2 / (fan_in + fan_out), Glorot & Bengio 2010
            "pytorch": None,
        })  # fmt: skip
        if init is None:
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                init(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map images [N, 3, 32, 32] to the maps after stages two and three; at width 16 [N, 32, 16, 16] and [N, 64, 8, 8]."""
        x = self.norm(self.conv(x))
        last = len(self.blocks) // 3  # blocks of the third stage
        middle = self.blocks[:-last](x if self.pre else self.activation(x))
        x = self.blocks[-last:](middle)
        return middle, self.activation(self.final_norm(x)) if self.pre else x

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images [N, 3, 32, 32] to logits [N, classes]."""
        return self.linear(self.maps(x)[1].mean(dim=(2, 3)))  # type: ignore[no-any-return]


def _choose(option: str, value: str, table: dict[str, Any]) -> Any:
    if value not in table:
        raise ValueError(f"{option}: found {value!r}; allowed: {', '.join(table)}")
    return table[value]


def parameter_count(model: nn.Module) -> int:
    """Count the trainable numbers of a network."""
    return sum(parameter.numel() for parameter in model.parameters())
