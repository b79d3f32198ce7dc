"""The one training loop: batch, forward, backward, step; then once an epoch: validate, log, save."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from . import storage
from .data import Split, batches, hold_out, mean_and_std, normalise
from .evaluate import accuracy, evaluate, fit_temperature, negative_log_likelihood, predict, rejection_threshold
from .infer import SIZE
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


def split_data(setting: Setting, seed: int, read: Callable[[str], Split | None]) -> tuple[Split, Split]:
    """Return the training and the validation images: the source's own "val" split, or a held-out part of "train".

    Raises:
        ValueError: If the setting asks for more images than there are.

    """
    everything = read("train")
    if everything is None:
        raise ValueError("the data set has no training split")
    kept, held = hold_out(everything.labels, setting.validation_size, seed)
    training, validation = everything.subset(kept), everything.subset(held)
    if setting.validation_size and (own := read("val")):
        training, validation = everything, own
    if setting.batch_size > len(training):
        raise ValueError(f"key 'batch_size': found {setting.batch_size}; allowed: at most the {len(training)} training images")
    return training, validation


def make_optimizer(setting: Setting, model: ResNet) -> torch.optim.Optimizer:
    """Build the optimizer over all parameters; "fused" updates them in one kernel."""
    if setting.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), setting.lr, setting.momentum, nesterov=setting.nesterov,
                               weight_decay=setting.weight_decay, fused=True)  # fmt: skip
    kind = torch.optim.Adam if setting.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), setting.lr, (setting.momentum, 0.999), weight_decay=setting.weight_decay, fused=True)


def train(setting: Setting, seed: int, read: Callable[[str], Split | None], folder: Path, device: str = "cpu",
          bfloat16: bool = False, compiled: bool = False,
          environment: dict[str, Any] | None = None) -> dict[str, Any]:  # fmt: skip
    """Train one setting with one seed into a run folder, or go on where the folder's last checkpoint stands.

    Args:
        setting: The row of the table.
        seed: Of the initial weights, the held-out split, the order of the images and their augmentation.
        read: Gives the split "train", "val" or "test", or None. "test" is asked for once, at the end.
        folder: The run folder; result.json is its last file, whose presence means done.
        device: "cpu" or "cuda".
        bfloat16: Compute in bfloat16 where that loses nothing (autocast); the weights stay float32.
        compiled: Compile the training step with torch.compile.
        environment: Facts about machine and versions that go into environment.json; where one of them has changed,
            a resumed run is marked as not bit-exact.

    Returns:
        The content of result.json.

    Raises:
        ValueError: If data, setting and run folder do not fit together.
        TrainingFailed: If the loss is no longer finite.
        Interrupted: After Ctrl-C or SIGTERM.

    """
    name = f"{setting.name}, seed {seed}"
    training, validation = split_data(setting, seed, read)
    mean, std = mean_and_std(training.images)

    if device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)  # on a CPU every operation used here is deterministic as it is
    torch.manual_seed(seed)
    architecture: dict[str, Any] = {
        "depth": setting.depth, "classes": len(training.classes), "block": setting.block,
        "shortcut": setting.shortcut == "identity", "activation": setting.activation, "leaky_slope": setting.leaky_slope,
        "normalization": setting.normalization, "weight_init": setting.weight_init,
    }  # fmt: skip
    model = ResNet(**architecture).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if setting.start_from:
        _start_from(model, setting, seed, training)
    optimizer = make_optimizer(setting, model)
    environment = (environment or {}) | {
        "data": training.source, "training_sha256": training.sha256,
        "training_images": len(training), "validation_images": len(validation),
    }  # fmt: skip
    training, validation_images = training.to(device), validation.images.to(device)
    mean_tensor, std_tensor = torch.tensor(mean, device=device), torch.tensor(std, device=device)
    fill = (mean_tensor * 255).round().to(torch.uint8)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            return model(x).float()  # type: ignore[no-any-return]

    def loss_and_hits(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = forward(normalise(images, mean_tensor, std_tensor))
        hits = (logits.argmax(1) == targets.argmax(1)).sum()
        return F.cross_entropy(logits, targets, label_smoothing=setting.label_smoothing), hits

    fast_step = torch.compile(loss_and_hits) if compiled else loss_and_hits
    fast_forward = torch.compile(forward) if compiled else forward

    # Everything that training changes is in the checkpoint, so a resumed run equals an uninterrupted one.
    rows: list[dict[str, Any]] = []
    state: dict[str, Any] = {"epoch": 0, "best_epoch": 0, "best_accuracy": -1.0, "not_bit_exact": ""}
    best = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if checkpoint := storage.load_checkpoint(folder):
        tensors, state, problem = checkpoint
        _restore(tensors, model, optimizer, best)
        rows = [row for row in storage.read_metrics(folder) if row["epoch"] <= state["epoch"]]
        before = storage.read_json(folder / "environment.json")
        if changed := [key for key in environment if before.get(key) != environment[key] and key != "git_commit"]:
            state["not_bit_exact"] = f"resumed after epoch {state['epoch']} with another {', '.join(changed)}"
        for line in filter(None, (problem, state["not_bit_exact"])):
            print(f"{name}: {line}", flush=True)
    storage.write_json(folder / "environment.json", environment)
    print(f"{name}: {setting.model}, {parameter_count(model):,} parameters; {training.source}: {len(training):,} training "
          f"and {len(validation):,} validation images; {device}, {'bfloat16' if bfloat16 else 'float32'}"
          f"{', compiled (the first time takes a minute)' if compiled else ''}"
          f"{'; goes on after epoch ' + str(state['epoch']) if rows else ''}", flush=True)  # fmt: skip

    steps = math.ceil(len(training) / setting.batch_size)
    console = Console()
    in_pipe = not console.is_terminal  # there the epoch lines alone tell the progress
    with _stop_signals() as received:
        for epoch in range(state["epoch"] + 1, setting.epochs + 1):
            if patience_ended(setting, state["epoch"], state["best_epoch"]):
                break
            started = time.perf_counter()
            model.train()
            totals = torch.zeros(2, dtype=torch.float64, device=device)
            epoch_batches = batches(training, setting.batch_size, setting.augmentation, seed, epoch, fill)
            shown = track(epoch_batches, f"epoch {epoch}", steps, console=console, transient=True, disable=in_pipe)
            for step, (images, targets) in enumerate(shown):
                rate = learning_rate(setting, (epoch - 1 + step / steps) / setting.epochs)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                # a last, smaller batch would have to be compiled for itself
                loss, hits = (fast_step if len(images) == setting.batch_size else loss_and_hits)(images, targets)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                totals += torch.stack([loss.detach().double() * len(images), 100 * hits.double()])
                if received:
                    raise Interrupted(received[0])
            train_loss, train_accuracy = (totals / len(training)).tolist()
            if not math.isfinite(train_loss):
                raise TrainingFailed(f"{name}: the loss is no longer finite in epoch {epoch}, at lr {rate:g}; "
                                     "a smaller lr, a warm-up or a normalisation helps")  # fmt: skip
            trained = time.perf_counter()

            model.eval()
            validation_loss = validation_accuracy = None
            if len(validation):
                logits = predict(fast_forward, validation_images, mean, std).cpu()
                validation_loss = negative_log_likelihood(logits, validation.labels)
                validation_accuracy = accuracy(logits, validation.labels)
            state["epoch"] = epoch
            if validation_accuracy is None or validation_accuracy > state["best_accuracy"]:
                state |= {"best_epoch": epoch, "best_accuracy": validation_accuracy}
                best = {key: tensor.clone() for key, tensor in model.state_dict().items()}
                storage.write_tensors(folder / "best.safetensors", best, {"epoch": epoch})
            values = (epoch, train_loss, train_accuracy, validation_loss, validation_accuracy, rate,
                      trained - started, time.perf_counter() - trained)  # fmt: skip
            rows.append(dict(zip(storage.METRICS, values, strict=True)))
            storage.write_metrics(folder, rows)  # before the checkpoint: what it does not know of is dropped on resume
            storage.save_checkpoint(folder, _collect(model, optimizer, best), state)
            print(_epoch_line(name, setting.epochs, rows, state), flush=True)

    # The result: the best weights; the test split is read once, here.
    storage.write_tensors(folder / "best.safetensors", best, {"epoch": state["best_epoch"]})
    model.load_state_dict(best)
    about = {"architecture": architecture, "mean": mean, "std": std, "data": training.source, "seed": seed,
             "setting": setting.model_dump(exclude={"seeds"}), "best_epoch": state["best_epoch"]}  # fmt: skip
    metrics = finish(folder / "model", model, about, validation, read("test"), device)
    result = {
        "setting": setting.name, "seed": seed, "parameters": parameter_count(model), "data": training.source,
        "epochs_run": state["epoch"], "best_epoch": state["best_epoch"], "stopped_early": state["epoch"] < setting.epochs,
        "train_minutes": sum(row["train_seconds"] + row["validation_seconds"] for row in rows) / 60,
        "not_bit_exact": state["not_bit_exact"], **metrics,
    }  # fmt: skip
    storage.write_json(folder / "result.json", result)
    return result


def finish(folder: Path, model: ResNet, about: dict[str, Any], validation: Split, test: Split | None,
           device: str = "cpu") -> dict[str, Any]:  # fmt: skip
    """Find temperature and rejection threshold on validation, read the test split, write the model folder.

    Returns:
        The metrics of "validation" and "test", None for a split that is not there.

    """
    model.eval()
    temperature, threshold = 1.0, 0.0
    metrics: dict[str, Any] = {"validation": None, "test": None}
    for part, split in (("validation", validation), ("test", test)):
        if split is None or not len(split):
            continue
        logits = predict(model, split.images.to(device), about["mean"], about["std"]).cpu()
        if part == "validation":
            temperature = fit_temperature(logits, split.labels)
            threshold = rejection_threshold(logits, temperature)
        metrics[part] = evaluate(logits, split.labels, split.classes, temperature)
        print(f"{part} accuracy {accuracy(logits, split.labels):.2f} % of {len(split):,} images", flush=True)
    kept = {part: values and {key: values[key] for key in ("accuracy", "n", "interval_95")} for part, values in metrics.items()}
    storage.save_model(folder, model, about | {
        "classes": list(validation.classes), "input_size": SIZE, "temperature": temperature, "rejection_threshold": threshold,
        "accuracy": kept,
    })  # fmt: skip
    return metrics


def _start_from(model: ResNet, setting: Setting, seed: int, training: Split) -> None:
    """Take the weights of another model; its last layer only where the classes are the same."""
    trained, config = storage.load_model(str(setting.start_from))
    before = config.get("setting", {}).get("validation_size", 0)
    if config.get("data") == training.source and (config.get("seed") != seed or before < setting.validation_size):
        raise ValueError(f"key 'start_from': {setting.start_from} was trained on the same data with seed {config.get('seed')} "
                         f"and validation_size {before}; allowed: this seed and no larger a validation_size, or it has "
                         "learned from images that are to validate it")  # fmt: skip
    same = config["classes"] == list(training.classes)
    weights = {key: value for key, value in trained.state_dict().items() if same or not key.startswith("linear.")}
    wanted = model.state_dict()
    if wrong := [key for key in weights if key not in wanted or wanted[key].shape != weights[key].shape]:
        raise ValueError(f"key 'start_from': {setting.start_from} is another network; it differs in '{wrong[0]}'")
    model.load_state_dict(weights, strict=False)


def _collect(model: ResNet, optimizer: torch.optim.Optimizer, best: storage.Tensors) -> storage.Tensors:
    groups = {"model": model.state_dict(), "best": best}
    groups |= {f"optimizer.{index}": values for index, values in optimizer.state_dict()["state"].items()}
    return {f"{group}.{key}": tensor for group, tensors in groups.items() for key, tensor in tensors.items()}


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
def _stop_signals() -> Iterator[list[int]]:
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


def _epoch_line(name: str, epochs: int, rows: list[dict[str, Any]], state: dict[str, Any]) -> str:
    row, seconds = rows[-1], [r["train_seconds"] + r["validation_seconds"] for r in rows[-5:]]
    minutes = sorted(seconds)[len(seconds) // 2] * (epochs - row["epoch"]) / 60
    left = f"{minutes // 60:.0f} h {minutes % 60:.0f} min" if minutes >= 60 else f"{minutes:.1f} min"
    validation = ""
    if row["validation_accuracy"] is not None:
        best = f"best {state['best_accuracy']:.2f} at {state['best_epoch']}"
        validation = f"validation {row['validation_accuracy']:.2f} % ({best})  "
    return (f"{name}: epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.4f}  train {row['train_accuracy']:.2f} %  "
            f"{validation}lr {row['lr']:.4g}  {seconds[-1]:.0f} s  left {left}")  # fmt: skip
