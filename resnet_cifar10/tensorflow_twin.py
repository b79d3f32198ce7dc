"""The same networks in TensorFlow: Keras layers, our own residual unit; weights go both ways, PyTorch's layout."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data import Split, mean_and_std, normalise
from .evaluate import predict
from .infer import SIZE
from .model import GROUPS, ResNet
from .settings import Setting
from .storage import Tensors
from .train import initial_network

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no advice on instruction sets, only warnings
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # with it, faster, TensorFlow prints lines that nothing else silences
os.environ |= {"KERAS_BACKEND": "tensorflow", "KERAS_HOME": os.devnull}  # else Keras writes a file into the home folder
import keras
import tensorflow as tf

VERSIONS = {"tensorflow": tf.__version__, "keras": keras.__version__, "onednn": os.environ["TF_ENABLE_ONEDNN_OPTS"]}
TO_KERAS = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}  # axes of a vector, of the linear layer and of a convolution


class BatchNormalization(keras.layers.BatchNormalization):  # type: ignore[misc]
    """Keras's, with the unbiased variance among the running statistics, as in PyTorch."""

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Map [N, H, W, C] to the same shape."""
        kept = self.momentum * self.moving_variance
        out = super().call(inputs, training=training, mask=mask)
        if training:
            count = keras.ops.cast(keras.ops.size(inputs[..., 0]), self.variable_dtype)
            self.moving_variance.assign(kept + (self.moving_variance - kept) * count / (count - 1))
        return out


class ResidualUnit(keras.layers.Layer):  # type: ignore[misc]
    """Two 3x3 convolutions and the shortcut around them (He et al. 2015 and 2016): every stride-th pixel, new channels zero."""

    def __init__(
        self,
        filters: int,
        stride: int,
        conv: Callable[..., Any],
        norm: Callable[[], Any],
        activation: Callable[[Any], Any],
        pre_activation: bool,
        activate_before_residual: bool,
        shortcut: bool,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.filters, self.stride, self.activation, self.shortcut = filters, stride, activation, shortcut
        self.pre_activation, self.activate_before_residual = pre_activation, activate_before_residual
        # at stride 2 the padding "same" would give the left and the upper side no zeros
        self.pad = keras.layers.ZeroPadding2D() if stride > 1 else keras.layers.Identity()
        self.conv1 = conv(filters, strides=stride, padding="valid" if stride > 1 else "same")
        self.norm1, self.norm2, self.conv2 = norm(), norm(), conv(filters)  # in PyTorch's order, for the weights

    def call(self, x: Any) -> Any:
        """Map [N, H, W, C] to [N, H / stride, W / stride, filters]."""
        around = x
        if self.pre_activation:
            x = self.activation(self.norm1(x))
            around = x if self.activate_before_residual else around
            x = self.conv2(self.activation(self.norm2(self.conv1(self.pad(x)))))
        else:
            x = self.norm2(self.conv2(self.activation(self.norm1(self.conv1(self.pad(x))))))
        if self.shortcut:
            new_channels = self.filters - around.shape[-1]
            x += keras.ops.pad(around[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (0, new_channels)))
        return x if self.pre_activation else self.activation(x)


def resnet(architecture: dict[str, Any], weight_decay: float = 0.0, dtype: str = "float32") -> keras.Model:
    """Build the network that ResNet(**architecture) is, from normalised images [N, 32, 32, 3] to logits [N, classes].

    Args:
        architecture: All arguments of ResNet; there is one process, so "sync_batch" is "batch".
        weight_decay: Adds half of it times the squares of all parameters to the loss, as in PyTorch.
        dtype: "float32" or "float64".

    Returns:
        The model, whose residual units are named unit_1_0, unit_1_1, ... unit_3_0, ...

    """
    normalization, width, pre = architecture["normalization"], architecture["width"], architecture["block"] == "pre"
    keras.config.set_floatx(dtype)  # Keras has one for the whole process
    keras.config.set_dtype_policy(dtype)
    l2 = keras.regularizers.L2(weight_decay / 2)
    act: Callable[[Any], Any] = {
        "relu": keras.ops.relu,
        "leaky_relu": partial(keras.ops.leaky_relu, negative_slope=architecture["leaky_slope"]),
        "gelu": partial(keras.ops.gelu, approximate=False),
        "silu": keras.ops.silu,
    }[architecture["activation"]]
    scale: dict[str, Any] = {"epsilon": 1e-5, "gamma_regularizer": l2, "beta_regularizer": l2}
    batch = partial(BatchNormalization, momentum=0.9, **scale)  # PyTorch counts the share that is new, 0.1
    norm: Callable[[], Any] = {
        "batch": batch,
        "sync_batch": batch,
        "layer": partial(keras.layers.GroupNormalization, 1, **scale),
        "group": partial(keras.layers.GroupNormalization, GROUPS, **scale),
        "none": keras.layers.Identity,
    }[normalization]
    conv = partial(
        keras.layers.Conv2D,
        kernel_size=3,
        padding="same",
        use_bias=normalization == "none",
        kernel_regularizer=l2,
        bias_regularizer=l2,
    )

    images = keras.Input((SIZE, SIZE, 3))
    x = conv(width)(images)
    x = x if pre else act(norm()(x))
    for stage, filters in enumerate((width, 2 * width, 4 * width), 1):
        for unit in range((architecture["depth"] - 2) // 6):
            stride, first = 2 if stage > 1 and unit == 0 else 1, stage == 1 and unit == 0
            x = ResidualUnit(
                filters, stride, conv, norm, act, pre, first, architecture["shortcut"], name=f"unit_{stage}_{unit}"
            )(x)
    x = act(norm()(x)) if pre else x
    x = keras.layers.GlobalAveragePooling2D()(x)
    logits = keras.layers.Dense(architecture["classes"], kernel_regularizer=l2, bias_regularizer=l2)(x)
    return keras.Model(images, logits)


def from_pytorch(
    network: ResNet, architecture: dict[str, Any], weight_decay: float = 0.0, dtype: str = "float32"
) -> keras.Model:
    """Build the Keras model of a PyTorch network, ResNet(**architecture), with its weights."""
    model = resnet(architecture, weight_decay, dtype)
    model.set_weights(_keras_weights(network))
    return model


def _keras_weights(network: ResNet) -> list[Any]:
    tensors = [tensor.numpy() for tensor in network.state_dict().values() if tensor.ndim]  # Keras counts no batches
    return [tensor.transpose(TO_KERAS[tensor.ndim]) for tensor in tensors]


def to_pytorch(model: keras.Model, network: ResNet) -> None:
    """Copy the weights of a Keras model into the PyTorch network of the same architecture."""
    names = [name for name, tensor in network.state_dict().items() if tensor.ndim]
    weights = [torch.tensor(weight.transpose(np.argsort(TO_KERAS[weight.ndim]))) for weight in model.get_weights()]
    network.load_state_dict(dict(zip(names, weights, strict=True)), strict=False)


def forward(network: ResNet, architecture: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Compute a PyTorch network's logits in TensorFlow: the function that evaluate.predict wants."""
    return _logits(from_pytorch(network, architecture))


