"""Small images in, predictions out: NumPy and ONNX Runtime, no PyTorch."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from .errors import one_line
from .files import read_json, validated

BUILT_IN = Path(__file__).parent / "models"
SIZE = 32  # pixels of a side of what the network sees
SEAL = b"r\x4a\n\x06sha256\x12\x40"  # protobuf of one more entry of an ONNX file's metadata: key sha256, value of 64 letters


@dataclass(frozen=True)
class Prediction:
    """What a photo shows. `membership`, at most 1: higher = more likely one of the classes; `rejected`: below the threshold."""

    label: str
    probabilities: dict[str, float]
    membership: float
    rejected: bool

    @property
    def verdict(self) -> str:
        """The label, or "none of these" and how many there are."""
        return f"none of these {len(self.probabilities)}" if self.rejected else self.label

    def __str__(self) -> str:
        percent = f"{100 * self.probabilities[self.label]:.0f} %"
        return f"{self.verdict} (most like: {self.label}, {percent})" if self.rejected else f"{self.label}, {percent}"


def model_folder(model: str | Path) -> Path:
    """Find the model folder that a user means: a model folder, a finished run folder or a built-in name.

    Raises:
        ValueError: Naming what was found and what is allowed.

    """
    path = Path(model)
    if (path / "setting.json").is_file() and not (path / "result.json").is_file():
        raise ValueError(f"{path}: this run is not finished; the same train command again goes on with it")
    for folder in (path, path / "model", BUILT_IN / path):
        if (folder / "config.json").is_file():
            return folder
    if (path / "model.onnx").is_file() or (path / "model.safetensors").is_file():
        raise ValueError(f"{path / 'config.json'}: missing")
    if (path / "result.json").is_file():
        raise ValueError(f"{path}: a finished run whose folder 'model' is not here; allowed: one that has it")
    names = ", ".join(sorted(entry.name for entry in BUILT_IN.iterdir()))
    raise ValueError(
        f"{model}: no such model; allowed: a model folder, a finished run folder (OUT/<setting>/seed-<n>), or built-in: {names}"
    )


class _Config(BaseModel, strict=True, allow_inf_nan=False, extra="allow"):  # what is needed of config.json; the rest is kept
    architecture: dict[str, Any]
    classes: list[Any]
    mean: list[float] = Field(min_length=3, max_length=3)
    std: list[Annotated[float, Field(gt=0)]] = Field(min_length=3, max_length=3)
    temperature: float = Field(gt=0)
    rejection_threshold: float
    data: str = "unknown data"
    setting: dict[str, Any] = {}


def check_class_names(names: Any, where: str) -> None:
    """Make sure that what a file says are the names of classes is that.

    Raises:
        ValueError: With `where`, what was found and what is allowed.

    """
    texts = isinstance(names, list) and all(isinstance(name, str) and name and name.isprintable() for name in names)
    if not texts or len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"{where}: found {one_line(names)}; allowed: two or more different names of printable characters")


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check config.json of a model folder.

    Raises:
        ValueError: Naming the file and the key that is missing or wrong.

    """
    file = folder / "config.json"
    config = validated(_Config, read_json(file), str(file)).model_dump()
    check_class_names(config["classes"], f"{file}: key 'classes'")
    return config


def onnx_runtime() -> Any:
    """Import ONNX Runtime without its telemetry, which would write to the home folder and call its maker."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    return onnxruntime


def seal(content: bytes) -> bytes:
    """Append to the bytes of an ONNX file their SHA-256, which makes it part of the file's metadata."""
    return content + SEAL + hashlib.sha256(content).hexdigest().encode()


class Classifier:
    """The network of a model folder in ONNX Runtime."""

    def __init__(self, model: str | Path = "resnet32") -> None:
        """Open the model.

        Raises:
            ValueError: If it is no model folder, or its files are damaged.

        """
        onnxruntime = onnx_runtime()
        folder = model_folder(model)
        self.config = read_config(folder)
        self.classes: list[str] = self.config["classes"]
        file = folder / "model.onnx"
        if not file.is_file():
            raise ValueError(f"{file}: missing; 'resnet-cifar10 export {model} --out {file}' writes it")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            content = file.read_bytes()
            body, sealed, _ = content.rpartition(SEAL)
            if sealed and content != seal(body):
                raise ValueError("damaged: its SHA-256 does not match")
            self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            blank = np.zeros((1, SIZE, SIZE, 3), np.uint8)
            shape = self.session.run(["probabilities", "membership", "activation_map"], {"images": blank})[0].shape
            named = self.session.get_modelmeta().custom_metadata_map.get("classes")
        except Exception as error:  # ONNX Runtime's errors share no base class below Exception
            raise ValueError(f"{file}: not an ONNX model: {one_line(error)}") from None
        if shape != (1, len(self.classes)):
            raise ValueError(f"{file}: gives {shape[-1]} classes, config.json names {len(self.classes)}")
        if named not in (None, "\n".join(self.classes)):
            raise ValueError(f"{file}: its classes are not those of config.json; 'resnet-cifar10 export' writes it anew")

    def classify(self, views: NDArray[np.uint8]) -> Prediction:
        """Average probabilities and membership over a photo's views [V, 32, 32, 3]; refuse it below the threshold."""
        outputs = self.session.run(["probabilities", "membership"], {"images": views})
        mean, membership = (output.mean(axis=0, dtype=np.float64).tolist() for output in outputs)
        probabilities = dict(zip(self.classes, mean, strict=True))
        label = max(probabilities, key=probabilities.__getitem__)
        return Prediction(label, probabilities, membership, membership < self.config["rejection_threshold"])
