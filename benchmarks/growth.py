"""How the time of an epoch grows with depth, batch size and the number of images: `make bench-growth`."""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path
from statistics import median

import torch
from bench import synthetic
from contenders import train
from matplotlib.figure import Figure

from resnet_cifar10 import files
from resnet_cifar10.machine import computes_in_bfloat16, environment
from resnet_cifar10.progress import progress
from resnet_cifar10.settings import slug

TURNS = 3
PANELS = {  # what grows: depth, batch size and images of each point
    "depth": [(depth, 128, 1_024) for depth in (20, 32, 44, 56, 110)],
    "batch size": [(20, size, 1_024) for size in (16, 32, 64, 128, 256, 512)],
    "images": [(20, 128, images) for images in (1_024, 2_048, 4_096, 8_192)],
}


def main() -> None:
    """Measure every point in turns, not compiled, the second of two epochs each time; write JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for JSON and plot")
    out = parser.parse_args().out
    machine, precision = environment("cpu"), "bfloat16" if computes_in_bfloat16("cpu") else "float32"
    points = [(panel, *point) for panel, at in PANELS.items() for point in at]
    seconds: dict[tuple[str, int, int, int], list[float]] = {point: [] for point in points}
    for point in progress(points * TURNS, "points"):
        _, depth, batch_size, images = point
        epochs: list[float] = []
        train(synthetic(images), depth, "cpu", precision, False, 2, epochs.append, batch_size)
        seconds[point].append(epochs[-1])

    title = f"Seconds an epoch, {precision}, not compiled: {machine['processor']}, {machine['threads']} threads, {date.today()}"
    figure = Figure((12, 4), layout="constrained")
    for column, (axis, (panel, at)) in enumerate(zip(figure.subplots(1, 3), PANELS.items(), strict=True)):
        values = torch.tensor([sorted(seconds[panel, *point]) for point in at])
        middle = values.median(1).values
        axis.errorbar([p[column] for p in at], middle, [middle - values[:, 0], values[:, -1] - middle], marker="o", capsize=3)
        axis.set(xlabel=panel, ylabel="seconds", ylim=(0, None))
        if panel == "batch size":
            axis.set_xscale("log", base=2)  # each size is double the last
        axis.set_xticks([p[column] for p in at], [f"{p[column]:,}" for p in at])
        axis.grid(alpha=0.3)
    figure.suptitle(f"{title}\nwhere not said otherwise: ResNet-20, batches of 128, 1,024 images", fontsize=9)
    file = out / f"{date.today()}-{slug(machine['processor'])}-growth"
    rows = [
        {"grows": panel, "depth": depth, "batch_size": size, "images": images, "seconds": found, "median": median(found)}
        for (panel, depth, size, images), found in seconds.items()
    ]
    files.write_json(file.with_suffix(".json"), {"title": title, "machine": machine, "rows": rows})
    figure.savefig(file.with_suffix(".png"), dpi=120)
    print(f"written: {file}.json and .png")


if __name__ == "__main__":
    main()
