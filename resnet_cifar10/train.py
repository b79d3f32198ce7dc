"""The one training loop: batch, forward, backward, step; then once an epoch: validate, log, save."""

from __future__ import annotations

import math
import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from . import data, storage
from .evaluate import accuracy, evaluate, fit_temperature, negative_log_likelihood, predict, rejection_threshold
from .model import ResNet, parameter_count
from .settings import Setting

ALONE = ("torch", "machine", "processor", "threads", "device", "precision", "compiled", "world_size", "data_sha256")


class Interrupted(Exception):
    """Ctrl-C or SIGTERM ended the training; the run folder holds everything up to the last whole epoch."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_status = 128 + signal_number


class TrainingFailed(Exception):
    """The training can't go on, for example because its loss is no longer finite."""


def learning_rate(setting: Setting, progress: float) -> float:
    """Return the learning rate at this fraction of the run, 0 <= progress < 1."""
    if progress < setting.warmup:
        return setting.lr * progress / setting.warmup
    rest = (progress - setting.warmup) / (1 - setting.warmup)
    match setting.lr_decay:
        case "step":
            return setting.lr * setting.lr_factor ** sum(progress >= m for m in setting.lr_milestones)
        case "cosine":  # Loshchilov & Hutter 2017, eq. 5, one period down to 0
            return setting.lr * 0.5 * (1 + math.cos(math.pi * rest))
        case "linear":
            return setting.lr * (1 - rest)
        case _:
            return setting.lr


def last_decay(setting: Setting) -> float:
    """Return the fraction of the run after which the learning rate stays as it is: patience counts from there."""
    return {"none": setting.warmup, "step": max([setting.warmup, *setting.lr_milestones])}.get(setting.lr_decay, 1.0)


def architecture(setting: Setting, classes: int) -> dict[str, Any]:
    """Collect the arguments of ResNet that a setting describes."""
    return {"depth": setting.depth, "classes": classes, "block": setting.block, "shortcut": setting.shortcut == "identity",
            "activation": setting.activation, "leaky_slope": setting.leaky_slope,
            "normalization": setting.normalization, "weight_init": setting.weight_init}  # fmt: skip


def make_optimizer(setting: Setting, model: ResNet) -> torch.optim.Optimizer:
    """Build the optimizer over all parameters; "fused" updates them in one kernel."""
    rate, decay = setting.lr, setting.weight_decay
    if setting.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), rate, setting.momentum, weight_decay=decay,
                               nesterov=setting.nesterov, fused=True)  # fmt: skip
    kind = torch.optim.Adam if setting.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), rate, (setting.momentum, 0.999), weight_decay=decay, fused=True)


