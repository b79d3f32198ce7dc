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
from .errors import JobFailed
from .evaluate import accuracy, negative_log_likelihood, predict
from .model import ResNet
from .muon import Muon
from .settings import Setting
from .storage import Tensors, check_tensors

WORST = 1e30  # stands for an infinite loss, which JSON cannot hold


class Checkpoint(NamedTuple):
    """Everything that training changes, so that a resumed run equals an uninterrupted one."""

    tensors: Tensors  # "model.*", "best.*" (the weights of the best epoch so far) and "optimizer.*"
    state: dict[str, Any]  # "epoch", "best_epoch", "best_accuracy", "best_loss"
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
    """Say whether `patience` epochs brought no better one (accuracy, then loss), counted after the last scheduled decay."""
    last_decay = max([setting.warmup, *(setting.lr_milestones if setting.lr_decay == "step" else [])])
    since = max(best_epoch, math.ceil(round(last_decay * setting.epochs, 6)))  # 0.55 * 100 is above 55
    return setting.patience is not None and epoch - since >= setting.patience


def make_optimizer(setting: Setting, model: ResNet) -> torch.optim.Optimizer:
    """Build the optimizer over all parameters; "fused" updates them in one kernel."""
    options: Any = {"weight_decay": setting.weight_decay, "fused": True}
    if setting.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), setting.lr, setting.momentum, nesterov=setting.nesterov, **options)
    if setting.optimizer == "muon":
        return Muon(model.parameters(), setting.lr, setting.momentum, setting.weight_decay)
    kind = torch.optim.Adam if setting.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), setting.lr, (setting.momentum, 0.999), **options)


def initial_network(setting: Setting, seed: int, classes: int, initial_weights: Tensors | None) -> ResNet:
    """Build the network that a run begins with; `initial_weights` replace the random ones of the same names."""
    torch.manual_seed(seed)
    network = ResNet(**setting.architecture(classes))
    if unknown := network.load_state_dict(initial_weights or {}, strict=False).unexpected_keys:
        raise ValueError(f"initial_weights: found {unknown[0]!r}; allowed: the names of {setting.model}'s own weights")
    return network


