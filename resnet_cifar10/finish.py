"""What follows a training: temperature and threshold from validation, the test split once, the model folder with its card."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

from .data import Split
from .errors import JobFailed, markdown
from .evaluate import evaluate, fit_temperature, predict
from .export import EXCESS_WEIGHT, describe, export
from .files import portable, write, write_json
from .infer import SIZE, Classifier
from .model import ResNet
from .photo import encoded, views
from .storage import save_model

REFUSED_MEMBERS = 0.05  # share of photos of the classes that the threshold refuses wrongly
MAX_FRAMED = 2_000  # photos made of validation images, at most, to find it
SHORT_SIDE = 128  # pixels of these photos
NEVER = -1e9  # the rejection threshold of a network without validation images


def finish(
    folder: Path, model: ResNet, config: dict[str, Any], validation: Split, test: Split | None, device: str
) -> dict[str, Any]:
    """Find on validation all that config.json lacks, classify the test split, write the model folder.

    The row of the last layer stands for a class that has no validation images; without any, nothing is ever refused.

    Returns:
        The metrics of "validation" and "test", None for a split that is not there.

    Raises:
        JobFailed: If a logit is not finite, or the ONNX graph and PyTorch disagree.

    """
    temperature = 1.0
    class_means = model.linear.weight.detach().cpu().clone()
    contrast_mean, contrast_std = torch.zeros(model.widths[1]), torch.ones(model.widths[1])
    metrics: dict[str, Any] = {"validation": None, "test": None}
    splits = {part: split for part, split in (("validation", validation), ("test", test)) if split}
    logits = {
        part: predict(model, split.images.to(device), config["mean"], config["std"]).cpu() for part, split in splits.items()
    }
    if not all(values.isfinite().all() for values in logits.values()):  # the last step can spoil the weights after its loss
        raise JobFailed(
            f"{config['setting']['name']}, seed {config['seed']}: the logits of epoch {config['best_epoch']} "
            "are not finite; a smaller lr, a warm-up or a normalisation helps"
        )
    if validation:
        temperature = fit_temperature(logits["validation"], validation.labels)
        images = validation.images.to(device)
        both = predict(lambda x: torch.cat(describe(model, x)[:2], 1), images, config["mean"], config["std"]).cpu()
        features, contrasts = both.tensor_split([model.widths[2]], 1)
        contrast_mean, contrast_std = contrasts.mean(0), contrasts.std(0, correction=0).clamp(1e-3)
        for label in set(validation.labels.tolist()):
            class_means[label] = features[validation.labels == label].mean(0)
    for part, split in splits.items():
        metrics[part] = evaluate(logits[part], split.labels, split.classes, temperature)
        metrics[part] |= {"mistakes": mistakes(logits[part] / temperature, split), "data_sha256": split.sha256}
        print(f"{part} accuracy {metrics[part]['accuracy']:.2f} % of {len(split):,} images")
    described = {"class_directions": F.normalize(class_means), "contrast_mean": contrast_mean, "contrast_std": contrast_std}
    config = config | {
        "classes": list(validation.classes),
        "input_size": SIZE,
        "temperature": temperature,
        "rejection_threshold": NEVER,
        **{key: np.round(numbers.double().numpy(), 6).tolist() for key, numbers in described.items()},
        "accuracy": {
            part: values and {key: values[key] for key in ("accuracy", "n", "interval_95")} for part, values in metrics.items()
        },
    }
    save_model(folder, model, config)
    export(folder, folder / "model.onnx")
    if validation:
        config["rejection_threshold"] = rejection_threshold(Classifier(folder), validation.images.numpy())
        write_json(folder / "config.json", config)
    write_card(folder, config)
    return metrics


def mistakes(logits: Tensor, split: Split) -> list[dict[str, Any]]:
    """Show the dozen images that were most confidently taken for another class, each as a PNG in base64."""
    probability, predicted = logits.softmax(1).max(1)
    wrong = (predicted != split.labels).nonzero().flatten()
    return [
        {
            "index": index,
            "label": split.classes[split.labels[index]],
            "predicted": split.classes[predicted[index]],
            "probability": float(probability[index]),
            "png": base64.b64encode(encoded(Image.fromarray(split.images[index].numpy()), "PNG")).decode(),
        }
        for index in wrong[probability[wrong].argsort(descending=True, stable=True)][:12].tolist()
    ]


def rejection_threshold(classifier: Classifier, images: NDArray[np.uint8]) -> float:
    """Find the membership that all but 5 % of photos made of images [N, 32, 32, 3] reach; the same images give the same."""
    photos = member_photos(images[:: math.ceil(len(images) / MAX_FRAMED)])
    return float(np.quantile([classifier.classify(views(photo)).membership for photo in photos], REFUSED_MEMBERS))


def member_photos(images: NDArray[np.uint8]) -> Iterator[Image.Image]:
    """Make a photo out of each image [N, 32, 32, 3]: in front of its own blurred colours, every second of mirrored tiles."""
    for index, image in enumerate(images):
        yield framed(image, np.random.default_rng([0, index]), mirrored_tiles(image) if index % 2 else None)


def mirrored_tiles(image: NDArray[np.uint8]) -> Image.Image:
    """Lay a picture uint8 [32, 32, 3] and its mirror images side by side, three in a row and a column."""
    return Image.fromarray(np.pad(image, ((SIZE, SIZE), (SIZE, SIZE), (0, 0)), "symmetric"))


def framed(image: NDArray[np.uint8], rng: np.random.Generator, background: Image.Image | None = None) -> Image.Image:
    """Make a photo out of a picture uint8 [32, 32, 3]: in front of a background, or else of its own blurred colours.

    Its object, taken as the middle three quarters of it, fills 40 to 100 % of the photo's short side, is stretched by up
    to the photo's own proportions, and is rather in the middle than at the edge.
    """
    picture = Image.fromarray(image)
    shape = rng.permuted([1.0, rng.choice([1, 4 / 3, 3 / 2, 16 / 9])])
    size = SHORT_SIDE * shape
    sides = SHORT_SIDE * rng.uniform(0.4, 1) / 0.75 * shape ** rng.random()
    left, top = ((size - 0.75 * sides) * rng.triangular(0, 0.5, 1, 2) - sides / 8).round().astype(int).tolist()
    (width, height), (w, h) = size.round().astype(int).tolist(), sides.round().astype(int).tolist()
    scene = (background or picture.filter(ImageFilter.GaussianBlur(4))).resize((width, height), Image.Resampling.BICUBIC)
    soft_edge = Image.new("L", (w, h))
    soft_edge.paste(255, (w // 16, h // 16, w - w // 16, h - h // 16))
    soft_edge = soft_edge.filter(ImageFilter.GaussianBlur(h / 32))
    scene.paste(picture.resize((w, h), Image.Resampling.BICUBIC), (left, top), soft_edge)
    return scene


def write_card(folder: Path, config: dict[str, Any]) -> None:
    """Write README.md, the model card: what the network is, how it was made, how good it is and where it fails."""
    setting, accuracy = config["setting"], config["accuracy"]
    if start := setting.get("start_from"):
        setting = setting | {"start_from": portable(start)}
    chosen = "chosen on validation" if accuracy["validation"] else "the last one, for no images were held out to choose by"
    chosen += ". The test images were looked at once, after that choice" if accuracy["test"] else ""
    members = f"""\
