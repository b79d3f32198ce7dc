"""What bench.py measures. Each function takes `report`, measures, reports, waits for its next turn, and so on."""

from __future__ import annotations

import logging
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

import resnet_cifar10.train
from resnet_cifar10 import storage
from resnet_cifar10.data import Split, batches, hold_out, mean_and_std, normalise
from resnet_cifar10.evaluate import accuracy
from resnet_cifar10.infer import BUILT_IN, Classifier, onnx_runtime, read_config
from resnet_cifar10.machine import keep_memory
from resnet_cifar10.model import ResNet
from resnet_cifar10.photo import read_photo, views
from resnet_cifar10.settings import Setting
from resnet_cifar10.study import evaluate_model

Metrics = dict[str, float]
Report = Callable[[Metrics], None]  # hands over what was measured and waits for the next turn
Images = np.ndarray[Any, np.dtype[np.uint8]]
MODEL = BUILT_IN / "resnet32"
BATCH = 128
CONTEXT = get_context("spawn")
MEMORY = "peak memory, MB"


def seconds_of(function: Callable[..., Any], *arguments: Any) -> float:
    """Time one call."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def peak_memory(process: str = "self") -> float:
    """Read the peak of a process's resident memory in MB; 0 once it has ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


def gpu_memory(device: str) -> Metrics:
    """Read the peak of a GPU's memory that PyTorch took, in place of that of the process."""
    return {MEMORY: torch.cuda.max_memory_reserved() / 1e6} if device == "cuda" else {}


# --- training ---


class PillowImages(Dataset[tuple[torch.Tensor, int]]):
    """The common recipe: every image for itself is padded, cropped and flipped by Pillow and normalised by NumPy."""

    def __init__(self, split: Split) -> None:
        self.images, self.labels = split.images.numpy(), split.labels.tolist()
        self.mean, self.std = (np.array(values, np.float32) for values in mean_and_std(split.images))

    def __len__(self) -> int:
        """Count the images."""
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        """Return image float32 [3, 32, 32] and label."""
        left, top = random.randrange(9), random.randrange(9)
        image = ImageOps.expand(Image.fromarray(self.images[i]), 4).crop((left, top, left + 32, top + 32))
        if random.random() < 0.5:
            image = ImageOps.mirror(image)
        pixels = (np.asarray(image, np.float32) / 255 - self.mean) / self.std
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), self.labels[i]


def common_recipe(split: Split, depth: int, device: str, report: Report) -> None:
    """Train as most do: float32, eager, NCHW, images from DataLoader workers."""
    loader = DataLoader(PillowImages(split), BATCH, shuffle=True, num_workers=2, persistent_workers=True)
    model = ResNet(depth).to(device, memory_format=torch.contiguous_format)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4)
    while True:
        started, total = time.perf_counter(), 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            total += loss.item()
        report(speed(split, depth, time.perf_counter() - started) | gpu_memory(device))


def train(
    split: Split,
    depth: int,
    device: str,
    precision: str,
    compiled: bool,
    epochs: int,
    after_epoch: Callable[[float], None],
    batch_size: int = BATCH,
) -> None:
    """Run the package's own training loop; after each epoch its seconds are handed over."""
    setting = Setting(name="benchmark", model=f"resnet{depth}", batch_size=batch_size, epochs=epochs, validation_size=0)
    nothing = split.subset(torch.arange(0))
    keep_memory()  # as the command does
    learner = resnet_cifar10.train.Learner(setting, 0, split, device, precision, compiled)
    for metrics, _ in resnet_cifar10.train.train(learner, setting, 0, split, nothing):
        after_epoch(metrics["train_seconds"])


def ours(split: Split, depth: int, device: str, precision: str, compiled: bool, report: Report) -> None:
    """Train as the package does."""

    def after_epoch(seconds: float) -> None:
        report(speed(split, depth, seconds) | gpu_memory(device))

    train(split, depth, device, precision, compiled, 1000, after_epoch)


