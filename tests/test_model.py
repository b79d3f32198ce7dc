"""The network against the papers: counts of parameters, the whole forward pass in float64 NumPy, gradients, initial weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import erf
from torch import distributed as dist
from torch import nn

from resnet_cifar10.model import BatchNorm2d, ResNet, SyncBatchNorm2d, parameter_count

COUNTS = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962}


@pytest.mark.parametrize(("depth", "count"), COUNTS.items())
def test_parameter_counts_are_those_of_the_paper(depth, count):
    assert parameter_count(ResNet(depth)) == count


def test_shortcuts_have_no_parameters():
    assert parameter_count(ResNet(20, shortcut=False)) == COUNTS[20]


def test_width_is_the_channels_of_the_first_stage():
    w, blocks = 24, 3  # of each stage
    stages = [9 * c * (before + (2 * blocks - 1) * c) + 4 * blocks * c for before, c in ((w, w), (w, 2 * w), (2 * w, 4 * w))]
    assert parameter_count(ResNet(20, width=w)) == 9 * 3 * w + 2 * w + sum(stages) + 4 * w * 10 + 10


def test_another_number_of_classes_changes_the_last_layer_alone():
    assert parameter_count(ResNet(20, classes=100)) == COUNTS[20] + 90 * 65
    assert ResNet(8, classes=7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("depth", [-4, 0, 2, 7, 9, 18, 33, 48])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match=r"6n ?\+ ?2") as error:
        ResNet(depth)
    assert str(depth) in str(error.value)


@pytest.mark.parametrize("option", ["block", "shortcut", "activation", "normalization", "weight_init"])
def test_unknown_options_are_refused(option):
    with pytest.raises(ValueError, match=option):
        ResNet(8, **{option: "unheard_of"})


# --- the forward pass, written from the papers ---

ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.1 * x),
    "gelu": lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, stride: int) -> np.ndarray:
    """3x3 cross-correlation with one pixel of zeros around: [N, C, H, W] to [N, K, H / stride, W / stride]."""
    n, _, height, width = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros((n, len(weight), height // stride, width // stride))
    for dy in range(3):
        for dx in range(3):
            seen = padded[:, :, dy : dy + height : stride, dx : dx + width : stride]
            out += np.einsum("nchw,kc->nkhw", seen, weight[:, :, dy, dx], optimize=True)
    return out if bias is None else out + bias[None, :, None, None]


class Reference:
    """The network of He et al. 2015, 2016 in float64 NumPy; it takes nothing but the numbers of the network under test."""

    def __init__(self, network: ResNet, depth: int, block: str, shortcut: bool, activation: str, normalization: str) -> None:
        self.n, self.pre, self.shortcut = (depth - 2) // 6, block == "pre", shortcut
        self.activate, self.normalization = ACTIVATIONS[activation], normalization
        self.modules = list(network.modules())
        self.running: list[tuple[Any, Any]] = []
        self.read()

    def read(self) -> None:
        def numbers(*kinds: type) -> list[tuple[np.ndarray, np.ndarray | None]]:
            both = [(m.weight, m.bias) for m in self.modules if isinstance(m, kinds)]
            return [tuple(t if t is None else t.detach().numpy().copy() for t in pair) for pair in both]

        self.convolutions, self.linear = numbers(nn.Conv2d), numbers(nn.Linear)[0]
        self.norms = numbers(nn.BatchNorm2d, nn.GroupNorm)
        self.running = self.running or [(0.0, 1.0)] * len(self.norms)

    def normalise(self, x: np.ndarray) -> np.ndarray:
        if self.normalization == "none":
            return x
        weight, bias = self.norms[self.norm]
        if self.normalization == "batch":  # Ioffe & Szegedy 2015: over images and pixels, for each channel
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3))
            old_mean, old_variance = self.running[self.norm]
            if self.training:
                unbiased = x.var((0, 2, 3), ddof=1)
                self.running[self.norm] = (0.9 * old_mean + 0.1 * mean, 0.9 * old_variance + 0.1 * unbiased)
            else:
                mean, variance = old_mean, old_variance
            x = (x - mean[None, :, None, None]) / np.sqrt(variance[None, :, None, None] + 1e-5)
        else:  # Ba et al. 2016, Wu & He 2018: over the pixels and channels of one group of one image
            groups = x.reshape(len(x), 1 if self.normalization == "layer" else 8, -1)
            groups = (groups - groups.mean(2, keepdims=True)) / np.sqrt(groups.var(2, keepdims=True) + 1e-5)
            x = groups.reshape(x.shape)
        self.norm += 1
        return x * weight[None, :, None, None] + bias[None, :, None, None]

    def convolve(self, x: np.ndarray, stride: int = 1) -> np.ndarray:
        self.convolution += 1
        return convolve(x, *self.convolutions[self.convolution - 1], stride)

    def around(self, x: np.ndarray, channels: int, stride: int) -> np.ndarray:
        if not self.shortcut:
            return np.zeros(())
        kept = x[:, :, ::stride, ::stride]
        return np.concatenate([kept, np.zeros((len(x), channels - x.shape[1], *kept.shape[2:]))], axis=1)

    def __call__(self, images: np.ndarray, training: bool) -> np.ndarray:
        self.training, self.convolution, self.norm = training, 0, 0
        x = self.convolve(images)
        if not self.pre:
            x = self.activate(self.normalise(x))
        for channels in (16, 32, 64):
            for unit in range(self.n):
                stride = 2 if channels > 16 and unit == 0 else 1
                if self.pre:
                    activated = self.activate(self.normalise(x))
                    inner = self.convolve(self.activate(self.normalise(self.convolve(activated, stride))))
                    x = inner + self.around(activated if channels == 16 and unit == 0 else x, channels, stride)
                else:
                    inner = self.normalise(self.convolve(self.activate(self.normalise(self.convolve(x, stride)))))
                    x = self.activate(inner + self.around(x, channels, stride))
        if self.pre:
            x = self.activate(self.normalise(x))
        weight, bias = self.linear
        return x.mean((2, 3)) @ weight.T + bias


def pair(depth: int, **options: Any) -> tuple[ResNet, Reference]:
    """Build a float64 network whose every number, scales and biases too, differs from its neutral value, and its reference."""
    torch.manual_seed(1)
    network = ResNet(depth, **options).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network, Reference(network, depth, **options)


def images(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3, 32, 32))


VARIANTS = [
    ("post", True, "relu", "batch"),
    ("post", False, "relu", "batch"),
    ("post", True, "gelu", "layer"),
    ("post", True, "leaky_relu", "group"),
    ("post", True, "relu", "none"),
    ("pre", True, "leaky_relu", "batch"),
    ("pre", False, "leaky_relu", "batch"),
    ("pre", True, "relu", "layer"),
    ("pre", True, "silu", "group"),
    ("pre", False, "silu", "none"),
    ("pre", True, "leaky_relu", "none"),
    ("post", True, "leaky_relu", "none"),
]
NAMES = ("block", "shortcut", "activation", "normalization")


@pytest.mark.parametrize(NAMES, VARIANTS)
def test_forward_pass_equals_the_papers_in_numpy(block, shortcut, activation, normalization):
    network, reference = pair(14, block=block, shortcut=shortcut, activation=activation, normalization=normalization)
    for training in (True, False):  # train mode moves the running statistics that eval mode uses
        network.train(training)
        x = images(2, seed=training)
        np.testing.assert_allclose(network(torch.from_numpy(x)).detach(), reference(x, training), rtol=1e-8, atol=1e-9)


SMOOTH = [("post", True, "gelu", "batch"), ("pre", True, "silu", "batch"), ("pre", True, "gelu", "group")]


@pytest.mark.parametrize(NAMES, SMOOTH)
def test_gradients_equal_finite_differences(block, shortcut, activation, normalization):
    network, reference = pair(8, block=block, shortcut=shortcut, activation=activation, normalization=normalization)
    x, weights = images(2, seed=3), np.random.default_rng(4).normal(size=(2, 10))
    (network(torch.from_numpy(x)) * torch.from_numpy(weights)).sum().backward()

    # Along one random direction through all parameters, every gradient takes part in the slope. Smooth activations
    # only: of 100,000 ReLUs some would cross their kink within any step.
    directions = [torch.randn_like(p) for p in network.parameters()]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(network.parameters(), directions, strict=True))
    values = []
    step = 1e-6
    for shift in (step, -2 * step):
        with torch.no_grad():
            for parameter, direction in zip(network.parameters(), directions, strict=True):
                parameter.add_(shift * direction)
        reference.read()
        values.append((reference(x, training=True) * weights).sum())
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


# --- initial weights ---


def layers(network: ResNet) -> list[nn.Conv2d | nn.Linear]:
    return [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize(
    ("weight_init", "activation", "variance"),
    [
        ("he_normal", "relu", lambda fan_in, fan_out: 2 / fan_in),
        ("he_normal", "leaky_relu", lambda fan_in, fan_out: 2 / (1 + 0.1**2) / fan_in),
        ("xavier_normal", "relu", lambda fan_in, fan_out: 2 / (fan_in + fan_out)),
    ],
)
def test_initial_weights_are_normal_with_the_variance_of_the_paper(weight_init, activation, variance):
    torch.manual_seed(0)
    network = ResNet(56, activation=activation, weight_init=weight_init)
    scaled = []
    for layer in layers(network):
        pixels = layer.weight[0, 0].numel() if isinstance(layer, nn.Conv2d) else 1
        fan_out, fan_in = layer.weight.shape[0] * pixels, layer.weight.shape[1] * pixels
        scaled.append(layer.weight.detach().flatten().double() / math.sqrt(variance(fan_in, fan_out)))
        n = len(scaled[-1])
        assert float(scaled[-1].std()) == pytest.approx(1, abs=5 / math.sqrt(2 * n))  # five standard errors
        assert float(scaled[-1].mean()) == pytest.approx(0, abs=5 / math.sqrt(n))
        assert layer.bias is None or not layer.bias.any()
    everything = torch.cat(scaled)
    assert float(everything.std()) == pytest.approx(1, abs=5 / math.sqrt(2 * len(everything)))
    within_one = (everything.abs() < 1).double().mean()
    assert float(within_one) == pytest.approx(0.6827, abs=0.005)  # of a normal distribution; 0.577 of a uniform one


def test_pytorch_initialisation_is_pytorchs_own():
    torch.manual_seed(0)
    network = ResNet(8, weight_init="pytorch")
    torch.manual_seed(0)
    for layer in layers(network):
        if isinstance(layer, nn.Conv2d):
            own = nn.Conv2d(layer.in_channels, layer.out_channels, 3, bias=layer.bias is not None)
        else:
            own = nn.Linear(layer.in_features, layer.out_features)
        assert torch.equal(layer.weight, own.weight)


@pytest.mark.parametrize("shape", [(6, 16, 8, 4), (2, 64, 8, 8)])
def test_compiled_batch_norm_is_batch_norm(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(memory_format=torch.channels_last) * 3 + 2
    upstream = torch.randn(shape)
    outcomes = []
    for kind in (nn.BatchNorm2d, BatchNorm2d):
        norm, image = kind(shape[1]), x.clone().requires_grad_()
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2, shape[1]))
        out = torch.compile(norm, backend="eager")(image)
        out.backward(upstream)
        outcomes.append([out.detach(), image.grad, norm.weight.grad, norm.bias.grad, *norm.state_dict().values()])
    assert not torch.equal(outcomes[0][0], outcomes[1][0])  # rounded elsewhere: it is not the same computation
    for theirs, ours in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.compile(BatchNorm2d(shape[1]), backend="eager")(torch.full(shape, 10.3)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_synchronised_batch_norm_of_one_process_is_batch_norm(dtype: torch.dtype) -> None:
    x = torch.randn(6, 16, 8, 4).to(dtype) * 3 + 2
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        theirs, ours = nn.BatchNorm2d(16), SyncBatchNorm2d(16)
        out = ours(x)
    finally:
        dist.destroy_process_group()
    assert out.dtype == dtype
    torch.testing.assert_close(out, theirs(x), rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)
    torch.testing.assert_close([ours.running_mean, ours.running_var], [theirs.running_mean, theirs.running_var])
