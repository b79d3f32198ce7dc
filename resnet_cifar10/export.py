"""The ONNX graph of a trained network: uint8 images in, calibrated probabilities, membership and maps out."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import normalise
from .errors import JobFailed, short
from .files import check_file, write
from .infer import SIZE, onnx_runtime, seal
from .model import ResNet
from .storage import load_model

OPSET = 20
OUTPUTS = ["probabilities", "membership", "activation_map"]
EXCESS_WEIGHT = 0.05  # cosines for each standard deviation; chosen in docs/photos.md


class _Deployed(nn.Module):
    """The network with normalisation before it; temperature, softmax, membership and activation map after it."""

    def __init__(self, model: ResNet, config: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.temperature = model, config["temperature"]
        self.mean, self.std = torch.tensor(config["mean"]), torch.tensor(config["std"])
        self.directions = torch.tensor(config["class_directions"])
        self.contrast_mean, self.contrast_std = torch.tensor(config["contrast_mean"]), torch.tensor(config["contrast_std"])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map images uint8 [N, 32, 32, 3] to the three outputs of the graph.

        Returns:
            Probabilities [N, classes]; membership [N], the cosines between an image's features and the class means, each
            weighted with the probability of its class, less the excess of its contrasts; activation maps [N, classes, 8, 8]
            (Zhou et al. 2016).

        """
        features, contrasts, maps = describe(self.model, normalise(images, self.mean, self.std))
        probabilities = (self.model.linear(features) / self.temperature).softmax(1)
        likeness = (probabilities * (F.normalize(features) @ self.directions.T)).sum(1)
        excess = ((contrasts - self.contrast_mean) / self.contrast_std).relu().mean(1)
        activation = torch.einsum("nchw,kc->nkhw", maps, self.model.linear.weight)
        return probabilities, likeness - EXCESS_WEIGHT * excess, activation


def describe(model: ResNet, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Map normalised images to features [N, 64], contrasts [N, 32] and the last maps [N, 64, 8, 8], at width 16.

    The contrast of a channel is the standard deviation of its map after the second stage: a picture richer in detail than
    those trained on has high ones, whatever class the last stage then takes it for (after Sastry & Oore 2020).
    """
    middle, maps = model.maps(x)
    return maps.mean((2, 3)), middle.std((2, 3)), maps


def export(model: str | Path, out: Path, images: Tensor | None = None) -> tuple[float, int]:
    """Write one self-contained ONNX file and compare it with PyTorch on images uint8 [N, 32, 32, 3], else 256 random ones.

    Returns:
        The largest difference between ONNX Runtime's and PyTorch's probabilities, and of how many images the label differs.

    Raises:
        ValueError: If the model folder is damaged, or `out` does not end in .onnx.
        JobFailed: If the two disagree by more than 1e-4 in a probability, or a thousandth in another output.

    """
    import onnx

    check_file(out, ".onnx")
    network, config = load_model(model)
    shapes = {
        "class_directions": (len(config["classes"]), network.widths[2]),
        "contrast_mean": network.widths[1:2],
        "contrast_std": network.widths[1:2],
    }
    for key, wanted in shapes.items():
        found = np.array(config.get(key) or [], object)  # of lists as they are, also of unequal lengths
        if found.shape != wanted or not all(type(value) in (int, float) and math.isfinite(value) for value in found.flat):
            raise ValueError(f"{model}: config.json: key '{key}': found {short(config.get(key))}; allowed: numbers of {wanted}")
    deployed = _Deployed(network, config).eval()
    if images is None:
        images = torch.randint(0, 256, (256, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own dependencies' deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            deployed,
            (images[:2],),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            optimize=True,
            input_names=["images"],
            output_names=OUTPUTS,
            dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
        )
    assert program is not None
    proto = program.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # where in the code each was made, with this machine's folders
    onnx.helper.set_model_props(proto, {"classes": "\n".join(config["classes"])})
    onnx.checker.check_model(proto, full_check=True)
    content = seal(proto.SerializeToString())
    session = onnx_runtime().InferenceSession(content, providers=["CPUExecutionProvider"])
    parts = torch.split(images, 500)
    theirs = [np.concatenate(part) for part in zip(*[session.run(OUTPUTS, {"images": x.numpy()}) for x in parts], strict=True)]
    with torch.inference_mode():
        ours = [torch.cat(part).numpy() for part in zip(*map(deployed, parts), strict=True)]
    differences = [float(np.abs(a - b).max()) for a, b in zip(theirs, ours, strict=True)]
    allowed = [1e-4, *(1e-3 * max(1.0, float(np.abs(each).max())) for each in ours[1:])]
    for name, difference, most in zip(OUTPUTS, differences, allowed, strict=True):
        if not difference <= most:  # NaN too
            raise JobFailed(f"{out}: not written: ONNX and PyTorch differ by {difference:.1e} in {name}; allowed: {most:.1e}")
    write(out, content)
    return differences[0], int((theirs[0].argmax(1) != ours[0].argmax(1)).sum())
