"""How signals pass through a network before it has learned anything: forward to the loss, and back as its gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Split, batches, mean_and_std, normalise
from .settings import Setting
from .storage import Tensors
from .train import initial_network

IMAGES = 128


def signals(setting: Setting, seed: int, training: Split, initial_weights: Tensors | None = None) -> dict[str, Any]:
    """Send up to 128 training images through the initial network of a run.

    Returns:
        For each block the root mean square of its output ("activation") and of the loss's gradient there ("gradient"); None
        where it is no finite number.

    """
    if setting.normalization == "sync_batch":  # one process looks alone
        setting = setting.model_copy(update={"normalization": "batch"})
    network = initial_network(setting, seed, len(training.classes), initial_weights)
    outputs: list[Tensor] = []

    for block in network.blocks:
        block.register_forward_hook(lambda block, inputs, output: outputs.append(output))
    mean, std = map(torch.tensor, mean_and_std(training.images))
    count = min(IMAGES, setting.batch_size)  # no more memory than a step takes
    images, targets = next(batches(training, count, "none", seed, 1, fill=torch.zeros(3, dtype=torch.uint8)))
    gradients = torch.autograd.grad(F.cross_entropy(network(normalise(images, mean, std)), targets), outputs)
    return {"activation": [_rms(output) for output in outputs], "gradient": [_rms(gradient) for gradient in gradients]}


def _rms(x: Tensor) -> float | None:
    size = float(x.detach().double().square().mean().sqrt())
    return size if math.isfinite(size) else None