class Learner:
    """The network in training, in PyTorch: all that the training loop leaves to a framework."""

    def __init__(
        self,
        setting: Setting,
        seed: int,
        training: Split,
        device: str,
        precision: str,
        compiled: bool,
        initial_weights: Tensors | None = None,
    ) -> None:
        """Build network and optimizer; on a GPU all that PyTorch computes from then on is deterministic.

        Args:
            setting: The row of the table, but for start_from, precision and compile, which the other arguments say.
            seed: Of the initial weights.
            training: The images to learn from, of which normalisation takes mean and deviation.
            device: "cpu" or "cuda".
            precision: "bfloat16" computes in bfloat16 where that loses nothing (autocast), the weights stay float32;
                "float32", or "float64".
            compiled: Compile the training step, and the forward pass of validation, with torch.compile.
            initial_weights: Replace the initial weights of the same names.

        """
        self.device = device
        self.mean, self.std = mean_and_std(training.images)
        if device == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)  # on a CPU every operation used here is deterministic as it is
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
            torch.backends.cudnn.allow_tf32 = False  # else convolutions of "float32" keep 10 bits of 23,
            torch.set_float32_matmul_precision("highest")  # and matrix products, where an environment variable says so
        dtype = {"bfloat16": torch.float32, "float32": torch.float32, "float64": torch.float64}[precision]
        model = initial_network(setting, seed, len(training.classes), initial_weights)
        self.model = model.to(device, dtype)
        self.optimizer = make_optimizer(setting, model)
        self.setting = setting
        mean, std = torch.tensor(self.mean, device=device), torch.tensor(self.std, device=device)

        def forward(x: Tensor) -> Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
                return model(x.to(dtype)).to(dtype)

        def loss_and_correct(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logits = forward(normalise(images, mean, std))
            correct = (logits.argmax(1) == targets.argmax(1)).sum()
            loss = F.cross_entropy(logits, targets.to(dtype), reduction="sum", label_smoothing=setting.label_smoothing)
            return loss, correct

        if compiled:
            torch.compiler.reset()  # else it may compile this network otherwise than a new process would, or not at all
        # a GPU replays its hundreds of small kernels as CUDA graphs, or it would wait for Python to launch each
        mode = "reduce-overhead" if device == "cuda" else None
        self.forward = torch.compile(forward) if compiled else forward
        self.loss_and_correct = torch.compile(loss_and_correct, mode=mode) if compiled else loss_and_correct
        self.eager_loss_and_correct = loss_and_correct

    def step(self, images: Tensor, targets: Tensor, lr: float, whole_batch: int) -> Tensor:
        """Learn from this process's part of a batch: uint8 [B, 32, 32, 3] and class probabilities [B, classes].

        `whole_batch` is the size of the whole batch, of which other processes may have the other parts.

        Returns:
            float64 [2]: the sum of the losses in nats, and the number of correct images.

        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # a smaller last batch is not compiled: its shape would need a compilation of its own
        compute = self.loss_and_correct if whole_batch == self.setting.batch_size else self.eager_loss_and_correct
        loss, correct = compute(images, targets)
        (loss / whole_batch).backward()
        if dist.is_initialized():
            _sum_gradients(self.model)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack([loss.detach().double(), correct.double()])

    def logits(self, images: Tensor) -> Tensor:
        """Map images uint8 [N, 32, 32, 3] to logits float32 [N, classes], with the running statistics of the first process."""
        if dist.is_initialized():
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        self.model.eval()
        logits = predict(self.forward, images, self.mean, self.std)
        self.model.train()
        return logits

    def tensors(self) -> dict[str, Tensors]:
        """Return all that training changes: "model" and "optimizer", by name."""
        moments = {
            f"{index}.{key}": tensor
            for index, values in self.optimizer.state_dict()["state"].items()
            for key, tensor in values.items()
        }
        return {"model": self.model.state_dict(), "optimizer": moments}

    def moment_shapes(self) -> dict[str, Sequence[int]]:
        """Name the tensors of the optimizer after its first step, each with its shape."""
        kinds = ["exp_avg", "exp_avg_sq", "step"]  # of Adam and AdamW
        if self.setting.optimizer in ("sgd", "muon"):
            kinds = [] if self.setting.optimizer == "sgd" and not self.setting.momentum else ["momentum_buffer"]
        return {
            f"{index}.{kind}": () if kind == "step" else parameter.shape
            for index, parameter in enumerate(self.model.parameters())
            for kind in kinds
        }

    def restore(self, weights: Tensors, moments: Tensors) -> None:
        """Take over what `tensors` gave."""
        self.model.load_state_dict(weights)
        parameters = list(self.model.parameters())
        state: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in moments.items():
            index, kind = key.split(".")
            like = parameters[int(index)] if tensor.ndim else tensor  # the fused step needs the strides of the parameter
            state[int(index)][kind] = torch.empty_like(like).copy_(tensor)
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


def train(
    learner: Any,
    setting: Setting,
    seed: int,
    training: Split,
    validation: Split,
    checkpoint: Checkpoint | None = None,
    watch: Callable[[Iterator[Any], int, int], Iterator[Any]] = lambda source, epoch, steps: source,
) -> Iterator[tuple[dict[str, Any], Checkpoint]]:
    """Train one setting with one seed, an epoch each time that the iterator is asked for more.

    Where torch.distributed is initialised, every process does this with the same arguments and gets its part of each batch.

    Args:
        learner: The network at its beginning, a Learner of this setting or what has the same methods.
        setting: The row of the table.
        seed: Of the order of the images and their augmentation.
        training: The images to learn from.
        validation: The held-out images whose accuracy chooses the best epoch, or their loss where that is equal; may be
            empty, then the last epoch is the best.
        checkpoint: Of the epoch after which to go on.
        watch: Hands on the batches of an epoch, of so many steps; what it raises ends the training.

    Yields:
        The epoch's line of metrics (losses in nats an image, accuracies in percent; None
        without validation images) and its checkpoint, whose tensors change with the next epoch.

    Raises:
        ValueError: If setting and checkpoint do not fit together.
        JobFailed: If the loss is no longer finite.

    """
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    steps = math.ceil(len(training) / setting.batch_size)
    last_batch = len(training) - (steps - 1) * setting.batch_size
    state: dict[str, Any] = {"epoch": 0, "best_epoch": 0, "best_accuracy": -1.0, "best_loss": WORST}
    best: Tensors = {}
    if checkpoint:
        if missing := state.keys() - checkpoint.state.keys():
            raise ValueError(f"{checkpoint.where}: key '{min(missing)}' is missing")
        shapes = {f"{part}.{key}": t.shape for part in ("model", "best") for key, t in learner.tensors()["model"].items()}
        shapes |= {f"optimizer.{key}": shape for key, shape in learner.moment_shapes().items()}
        check_tensors(checkpoint.where, shapes, checkpoint.tensors)
        state, best = dict(checkpoint.state), checkpoint.part("best")
        learner.restore(checkpoint.part("model"), checkpoint.part("optimizer"))
    device = learner.device
    training, validation_images = training.to(device), validation.images[rank::processes].to(device)
    fill = (torch.tensor(learner.mean, device=device) * 255).round().to(torch.uint8)

    for epoch in range(state["epoch"] + 1, setting.epochs + 1):
        if patience_ended(setting, state["epoch"], state["best_epoch"]):
            return
        started = time.perf_counter()
        totals = torch.zeros(2, dtype=torch.float64, device=device)
        source = batches(training, setting.batch_size, setting.augmentation, seed, epoch, fill, rank, processes)
        for step, (images, targets) in enumerate(watch(source, epoch, steps), 1):
            lr = learning_rate(setting, (epoch - 1 + (step - 1) / steps) / setting.epochs)
            totals += learner.step(images, targets, lr, last_batch if step == steps else setting.batch_size)
        if processes > 1:
            dist.all_reduce(totals)
        loss_sum, correct = totals.tolist()
        train_loss, train_accuracy = loss_sum / len(training), 100 * correct / len(training)
        if not math.isfinite(train_loss):
            raise JobFailed(
                f"{setting.name}, seed {seed}: the loss is no longer finite in epoch {epoch}, at lr {lr:g}; "
                "a smaller lr, a warm-up or a normalisation helps"
            )
        trained = time.perf_counter()

        validation_loss = validation_accuracy = None
        better = True
        loss = WORST
        if len(validation):
            part = learner.logits(validation_images)
            logits = part.new_zeros(len(validation), part.shape[1])
            logits[rank::processes] = part
            if processes > 1:
                dist.all_reduce(logits)
            validation_loss = negative_log_likelihood(logits.cpu(), validation.labels)
            validation_accuracy = accuracy(logits.cpu(), validation.labels)
            loss = validation_loss if math.isfinite(validation_loss) else WORST
            better = (validation_accuracy, -loss) > (state["best_accuracy"], -state["best_loss"])
        state["epoch"] = epoch
        if better:
            state |= {"best_epoch": epoch, "best_accuracy": validation_accuracy, "best_loss": loss}
            best = {key: tensor.clone() for key, tensor in learner.tensors()["model"].items()}
        metrics = {
            "epoch": epoch,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "validation_loss": validation_loss,
            "validation_accuracy": validation_accuracy,
            "lr": lr,
            "train_seconds": trained - started,
            "validation_seconds": time.perf_counter() - trained,
        }
        yield metrics, Checkpoint.of(state, best=best, **learner.tensors())


def _sum_gradients(model: ResNet) -> None:
    """Add the gradients of all processes, in one piece and one order, so that a restarted run repeats every bit."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))
