"""Training as a user meets it: killed, stopped, resumed, refused."""

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run

from resnet_cifar10 import processes, run_folder, study
from resnet_cifar10.data import Split, batches, normalise
from resnet_cifar10.errors import Interrupted, JobFailed
from resnet_cifar10.evaluate import fit_temperature
from resnet_cifar10.export import describe
from resnet_cifar10.files import write_json
from resnet_cifar10.machine import has_compiler
from resnet_cifar10.model import ResNet
from resnet_cifar10.muon import RMS, Muon, orthogonal
from resnet_cifar10.run_folder import load_checkpoint
from resnet_cifar10.settings import Setting, load_settings
from resnet_cifar10.signals import signals
from resnet_cifar10.storage import load_model
from resnet_cifar10.study import claim, epoch_line, split_data
from resnet_cifar10.study import run as train_run
from resnet_cifar10.train import Checkpoint, Learner, initial_network, train
from torture.training import contents

pytestmark = pytest.mark.usefixtures("quick_export")

TABLE = """
[[setting]]
name = "Small"
model = "resnet8"
width = 8
batch_size = 128
lr = 0.05
epochs = {epochs}
augmentation = "crop_flip_cutout_mixup"
lr_decay = "cosine"
validation_size = 200
compile = false
"""


def table(folder: Path, epochs: int = 3) -> Path:
    file = folder / "table.toml"
    file.write_text(TABLE.format(epochs=epochs))
    return file


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, quick_export: None) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run("train", table(folder), "--data", "digits", "--out", folder / "runs")
    return folder / "runs" / "small" / "seed-0"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_cleanly_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, status: int
) -> None:
    def save_then_signal(folder: Path, rows: list[Any], checkpoint: Checkpoint) -> None:
        save(folder, rows, checkpoint)
        signal.raise_signal(number)

    save = run_folder.save
    monkeypatch.setattr(study, "save", save_then_signal)
    stopped = run("train", table(tmp_path), "--data", "digits", "--out", tmp_path / "runs", status=status)
    assert "the same command again goes on" in stopped.err
    checkpoint, _ = load_checkpoint(tmp_path / "runs" / "small" / "seed-0")
    assert checkpoint and checkpoint.state["epoch"] == 1


