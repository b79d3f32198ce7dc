"""Settings x seeds: run what is not done yet, each into its run folder."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from statistics import median_low
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch import distributed as dist

from .data import Split, hold_out
from .errors import Interrupted, JobFailed, one_line
from .evaluate import Forward, evaluate, predict
from .files import read_json, validated, write_json
from .finish import finish
from .machine import computes_in_bfloat16, environment, has_compiler, pick_device
from .model import ResNet, parameter_count
from .processes import from_first, joined_processes, of_all
from .progress import progress
from .run_folder import FAILED, check_room, has_checkpoint, locked, note_failure, resume, save, save_best
from .settings import Setting, slug
from .signals import signals
from .sources import load
from .storage import Tensors, load_model
from .train import Learner, train

PROGRESS_IMAGES = 2_500  # images between two looks at the progress of an evaluation
Reader = Callable[[str], Split | None]
Task = tuple[Setting, int, Path]  # a setting, a seed and their folder


def study(settings: Sequence[Setting], data: str | Path, out: Path, device: str = "auto", framework: str = "pytorch") -> None:
    """Train every setting with each of its seeds; what is done is skipped.

    Under torchrun each process calls this; the first one alone writes and prints. Call it in the main thread, for it answers
    signals, and in a script below `if __name__ == "__main__":`, for processes that decode pictures import that.

    Raises:
        ValueError: If settings, data, device and output folder do not fit together, before anything is written; or what an
            earlier start wrote is damaged.
        JobFailed: If a run failed, after all the others have ended; or at once, if another process has ended.
        Interrupted: After Ctrl-C or SIGTERM.

    """
    device = pick_device("cpu" if (framework, device) == ("tensorflow", "auto") else device)
    read = cache(partial(load, data, processes=os.cpu_count() or 1))
    runs = run_folders(settings, out)
    for setting in settings:
        backend(framework).resolve(setting, device)
    with joined_processes(device) as rank:
        print(f"reading {data}")
        if rank == 0:
            claim(runs, read, framework)
        failed: list[str] = []
        in_work: list[str] = []
        queue = list(enumerate(runs, 1))
        while len(in_work) < len(queue):  # what others work on comes to the end of it: they may have ended, or died, by then
            number, (setting, seed, folder) = queue.pop(0)
            # looked up anew each time: another command may have done it; the file system of another host may be late
            is_done = from_first((folder / "result.json").exists())
            what = f"{setting.name}, seed {seed}: {'is done: ' if is_done else ''}{folder}"
            print(f"run {number} of {len(runs)}: {what}")
            if is_done:
                continue
            others = [other for _, (other, _, place) in queue if not (place / "result.json").exists()]
            later = sum(other.epochs * _relative_cost(other) for other in others)
            with locked(folder) if rank == 0 else nullcontext() as other:
                if other := from_first(other):
                    queue.append((number, (setting, seed, folder)))
                    in_work.append(f"{setting.name}, seed {seed}: {other} is working on it")
                    print(in_work[-1])
                    continue
                if from_first((folder / "result.json").exists()):
                    print(f"{setting.name}, seed {seed}: is done by now")
                    continue
                in_work = []
                try:
                    run(setting, seed, read, folder, device, rank, framework, later)
                    continue
                except JobFailed as error:
                    failed.append(str(error))
                except RuntimeError as error:  # of a GPU an OutOfMemoryError, of a CPU no more than this
                    memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
                    if not memory or dist.is_initialized():  # the others wait for this process in the middle of a step
                        raise
                    failed.append(f"{setting.name}, seed {seed}: {one_line(error)}; a smaller batch_size or width helps")
                print(f"failed: {failed[-1]}")
                if rank == 0:
                    note_failure(folder, failed[-1])
    if failed and rank == 0:  # as soon as another process fails, torchrun ends this one, which may still be exporting
        raise JobFailed(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}")
    if in_work and rank == 0:
        raise JobFailed(f"{len(in_work)} of {len(runs)} runs are left to others: {'; '.join(in_work)}")


def run_folders(settings: Sequence[Setting], out: Path) -> list[Task]:
    """Name the folder of every setting with each of its seeds."""
    return [(setting, seed, out / slug(setting.name) / f"seed-{seed}") for setting in settings for seed in setting.seeds]


def backend(framework: str) -> Any:
    """Choose by name, "pytorch" or "tensorflow", all that depends on the framework: resolve, Learner, forward, VERSIONS."""
    if framework == "tensorflow":
        from . import tensorflow_twin as twin

        return twin
    if framework != "pytorch":
        raise ValueError(f"framework: found {framework!r}; allowed: pytorch, tensorflow")
    return SimpleNamespace(resolve=_resolve, Learner=Learner, forward=lambda network, _: network, VERSIONS={})


def _resolve(setting: Setting, device: str) -> tuple[str, bool]:
    """Say what a setting leaves to the machine; float32 on a CPU gains nothing sure by compiling (benchmarks/README.md)."""
    automatic = "bfloat16" if computes_in_bfloat16(device) else "float32"
    precision = automatic if setting.precision == "auto" else setting.precision
    return precision, setting.compile and (device != "cpu" or precision == "bfloat16")


def run(
    setting: Setting,
    seed: int,
    read: Reader,
    folder: Path,
    device: str = "cpu",
    rank: int = 0,
    framework: str = "pytorch",
    later: int = 0,
) -> dict[str, Any]:
    """Train one setting with one seed in the folder that `claim` prepared; the test split is classified once, at the end.

    `read` gives the splits "train", "val" and "test", or None. `later` is what other runs still have to do, in epochs x depth x
    width; it is told as time.

    Returns:
        The content of result.json, whose presence means done; {} where the rank is not 0.

    Raises:
        ValueError: If setting and data do not fit together, or the folder holds something damaged.
        JobFailed: If the loss, or a logit of the trained network, is not finite.
        Interrupted: After Ctrl-C or SIGTERM.

    """
    chosen = backend(framework)
    precision, compiled = chosen.resolve(setting, device)
    if compiled and not has_compiler():
        compiled = False
        print("no C++ compiler with Python's headers (g++, python3-dev): the training step is not compiled, but slower")
    training, validation = split_data(setting, seed, read)
    initial_weights = _initial_weights(setting, seed, folder, training, read)
    facts = environment(device) | chosen.VERSIONS
    facts |= {
        "precision": precision,
        "compiled": compiled,
        "data": training.source,
        "training_sha256": training.sha256,
        "training_images": len(training),
        "validation_images": len(validation),
    }
    facts = of_all(facts)
    rows, checkpoint, messages = from_first(resume(folder, facts) if rank == 0 else None)
    if rank == 0:
        (folder / FAILED).unlink(missing_ok=True)
        if checkpoint is None:
            write_json(folder / "signals.json", signals(setting, seed, training, initial_weights))
    name, world_size = f"{setting.name}, seed {seed}", facts["world_size"]
    for message in messages:
        print(f"{name}: {message}")
    first = f", first weights of {setting.start_from}" if setting.start_from else ""
    print(
        f"{name}: {setting.model}{first}; "
        f"{training.source}: {len(training):,} training and {len(validation):,} validation images; "
        f"{framework}, {device}, {precision}{f', {world_size} processes' if world_size > 1 else ''}"
        f"{', compiled (the first time takes a minute)' if compiled else ''}"
        f"{f'; goes on after epoch {len(rows)}' if rows else ''}"
    )

    with stop_requests() as received:

        def watch(source: Iterator[Any], epoch: int, steps: int) -> Iterator[Any]:
            """Show how far an epoch is (in a pipe its line tells it), and end it after a step when asked to."""
            console = Console()
            with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
                for batch in bar.track(source, steps, description=f"epoch {epoch}"):
                    yield batch
                    if received:
                        raise Interrupted(received[0])

        learner = chosen.Learner(setting, seed, training, device, precision, compiled, initial_weights)
        epochs = train(learner, setting, seed, training, validation, checkpoint, watch)
        for row, checkpoint in epochs:
            rows.append(row)
            if rank == 0:
                save(folder, rows, checkpoint)
            print(epoch_line(name, setting, rows, checkpoint.state, later))
    if received:
        raise Interrupted(received[0])
    if rank > 0:
        return {}
    save_best(folder, checkpoint)
    architecture, best_epoch = setting.architecture(len(training.classes)), checkpoint.state["best_epoch"]
    network = ResNet(**architecture)
    network.load_state_dict(checkpoint.part("best"))
    network = network.eval().to(device)
    config = {
        "architecture": architecture,
        "mean": learner.mean,
        "std": learner.std,
        "data": training.source,
        "training_sha256": facts["training_sha256"],
        "seed": seed,
        "setting": setting.model_dump(),
        "best_epoch": best_epoch,
    }
    result = {
        "setting": setting.name,
        "seed": seed,
        "parameters": parameter_count(network),
        "data": training.source,
        "epochs_run": len(rows),
        "best_epoch": best_epoch,
        "stopped_early": len(rows) < setting.epochs,
        "train_minutes": sum(row["train_seconds"] + row["validation_seconds"] for row in rows) / 60,
        **finish(folder / "model", network, config, validation, read("test"), device),
    }
    write_json(folder / "result.json", result)
    print(f"{name}: the model is in {folder / 'model'}")
    return result


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect the first Ctrl-C or SIGTERM, so that the current step ends; a second one does what it did before."""
    received: list[int] = []

    def remember(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def epoch_line(name: str, setting: Setting, rows: list[dict[str, Any]], state: dict[str, Any], later: int) -> str:
    """Say how the last epoch went and how long the others will take, and the later runs, in proportion to their size."""
    row, seconds = rows[-1], pace(rows)
    epochs = setting.epochs - row["epoch"]
    left = duration(seconds * epochs)
    left += f", of all runs {duration(seconds * (epochs + later / _relative_cost(setting)))}" if later else ""
    validation = ""
    if row["validation_accuracy"] is not None:
        best = f"best {state['best_accuracy']:.2f} at {state['best_epoch']}"
        validation = f"validation {row['validation_accuracy']:.2f} % ({best})  "
    done = f"{name}: epoch {row['epoch']}/{setting.epochs}  loss {row['train_loss']:.4f}  train {row['train_accuracy']:.2f} %"
    return f"{done}  {validation}lr {row['lr']:.4g}  {row['train_seconds'] + row['validation_seconds']:.0f} s  left {left}"


def _relative_cost(setting: Setting) -> int:
    """What the time of an epoch is about proportional to: a network of twice the width took 2.6 times as long, not four."""
    return setting.depth * setting.width


def pace(rows: list[dict[str, Any]]) -> float:
    """Return the usual seconds of the last epochs; of two the lower ones, for a pause or compiling is no pace."""
    return median_low([row["train_seconds"] + row["validation_seconds"] for row in rows[-5:]])


def duration(seconds: float) -> str:
    """Say how long something takes."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def split_data(setting: Setting, seed: int, read: Reader) -> tuple[Split, Split]:
    """Return the training and the validation images: the source's own "val" split, or a held-out part of "train".

    Raises:
        ValueError: If the setting asks for more images than there are.

    """
    everything = read("train")
    if everything is None:
        raise ValueError("--data: found no training split; allowed: data with one, such as a folder with train/<class>/*")
    if setting.validation_size and (own := read("val")):
        training, validation = everything, own
    else:
        try:
            kept, held = hold_out(everything.labels, setting.validation_size, seed)
        except ValueError as error:
            usual = "" if "validation_size" in setting.model_fields_set else "; it is the usual value, for the table says none"
            raise ValueError(f"setting '{setting.name}': {error}{usual}") from None
        training, validation = everything.subset(kept), everything.subset(held)
    if setting.batch_size > len(training):
        raise ValueError(
            f"setting '{setting.name}': key 'batch_size': found {setting.batch_size}; "
            f"allowed: at most the {len(training)} training images"
        )
    last_batch = len(training) % setting.batch_size or setting.batch_size
    if dist.is_initialized() and last_batch < dist.get_world_size():
        raise ValueError(
            f"setting '{setting.name}': key 'batch_size': found {setting.batch_size}, with a last batch of "
            f"{last_batch}; allowed: an image there for each of {dist.get_world_size()} processes"
        )
    return training, validation


def _initial_weights(setting: Setting, seed: int, folder: Path, training: Split, read: Reader) -> Tensors | None:
    """Take the weights of another model, if it has not learned from images that are to validate this run.

    Its last layer is taken only where the classes are the same. None: the setting names no model, or the run has begun and
    needs it no longer.
    """
    name, where = setting.start_from, f"setting '{setting.name}': key 'start_from'"
    if name is None or has_checkpoint(folder):
        return None
    try:
        network, config = load_model(name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    same_data = config["data"].partition(" (")[0] == training.source.partition(" (")[0]  # a JPEG copy is the same
    same_images = config.get("training_sha256") == training.sha256
    if setting.validation_size and not read("val") and same_data and not same_images:
        raise ValueError(
            f"{where}: {name} was trained on other images of {config['data']} (seed {config.get('seed')}, validation_size "
            f"{config['setting'].get('validation_size')}); allowed: the same data, seed {seed} and validation_size "
            f"{setting.validation_size}; otherwise it may have learned from the validation images of this run"
        )
    wanted, there = setting.architecture(len(config["classes"])), config["architecture"]
    plain = [{key: str(value).removeprefix("sync_") for key, value in each.items()} for each in (wanted, there)]
    if wrong := [key for key in wanted if plain[0][key] != plain[1][key] and key != "weight_init"]:
        raise ValueError(
            f"{where}: {name} has the {wrong[0]} {there[wrong[0]]!r}; allowed: {wanted[wrong[0]]!r}, as the setting says"
        )
    same_classes = config["classes"] == list(training.classes)
    return {key: value for key, value in network.state_dict().items() if same_classes or not key.startswith("linear.")}


def claim(runs: Sequence[Task], read: Reader, framework: str = "pytorch") -> None:
    """Make sure that every folder is free or holds this very run, then write into each what it is to hold.

    Raises:
        ValueError: Before anything is written.

    """
    claims = []
    for setting, seed, folder in runs:
        training, validation = split_data(setting, seed, read)
        digests = {"training_sha256": training.sha256, "validation_sha256": validation.sha256}
        content = {"setting": setting.model_dump(), "seed": seed, "framework": framework, **digests}
        if (folder / "setting.json").exists():
            _check_claim(folder, content)
        elif folder.is_dir() and (foreign := [entry.name for entry in folder.iterdir() if entry.name[0] != "."]):
            raise ValueError(
                f"{folder}: found {foreign[0]} and no setting.json; allowed: an empty folder or a run of this table"
            )
        if not (folder / "result.json").exists():
            check_room(folder, parameter_count(ResNet(**setting.architecture(len(training.classes)))))
            _initial_weights(setting, seed, folder, training, read)  # what is wrong with the model is found now
        claims.append((folder, content))
    read("test")  # what is wrong with it is found now, not after hours
    for folder, content in claims:
        if not (folder / "setting.json").exists():
            with locked(folder.parents[1], wait=True):  # of OUT: the run's own would be waited for as long as it is trained
                if not (folder / "setting.json").exists():
                    write_json(folder / "setting.json", content)
        _check_claim(folder, content)  # another process may have been quicker


def _check_claim(folder: Path, content: dict[str, Any]) -> None:
    """Make sure that the folder holds this very run."""
    found = read_json(folder / "setting.json", ["setting"])
    then = validated(Setting, found["setting"], f"{folder / 'setting.json'}: damaged")  # younger keys: their usual values
    before, now = then.model_dump() | found, content["setting"] | content
    if differ := [
        f"other {key.removesuffix('_sha256')} images"
        if key.endswith("_sha256")
        else f"{key} was {before.get(key)!r}, is {now[key]!r}"
        for key in now
        if key != "setting" and before.get(key) != now[key]
    ]:
        raise ValueError(f"{folder}: holds another study ({'; '.join(differ)}); choose another --out or name")


def shown_logits(compute: Forward, images: Tensor, config: dict[str, Any], title: str) -> Tensor:
    """Predict with a model's mean and std, and show how far it is."""
    parts = progress(torch.split(images, PROGRESS_IMAGES), title)
    return torch.cat([predict(compute, part, config["mean"], config["std"]) for part in parts])


def evaluate_model(model: str | Path, test: Split, framework: str = "pytorch") -> dict[str, Any]:
    """Evaluate a model folder, a finished run folder or a built-in name with its own mean, std and temperature.

    Raises:
        ValueError: If the model cannot be read, or its class names are not those of the data.

    """
    chosen = backend(framework)
    network, config = load_model(model)
    if config["classes"] != list(test.classes):
        theirs, ours = ", ".join(config["classes"]), ", ".join(test.classes)
        raise ValueError(f"{model}: found the classes {theirs}; allowed: those of the data ({ours})")
    compute = chosen.forward(network, config["architecture"])
    logits = shown_logits(compute, test.images, config, f"evaluating {len(test):,} images")
    metrics = evaluate(logits, test.labels, test.classes, config["temperature"])
    return metrics | {"model": str(model), "data": test.source, "data_sha256": test.sha256, "framework": framework}
