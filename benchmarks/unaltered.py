"""How many of its training images a network classifies correctly as they are, not augmented as while it learned.

Call it as python benchmarks/unaltered.py MODEL... --data DATA. The images are those of the model's own seed and split.
"""

from __future__ import annotations

from typing import Annotated

import typer

from resnet_cifar10.evaluate import accuracy, wilson_interval
from resnet_cifar10.settings import Setting
from resnet_cifar10.sources import load
from resnet_cifar10.storage import load_model
from resnet_cifar10.study import shown_logits, split_data


def main(models: list[str], data: Annotated[str, typer.Option()]) -> None:
    """Print the accuracy on the training and the validation images of each model."""
    splits = {split: load(data, split) for split in ("train", "val")}
    for model in models:
        network, config = load_model(model)
        parts = split_data(Setting(**config["setting"]), config["seed"], splits.__getitem__)
        for name, part in zip(("training", "validation"), parts, strict=True):
            percent = accuracy(shown_logits(network, part.images, config, name), part.labels)
            low, high = wilson_interval(percent, len(part))
            print(f"{model}: {percent:.2f} % of {len(part):,} {name} images of {part.source} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    typer.run(main)