def test_a_training_that_was_stopped_from_python_gives_signals_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(study, "save", lambda *arguments: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        train_run(setting(epochs=2), 0, data, tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def unfinished(tmp_path: Path, run: Path) -> Path:
    """Copy a finished run to where `table` and --out find it, as it was before its last file."""
    folder = tmp_path / "runs" / "small" / "seed-0"
    shutil.copytree(run, folder)
    (folder / "result.json").unlink()
    return folder


@pytest.mark.parametrize("key", ["instructions", "code_sha256"])
def test_a_run_that_goes_on_elsewhere_or_with_other_code_says_so_and_keeps_the_mark(
    tmp_path: Path, undisturbed: Path, key: str
) -> None:
    folder = unfinished(tmp_path, undisturbed)
    (folder / "previous.safetensors").replace(folder / "last.safetensors")
    facts = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps(facts | {key: "before"}))
    resumed = run("train", table(tmp_path), "--data", "digits", "--out", tmp_path / "runs")
    told = f"resumed after epoch 2 with a change of {key}{'' if key == 'code_sha256' else f' (before, now {facts[key]})'}"
    assert f"not bit-exact: {told}\n" in resumed.out
    assert json.loads((folder / "environment.json").read_text())["not_bit_exact"] == told


def test_a_run_that_another_command_ends_in_the_meantime_is_left_alone(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = unfinished(tmp_path, undisturbed)
    before = contents(folder)

    @contextmanager
    def locked_at_last(folder: Path) -> Iterator[None]:
        shutil.copy(undisturbed / "result.json", folder)
        yield

    monkeypatch.setattr(study, "locked", locked_at_last)
    run("train", table(tmp_path), "--data", "digits", "--out", tmp_path / "runs")
    assert contents(folder) == before | contents(undisturbed)


def test_a_run_that_another_command_works_on_is_left_to_it_and_the_next_one_trained(tmp_path: Path, undisturbed: Path) -> None:
    folder, file = unfinished(tmp_path, undisturbed), table(tmp_path)
    file.write_text(file.read_text() + file.read_text().replace("Small", "More"))
    with run_folder.locked(folder):
        left = run("train", file, "--data", "digits", "--out", tmp_path / "runs", status=1)
    assert left.out.count(f"Small, seed 0: process {os.getpid()} on ") == 2  # asked again when the other run was done
    assert f"1 of 2 runs are left to others: Small, seed 0: process {os.getpid()} on " in left.err
    assert not (folder / "result.json").exists()
    assert (tmp_path / "runs" / "more" / "seed-0" / "result.json").exists()


def test_a_run_that_another_command_gives_up_is_taken_over(tmp_path: Path, undisturbed: Path, monkeypatch: Any) -> None:
    folder, file = unfinished(tmp_path, undisturbed), table(tmp_path)
    file.write_text(file.read_text() + file.read_text().replace("Small", "More"))
    with ExitStack() as other:
        other.enter_context(run_folder.locked(folder))
        finish = study.finish
        monkeypatch.setattr(study, "finish", lambda *args: (other.close(), finish(*args))[1])  # it ends as More is trained
        run("train", file, "--data", "digits", "--out", tmp_path / "runs")
    assert all((tmp_path / "runs" / name / "seed-0" / "result.json").exists() for name in ("small", "more"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_too_little_memory_fails_one_run_and_not_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    def run_or_fail(setting: Setting, *arguments: object) -> None:
        if setting.name == "Small":
            raise error
        ended.append(setting.name)

    ended: list[str] = []
    monkeypatch.setattr(study, "run", run_or_fail)
    file = table(tmp_path)
    file.write_text(file.read_text() + file.read_text().replace("Small", "More"))
    failed = run("train", file, "--data", "digits", "--out", tmp_path / "runs", status=1)
    assert f"1 of 2 runs failed: Small, seed 0: {error}; a smaller batch_size" in failed.err
    assert ended == ["More"]


def test_processes_of_one_run_may_differ_in_hardware_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ours: dict[str, Any] = dict.fromkeys(("torch", "code_sha256", "training_sha256", "processor", "device"), "B")
    ours |= {"precision": "float32", "compiled": False, "instructions": "AVX2"}
    theirs = ours | {"processor": "A"}
    assert processes.of_all(ours) == ours  # alone
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(processes.dist, "all_gather_object", lambda found, mine: found.__setitem__(slice(None), [mine, theirs]))
    assert processes.of_all(ours) == ours | {"processor": "A and B"}
    with pytest.raises(ValueError, match="processes whose precision is bfloat16 and float32; allowed: one for all"):
        processes.of_all(ours | {"precision": "bfloat16"})


@pytest.mark.parametrize(
    ("compiler", "headers", "found"),
    [("/not/there", True, False), (sys.executable, False, False), (sys.executable, True, True)],
)
def test_compiling_takes_a_compiler_and_the_headers_of_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, headers: bool, found: bool
) -> None:
    if headers:
        (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert has_compiler() == found


def test_what_is_done_is_skipped_and_another_study_is_refused(tmp_path: Path, undisturbed: Path) -> None:
    out, before = undisturbed.parents[1], contents(undisturbed)
    assert "is done" in run("train", table(tmp_path), "--data", "digits", "--out", out).out
    refused = run("train", table(tmp_path), "--data", "digits", "--out", out, "--epochs", "9", status=2)
    assert "epochs was 3, is 9" in refused.err
    assert contents(undisturbed) == before


def test_an_output_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "small" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("precious")
    assert "thesis.txt" in run("train", table(tmp_path), "--data", "digits", "--out", tmp_path / "runs", status=2).err
    assert [entry.name for entry in folder.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "change",
    [
        "batch_size = 128|batch_size = 5000",
        "validation_size = 200|validation_size = 1438",
        'model = "resnet8"|model = "resnet9"',
    ],
)
def test_impossible_settings_write_nothing(tmp_path: Path, change: str) -> None:
    file = table(tmp_path)
    file.write_text(file.read_text().replace(*change.split("|")))
    refused = run("train", file, "--data", "digits", "--out", tmp_path / "runs", status=2)
    assert change.partition(" = ")[0] in refused.err
    assert not (tmp_path / "runs").exists()


def test_a_model_to_start_from_that_is_not_there_is_found_before_anything_is_written(tmp_path: Path) -> None:
    file = table(tmp_path)
    file.write_text(file.read_text() + 'start_from = "resnet23"\n')
    refused = run("train", file, "--data", "digits", "--out", tmp_path / "runs", status=2)
    assert "resnet23: no such model" in refused.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("first", ["small", "more"])
def test_a_setting_cannot_start_from_itself_or_from_a_later_one(tmp_path: Path, first: str) -> None:
    file, out = table(tmp_path), tmp_path / "runs"
    file.write_text(file.read_text() + f'start_from = "{out}/{first}/seed-0"\n' + file.read_text().replace("Small", "More"))
    assert "no such model" in run("train", file, "--data", "digits", "--out", out, status=2).err
    assert not out.exists()


def test_a_network_that_has_learned_from_images_in_another_form_is_not_validated_on_them(tmp_path: Path) -> None:
    copy = replace(images(), source="CIFAR-10 (JPEG quality 75 copy)")
    train_run(setting(epochs=1), 0, lambda part: copy if part == "train" else None, tmp_path / "copy", "cpu")
    originals = replace(images(), images=images().images ^ 1, source="CIFAR-10")
    row = setting(start_from=str(tmp_path / "copy"))
    with pytest.raises(
        ValueError, match=r"trained on other images of CIFAR-10 \(JPEG quality 75 copy\) .* it may have learned"
    ):
        claim([(row, 0, tmp_path / "originals")], lambda part: originals if part == "train" else None)
    claim([(row, 0, tmp_path / "the same")], lambda part: copy if part == "train" else None)
    more = replace(images(80), source=copy.source)  # the folder has grown: other images are held out
    with pytest.raises(ValueError, match=r"trained on other images of CIFAR-10 .* it may have learned"):
        claim([(row, 0, tmp_path / "grown")], lambda part: more if part == "train" else None)


def test_a_run_goes_on_without_the_model_that_it_started_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_run(setting(epochs=1), 0, data, tmp_path / "model")
    row = setting(start_from=str(tmp_path / "model"))
    train_run(row, 0, data, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(study, "save", save_then_die(after=1))
        train_run(row, 0, data, tmp_path / "parts")
    shutil.rmtree(tmp_path / "model")
    train_run(row, 0, data, tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def images(n: int = 64, classes: int = 4) -> Split:
    """Pictures whose mean colour tells the class."""
    labels = torch.arange(n) % classes
    noise = torch.randint(0, 64, (n, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Split(noise + (48 * labels).to(torch.uint8)[:, None, None, None], labels, tuple("abcd"), "made up")


def setting(**changes: object) -> Setting:
    small = {"name": "Test", "model": "resnet8", "width": 8, "batch_size": 16, "epochs": 2, "validation_size": 16}
    return Setting.model_validate(small | {"precision": "float32", "compile": False} | changes)


def data(part: str) -> Split | None:
    return None if part == "val" else images()


def test_a_run_starts_from_one_of_another_seed_where_validation_images_are_apart(tmp_path: Path) -> None:
    def apart(part: str) -> Split:
        return images()

    train_run(setting(epochs=1), 0, apart, tmp_path / "first")
    row = setting(start_from=str(tmp_path / "first"))
    claim([(row, 1, tmp_path / "apart")], apart)
    with pytest.raises(ValueError, match=r"key 'start_from': .* allowed: the same data, seed 1 "):
        claim([(row, 1, tmp_path / "held out")], data)


def test_a_model_to_start_from_must_be_built_alike_but_synchronised_or_not(tmp_path: Path) -> None:
    train_run(setting(epochs=1), 0, data, tmp_path / "first")
    row = setting(start_from=str(tmp_path / "first"))
    claim([(row.model_copy(update={"normalization": "sync_batch"}), 0, tmp_path / "alike")], data)
    with pytest.raises(ValueError, match=r"has the activation 'relu'; allowed: 'gelu', as the setting says"):
        claim([(row.model_copy(update={"activation": "gelu"}), 0, tmp_path / "other")], data)


def test_a_run_of_before_a_key_was_there_goes_on(tmp_path: Path) -> None:
    claim([(setting(), 0, tmp_path / "run")], data)
    file = tmp_path / "run/setting.json"
    content = json.loads(file.read_text())
    del content["setting"]["block"]
    file.write_text(json.dumps(content))
    claim([(setting(), 0, tmp_path / "run")], data)
    with pytest.raises(ValueError, match="block was 'post', is 'pre'"):
        claim([(setting(block="pre"), 0, tmp_path / "run")], data)


def test_the_table_of_the_readme_begins_with_the_built_in_network_but_its_last_layer(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text((ROOT / "README.md").read_text().partition("```toml\n")[2].partition("```")[0])
    (row,) = load_settings(tmp_path / "my.toml")

    def read(part: str) -> Split | None:
        return images(200) if part == "train" else None

    claim([(row, 0, tmp_path / "run")], read)
    first = study._initial_weights(row, 0, tmp_path / "run", split_data(row, 0, read)[0], read)
    assert first and "conv.weight" in first and not any(name.startswith("linear.") for name in first)


def test_a_run_that_fails_does_not_keep_those_after_it_from_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("resnet_cifar10.study.load", lambda source, part, processes: None if part == "val" else images())
    wild = {"lr": 100.0, "normalization": "none", "shortcut": "none", "model": "resnet56", "epochs": 5}
    said = r"1 of 2 runs failed: Wild, seed 0: the loss is no longer finite in epoch \d, at lr 100"
    with pytest.raises(JobFailed, match=said):
        study.study([setting(name="Wild", **wild), setting(name="Tame", epochs=1)], "images", tmp_path)
    assert "failed: Wild, seed 0" in capsys.readouterr().out
    assert (tmp_path / "tame/seed-0/result.json").exists() and not (tmp_path / "wild/seed-0/result.json").exists()
    reason = json.loads((tmp_path / "wild/seed-0/failed.json").read_text())["reason"]
    assert reason.startswith("Wild, seed 0: the loss is no longer finite")  # the report tells it


def test_a_folder_that_was_removed_meanwhile_ends_its_run_and_is_not_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove_before(*arguments: Any) -> None:
        shutil.rmtree(tmp_path / "test")
        run_folder.save(*arguments)

    monkeypatch.setattr("resnet_cifar10.study.load", lambda source, part, processes: None if part == "val" else images())
    monkeypatch.setattr(study, "save", remove_before)
    with pytest.raises(OSError, match=r"seed-0: was removed while it was worked on"):
        study.study([setting()], "images", tmp_path)
    assert not [*tmp_path.rglob("seed-0")]


def test_a_network_is_compiled_as_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for width in (8, 16):
            learner = Learner(setting(width=width), 0, images(), "cpu", "float32", compiled=True)
            learner.step(images(16).images, F.one_hot(images(16).labels, 4).float(), 0.1, 16)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):  # the limit is one
            learner.loss_and_correct(images(8).images, F.one_hot(images(8).labels, 4).float())


def test_a_run_that_another_command_has_done_meanwhile_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def run(setting: Setting, *rest: Any) -> None:
        ran.append(setting.name)
        write_json(tmp_path / "second/seed-0/result.json", {})

    monkeypatch.setattr("resnet_cifar10.study.load", lambda source, part, processes: None if part == "val" else images())
    monkeypatch.setattr(study, "run", run)
    study.study([setting(name="First"), setting(name="Second")], "images", tmp_path)
    assert ran == ["First"] and "Second, seed 0: is done" in capsys.readouterr().out


@pytest.mark.parametrize("validation_size", [0, 20])
def test_weights_that_the_last_step_spoilt_stop_the_run(tmp_path: Path, validation_size: int) -> None:
    one_step = setting(lr=100.0, normalization="none", model="resnet32", epochs=1, validation_size=validation_size)
    some = images().subset(torch.arange(one_step.batch_size + validation_size))
    with pytest.raises(JobFailed, match="Test, seed 0: the logits of epoch 1 are not finite"):
        train_run(one_step, 0, lambda part: None if part == "val" else some, tmp_path, "cpu")
    assert not (tmp_path / "result.json").exists()


def test_a_folder_that_is_claimed_meanwhile_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_room(folder: Path, parameters: int) -> None:  # another process comes between the check and the writing
        monkeypatch.undo()
        claim([(setting(epochs=2), 0, folder)], data)

    monkeypatch.setattr(study, "check_room", check_room)
    with pytest.raises(ValueError, match="epochs was 2, is 1"):
        claim([(setting(epochs=1), 0, tmp_path / "run")], data)


def save_then_die(after: int) -> Callable[[Path, list[Any], Checkpoint], None]:
    """Save as ever, then break off after this epoch."""
    save = run_folder.save

    def saved(folder: Path, rows: list[Any], checkpoint: Checkpoint) -> None:
        save(folder, rows, checkpoint)
        if checkpoint.state["epoch"] == after:
            raise RuntimeError("power cut")

    return saved


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "muon"])
def test_every_optimizer_learns_and_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    row = setting(
        optimizer=optimizer,
        lr=0.02 if optimizer == "sgd" else 0.003,
        lr_decay="linear",
        nesterov=optimizer == "sgd",
        epochs=6,
        augmentation="crop_flip_cutout_mixup",
    )
    result = train_run(row, 0, data, tmp_path / "whole", "cpu")
    assert result["test"]["accuracy"] > 50

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(study, "save", save_then_die(after=3))
        train_run(row, 0, data, tmp_path / "parts", "cpu")
    train_run(row, 0, data, tmp_path / "parts", "cpu")
    assert (tmp_path / "parts/last.safetensors").read_bytes() == (tmp_path / "whole/last.safetensors").read_bytes()


@pytest.mark.parametrize("shape", [(3, 16, 27), (2, 64, 32), (1, 20, 20)])
def test_an_orthogonal_update_keeps_the_directions_and_evens_out_their_lengths(shape: tuple[int, int, int]) -> None:
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    lengths = torch.linspace(1, 0.01, min(shape[1:]))
    singular = u.mT @ orthogonal(u @ torch.diag(lengths) @ v) @ v.mT
    diagonal = singular.diagonal(dim1=1, dim2=2)
    assert diagonal[:, 0].min() > 0.6
    assert diagonal.max() < 1.3
    assert diagonal[lengths.expand_as(diagonal) > 0.05].min() > 0.6
    torch.testing.assert_close(singular, torch.diag_embed(diagonal), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (1, 16)])
def test_steps_of_muon_are_those_of_pytorch_for_matrices(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    how = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9}
    optimizers = Muon([ours], **how), torch.optim.Muon([theirs], nesterov=True, adjust_lr_fn="match_rms_adamw", **how)
    for _ in range(4):
        ours.grad = theirs.grad = torch.randn(shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.002)  # PyTorch computes in bfloat16


def test_a_step_of_muon_has_the_size_of_one_of_adam_and_decays_weights_apart() -> None:
    weight, unmoved = (torch.nn.Parameter(torch.ones(16, 8, 3, 3)) for _ in range(2))
    weight.grad, unmoved.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)), torch.zeros(16, 8, 3, 3)
    Muon([weight, unmoved], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    assert torch.allclose(unmoved, torch.full_like(unmoved, 0.95))
    assert 0.7 < (weight - unmoved).square().mean().sqrt() / (0.1 * RMS) < 1.2


def test_signals_show_what_shortcuts_and_normalisation_do_to_an_untrained_network() -> None:
    def passed(**changes: object) -> list[list[float]]:
        found = signals(setting(model="resnet56", batch_size=32, **changes), 0, images())
        assert [len(sizes) for sizes in found.values()] == [27, 27]
        return [[size or math.inf for size in sizes] for sizes in found.values()]

    (_, usual), (_, plain), (unbounded, _) = passed(), passed(shortcut="none"), passed(normalization="none")
    assert usual[0] / usual[-1] < 30  # multiplied on the way back
    assert plain[0] / plain[-1] > 300
    assert unbounded[-1] / unbounded[0] > 1000
    vanishing = passed(shortcut="none", normalization="none", weight_init="pytorch")[1]
    assert 0 < vanishing[0] < 1e-20 * vanishing[-1]


def test_the_time_left_counts_the_later_runs_by_their_size() -> None:
    row = {
        "epoch": 4,
        "train_loss": 1.0,
        "train_accuracy": 50.0,
        "validation_accuracy": None,
        "lr": 0.1,
        "train_seconds": 25.0,
        "validation_seconds": 5.0,
    }
    one = setting(model="resnet20", width=16, epochs=10)
    assert epoch_line("One", one, [row], {}, later=0).endswith("lr 0.1  30 s  left 3.0 min")
    assert epoch_line("One", one, [row], {}, later=10 * 56 * 16).endswith("left 3.0 min, of all runs 17.0 min")
    assert epoch_line("One", one, [row], {}, later=200 * 20 * 16).endswith("left 3.0 min, of all runs 1 h 43 min")
    paused = row | {"train_seconds": 2_000.0}
    assert epoch_line("One", one, [paused, row], {}, later=0).endswith("left 3.0 min")


def test_patience_ends_a_run_and_the_best_weights_are_kept(tmp_path: Path) -> None:
    hopeless = setting(lr=1e-9, patience=2, epochs=50, augmentation="none")
    result = train_run(hopeless, 0, data, tmp_path, "cpu")
    assert result["stopped_early"]
    assert result["epochs_run"] == result["best_epoch"] + 2
    assert load_model(tmp_path)[0].norm.num_batches_tracked == 3 * result["best_epoch"]


def test_without_validation_the_last_epoch_is_kept(tmp_path: Path) -> None:
    row = setting(validation_size=0, epochs=3)
    result = train_run(row, 0, lambda part: images() if part == "train" else None, tmp_path, "cpu")
    assert (result["best_epoch"], result["validation"], result["test"]) == (3, None, None)


def test_a_validation_split_of_its_own_is_used_whole(tmp_path: Path) -> None:
    train_run(setting(validation_size=5_000), 0, lambda part: images(128 if part == "val" else 64), tmp_path, "cpu")
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert (environment["training_images"], environment["validation_images"]) == (64, 128)


def test_training_and_validation_images_are_different_ones() -> None:
    training, validation = split_data(setting(), 0, lambda part: images() if part == "train" else None)
    assert (len(training), len(validation)) == (48, 16)
    assert not {i.numpy().tobytes() for i in training.images} & {i.numpy().tobytes() for i in validation.images}


def test_other_images_under_the_same_name_are_refused(tmp_path: Path) -> None:
    changed = replace(images(), images=images().images ^ 1)
    for data in (images(), images()):
        claim([(setting(), 0, tmp_path / "run")], lambda part, data=data: data if part == "train" else None)
    with pytest.raises(ValueError, match="other training images"):
        claim([(setting(), 0, tmp_path / "run")], lambda part: changed if part == "train" else None)


def test_the_loop_learns_from_the_batches_that_setting_seed_and_epoch_ask_for() -> None:
    class Recorder:
        device, mean = "cpu", (0.2, 0.4, 0.6)

        def step(self, images: torch.Tensor, targets: torch.Tensor, lr: float, batch_size: int) -> torch.Tensor:
            seen.append((images, targets, lr, batch_size))
            return torch.tensor([2.0, 0.5], dtype=torch.float64) * len(images)

        def tensors(self) -> dict[str, Any]:
            return {"model": {}, "optimizer": {}}

    seen: list[Any] = []
    row, some = setting(lr=0.6, lr_decay="linear", augmentation="crop_flip_mixup", validation_size=0), images(40)
    rows = [metrics for metrics, _ in train(Recorder(), row, 7, some, some.subset(torch.arange(0)))]
    fill = torch.tensor([51, 102, 153], dtype=torch.uint8)
    wanted = [batch for epoch in (1, 2) for batch in batches(some, 16, "crop_flip_mixup", 7, epoch, fill)]
    for (pixels, targets, *_), batch in zip(seen, wanted, strict=True):
        assert torch.equal(pixels, batch[0]) and torch.equal(targets, batch[1])
    assert [lr for *_, lr, _ in seen] == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert [size for *_, size in seen] == [16, 16, 8] * 2
    assert [(metrics["train_loss"], metrics["train_accuracy"]) for metrics in rows] == [(2, 50)] * 2


def test_of_epochs_with_equal_accuracy_the_one_with_the_lowest_loss_is_kept() -> None:
    class Sure:
        """All images of validation rightly named, in each epoch with another confidence."""

        device, mean, epoch = "cpu", (0.2, 0.4, 0.6), 0

        def step(self, images: torch.Tensor, targets: torch.Tensor, lr: float, batch_size: int) -> torch.Tensor:
            return torch.zeros(2, dtype=torch.float64)

        def logits(self, images: torch.Tensor) -> torch.Tensor:
            self.epoch += 1
            return (1.0, 9.0, 5.0, 9.0)[self.epoch - 1] * torch.eye(4)[held.labels]

        def tensors(self) -> dict[str, Any]:
            return {"model": {"epoch": torch.tensor(self.epoch)}, "optimizer": {}}

    held = images(8)
    *_, (_, last) = train(Sure(), setting(epochs=4), 0, images(40), held)
    assert last.state["best_epoch"] == 2 and last.state["best_accuracy"] == 100
    assert last.part("best")["epoch"] == 2


def test_a_fault_in_the_test_images_is_found_before_anything_is_written(tmp_path: Path, class_folders: Path) -> None:
    (class_folders / "test" / "red" / "notes.jpg").write_text("hello")
    (tmp_path / "table.toml").write_text('[[setting]]\nname = "Own"\nbatch_size = 6\nepochs = 1\nvalidation_size = 3\n')
    refused = run("train", tmp_path / "table.toml", "--data", class_folders, "--out", tmp_path / "runs", status=2)
    assert "notes.jpg: not an image" in refused.err and not (tmp_path / "runs").exists()


def test_seeds_differ_in_first_weights_and_held_out_images() -> None:
    first = [initial_network(setting(), seed, 4, None).conv.weight for seed in (0, 1)]
    held = [split_data(setting(), seed, data)[1].images for seed in (0, 1)]
    assert not torch.equal(*first) and not torch.equal(*held)


def test_a_checkpoint_serves_two_runs() -> None:
    row, (training, validation) = setting(epochs=2), (images(48), images(16))
    learner = Learner(row, 0, training, "cpu", "float32", False)
    _, checkpoint = next(train(learner, row, 0, training, validation))
    checkpoint = deepcopy(checkpoint)  # its tensors change with the next epoch
    ends = [[row["epoch"] for row, _ in train(learner, row, 0, training, validation, checkpoint)] for _ in range(2)]
    assert ends == [[2], [2]]


def test_weights_of_other_names_are_no_first_weights() -> None:
    weights = {f"module.{key}": tensor for key, tensor in ResNet(8, 4).state_dict().items()}
    with pytest.raises(ValueError, match=r"found 'module\..*resnet8"):
        initial_network(setting(), 0, 4, weights)


def test_another_framework_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found 'jax'; allowed: pytorch, tensorflow"):
        study.study([setting()], "digits", tmp_path / "runs", framework="jax")
    assert not (tmp_path / "runs").exists()


def test_a_step_is_that_of_pytorch() -> None:
    row, data = setting(lr=0.1, weight_decay=0.01, label_smoothing=0.1), images(16)
    learner = Learner(row, 0, data, "cpu", "float32", False)
    torch.manual_seed(0)
    plain = ResNet(**row.architecture(4))
    sgd = torch.optim.SGD(plain.parameters(), 0.05, 0.9, weight_decay=0.01)
    targets, (mean, std) = torch.eye(4)[data.labels], map(torch.tensor, (learner.mean, learner.std))
    F.cross_entropy(plain(normalise(data.images, mean, std)), targets, label_smoothing=0.1).backward()
    sgd.step()
    learner.step(data.images, targets, 0.05, 16)
    torch.testing.assert_close(learner.model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


def test_bfloat16_is_for_computing_and_the_weights_stay_float32() -> None:
    learner, dtypes = Learner(setting(), 0, images(), "cpu", "bfloat16", compiled=False), []
    learner.model.conv.register_forward_hook(lambda conv, x, out: dtypes.append(out.dtype))
    learner.step(images(16).images, torch.eye(4)[images(16).labels], 0.1, 16)
    assert dtypes == [torch.bfloat16] and learner.model.conv.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("able", "asked", "device", "resolved"),
    [
        (True, "auto", "cpu", ("bfloat16", True)),
        (False, "auto", "cpu", ("float32", False)),
        (True, "float32", "cpu", ("float32", False)),
        (False, "bfloat16", "cpu", ("bfloat16", True)),
        (False, "auto", "cuda", ("float32", True)),
    ],
)
def test_the_machine_chooses_what_the_setting_leaves_open(
    monkeypatch: pytest.MonkeyPatch, able: bool, asked: str, device: str, resolved: tuple[str, bool]
) -> None:
    monkeypatch.setattr(study, "computes_in_bfloat16", lambda device: able)
    assert study._resolve(setting(precision=asked, compile=True), device) == resolved
    assert study._resolve(setting(precision=asked), device) == (resolved[0], False)


def test_a_finished_model_is_calibrated_on_its_validation_images(tmp_path: Path) -> None:
    result = train_run(setting(epochs=1, lr=0.01), 0, lambda part: images(), tmp_path)
    seconds = sum(row["train_seconds"] + row["validation_seconds"] for row in run_folder.read_metrics(tmp_path))
    assert result["train_minutes"] == pytest.approx(seconds / 60) and not result["stopped_early"]
    (network, config), labels = load_model(tmp_path), images().labels
    with torch.inference_mode():
        x = normalise(images().images, torch.tensor(config["mean"]), torch.tensor(config["std"]))
        (features, contrasts, _), logits = describe(network, x), network(x)
    assert config["temperature"] == pytest.approx(fit_temperature(logits, labels), rel=1e-3)
    assert 0.1 < config["temperature"] < 10  # not at an end of the search
    for label in range(4):
        middle = F.normalize(features[labels == label].mean(0), dim=0)
        assert config["class_directions"][label] == pytest.approx(middle.tolist(), abs=1e-4)
    assert config["contrast_mean"] == pytest.approx(contrasts.mean(0).tolist(), abs=1e-4)
    assert config["contrast_std"] == pytest.approx(contrasts.std(0, correction=0).tolist(), abs=1e-4)