def matrix_product(side: int, kinds: list[str], report: Report) -> None:
    """Measure the peak: the best of ten products of square matrices."""
    factors = {kind: torch.randn(side, side, dtype=getattr(torch, kind)) for kind in kinds}
    while True:
        report(
            {
                f"{kind} peak, GFLOP/s": 2e-9 * side**3 / min(seconds_of(torch.mm, m, m) for _ in range(10))
                for kind, m in factors.items()
            }
        )


def macs(depth: int) -> int:
    """Count the multiplications of one image in ResNet of depth 6n + 2 with identity shortcuts."""
    return 9 * 3 * 16 * 32**2 + (depth - 3) * 9 * 16 * 16 * 32**2 + 64 * 10  # two of the 6n convolutions cost half


def speed(split: Split, depth: int, seconds: float) -> Metrics:
    """Say how fast these images were trained on; a step is three times the work of a forward pass."""
    rate = len(split) / seconds
    return {"images/s": rate, "GFLOP/s": 3 * 2e-9 * macs(depth) * rate}


OPERATORS = {  # the group of an operation, by what its name, or that of an operation around it, holds
    "augmentation": ("augmentation",),
    "optimizer": ("Optimizer", "_fused_sgd"),
    "convolution": ("conv",),
    "normalisation": ("batch_norm", "BatchNorm"),
    "compiled: normalisation and elementwise": ("Compiled",),
    "elementwise": ("relu", "Relu", "threshold", "aten::add", "aten::mul", "aten::div", "aten::sub", "aten::copy_"),
}


def profile(split: Split, *how: Any, report: Report) -> None:
    """Profile the second epoch of the training loop."""

    def named(*arguments: Any) -> Any:
        source = batches(*arguments)
        while True:
            with torch.profiler.record_function("augmentation"):
                batch = next(source, None)
            if batch is None:
                return
            yield batch

    def group(event: Any) -> str:
        names = ""
        while event:
            names, event = f"{names} {event.name}", event.cpu_parent
        return next((g for g, words in OPERATORS.items() if any(word in names for word in words)), "other")

    def after_epoch(seconds: float) -> None:
        if profiler.profiler is None:
            profiler.__enter__()
            return
        profiler.__exit__(None, None, None)
        shares = dict.fromkeys([*OPERATORS, "other"], 0.0)
        for event in profiler.events():
            shares[group(event)] += event.self_cpu_time_total / 1e4 / seconds
        shares["other"] += 100 - sum(shares.values())  # Python between the operations
        report({f"{name}, %": share for name, share in shares.items() if share})

    os.environ["KINETO_LOG_LEVEL"] = "6"  # nothing
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with patch.object(resnet_cifar10.train, "batches", named):
        train(split, *how, 2, after_epoch)


def one_step(split: Split, *how: Any) -> None:
    """Train one batch."""
    train(split, *how, 1, lambda seconds: None)


def first_step(split: Split, *how: Any, report: Report) -> None:
    """Time a new process up to the end of its first training step, and once more."""
    processes = [CONTEXT.Process(target=one_step, args=(split.subset(torch.arange(BATCH)), *how)) for _ in range(2)]
    first, second = (seconds_of(lambda p: (p.start(), p.join()), process) for process in processes)
    assert not any(process.exitcode for process in processes)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
    report({"first start, s": first, "second start, s": second, MEMORY: memory})


# --- inference, evaluation, loading, whole processes ---


def torch_network(compiled: bool, bfloat16: bool = False) -> Callable[[Images], Any]:
    """Return the built-in network in PyTorch: eager and NCHW, or compiled and channels_last; the latter also in bfloat16."""
    network, config = storage.load_model(MODEL)
    layout = torch.channels_last if compiled else torch.contiguous_format
    network = network.to(memory_format=layout)
    mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])

    def run(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return network(normalise(images, mean, std).contiguous(memory_format=layout))

    fast = torch.compile(run, dynamic=False) if compiled else run
    return torch.inference_mode()(lambda images: fast(torch.from_numpy(images)))


def onnx_network(file: Path) -> Callable[[Images], Any]:
    """Return a network in ONNX Runtime, with the options of infer.Classifier."""
    session = onnx_runtime().InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["probabilities"], {"images": images})[0]


