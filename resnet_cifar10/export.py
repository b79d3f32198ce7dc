"""The model folder of a trained network, and its ONNX graph: uint8 images in, calibrated probabilities and maps out."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .data import Split, normalise
from .evaluate import accuracy, evaluate, fit_temperature, predict, rejection_threshold
from .infer import SIZE, onnx_runtime, read_config, seal
from .model import ResNet
from .storage import load_model, save_model, write

OPSET = 20


class _Deployed(nn.Module):
    """The network with normalisation before it and temperature, softmax and activation map after it."""

    def __init__(self, model: ResNet, config: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.temperature = model, config["temperature"]
        self.register_buffer("mean", torch.tensor(config["mean"]))
        self.register_buffer("std", torch.tensor(config["std"]))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map uint8 [N, 32, 32, 3] to probabilities [N, classes] and activation maps [N, classes, 8, 8] (Zhou et al. 2016)."""
        maps = self.model.features(normalise(images, self.mean, self.std))  # type: ignore[arg-type]
        logits = self.model.linear(maps.mean(dim=(2, 3)))
        activation = torch.einsum("nchw,kc->nkhw", maps, self.model.linear.weight)
        return (logits / self.temperature).softmax(1), activation


def export(model: str | Path, out: Path) -> float:
    """Write one self-contained ONNX file and compare it with PyTorch.

    Returns:
        The largest difference between ONNX Runtime's and PyTorch's probabilities on 256 random images.

    Raises:
        ValueError: If the model folder is damaged, or the two disagree by more than 1e-4.

    """
    import onnx

    network, config = load_model(model)
    deployed = _Deployed(network, config).eval()
    images = torch.randint(0, 256, (256, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own dependencies' deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            deployed, (images[:2],), dynamo=True, opset_version=OPSET, verbose=False, optimize=True,
            input_names=["images"], output_names=["probabilities", "activation_map"],
            dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
        )  # fmt: skip
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {"classes": "\n".join(config["classes"])})
    onnx.checker.check_model(proto, full_check=True)
    content = seal(proto.SerializeToString())
    session = onnx_runtime().InferenceSession(content, providers=["CPUExecutionProvider"])
    theirs = session.run(["probabilities"], {"images": images.numpy()})[0]
    with torch.inference_mode():
        ours = deployed(images)[0].numpy()
    difference = float(np.abs(theirs - ours).max())
    if difference > 1e-4:
        raise ValueError(f"{out}: not written: ONNX and PyTorch differ by {difference:.1e} in a probability")
    write(out, content)
    return difference


def finish(folder: Path, model: ResNet, config: dict[str, Any], validation: Split, test: Split | None,
           device: str = "cpu") -> dict[str, Any]:  # fmt: skip
    """Find temperature and rejection threshold on validation, read the test split, write the model folder.

    Returns:
        The metrics of "validation" and "test", None for a split that is not there.

    """
    temperature, threshold = 1.0, 0.0
    metrics: dict[str, Any] = {"validation": None, "test": None}
    for part, split in (("validation", validation), ("test", test)):
        if split is None or not len(split):
            continue
        logits = predict(model, split.images.to(device), config["mean"], config["std"]).cpu()
        if part == "validation":
            temperature = fit_temperature(logits, split.labels)
            threshold = rejection_threshold(logits, temperature)
        metrics[part] = evaluate(logits, split.labels, split.classes, temperature)
        print(f"{part} accuracy {accuracy(logits, split.labels):.2f} % of {len(split):,} images", flush=True)
    kept = {part: values and {key: values[key] for key in ("accuracy", "n", "interval_95")} for part, values in metrics.items()}
    save_model(folder, model, config | {
        "classes": list(validation.classes), "input_size": SIZE, "temperature": temperature, "rejection_threshold": threshold,
        "accuracy": kept,
    })  # fmt: skip
    write_card(folder)
    export(folder, folder / "model.onnx")
    return metrics


def write_card(folder: Path) -> None:
    """Write README.md, the model card: what the network is, how it was made, how good it is and where it fails."""
    config = read_config(folder)
    setting, accuracy = config["setting"], config["accuracy"]
    results = [f"| {part} | {values['accuracy']:.2f} % | {values['interval_95'][0]:.2f} to {values['interval_95'][1]:.2f} | "
               f"{values['n']:,} |" for part, values in accuracy.items() if values]  # fmt: skip
    start = f" Its first weights are those of `{setting['start_from']}`." if setting.get("start_from") else ""
    keys = "\n".join(f"| {key} | {value} |" for key, value in setting.items())
    write(folder / "README.md", f"""---
license: mit
library_name: onnx
pipeline_tag: image-classification
---

# {setting["model"]}, {setting["name"]}

A residual network for 32x32 images in {len(config["classes"])} classes: {", ".join(config["classes"])}.

| split | accuracy | 95 % interval | images |
| --- | --- | --- | --- |
{chr(10).join(results)}

- Trained on {config["data"]}, seed {config["seed"]}; weights of epoch {config["best_epoch"]} of {setting["epochs"]},
  chosen on validation. The test images were looked at once, after that choice. One run: n = 1 seed.{start}
- Probabilities are scaled with temperature {config["temperature"]:.3f}, fitted on validation. A photo whose highest
  probability is below {config["rejection_threshold"]:.3f} is answered with "none of these": one in twenty validation
  images falls below that.
- It knows small pictures that are filled by one object. It can be wrong on anything else.

`model.safetensors` holds the weights, `model.onnx` the whole way from uint8 pixels [N, 32, 32, 3] to probabilities,
`config.json` all that is needed to use either: `resnet-cifar10 infer PHOTO --model FOLDER`.

| key | value |
| --- | --- |
{keys}
""")