Probabilities are scaled with temperature {config["temperature"]:.3f}, fitted on validation. Membership is the mean
  cosine between the features of a photo's views and the class means, each class weighted with its probability, less
  {EXCESS_WEIGHT} times the standard deviations by which the contrasts of the second stage exceed those of validation images on
  average. A photo below {config["rejection_threshold"]:.3f} is answered with "none of these", as is one in twenty photos made
  of validation images."""
    if not accuracy["validation"]:
        members = 'No photo is answered with "none of these": that takes validation images.'
    rows = [
        f"| {part} | {values['accuracy']:.2f} % | {values['interval_95'][0]:.2f} to {values['interval_95'][1]:.2f} | "
        f"{values['n']:,} |"
        for part, values in accuracy.items()
        if values
    ]
    results = "\n".join(rows)
    first = f" Its first weights are those of `{setting['start_from']}`." if start else ""
    shown = {key: value for key, value in setting.items() if key != "nesterov" or value}  # Muon always is
    keys = "\n".join(f"| {key} | {markdown(value)} |" for key, value in shown.items())
    write(
        folder / "README.md",
        f"""---
library_name: onnx
pipeline_tag: image-classification
---

# {setting["model"]}, {markdown(setting["name"])}

A residual network for 32x32 images in {len(config["classes"])} classes: {markdown(", ".join(config["classes"]))}.

| split | accuracy | 95 % interval | images |
| --- | --- | --- | --- |
{results}

- Trained on {markdown(config["data"])}, seed {config["seed"]}; weights of epoch {config["best_epoch"]} of {setting["epochs"]},
  {chosen}. One run: n = 1 seed.{first}
- {members}
- It knows small pictures that are filled by one object. It can be wrong on anything else.

`model.safetensors` holds the weights; `model.onnx` the whole way from pixels, uint8 [N, 32, 32, 3] in RGB, to probabilities,
membership [N] and activation maps [N, classes, 8, 8] (what spoke for a class, and where); `config.json` the names of the
classes, the threshold and how the network was made. `resnet-cifar10 infer PHOTO --model FOLDER` uses them so; the same without
that package, for photos of 8 bits a colour:

```python
import json, numpy, onnxruntime
from PIL import Image, ImageOps

config, session = json.load(open("config.json")), onnxruntime.InferenceSession("model.onnx")
photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
(w, h), views = photo.size, []
for a, b in ((0.85 * w, 0.85 * h), (0.75 * min(w, h), 0.75 * min(w, h))):  # most of it; a closer square
    box = (w - a) / 2, (h - b) / 2, (w + a) / 2, (h + b) / 2
    view = numpy.asarray(photo.resize((32, 32), Image.Resampling.BOX, box))
    views += [view, view[:, ::-1]]  # and mirrored
outputs = session.run(["probabilities", "membership"], {{"images": numpy.stack(views)}})
probabilities, membership = (output.mean(0) for output in outputs)
print(dict(zip(config["classes"], probabilities.tolist())))
print("none of these" if membership < config["rejection_threshold"] else config["classes"][probabilities.argmax()])
```

| key | value |
| --- | --- |
{keys}
""",
    )
