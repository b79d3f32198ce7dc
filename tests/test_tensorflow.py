"""Two independent implementations of the same network agree: logits, one step of training, whole runs."""

import csv
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run

from resnet_cifar10 import run_folder, study
from resnet_cifar10.data import Split
from resnet_cifar10.model import ResNet
from resnet_cifar10.settings import Setting, load_settings
from resnet_cifar10.storage import load_model, read_tensors
from resnet_cifar10.train import Checkpoint, make_optimizer
from torture.harness import Ended

pytestmark = [
    pytest.mark.skipif(not find_spec("tensorflow"), reason="needs the extra 'tensorflow'"),
    pytest.mark.filterwarnings(  # Keras itself converts scalars in a way that NumPy gives up
        "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
    ),
    pytest.mark.usefixtures("quick_export"),
]


@pytest.fixture(scope="module")
def twin() -> Any:
    """Import it here: TensorFlow takes many seconds, and each process of the tests reads this file."""
    from resnet_cifar10 import tensorflow_twin

    return tensorflow_twin


def network(setting: Setting, dtype: torch.dtype) -> tuple[ResNet, dict[str, Any]]:
    """Build a network whose every number, running statistics too, differs from its neutral value."""
    torch.manual_seed(1)
    architecture = setting.architecture(10)
    model = ResNet(**architecture).to(dtype)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.ndim == 1:
                tensor.add_(0.1 * torch.rand_like(tensor))
    return model, architecture


def row(**changes: object) -> Setting:
    return Setting.model_validate({"name": "Row", "epochs": 1, "weight_decay": 5e-4} | changes)


def channels_last(images: torch.Tensor) -> Any:
    return images.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("depth", "block", "activation"),
    [
        (20, "post", "relu"),
        (32, "pre", "leaky_relu"),
    ],
)
def test_the_same_weights_give_the_same_logits(twin: Any, depth: int, block: str, activation: str) -> None:
    model, architecture = network(row(model=f"resnet{depth}", block=block, activation=activation), torch.float32)
    theirs = twin.from_pytorch(model, architecture)
    images = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for training in (True, True, False):  # with the statistics of the batch, then with the running ones that this gave
        with torch.inference_mode():
            logits = model.train(training)(images)
        answer = torch.from_numpy(theirs(channels_last(images), training=training).numpy())
        assert float((answer - logits).abs().max()) < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"normalization": "layer", "activation": "gelu"},
        {"normalization": "group", "activation": "silu", "block": "pre"},
        {"normalization": "none", "shortcut": "none"},
        {"normalization": "none", "block": "pre"},
        {"normalization": "layer", "width": 24},
    ],
)
def test_every_other_option_gives_the_same_logits(twin: Any, changes: dict[str, Any]) -> None:
    model, architecture = network(row(model="resnet8", **changes), torch.float64)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    answer = twin.from_pytorch(model, architecture, dtype="float64")(channels_last(images), training=False).numpy()
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(answer), model(images), rtol=1e-6, atol=1e-6)


def test_units_have_the_names_of_the_assignment(twin: Any) -> None:
    layers = twin.resnet(row(model="resnet32").architecture(10)).layers
    names = [layer.name for layer in layers if layer.name.startswith("unit")]
    assert names == [f"unit_{stage}_{unit}" for stage in (1, 2, 3) for unit in range(5)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"block": "pre", "nesterov": True},
        {"momentum": 0.0, "label_smoothing": 0.1},
        {"optimizer": "adam", "lr": 1e-3},
        {"optimizer": "adamw", "lr": 1e-3},
    ],
)
def test_steps_of_training_give_the_same_weights_and_running_statistics(twin: Any, changes: dict[str, Any]) -> None:
    setting = row(**{"model": "resnet8", "lr_decay": "linear"} | changes)
    model, architecture = network(setting, torch.float64)
    optimizer = make_optimizer(setting, model)
    smoothing, decay = setting.label_smoothing, 0.0 if setting.optimizer == "adamw" else setting.weight_decay
    theirs = twin.from_pytorch(model, architecture, decay, "float64")
    loss = twin.keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing)
    theirs.compile(twin.make_optimizer(setting), loss, run_eagerly=True)  # two steps are not worth a graph
    if "adam" in setting.optimizer:  # Keras adds epsilon before the correction of the bias, PyTorch after it
        optimizer.param_groups[0]["eps"] = theirs.optimizer.epsilon = 1e-15
    torch.manual_seed(2)
    for step in range(2):  # the second one has a momentum and another learning rate
        images, targets = torch.randn(8, 3, 32, 32, dtype=torch.float64), torch.eye(10, dtype=torch.float64)[:8]
        optimizer.param_groups[0]["lr"] = theirs.optimizer.learning_rate = setting.lr * (1 - step / 3)
        F.cross_entropy(model(images), targets, label_smoothing=smoothing).backward()
        optimizer.step()
        optimizer.zero_grad()
        theirs.train_on_batch(channels_last(images), targets.numpy())
    back = ResNet(**architecture).double()
    twin.to_pytorch(theirs, back)
    for name, tensor in back.state_dict().items():
        if tensor.ndim:  # Keras counts no batches
            assert float((tensor - model.state_dict()[name]).abs().max()) < 1e-5, name