def quantise(images: Images, out: Path) -> None:
    """Write the built-in network with weights and activations of 8 bits, their ranges seen on these images."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        batches = iter(np.array_split(images, 8))

        def get_next(self) -> dict[str, Images] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    logging.disable(logging.WARNING)  # it recommends steps that the exporter has done
    how = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
    # 7 bits: without VNNI sums of two products saturate
    quantize_static(MODEL / "model.onnx", out, Reader(), **how, reduce_range=True)


def inference(images: Images, singles: int, build: Callable[..., Callable[[Images], Any]], *how: Any, report: Report) -> None:
    """Time single images and batches of 256."""
    network = build(*how)
    while True:
        times = [1e3 * seconds_of(network, images[i : i + 1]) for i in range(singles)]
        rate = 256 / median(seconds_of(network, images[:256]) for _ in range(3))
        report(
            {
                "one image, median, ms": float(np.percentile(times, 50)),
                "one image, 99 of 100, ms": float(np.percentile(times, 99)),
                "batch of 256, images/s": rate,
            }
        )


def photo(file: Path, times: int, report: Report) -> None:
    """Time what `infer` does with a photo, once it has started: read, decode, cut views, classify."""
    classifier = Classifier(MODEL)
    while True:
        seconds = [seconds_of(lambda: classifier.classify(views(read_photo(file)))) for _ in range(times)]
        report({"a photo of 640 x 427 pixels, median, ms": 1e3 * median(seconds)})


def common_evaluation(test: Split, report: Report) -> None:
    """Evaluate as most do: eager, NCHW, a normalised batch at a time."""
    network = torch_network(compiled=False)
    while True:
        report({f"{len(test):,} images, s": seconds_of(lambda: [network(x.numpy()) for x in test.images.split(BATCH)])})


def evaluation(test: Split, report: Report) -> None:
    """Evaluate as the package does, metrics and all."""
    while True:
        report({f"{len(test):,} images, s": seconds_of(evaluate_model, MODEL, test)})


def loading(data: str, pillow: bool, report: Report) -> None:
    """Read training and test images in a program of its own; or let Pillow decode them, one after another."""
    program = f"""import io, numpy, time
from PIL import Image
from resnet_cifar10 import sources
from resnet_cifar10.sources import load
def one_by_one(files, *_):
    opened = (Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) for file in files)
    return numpy.stack([numpy.asarray(image.convert("RGB")) for image in opened])
{"sources.decode = one_by_one" if pillow else ""}
started = time.perf_counter()
images = sum(len(load({data!r}, part, {os.cpu_count()})) for part in ("train", "test"))
print(images, time.perf_counter() - started)"""
    while True:
        images, seconds = subprocess.check_output([sys.executable, "-c", program], text=True).split()
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
        report({f"{int(images):,} images, s": float(seconds), MEMORY: peak})


def program(command: list[str], report: Report) -> None:
    """Time a whole process; its memory is watched in a run before that."""
    peak = 0.0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, peak_memory(str(process.pid)))
    while True:
        report(
            {
                "whole process, s": seconds_of(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)),
                MEMORY: peak,
            }
        )


def int8_accuracy(file: Path, split: Split) -> str:
    """Say what 8 bits cost, on the images that the training of the built-in network had held out."""
    config = read_config(MODEL)
    _, held = hold_out(split.labels, config["setting"]["validation_size"], config["seed"])
    validation = split.subset(held)
    exact, rounded = (
        accuracy(torch.from_numpy(onnx_network(f)(validation.images.numpy())), validation.labels)
        for f in (MODEL / "model.onnx", file)
    )
    return f"int8 has {rounded:.2f} % of {len(validation):,} validation images right, float32 {exact:.2f} %"