def train(setting: Setting, seed: int, path: str | Path, folder: Path, device: str = "cpu") -> dict[str, Any]:
    """Train one setting with one seed into a run folder, or go on where the folder's last checkpoint stands.

    Args:
        setting: The row of the table.
        seed: Of the initial weights, the held-out split, the order of the images and their augmentation.
        path: The data set, as data.load takes it. Its test split is read once, at the end.
        folder: The run folder; result.json is its last file, whose presence means done.
        device: "cpu" or "cuda".

    Returns:
        The content of result.json.

    Raises:
        ValueError: If data, setting and run folder do not fit together.
        TrainingFailed: If the loss is no longer finite.
        Interrupted: After Ctrl-C or SIGTERM.

    """
    # The data: the training images minus the held-out ones, and their mean and std.
    everything = data.load(path, "train")
    if everything is None:
        raise ValueError(f"{path}: has no training split")
    validation = data.load(path, "val") if setting.validation_size else None
    train_split = everything
    if validation is None:
        train_indices, validation_indices = data.hold_out(everything.labels, setting.validation_size, seed)
        train_split, validation = everything.subset(train_indices), everything.subset(validation_indices)
    if setting.batch_size > len(train_split):
        raise ValueError(f"key 'batch_size': found {setting.batch_size}; allowed: at most {len(train_split)}, the training images")
    mean, std = data.mean_and_std(train_split.images)

    # The machine.
    bfloat16 = setting.precision == "bfloat16" or (setting.precision == "auto" and _computes_in_bfloat16(device))
    compiled = setting.compile and bool(os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++"))
    if setting.compile and not compiled:
        print("No C++ compiler found (g++): the training step is not compiled and runs slower.", flush=True)
    if device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    model = ResNet(**architecture(setting, len(everything.classes)))
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(setting, model)
    train_split = data.Split(train_split.images.to(device), train_split.labels.to(device), *_names(train_split))
    mean_tensor, std_tensor = torch.tensor(mean, device=device), torch.tensor(std, device=device)
    fill = (mean_tensor * 255).round().to(torch.uint8)
    environment = _environment(device, bfloat16, compiled) | {
        "data": everything.source, "data_sha256": everything.sha256,
        "train_images": len(train_split), "validation_images": len(validation),
    }  # fmt: skip

    def loss_and_hits(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            logits = model(data.normalise(images, mean_tensor, std_tensor)).float()
        hits = (logits.argmax(1) == targets.argmax(1)).sum()
        return F.cross_entropy(logits, targets, label_smoothing=setting.label_smoothing), hits

    def predict_fast(x: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            return model(x)  # type: ignore[no-any-return]

    full_step = torch.compile(loss_and_hits) if compiled else loss_and_hits
    validate = torch.compile(predict_fast) if compiled else predict_fast

    # The state: all of it is in the checkpoint, so a resumed run equals an uninterrupted one.
    _claim(folder, setting, seed, everything.sha256)
    rows: list[dict[str, Any]] = []
    state: dict[str, Any] = {"epoch": 0, "best_epoch": 0, "best_accuracy": -1.0, "not_bit_exact": ""}
    best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if checkpoint := storage.load_checkpoint(folder):
        tensors, state, problem = checkpoint
        _restore(tensors, model, optimizer, best)
        rows = [row for row in storage.read_metrics(folder) if row["epoch"] <= state["epoch"]]
        before = storage.read_json(folder / "environment.json")
        if changed := [key for key in ALONE if before.get(key) != environment[key]]:
            state["not_bit_exact"] = f"resumed after epoch {state['epoch']} with other {', '.join(changed)}"
        for line in (problem, state["not_bit_exact"] and f"not bit-exact: {state['not_bit_exact']}"):
            if line:
                print(f"{setting.name}, seed {seed}: {line}", flush=True)
    storage.write_json(folder / "environment.json", environment)

    steps = math.ceil(len(train_split) / setting.batch_size)
    name = f"{setting.name}, seed {seed}"
    print(f"{name}: {setting.model}, {parameter_count(model):,} parameters; {everything.source}: {len(train_split):,} training and "
          f"{len(validation):,} validation images; {device}, {'bfloat16' if bfloat16 else 'float32'}"
          + (f"; goes on after epoch {state['epoch']}" if state["epoch"] else ""), flush=True)  # fmt: skip
    if compiled and state["epoch"] < setting.epochs:
        print(f"{name}: compiling the training step (about a minute the first time on a machine)", flush=True)

    with _stop_signals() as received, _progress_bar(name, setting.epochs * steps) as progress:
        for epoch in range(state["epoch"] + 1, setting.epochs + 1):
            if _patience_ended(setting, state):
                break
            started = time.perf_counter()
            model.train()
            totals = torch.zeros(2, dtype=torch.float64, device=device)
            epoch_batches = data.batches(train_split, setting.batch_size, setting.augmentation, seed, epoch, fill)
            for step, (images, targets) in enumerate(epoch_batches):
                rate = learning_rate(setting, (epoch - 1 + step / steps) / setting.epochs)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                step_function = full_step if len(images) == setting.batch_size else loss_and_hits
                loss, hits = step_function(images, targets)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                totals += torch.stack([loss.detach().double() * len(images), hits.double()])
                progress((epoch - 1) * steps + step + 1, time.perf_counter() - started)
                if received:
                    raise Interrupted(received[0])
            train_loss, train_accuracy = (totals / len(train_split)).tolist()
            if not math.isfinite(train_loss):
                raise TrainingFailed(f"{name}: the loss is no longer finite in epoch {epoch} at lr {rate:g}; "
                                     "a smaller lr, a warm-up or a normalisation helps")  # fmt: skip
            train_seconds = time.perf_counter() - started

            validation_loss = validation_accuracy = None
            model.eval()
            if len(validation):
                logits = predict(validate, validation.images.to(device), mean, std).cpu()
                validation_loss = negative_log_likelihood(logits, validation.labels)
                validation_accuracy = accuracy(logits, validation.labels)
            if validation_accuracy is None or validation_accuracy > state["best_accuracy"]:
                state |= {"best_epoch": epoch, "best_accuracy": validation_accuracy or -1.0}
                best = {key: tensor.clone() for key, tensor in model.state_dict().items()}
                storage.write_tensors(folder / "best.safetensors", best, {"epoch": epoch, "setting": setting.name, "seed": seed})
            state["epoch"] = epoch
            values = (epoch, train_loss, 100 * train_accuracy, validation_loss, validation_accuracy, rate,
                      train_seconds, time.perf_counter() - started - train_seconds)  # fmt: skip
            rows.append(dict(zip(storage.METRICS, values, strict=True)))
            storage.write_metrics(folder, rows)
            storage.save_checkpoint(folder, _collect(model, optimizer, best), state)
            _say_epoch(name, setting, rows[-1], state, rows)

    # The result: the best weights, the temperature from validation, the test split once.
    storage.write_tensors(folder / "best.safetensors", best, {"epoch": state["best_epoch"], "setting": setting.name, "seed": seed})
    model.load_state_dict(best)
    model.eval()
    temperature, threshold, validation_metrics, test_metrics = 1.0, 0.0, None, None
    if len(validation):
        logits = predict(model, validation.images.to(device), mean, std).cpu()
        temperature = fit_temperature(logits, validation.labels)
        threshold = rejection_threshold(logits, temperature)
        validation_metrics = evaluate(logits, validation.labels, validation.classes, temperature)
    if test := data.load(path, "test"):
        logits = predict(model, test.images.to(device), mean, std).cpu()
        test_metrics = evaluate(logits, test.labels, test.classes, temperature)
    result = {
        "setting": setting.name, "seed": seed, "parameters": parameter_count(model), "data": everything.source,
        "epochs_run": state["epoch"], "best_epoch": state["best_epoch"], "stopped_early": state["epoch"] < setting.epochs,
        "train_minutes": sum(row["train_seconds"] + row["validation_seconds"] for row in rows) / 60,
        "not_bit_exact": state["not_bit_exact"], "validation": validation_metrics, "test": test_metrics,
    }  # fmt: skip
    config = {
        "architecture": architecture(setting, len(everything.classes)), "classes": list(everything.classes),
        "input_size": data.SIZE, "mean": mean, "std": std, "temperature": temperature, "rejection_threshold": threshold,
        "data": everything.source, "data_sha256": everything.sha256, "setting": setting.model_dump(exclude={"seeds"}),
        "seed": seed, "best_epoch": state["best_epoch"],
        "accuracy": {part: metrics and {key: metrics[key] for key in ("accuracy", "n", "interval_95")}
                     for part, metrics in (("validation", validation_metrics), ("test", test_metrics))},
    }  # fmt: skip
    storage.save_model(folder / "model", model, config)
    storage.write_json(folder / "result.json", result)
    print(f"{name}: done; best epoch {state['best_epoch']}"
          + (f", test accuracy {test_metrics['accuracy']:.2f} % of {test_metrics['n']:,} images" if test_metrics else ""),
          flush=True)  # fmt: skip
    return result


def _names(split: data.Split) -> tuple[tuple[str, ...], str]:
    return split.classes, split.source


def _patience_ended(setting: Setting, state: dict[str, Any]) -> bool:
    """Early stopping: no better validation accuracy for `patience` epochs, counted after the last scheduled decay."""
    if setting.patience is None:
        return False
    since = max(state["best_epoch"], math.ceil(last_decay(setting) * setting.epochs))
    return bool(state["epoch"] - since >= setting.patience)


def _claim(folder: Path, setting: Setting, seed: int, data_sha256: str) -> None:
    """Write setting.json, or make sure that the folder holds this very run."""
    wanted = {"setting": setting.model_dump(exclude={"seeds"}), "seed": seed, "data_sha256": data_sha256}
    if not (folder / "setting.json").exists():
        if any(entry.name != ".lock" for entry in folder.iterdir()):
            raise ValueError(f"{folder}: holds other files and no setting.json; allowed: an empty folder or a run of this table")
        storage.write_json(folder / "setting.json", wanted)
        return
    found = storage.read_json(folder / "setting.json")
    if found != wanted:
        before, now = ({**value["setting"], **value} for value in (found, wanted))
        differ = [key for key in now if key != "setting" and before.get(key) != now[key]]
        raise ValueError(f"{folder}: holds another study: {', '.join(f'{k} was {before.get(k)!r}, is {now[k]!r}' for k in differ)}; "
                         "choose another --out")  # fmt: skip


def _collect(model: ResNet, optimizer: torch.optim.Optimizer, best: storage.Tensors) -> storage.Tensors:
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    tensors |= {f"best.{key}": value for key, value in best.items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in values.items()}
    return tensors


def _restore(tensors: storage.Tensors, model: ResNet, optimizer: torch.optim.Optimizer, best: storage.Tensors) -> None:
    model.load_state_dict({key.removeprefix("model."): t for key, t in tensors.items() if key.startswith("model.")})
    for key in best:
        best[key] = tensors[f"best.{key}"].to(best[key].device)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            like = parameters[int(index)]  # the fused step needs the strides of the parameter
            fits = tensor.shape == like.shape
            state.setdefault(int(index), {})[name] = torch.empty_like(like).copy_(tensor) if fits else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _computes_in_bfloat16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


def _environment(device: str, bfloat16: bool, compiled: bool) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return {
        "package": version("resnet-cifar10"), "git_commit": commit.stdout.strip() or None,
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
        "machine": platform.machine(), "system": platform.system(), "processor": _processor(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "precision": "bfloat16" if bfloat16 else "float32", "compiled": compiled, "world_size": 1,
    }  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect the first Ctrl-C or SIGTERM, so that the current step ends; a second one acts at once."""
    received: list[int] = []

    def remember(number: int, frame: object) -> None:
        received.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {each: signal.signal(each, remember) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def _progress_bar(name: str, total: int) -> Iterator[Any]:
    """Yield a function (steps done, seconds in this epoch) that moves the bar of a terminal; a pipe gets no bar."""
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>5.1f} %"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total)
        yield lambda done, seconds: bar.update(task, completed=done)


def _say_epoch(name: str, setting: Setting, row: dict[str, Any], state: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    recent = [r["train_seconds"] + r["validation_seconds"] for r in rows[-5:]]
    left = (setting.epochs - row["epoch"]) * sorted(recent)[len(recent) // 2]
    validation = "" if row["validation_accuracy"] is None else (
        f"validation {row['validation_accuracy']:5.2f} % (best {state['best_accuracy']:.2f} at {state['best_epoch']})  ")  # fmt: skip
    print(f"{name}: epoch {row['epoch']}/{setting.epochs}  loss {row['train_loss']:.4f}  train {row['train_accuracy']:5.2f} %  "
          f"{validation}lr {row['lr']:.4g}  {recent[-1]:.0f} s  left {duration(left)}", flush=True)  # fmt: skip


def duration(seconds: float) -> str:
    """Write a time for people: 45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
