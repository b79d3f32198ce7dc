"""What this machine is and can do: recorded with every run."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

# a change of these may change the bits of a run: their checksum is recorded with it
COMPUTING = ("data.py", "evaluate.py", "model.py", "muon.py", "norms.py", "photo_like.py", "tensorflow_twin.py", "train.py")
BFLOAT16 = ("avx512_bf16", "amx_bf16")  # instructions that compute in it
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


def pick_device(device: str) -> str:
    """Turn "auto" into "cuda" or "cpu".

    Raises:
        ValueError: If the device is unknown or not there.

    """
    there = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if device not in ("auto", *there):
        raise ValueError(f"--device: found {device!r}; allowed here: auto, {', '.join(there)}")
    return there[-1] if device == "auto" else device


def computes_in_bfloat16(device: str) -> bool:
    """Say whether the processor multiplies matrices of bfloat16 itself; where it does not, float32 is faster."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(torch.cpu.get_capabilities().get(feature) for feature in BFLOAT16)


def has_compiler() -> bool:
    """Say whether torch.compile finds a C++ compiler, and Python's headers, which its kernels need."""
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return bool(shutil.which(os.environ.get("CXX") or "g++")) and headers.exists()


def keep_memory() -> None:
    """Keep what a step frees for the next one; else glibc hands it back, and the system fills each page with zeros again."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_TRIM_THRESHOLD, -1)  # never
        mallopt(M_MMAP_MAX, 0)  # no large piece apart from the heap, which would end with it


def environment(device: str) -> dict[str, Any]:
    """Collect the versions and the hardware that a result was obtained with."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*\S)", cpuinfo.read_text() if cpuinfo.exists() else "")
    here = Path(__file__).parent
    code = hashlib.sha256(b"".join((here / name).read_bytes() for name in COMPUTING)).hexdigest()
    bfloat16 = [feature for feature in BFLOAT16 if torch.cpu.get_capabilities().get(feature)]
    commit = ""
    if (here.parent / ".git").exists() and shutil.which("git"):
        git = ["git", "-C", str(here), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "git_commit": commit or "unknown",
        "code_sha256": code,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "processor": model[1] if model else platform.processor(),  # of a virtual machine often no more than the maker
        "instructions": ", ".join([torch.backends.cpu.get_cpu_capability(), *bfloat16]),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
    }
