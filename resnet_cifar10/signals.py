"""How signals pass through a network before it has learned anything: forward to the loss, and back as its gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Split, batches, mean_and_std, normalise
from .model import ResNet
from .storage import Tensors

IMAGES = 128


def signals(architecture: dict[str, Any], seed: int, training: Split, first_weights: Tensors | None = None) -> dict[str, Any]:
    """Send 128 training images through the initial network of a run.

    Returns:
        For each block the root mean square of its output ("activation") and of the loss's gradient there ("gradient"); None
        where it is too large for a float.

    """
    torch.manual_seed(seed)
    network = ResNet(**architecture)
    network.load_state_dict(first_weights or {}, strict=False)
    outputs: list[Tensor] = []

    def remember(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    for block in network.blocks:
        block.register_forward_hook(remember)
    mean, std = map(torch.tensor, mean_and_std(training.images))
    images, targets = next(batches(training, IMAGES, "none", seed, 1, fill=torch.zeros(3, dtype=torch.uint8)))
    F.cross_entropy(network(normalise(images, mean, std)), targets).backward()  # type: ignore[no-untyped-call]
    gradients = [output.grad for output in outputs]
    return {"activation": [_size(output) for output in outputs], "gradient": [_size(g) for g in gradients if g is not None]}


def _size(x: Tensor) -> float | None:
    size = float(x.detach().square().mean().sqrt())
    return size if math.isfinite(size) else None
