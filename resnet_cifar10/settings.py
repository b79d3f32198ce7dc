"""One row of the experiment table: what is trained and how. TOML in, checked rows out."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .errors import one_line, short
from .files import validated

AUGMENTATIONS = {  # each with the report's words for it
    "crop": "padding by 4 with a random 32×32 crop",
    "flip": "random horizontal flip",
    "altflip": "each image mirrored in every second epoch",
    "photo": "framing, background, focus, light, noise and compression of every second image changed as in photos",
    "cutout": "a random square erased (cutout)",
    "mixup": "pairs of images mixed (mixup)",
}
MAX_FILE_BYTES = 1_000_000
HELP = 'words need "quotation marks", true and false none; numbers have a point, not a comma; a key comes once'


class Setting(BaseModel):
    """One frozen row of the table. The default values are those of He et al. 2015, section 4.2, but for epochs and lr_decay."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=80)
    model: str = "resnet32"  # resnet<depth>, depth = 6n + 2
    width: int = Field(16, ge=8, le=256, multiple_of=8)  # channels of the first stage; the others have two and four times those
    block: Literal["post", "pre"] = "post"  # pre: normalise and activate before each convolution (He et al. 2016)
    shortcut: Literal["identity", "none"] = "identity"  # none: the plain network of He et al. 2015, figure 6
    batch_size: int = Field(128, ge=2, le=65_536)
    activation: Literal["relu", "leaky_relu", "gelu", "silu"] = "relu"
    leaky_slope: float = Field(0.1, ge=0, lt=1)
    weight_init: Literal["he_normal", "xavier_normal", "pytorch"] = "he_normal"
    optimizer: Literal["sgd", "adam", "adamw", "muon"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1)  # for Adam and AdamW: beta 1
    nesterov: bool = False
    lr: float = Field(0.1, gt=0, le=100)
    epochs: int = Field(200, ge=1, le=100_000)
    normalization: Literal["batch", "sync_batch", "layer", "group", "none"] = "batch"  # sync: over all processes of a run
    weight_decay: float = Field(1e-4, ge=0, le=1)
    augmentation: str = "crop_flip"  # "none", or parts of AUGMENTATIONS joined by "_"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    lr_decay: Literal["none", "step", "cosine", "linear"] = "none"
    lr_milestones: list[float] = Field([0.5, 0.75], min_length=1)  # "step": fractions of the run where lr falls
    lr_factor: float = Field(0.1, gt=0, lt=1)  # "step": what lr is multiplied by there
    warmup: float = Field(0.0, ge=0, lt=1)  # fraction of the run in which lr rises linearly from 0
    patience: int | None = Field(None, ge=1, le=100_000)  # epochs without a better one, after the last decay
    validation_size: int = Field(5_000, ge=0, le=10_000_000)  # training images held out, stratified
    precision: Literal["auto", "bfloat16", "float32", "float64"] = "auto"  # auto: bfloat16 where the processor computes in it
    compile: bool = True  # torch.compile, where it is faster: not in float32 on a CPU
    start_from: str | None = Field(None, min_length=1)  # a model whose weights are the first ones; None: weight_init
    seeds: list[int] = Field([0], min_length=1, exclude=True)

    @model_validator(mode="after")
    def _values_fit(self) -> Self:
        parts = self.augmentation.split("_")
        once = len(set(parts)) == len(parts) and not {"flip", "altflip"} <= set(parts)
        checks = {
            "name": (slug(self.name) and self.name.isprintable(), "a printable name with at least one of a-z, 0-9"),
            "model": (
                self.model in {f"resnet{depth}" for depth in range(8, 1203, 6)},
                "'resnet' and a depth of 6n+2: resnet8, resnet14, resnet20, resnet26, resnet32, ... resnet1202",
            ),
            "augmentation": (
                parts == ["none"] or (set(parts) <= AUGMENTATIONS.keys() and once),
                f"'none', or some of {', '.join(AUGMENTATIONS)} joined by '_' (crop_flip), one flip at most",
            ),
            "lr_milestones": (all(a < b for a, b in pairwise([0, *self.lr_milestones, 1])), "rising fractions of the run"),
            "seeds": (
                len(set(self.seeds)) == len(self.seeds) and all(0 <= s < 2**32 for s in self.seeds),
                "different whole numbers from 0 to 4294967295",
            ),
            "patience": (
                self.patience is None or (self.validation_size and self.lr_decay in ("none", "step")),
                "only with a validation_size above 0, and lr_decay 'none' or 'step' (the others fall to the end)",
            ),
            "nesterov": (
                not self.nesterov or (self.optimizer == "sgd" and self.momentum),
                "true only with optimizer 'sgd' and a momentum above 0",
            ),
        }
        for key, (right, allowed) in checks.items():
            if not right:
                raise ValueError(f"key '{key}': found {short(getattr(self, key))}; allowed: {allowed}")
        return self

    @property
    def depth(self) -> int:
        """The number of weighted layers, 6n + 2."""
        return int(self.model.removeprefix("resnet"))

    def architecture(self, classes: int) -> dict[str, Any]:
        """The arguments of the network."""
        keys = {"width", "block", "activation", "leaky_slope", "normalization", "weight_init"}
        other = {"depth": self.depth, "classes": classes, "shortcut": self.shortcut == "identity"}
        return other | self.model_dump(include=keys)


def slug(name: str) -> str:
    """Reduce a name to a-z, 0-9 and single '-', for a folder: 'Setting #2' becomes 'setting-2'."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    defaults: dict[str, Any] = {}
    setting: list[dict[str, Any]] = Field(min_length=1)


def load_settings(path: Path, only: Sequence[str] = (), **overrides: Any) -> list[Setting]:
    """Read the rows of a settings table.

    Args:
        path: A TOML file with an optional table [defaults] and one [[setting]] for each row.
        only: Names (or slugs) of the rows to keep; empty: all.
        overrides: Keys that replace what every row says; None leaves the row's own value.

    Raises:
        ValueError: With one line that names the file, the row, the key, what was found and what is allowed.

    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES:,} bytes")
        text = content.decode("utf-8-sig") + "\n"  # so that an error in the last line has its number
        values = tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"{path}: settings file cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a TOML settings file: its text is not in UTF-8") from None
    except (ValueError, RecursionError) as error:
        where, help_with = re.search(r"at line (\d+)", str(error)), ""
        if where:
            line = text.split("\n")[int(where[1]) - 1]
            help_with = f": {one_line(line)} ({HELP})"
        raise ValueError(f"{path}: not a TOML settings file: {one_line(error)}{help_with}") from None
    table = validated(_Table, values, f"{path}: only [defaults] and one [[setting]] for each row")
    given = {key: value for key, value in overrides.items() if value is not None}
    settings = [
        validated(Setting, table.defaults | row | given, f"{path}: setting {short(row.get('name', number))}")
        for number, row in enumerate(table.setting, 1)
    ]
    seen: dict[str, Setting] = {}
    for setting in settings:
        if (twin := seen.setdefault(slug(setting.name), setting)) is not setting:
            raise ValueError(
                f"{path}: key 'name': '{setting.name}' and '{twin.name}' give the same run folder "
                f"'{slug(setting.name)}'; names must differ in their letters a-z and digits"
            )
    for name in only:
        if slug(name) not in seen:
            raise ValueError(f"{path}: no setting named '{name}'; there are: {', '.join(repr(s.name) for s in settings)}")
    wanted = {slug(name) for name in only} or seen
    return [setting for key, setting in seen.items() if key in wanted]
