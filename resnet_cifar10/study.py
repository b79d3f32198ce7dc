"""Settings x seeds: run what is not done yet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .export import export
from .settings import Setting
from .storage import locked
from .train import train


def study(settings: Sequence[Setting], seeds: Sequence[int], data: str | Path, out: Path, device: str) -> None:
    """Train every setting with each of the seeds (none given: the setting's own); what is done is skipped.

    Raises:
        ValueError: If the input is wrong.

    """
    runs = [(setting, seed, out / setting.slug / f"seed-{seed}") for setting in settings for seed in seeds or setting.seeds]
    for number, (setting, seed, folder) in enumerate(runs, 1):
        head = f"run {number} of {len(runs)}: {setting.name}, seed {seed}"
        if (folder / "model" / "model.onnx").exists():
            print(f"{head} is done: {folder}", flush=True)
            continue
        print(f"{head}: {folder}", flush=True)
        with locked(folder):
            if not (folder / "result.json").exists():
                train(setting, seed, data, folder, device)
            export(folder / "model", folder / "model" / "model.onnx")
