"""The residual network for small images (He et al. 2015, arXiv:1512.03385, section 4.2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norms import BatchNorm2d, SyncBatchNorm2d

MAX_DEPTH = 1202  # the deepest network of He et al. 2015, table 6
GROUPS = 8  # of group normalisation (Wu & He 2018)
NORMALIZATIONS: dict[str, Callable[[int], nn.Module]] = {
    "batch": BatchNorm2d,
    "sync_batch": SyncBatchNorm2d,
    "layer": partial(nn.GroupNorm, 1),  # over channels and pixels of one image
    "group": partial(nn.GroupNorm, GROUPS),
    "none": nn.Identity,  # takes any arguments
}


class Block(nn.Module):
    """Two 3x3 convolutions and the shortcut around them.

    Post-activation (He et al. 2015) normalises and activates after each convolution, and activates the sum;
    pre-activation (He et al. 2016, arXiv:1603.05027) normalises and activates before each convolution.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        stride: int,
        conv: Callable[..., nn.Module],
        norm: Callable[[int], nn.Module],
        activation: nn.Module,
        shortcut: bool,
        pre: bool,
        first: bool,
    ) -> None:
        super().__init__()
        self.conv1 = conv(c_in, c_out, stride=stride)
        self.norm1 = norm(c_in if pre else c_out)
        self.norm2 = norm(c_out)
        self.conv2 = conv(c_out, c_out)
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
        return out if self.pre else self.activation(out)


class ResNet(nn.Module):
    """ResNet of depth 6n + 2: one convolution, three stages of n blocks, average pooling, one linear layer."""

    def __init__(
        self,
        depth: int,
        classes: int = 10,
        width: int = 16,
        block: str = "post",
        shortcut: bool = True,
        activation: str = "relu",
        leaky_slope: float = 0.1,
        normalization: str = "batch",
        weight_init: str = "he_normal",
    ) -> None:
        """Build and initialise the network; every argument but `shortcut` takes the values that settings.Setting allows.

        Raises:
            ValueError: If depth is not 6n + 2 with n >= 1, or an option is unknown.

        """
        super().__init__()
        if not isinstance(shortcut, bool):
            raise ValueError(f"shortcut: found {shortcut!r}; allowed: True, False")
        n, rest = divmod(depth - 2, 6)
        if rest or not 8 <= depth <= MAX_DEPTH:
            raise ValueError(f"depth {depth} is not 6n + 2 (8, 14, 20, 26, 32, ... {MAX_DEPTH})")
        norm = _choose("normalization", normalization, NORMALIZATIONS)
        pre = _choose("block", block, {"post": False, "pre": True})
        # Leaky ReLU in place: its backward pass reads the signs from the saved output; otherwise torch.compile stores them
        # separately, which makes a step almost three times as slow (benchmarks/README.md).
        in_place = not (pre and normalization == "none")  # there the shortcut still needs the input
        leaky = nn.LeakyReLU(leaky_slope, in_place)
        activations = {"relu": nn.ReLU(), "leaky_relu": leaky, "gelu": nn.GELU(), "silu": nn.SiLU()}
        act = _choose("activation", activation, activations)
        # a normalisation's own shift makes the bias of a convolution useless
        conv = partial(nn.Conv2d, kernel_size=3, padding=1, bias=normalization == "none")

        self.widths = (width, 2 * width, 4 * width)  # channels of the three stages, on maps of 32x32, 16x16 and 8x8
        self.conv = conv(3, width)
        self.norm = nn.Identity() if pre else norm(width)
        self.activation = nn.Identity() if pre else act
        blocks: list[nn.Module] = []
        c_in = width
        for stage, c_out in enumerate(self.widths):
            for unit in range(n):
                stride = 2 if stage > 0 and unit == 0 else 1
                blocks.append(Block(c_in, c_out, stride, conv, norm, act, shortcut, pre, first=not blocks))
                c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.final_norm = norm(c_in) if pre else nn.Identity()
        self.final_activation = act if pre else nn.Identity()
        self.linear = nn.Linear(c_in, classes)
        self._initialise(weight_init, leaky_slope if activation == "leaky_relu" else 0.0)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # each pixel's channels together: faster

    def _initialise(self, weight_init: str, slope: float) -> None:
        # variance 2 / fan_in keeps the size of activations through ReLU (He et al. 2015, arXiv:1502.01852, eq. 10)
        he = partial(nn.init.kaiming_normal_, a=slope, nonlinearity="leaky_relu")
        xavier = nn.init.xavier_normal_  # variance 2 / (fan_in + fan_out), Glorot & Bengio 2010
        init = _choose("weight_init", weight_init, {"he_normal": he, "xavier_normal": xavier, "pytorch": None})
        if init is None:
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                init(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map images [N, 3, 32, 32] to the maps after stages two and three; at width 16 [N, 32, 16, 16] and [N, 64, 8, 8].

        The network itself goes on with the last alone; the others help to know a photo of none of the classes (export.py).
        """
        x = self.activation(self.norm(self.conv(x)))
        last = len(self.blocks) // 3  # blocks of the third stage
        middle = self.blocks[:-last](x)
        return middle, self.final_activation(self.final_norm(self.blocks[-last:](middle)))

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images [N, 3, 32, 32] to logits [N, classes]."""
        return self.linear(self.maps(x)[1].mean(dim=(2, 3)))


def _choose(option: str, value: str, table: dict[str, Any]) -> Any:
    if value not in table:
        raise ValueError(f"{option}: found {value!r}; allowed: {', '.join(table)}")
    return table[value]


def parameter_count(model: nn.Module) -> int:
    """Count the trainable numbers of a network."""
    return sum(parameter.numel() for parameter in model.parameters())
