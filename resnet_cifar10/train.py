"""The one training loop: batch, forward, backward, step; then once an epoch: validate, and hand out what there is to save."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist

from .data import Split, batches, mean_and_std, normalise
from .evaluate import accuracy, negative_log_likelihood, predict
from .model import ResNet
from .muon import Muon
from .settings import Setting
from .storage import Tensors, check_tensors


class TrainingFailed(Exception):
    """The training can't go on, for example because its loss is no longer finite."""


class Checkpoint(NamedTuple):
    """Everything that training changes, so that a resumed run equals an uninterrupted one."""

    tensors: Tensors  # "model.*", "best.*" (the weights of the best epoch so far) and "optimizer.*"
    state: dict[str, Any]  # "epoch", "best_epoch", "best_accuracy"
    where: str = "checkpoint"  # its file, for messages

    @classmethod
    def of(cls, state: dict[str, Any], **parts: Tensors) -> Checkpoint:
        """Put the tensors of the parts side by side."""
        return cls({f"{part}.{key}": tensor for part, tensors in parts.items() for key, tensor in tensors.items()}, dict(state))

    def part(self, name: str) -> Tensors:
        """Take out one part: "model", "best" or "optimizer"."""
        return {key.removeprefix(f"{name}."): tensor for key, tensor in self.tensors.items() if key.startswith(f"{name}.")}


def learning_rate(setting: Setting, progress: float) -> float:
    """Return the learning rate at this fraction of the run, 0 <= progress < 1."""
    if progress < setting.warmup:
        return setting.lr * progress / setting.warmup
    rest = (progress - setting.warmup) / (1 - setting.warmup)
    match setting.lr_decay:
        case "step":
            return setting.lr * setting.lr_factor ** sum(progress >= m for m in setting.lr_milestones)
        case "cosine":  # Loshchilov & Hutter 2017, eq. 5: one period, down to 0
            return setting.lr * 0.5 * (1 + math.cos(math.pi * rest))
        case "linear":
            return setting.lr * (1 - rest)
        case _:
            return setting.lr


def patience_ended(setting: Setting, epoch: int, best_epoch: int) -> bool:
    """Say whether `patience` epochs brought no better validation accuracy, counted after the last scheduled decay."""
    last_decay = {"none": setting.warmup, "step": max([setting.warmup, *setting.lr_milestones])}.get(setting.lr_decay, 1.0)
    since = max(best_epoch, math.ceil(last_decay * setting.epochs))
    return setting.patience is not None and epoch - since >= setting.patience


def make_optimizer(setting: Setting, model: ResNet) -> torch.optim.Optimizer:
    """Build the optimizer over all parameters; "fused" updates them in one kernel."""
    if setting.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), setting.lr, setting.momentum, nesterov=setting.nesterov,
                               weight_decay=setting.weight_decay, fused=True)  # fmt: skip
    if setting.optimizer == "muon":
        return Muon(model.parameters(), setting.lr, setting.momentum, setting.weight_decay)
    kind = torch.optim.Adam if setting.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), setting.lr, (setting.momentum, 0.999), weight_decay=setting.weight_decay, fused=True)