def _logits(model: keras.Model) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.from_numpy(model.predict_on_batch(x.permute(0, 2, 3, 1).numpy()))


class SGD(keras.optimizers.SGD):  # type: ignore[misc]
    """Momentum as in PyTorch: the velocity adds up gradients, not steps, so a new learning rate acts at once."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Move one variable."""
        step = gradient
        if self.momentum > 0:
            velocity = self.momentums[self._get_variable_index(variable)]
            self.assign(velocity, self.momentum * velocity + gradient)
            step = gradient + self.momentum * velocity if self.nesterov else velocity
        self.assign_sub(variable, keras.ops.cast(learning_rate, variable.dtype) * step)


def make_optimizer(setting: Setting) -> keras.optimizers.Optimizer:
    """Build the optimizer; the weight decay of SGD and Adam is in the loss, AdamW takes its own (Loshchilov & Hutter 2019).

    Keras adds the epsilon of Adam before the correction of the bias, PyTorch after it: where gradients are tiny, the first
    hundreds of steps differ.
    """
    if setting.optimizer == "sgd":
        return SGD(setting.lr, setting.momentum, setting.nesterov)
    betas = {"beta_1": setting.momentum, "beta_2": 0.999, "epsilon": 1e-8}
    if setting.optimizer == "adam":
        return keras.optimizers.Adam(setting.lr, **betas)
    return keras.optimizers.AdamW(setting.lr, weight_decay=setting.weight_decay, **betas)


