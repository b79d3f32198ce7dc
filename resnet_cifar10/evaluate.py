"""Logits of a whole split, then every metric as a short function of (logits, labels)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import normalise

Forward = Callable[[Tensor], Tensor]  # normalised images [N, 3, 32, 32] to logits [N, classes]


@torch.inference_mode()
def predict(model: Forward, images: Tensor, mean: list[float], std: list[float], batch_size: int = 250) -> Tensor:
    """Map images uint8 [N, 32, 32, 3] to what the model, in eval mode, gives: float32 [N, ...] on their device."""
    logits = []
    scale = torch.tensor(mean, device=images.device), torch.tensor(std, device=images.device)
    for batch in torch.split(images, batch_size):
        x = normalise(batch, *scale)
        missing = batch_size - len(x) if len(images) > batch_size else 0  # one shape for all: nothing is compiled twice
        logits.append(model(F.pad(x, (0, 0, 0, 0, 0, 0, 0, missing)))[: len(x)].float())
    return torch.cat(logits)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of images whose label has the highest logit; of equal ones the first counts."""
    return 100 * float((logits.argmax(1) == labels).double().mean())


def top2_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of images whose label is among the two highest logits."""
    return 100 * float((logits.topk(2).indices == labels[:, None]).any(1).double().mean())


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Count int64 [classes, classes]: rows are true classes, columns predicted ones."""
    classes = logits.shape[1]
    return torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).view(classes, classes)


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Mean of -log p(label), in nats."""
    return float(F.cross_entropy(logits.double(), labels))


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error in percent: mean gap of confidence to accuracy in bins (Guo et al. 2017, eq. 3, table 1)."""
    confidence, predicted = logits.double().softmax(1).max(1)
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, confidence - (predicted == labels).double())
    return 100 * float(gap.abs().sum() / len(labels))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Find the T that minimises the negative log-likelihood of logits / T (Guo et al. 2017, section 4.2).

    Without a mistake there is no minimum, and every answer would be made certain: then each of the n images is taken to be
    named wrongly with probability 1 / (n + 2), Laplace's rule of succession.
    """
    n, classes = logits.shape
    smoothing = classes / (classes - 1) / (n + 2) if accuracy(logits, labels) == 100 else 0.0
    low, high = -3.0, 3.0  # of log T; the likelihood has one minimum, so each third that is dropped is the wrong one
    for _ in range(60):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        left, right = (F.cross_entropy(logits.double() / math.exp(t), labels, label_smoothing=smoothing) for t in (a, b))
        low, high = (low, b) if left < right else (a, high)
    return math.exp((low + high) / 2)


def wilson_interval(percent: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n images, in percent (Wilson 1927)."""
    p, z = percent / 100, 1.959964
    centre, spread = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    low, high = (100 * limit / (1 + z**2 / n) for limit in (centre - spread, centre + spread))
    return max(low, 0.0), min(high, 100.0)  # which rounding may miss by 1e-15


def evaluate(logits: Tensor, labels: Tensor, classes: tuple[str, ...], temperature: float = 1.0) -> dict[str, Any]:
    """Compute every metric of a split; accuracies are in percent, unrounded; "scaled" is of logits / temperature.

    Recall is None for a class without images, precision for one that no image was taken for.
    """
    counts = confusion(logits, labels)
    correct, labelled, predicted = (numbers.tolist() for numbers in (counts.diagonal(), counts.sum(1), counts.sum(0)))
    percent = accuracy(logits, labels)
    return {
        "accuracy": percent,
        "n": len(labels),
        "interval_95": wilson_interval(percent, len(labels)),
        "top2_accuracy": top2_accuracy(logits, labels),
        "negative_log_likelihood": negative_log_likelihood(logits, labels),
        "calibration_error": calibration_error(logits, labels),
        "temperature": temperature,
        "negative_log_likelihood_scaled": negative_log_likelihood(logits / temperature, labels),
        "calibration_error_scaled": calibration_error(logits / temperature, labels),
        "per_class": {
            name: {"precision": 100 * hits / taken if taken else None, "recall": 100 * hits / n if n else None, "n": n}
            for name, hits, n, taken in zip(classes, correct, labelled, predicted, strict=True)
        },
        "confusion": counts.tolist(),
    }