def train(setting: Setting, seed: int, training: Split, validation: Split, device: str = "cpu", precision: str = "float32",
          compiled: bool = False, first_weights: Tensors | None = None, checkpoint: Checkpoint | None = None,
          after_step: Callable[[int, int, int], None] = lambda epoch, step, steps: None,
          ) -> Iterator[tuple[dict[str, Any], Checkpoint]]:  # fmt: skip
    """Train one setting with one seed, an epoch each time that the iterator is asked for more.

    Where torch.distributed is initialised, every process does this with the same arguments and gets its part of each batch.

    Args:
        setting: The row of the table.
        seed: Of the initial weights, the order of the images and their augmentation.
        training: The images to learn from.
        validation: The held-out images that choose the best epoch; may be empty, then the last epoch is the best.
        device: "cpu" or "cuda".
        precision: "bfloat16" computes in bfloat16 where that loses nothing (autocast), the weights stay float32;
            "float32", or "float64".
        compiled: Compile the training step with torch.compile.
        first_weights: Replace the initial weights of the same names.
        checkpoint: Of the epoch after which to go on.
        after_step: Called with epoch, step of the epoch and steps of an epoch; what it raises ends the training.

    Yields:
        The epoch's line of metrics (losses in nats an image, accuracies in percent; None without validation images) and
        its checkpoint, whose tensors change with the next epoch.

    Raises:
        ValueError: If setting, checkpoint and number of processes do not fit together.
        TrainingFailed: If the loss is no longer finite.

    """
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    steps = math.ceil(len(training) / setting.batch_size)
    last_batch = len(training) - (steps - 1) * setting.batch_size
    if last_batch < processes:
        raise ValueError(f"key 'batch_size': found {setting.batch_size}, with a last batch of {last_batch} images; "
                         f"allowed: at least one image for each of {processes} processes")  # fmt: skip
    mean, std = mean_and_std(training.images)
    if device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)  # on a CPU every operation used here is deterministic as it is
    torch.manual_seed(seed)
    dtype = torch.float64 if precision == "float64" else torch.float32
    model = ResNet(**setting.architecture(len(training.classes)))
    model.load_state_dict(first_weights or {}, strict=False)
    model = model.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(setting, model)
    state: dict[str, Any] = {"epoch": 0, "best_epoch": 0, "best_accuracy": -1.0}
    best: Tensors = {}
    if checkpoint:
        if missing := state.keys() - checkpoint.state.keys():
            raise ValueError(f"{checkpoint.where}: key '{min(missing)}' is missing")
        check_tensors(checkpoint.where, _shapes(setting, model), checkpoint.tensors)
        state = checkpoint.state
        best = checkpoint.part("best")
        _restore(checkpoint, model, optimizer)
    training, validation_images = training.to(device), validation.images[rank::processes].to(device)
    mean_tensor, std_tensor = torch.tensor(mean, device=device), torch.tensor(std, device=device)
    fill = (mean_tensor * 255).round().to(torch.uint8)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            return model(x.to(dtype)).to(dtype)  # type: ignore[no-any-return]

    def loss_and_hits(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = forward(normalise(images, mean_tensor, std_tensor))
        hits = (logits.argmax(1) == targets.argmax(1)).sum()
        return F.cross_entropy(logits, targets.to(dtype), reduction="sum", label_smoothing=setting.label_smoothing), hits

    # a GPU replays its hundreds of small kernels as CUDA graphs, or it would wait for Python to launch each
    mode = "reduce-overhead" if device == "cuda" else None
    fast_step = torch.compile(loss_and_hits, mode=mode) if compiled else loss_and_hits
    fast_forward = torch.compile(forward) if compiled else forward
    full = len(range(rank, setting.batch_size, processes))  # this process's part of a whole batch
    for epoch in range(state["epoch"] + 1, setting.epochs + 1):
        if patience_ended(setting, state["epoch"], state["best_epoch"]):
            return
        started = time.perf_counter()
        model.train()
        totals = torch.zeros(2, dtype=torch.float64, device=device)
        source = batches(training, setting.batch_size, setting.augmentation, seed, epoch, fill, rank, processes)
        for step, (images, targets) in enumerate(source):
            rate = learning_rate(setting, (epoch - 1 + step / steps) / setting.epochs)
            for group in optimizer.param_groups:
                group["lr"] = rate
            # a last, smaller batch would have to be compiled for itself
            loss, hits = (fast_step if len(images) == full else loss_and_hits)(images, targets)
            (loss / (last_batch if step == steps - 1 else setting.batch_size)).backward()  # type: ignore[no-untyped-call]
            if processes > 1:
                _sum_gradients(model)
            optimizer.step()
            optimizer.zero_grad()
            totals += torch.stack([loss.detach().double(), 100 * hits.double()])
            after_step(epoch, step + 1, steps)
        if processes > 1:
            dist.all_reduce(totals)
            for buffer in model.buffers():  # the running statistics of the first process
                dist.broadcast(buffer, 0)
        train_loss, train_accuracy = (totals / len(training)).tolist()
        if not math.isfinite(train_loss):
            raise TrainingFailed(f"{setting.name}, seed {seed}: the loss is no longer finite in epoch {epoch}, at lr {rate:g}; "
                                 "a smaller lr, a warm-up or a normalisation helps")  # fmt: skip
        trained = time.perf_counter()

        model.eval()
        validation_loss = validation_accuracy = None
        if len(validation):
            part = predict(fast_forward, validation_images, mean, std)
            logits = part.new_zeros(len(validation), part.shape[1])
            logits[rank::processes] = part
            if processes > 1:
                dist.all_reduce(logits)
            validation_loss = negative_log_likelihood(logits.cpu(), validation.labels)
            validation_accuracy = accuracy(logits.cpu(), validation.labels)
        state["epoch"] = epoch
        if validation_accuracy is None or validation_accuracy > state["best_accuracy"]:
            state |= {"best_epoch": epoch, "best_accuracy": validation_accuracy}
            best = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        metrics = {
            "epoch": epoch, "train_loss": train_loss, "train_accuracy": train_accuracy, "validation_loss": validation_loss,
            "validation_accuracy": validation_accuracy, "lr": rate,
            "train_seconds": trained - started, "validation_seconds": time.perf_counter() - trained,
        }  # fmt: skip
        moments = {f"{index}.{key}": tensor for index, values in optimizer.state_dict()["state"].items()
                   for key, tensor in values.items()}  # fmt: skip
        yield metrics, Checkpoint.of(state, model=model.state_dict(), best=best, optimizer=moments)


def _sum_gradients(model: ResNet) -> None:
    """Add the gradients of all processes, in one piece and one order, so that a restarted run repeats every bit."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))


def _shapes(setting: Setting, model: ResNet) -> dict[str, Sequence[int]]:
    """Name the tensors of a checkpoint, each with its shape."""
    of_adam = ("exp_avg", "exp_avg_sq", "step")
    kinds = {"sgd": ("momentum_buffer",) * (setting.momentum > 0), "muon": ("momentum_buffer",)}.get(setting.optimizer, of_adam)
    shapes: dict[str, Sequence[int]] = {
        f"optimizer.{index}.{kind}": () if kind == "step" else parameter.shape
        for index, parameter in enumerate(model.parameters()) for kind in kinds
    }  # fmt: skip
    return shapes | {f"{group}.{key}": t.shape for group in ("model", "best") for key, t in model.state_dict().items()}


def _restore(checkpoint: Checkpoint, model: ResNet, optimizer: torch.optim.Optimizer) -> None:
    model.load_state_dict(checkpoint.part("model"))
    parameters = list(model.parameters())
    state: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in checkpoint.part("optimizer").items():
        index, kind = key.split(".")
        like = parameters[int(index)] if tensor.ndim else tensor  # the fused step needs the strides of the parameter
        state[int(index)][kind] = torch.empty_like(like).copy_(tensor)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