def resolve(setting: Setting, device: str) -> tuple[str, bool]:
    """Return precision and whether to compile, refuse what TensorFlow lacks here; its compiler XLA is slower on a CPU.

    Raises:
        ValueError: Naming the option or key, what was found and what is allowed.

    """
    allowed = "allowed with --framework tensorflow"
    if device != "cpu":
        raise ValueError(f"--device: found {device!r}; {allowed}: cpu")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError(f"torchrun: found several processes; {allowed}: one")
    if setting.optimizer == "muon":
        raise ValueError(f"setting {setting.name!r}: key 'optimizer': found 'muon'; {allowed}: sgd, adam, adamw")
    if setting.precision == "bfloat16":
        raise ValueError(f"setting {setting.name!r}: key 'precision': found 'bfloat16'; {allowed}: auto, float32, float64")
    return "float32" if setting.precision == "auto" else setting.precision, False


class Learner:
    """The network in training, in TensorFlow: does what train.Learner does, from the same initial weights."""

    def __init__(
        self,
        setting: Setting,
        seed: int,
        training: Split,
        device: str,
        precision: str,
        compiled: bool,
        initial_weights: Tensors | None,
    ) -> None:
        """Build network and optimizer; the device is the CPU."""
        self.device, (self.mean, self.std) = device, mean_and_std(training.images)
        architecture = setting.architecture(len(training.classes))
        self.network = initial_network(setting, seed, len(training.classes), initial_weights)
        self.network.to(getattr(torch, precision))
        decay = 0.0 if setting.optimizer == "adamw" else setting.weight_decay
        self.model, self.optimizer = from_pytorch(self.network, architecture, decay, precision), make_optimizer(setting)
        self.optimizer.build(self.model.trainable_variables)
        options: dict[str, Any] = {"from_logits": True, "label_smoothing": setting.label_smoothing}
        self.model.compile(
            self.optimizer,
            keras.losses.CategoricalCrossentropy(**options),
            jit_compile=compiled,
            metrics=[
                keras.metrics.CategoricalCrossentropy("cross_entropy", **options),  # without weight decay
                keras.metrics.CategoricalAccuracy("accuracy"),
            ],
        )

    def step(self, images: Tensor, targets: Tensor, lr: float, whole_batch: int) -> Tensor:
        """Learn from a batch; return the sum of the losses and the number of correct images."""
        self.optimizer.learning_rate = lr
        x = normalise(images, torch.tensor(self.mean), torch.tensor(self.std)).permute(0, 2, 3, 1)
        x = x.to(self.network.linear.weight.dtype)
        log = self.model.train_on_batch(x.numpy(), targets.numpy(), return_dict=True)  # the metrics of this batch alone
        losses, correct = whole_batch * log["cross_entropy"], round(whole_batch * log["accuracy"])
        return torch.tensor([losses, correct], dtype=torch.float64)

    def logits(self, images: Tensor) -> Tensor:
        """Map images uint8 [N, 32, 32, 3] to logits float32 [N, classes]."""
        return predict(_logits(self.model), images, self.mean, self.std)

    def tensors(self) -> dict[str, Tensors]:
        """Return all that training changes: "model" in PyTorch's layout, and "optimizer"."""
        to_pytorch(self.model, self.network)
        moments = {str(index): torch.tensor(variable.numpy()) for index, variable in enumerate(self.optimizer.variables)}
        return {"model": self.network.state_dict(), "optimizer": moments}

    def moment_shapes(self) -> dict[str, Sequence[int]]:
        """Name the variables of the optimizer, each with its shape."""
        return {str(index): tuple(variable.shape) for index, variable in enumerate(self.optimizer.variables)}

    def restore(self, weights: Tensors, moments: Tensors) -> None:
        """Take over what `tensors` gave."""
        self.network.load_state_dict(weights)
        self.model.set_weights(_keras_weights(self.network))
        for index, variable in enumerate(self.optimizer.variables):
            variable.assign(moments[str(index)].numpy())