# --- the command line ---


def train(folder: Path, *options: str, status: int = 0) -> Ended:
    (folder / "table.toml").write_text(
        '[[setting]]\nname = "D"\nmodel = "resnet8"\nepochs = 2\nvalidation_size = 200\n'
        'batch_size = 32\nlr = 0.05\nlr_decay = "linear"\naugmentation = "crop"\n'
        "compile = false\n"
    )
    table = ("train", folder / "table.toml", "--data", "digits", "--out", folder / "runs")
    return run(*table, "--framework", "tensorflow", *options, status=status)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, quick_export: None) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(folder)
    return folder / "runs" / "d" / "seed-0"


def test_a_run_has_the_folder_of_every_run_and_learns(twin: Any, trained: Path) -> None:
    result = json.loads((trained / "result.json").read_text())
    assert result["test"]["accuracy"] > 50  # chance: 10 %
    with open(trained / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert max(float(row["validation_accuracy"]) for row in rows) == result["validation"]["accuracy"]
    best, _ = read_tensors(trained / "best.safetensors")
    model, config = load_model(trained)
    assert all(torch.equal(tensor, best[name]) for name, tensor in model.state_dict().items())
    assert config["best_epoch"] == result["best_epoch"]
    assert json.loads((trained / "environment.json").read_text())["tensorflow"] == twin.tf.__version__


def test_both_frameworks_evaluate_a_model_alike(trained: Path) -> None:
    both = [
        json.loads(run("evaluate", trained, "--data", "digits", "--json", "--framework", name).out)
        for name in ("pytorch", "tensorflow")
    ]
    assert [metrics["framework"] for metrics in both] == ["pytorch", "tensorflow"]
    assert both[0]["confusion"] == both[1]["confusion"]
    assert both[0]["negative_log_likelihood"] == pytest.approx(both[1]["negative_log_likelihood"], abs=1e-5)


def test_a_run_is_skipped_when_done_and_is_another_one_in_the_other_framework(trained: Path) -> None:
    folder = trained.parents[2]
    assert "is done" in train(folder).out
    assert "framework was 'tensorflow', is 'pytorch'" in train(folder, "--framework", "pytorch", status=2).err


def test_a_broken_off_run_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.arange(48) % 2
    pixels = (labels * 200).to(torch.uint8)[:, None, None, None].expand(-1, 32, 32, 3)
    split = Split(pixels, labels, ("dark", "light"), "made up")
    short = row(model="resnet8", epochs=2, validation_size=16, batch_size=16, compile=False)

    def run_into(folder: Path) -> None:
        study.run(short, 0, lambda part: split if part == "train" else None, folder, framework="tensorflow")

    def power_cut(folder: Path, rows: list[Any], checkpoint: Checkpoint) -> None:
        save(folder, rows, checkpoint)
        raise RuntimeError("power cut")

    save = run_folder.save
    run_into(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(study, "save", power_cut)
        run_into(tmp_path / "parts")
    assert len(run_folder.read_metrics(tmp_path / "parts")) == 1
    run_into(tmp_path / "parts")
    for name in ("best.safetensors", "last.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_what_tensorflow_lacks_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "table.toml").write_text('[[setting]]\nname = "D"\nprecision = "bfloat16"\n')
    table = ("train", tmp_path / "table.toml", "--data", "digits", "--out", tmp_path / "runs")
    refused = run(*table, "--framework", "tensorflow", status=2).err
    assert "'precision': found 'bfloat16'" in refused
    assert "tensorflow: auto, float32, float64" in refused
    (tmp_path / "muon.toml").write_text('[[setting]]\nname = "M"\noptimizer = "muon"\n')
    muon = run("train", tmp_path / "muon.toml", *table[2:], "--framework", "tensorflow", status=2).err
    assert "'optimizer': found 'muon'; allowed with --framework tensorflow: sgd, adam, adamw" in muon
    assert "allowed with --ray: pytorch" in run(*table, "--framework", "tensorflow", "--ray", "local", status=2).err
    assert "'abacus' is not one of 'pytorch', 'tensorflow'" in run(*table, "--framework", "abacus", status=2).err
    assert not (tmp_path / "runs").exists()


def test_the_settings_of_the_comparison_differ_in_nothing_but_what_is_compared() -> None:
    first, second, faster = load_settings(ROOT / "settings" / "frameworks.toml")
    assert first.model_dump(exclude={"name"}) == second.model_dump(exclude={"name"})
    what = {"name", "precision", "compile"}
    assert first.model_dump(exclude=what) == faster.model_dump(exclude=what) and first.precision != faster.precision
