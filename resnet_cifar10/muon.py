"""The optimizer Muon: SGD with momentum whose update of a matrix is orthogonalised: all its singular values become about 1."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: singular values come to 0.7 to 1.2, in five rounds
ROUNDS = 5
RMS = 0.2  # of an update, as Adam's usually is, so that both take the same learning rates (Liu et al. 2025, eq. 4)


def orthogonal(matrices: Tensor) -> Tensor:
    """Map [N, rows, columns] to the nearest semi-orthogonal matrices, about: U V^T of the decomposition U S V^T.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrices else x.mT


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal; weight decay apart from the gradient, as in AdamW.

    A convolution is a matrix with a row for each output channel, a vector is a matrix of one row.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update all parameters; those of one shape together."""
        (group,) = self.param_groups
        shapes: dict[Any, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            shapes[parameter.shape].append(parameter)
        for shape, parameters in shapes.items():
            updates = orthogonal(torch.stack([self._momentum(p, group["momentum"]) for p in parameters]))
            scale = group["lr"] * RMS * max(updates.shape[1:]) ** 0.5
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.view(shape), alpha=scale)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Update and return the Nesterov momentum of a parameter, as a matrix."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum).reshape(len(parameter) if parameter.ndim > 1 else 1, -1)
