"""The one training loop: batch, forward, backward, step; then once an epoch: validate, log, save."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch import distributed as dist

from . import storage
from .data import Split, batches, mean_and_std, normalise
from .evaluate import accuracy, negative_log_likelihood, predict
from .model import ResNet, parameter_count
from .settings import Setting


class TrainingFailed(Exception):
    """The training can't go on, for example because its loss is no longer finite."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM ended the training; the run folder holds everything up to the last whole epoch."""


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
    kind = torch.optim.Adam if setting.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), setting.lr, (setting.momentum, 0.999), weight_decay=setting.weight_decay, fused=True)


def train(setting: Setting, seed: int, training: Split, validation: Split, folder: Path, device: str = "cpu",
          precision: str = "float32", compiled: bool = False, first_weights: storage.Tensors | None = None,
          environment: dict[str, Any] | None = None) -> tuple[ResNet, dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Train one setting with one seed into a run folder, or go on where the folder's last checkpoint stands.

    Where torch.distributed is initialised, every process calls this with the same arguments and gets its part of each
    batch; the first one alone writes.

    Args:
        setting: The row of the table.
        seed: Of the initial weights, the order of the images and their augmentation.
        training: The images to learn from.
        validation: The held-out images that choose the best epoch; may be empty, then the last epoch is the best.
        folder: The run folder.
        device: "cpu" or "cuda".
        precision: "bfloat16" computes in bfloat16 where that loses nothing (autocast), the weights stay float32;
            "float32", or "float64".
        compiled: Compile the training step with torch.compile.
        first_weights: Replace the initial weights of the same names.
        environment: Facts about machine and versions that go into environment.json; where one of them has changed,
            a resumed run is marked as not bit-exact.

    Returns:
        The network with its best weights, the start of its config.json and the start of result.json.

    Raises:
        ValueError: If run folder, setting and number of processes do not fit together.
        TrainingFailed: If the loss is no longer finite.
        Interrupted: After Ctrl-C or SIGTERM.

    """
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    steps = math.ceil(len(training) / setting.batch_size)
    last_batch = len(training) - (steps - 1) * setting.batch_size
    if min(last_batch, setting.batch_size) < processes:
        raise ValueError(f"key 'batch_size': found {setting.batch_size}, with a last batch of {last_batch} images; "
                         f"allowed: at least one image for each of {processes} processes")  # fmt: skip
    name = f"{setting.name}, seed {seed}"
    mean, std = mean_and_std(training.images)
    if device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)  # on a CPU every operation used here is deterministic as it is
    torch.manual_seed(seed)
    architecture = setting.architecture(len(training.classes))
    dtype = torch.float64 if precision == "float64" else torch.float32
    model = ResNet(**architecture)
    model.load_state_dict(first_weights or {}, strict=False)
    model = model.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(setting, model)
    environment = (environment or {}) | {
        "data": training.source, "training_sha256": training.sha256,
        "training_images": len(training), "validation_images": len(validation),
    }  # fmt: skip
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

    fast_step = torch.compile(loss_and_hits) if compiled else loss_and_hits
    fast_forward = torch.compile(forward) if compiled else forward

    # Everything that training changes is in the checkpoint, so a resumed run equals an uninterrupted one.
    rows: list[dict[str, Any]] = []
    state: dict[str, Any] = {"epoch": 0, "best_epoch": 0, "best_accuracy": -1.0, "not_bit_exact": ""}
    best = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = [storage.load_checkpoint(folder) if rank == 0 else None]
    if processes > 1:
        dist.broadcast_object_list(found)
    if found[0]:
        tensors, held, problem = found[0]
        if missing := state.keys() - held.keys():
            raise ValueError(f"{folder}: checkpoint: key '{min(missing)}' is missing")
        storage.check_tensors(folder, _shapes(setting, model), tensors)
        state = held
        _restore(tensors, model, optimizer, best)
        if rank == 0:
            rows = [row for row in storage.read_metrics(folder) if row["epoch"] <= state["epoch"]]
            if len(rows) != state["epoch"]:
                raise ValueError(f"{folder / 'metrics.csv'}: found {len(rows)} epochs, the checkpoint has {state['epoch']}")
            before = storage.read_json(folder / "environment.json")
            state["not_bit_exact"] = state["not_bit_exact"] or before.get("not_bit_exact", "")
            if changed := [key for key in environment if before.get(key) != environment[key] and key != "git_commit"]:
                state["not_bit_exact"] = f"resumed after epoch {state['epoch']} with another {', '.join(changed)}"
            for line in filter(None, (problem, state["not_bit_exact"])):
                print(f"{name}: {line}", flush=True)
    if rank == 0:
        # with the mark: a run that is killed before its next checkpoint must not lose it
        storage.write_json(folder / "environment.json", environment | {"not_bit_exact": state["not_bit_exact"]})
    print(f"{name}: {setting.model}, {parameter_count(model):,} parameters; {training.source}: {len(training):,} training "
          f"and {len(validation):,} validation images; {device}, {precision}"
          f"{f', {processes} processes' if processes > 1 else ''}"
          f"{', compiled (the first time takes a minute)' if compiled else ''}"
          f"{'; goes on after epoch ' + str(state['epoch']) if rows else ''}", flush=True)  # fmt: skip

    full = len(range(rank, setting.batch_size, processes))  # this process's part of a whole batch
    console = Console()
    in_pipe = rank > 0 or not console.is_terminal  # there the epoch lines alone tell the progress
    with stop_signals() as received:
        for epoch in range(state["epoch"] + 1, setting.epochs + 1):
            if patience_ended(setting, state["epoch"], state["best_epoch"]):
                break
            started = time.perf_counter()
            model.train()
            totals = torch.zeros(2, dtype=torch.float64, device=device)
            epoch_batches = batches(training, setting.batch_size, setting.augmentation, seed, epoch, fill, rank, processes)
            shown = track(epoch_batches, f"epoch {epoch}", steps, console=console, transient=True, disable=in_pipe)
            for step, (images, targets) in enumerate(shown):
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
                if received:
                    raise Interrupted(received[0])
            if processes > 1:
                dist.all_reduce(totals)
                for buffer in model.buffers():  # the running statistics of the first process
                    dist.broadcast(buffer, 0)
            train_loss, train_accuracy = (totals / len(training)).tolist()
            if not math.isfinite(train_loss):
                raise TrainingFailed(f"{name}: the loss is no longer finite in epoch {epoch}, at lr {rate:g}; "
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
            improved = validation_accuracy is None or validation_accuracy > state["best_accuracy"]
            if improved:
                state |= {"best_epoch": epoch, "best_accuracy": validation_accuracy}
                best = {key: tensor.clone() for key, tensor in model.state_dict().items()}
            if rank > 0:
                continue
            values = (epoch, train_loss, train_accuracy, validation_loss, validation_accuracy, rate,
                      trained - started, time.perf_counter() - trained)  # fmt: skip
            rows.append(dict(zip(storage.METRICS, values, strict=True)))
            if improved:
                storage.write_tensors(folder / "best.safetensors", best, {"epoch": epoch})
            storage.write_metrics(folder, rows)  # before the checkpoint: what it does not know of is dropped on resume
            storage.save_checkpoint(folder, _collect(model, optimizer, best), state)
            print(epoch_line(name, setting.epochs, rows, state), flush=True)

    if rank == 0:
        storage.write_tensors(folder / "best.safetensors", best, {"epoch": state["best_epoch"]})
    model.load_state_dict(best)
    minutes = sum(row["train_seconds"] + row["validation_seconds"] for row in rows) / 60
    config = {"architecture": architecture, "mean": mean, "std": std, "data": training.source, "seed": seed,
              "setting": setting.model_dump(exclude={"seeds"}), "best_epoch": state["best_epoch"]}  # fmt: skip
    return model.float().eval(), config, {
        "setting": setting.name, "seed": seed, "parameters": parameter_count(model), "data": training.source,
        "epochs_run": state["epoch"], "best_epoch": state["best_epoch"], "stopped_early": state["epoch"] < setting.epochs,
        "train_minutes": minutes, "not_bit_exact": state["not_bit_exact"],
    }  # fmt: skip


def _sum_gradients(model: ResNet) -> None:
    """Add the gradients of all processes, in one piece and one order, so that a restarted run repeats every bit."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))


def _collect(model: ResNet, optimizer: torch.optim.Optimizer, best: storage.Tensors) -> storage.Tensors:
    groups = {"model": model.state_dict(), "best": best}
    groups |= {f"optimizer.{index}": values for index, values in optimizer.state_dict()["state"].items()}
    return {f"{group}.{key}": tensor for group, tensors in groups.items() for key, tensor in tensors.items()}


def _shapes(setting: Setting, model: ResNet) -> dict[str, Sequence[int]]:
    """Name the tensors of a checkpoint, each with its shape."""
    kinds = ("momentum_buffer",) * (setting.momentum > 0) if setting.optimizer == "sgd" else ("exp_avg", "exp_avg_sq", "step")
    shapes: dict[str, Sequence[int]] = {
        f"optimizer.{index}.{kind}": () if kind == "step" else parameter.shape
        for index, parameter in enumerate(model.parameters()) for kind in kinds
    }  # fmt: skip
    return shapes | {f"{group}.{key}": t.shape for group in ("model", "best") for key, t in model.state_dict().items()}


def _restore(tensors: storage.Tensors, model: ResNet, optimizer: torch.optim.Optimizer, best: storage.Tensors) -> None:
    model.load_state_dict({key.removeprefix("model."): t for key, t in tensors.items() if key.startswith("model.")})
    best |= {key: tensors[f"best.{key}"].to(tensor.device) for key, tensor in best.items()}
    state: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(model.parameters()):
        prefix = f"optimizer.{index}."
        for key, tensor in tensors.items():
            if key.startswith(prefix):  # the fused step needs the strides of the parameter
                like = torch.empty_like(parameter) if tensor.shape == parameter.shape else torch.empty_like(tensor)
                state.setdefault(index, {})[key.removeprefix(prefix)] = like.copy_(tensor)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect the first Ctrl-C or SIGTERM, so that the current step ends; a second one acts at once."""
    received: list[int] = []

    def remember(number: int, frame: object) -> None:
        received.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        restore()


def epoch_line(name: str, epochs: int, rows: list[dict[str, Any]], state: dict[str, Any]) -> str:
    """Say how the last epoch went and how long the others will take."""
    row, seconds = rows[-1], [r["train_seconds"] + r["validation_seconds"] for r in rows[-5:]]
    minutes = sorted(seconds)[len(seconds) // 2] * (epochs - row["epoch"]) / 60
    left = f"{minutes // 60:.0f} h {minutes % 60:.0f} min" if minutes >= 60 else f"{minutes:.1f} min"
    validation = ""
    if row["validation_accuracy"] is not None:
        best = f"best {state['best_accuracy']:.2f} at {state['best_epoch']}"
        validation = f"validation {row['validation_accuracy']:.2f} % ({best})  "
    return (f"{name}: epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.4f}  train {row['train_accuracy']:.2f} %  "
            f"{validation}lr {row['lr']:.4g}  {seconds[-1]:.0f} s  left {left}")  # fmt: skip
