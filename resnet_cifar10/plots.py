"""The plots of the report, each as PNG for Markdown and as SVG for the page, whose colours follow light and dark."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .results import Row, join
from .settings import slug

INK, MUTED, GRID, PAPER = "#1c2026", "#5d6673", "#dfe3e8", "#fefefe"
# Colours apart for the colour-blind (after Okabe & Ito), dashes apart in grey print.
LINES: list[tuple[str, Any]] = [("#0b66a8", "-"), ("#c4490c", (0, (5, 1.5))), ("#00805c", (0, (1.5, 1))),
                                ("#9c4480", (0, (6, 1.5, 1.5, 1.5))), ("#8a6a00", (0, (4, 1, 1, 1, 1, 1))),
                                ("#3f4752", (0, (9, 2)))]  # fmt: skip
SHADES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper", **{line[0]: f"line{i}" for i, line in enumerate(LINES)}}

TICKS = (-50, -20, -10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50)  # points


@dataclass(frozen=True)
class Picture:
    """A picture in both forms: `file` with `content` beside the Markdown, `inline` inside the page."""

    file: str
    alt: str
    content: bytes
    inline: str


def draw(name: str, alt: str, size: tuple[float, float], paint: Callable[[Any], None]) -> Picture:
    """Paint on a Matplotlib figure of this size in inches; equal input gives equal bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "text.color": INK, "font.size": 9,
        "axes.edgecolor": GRID, "axes.labelcolor": MUTED, "axes.titlecolor": MUTED, "axes.titlesize": 9, "axes.grid": True,
        "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "grid.color": GRID,
        "grid.linewidth": 0.6, "xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED, "lines.linewidth": 1.4,
    }  # fmt: skip
    png, svg = io.BytesIO(), io.StringIO()
    with matplotlib.rc_context(style):
        figure = Figure(size, layout="constrained")
        paint(figure)
        figure.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    # Inside HTML a drawing needs no name spaces; size, font and colours (light or dark) are the page's.
    opening, body = svg.getvalue().split("<svg", 1)[1].split(">", 1)
    body = re.sub(r'<metadata>.*?</metadata>|<style.*?</style>|(?<=<g) id="[^"]*"', "", body, flags=re.DOTALL)
    for colour, shade in SHADES.items():
        body = body.replace(colour, f"var(--{shade})")
    box = opening.split('viewBox="')[1].split('"')[0]
    return Picture(f"plots/{name}.png", alt, png.getvalue(), f'<svg viewBox="{box}" aria-hidden="true">{body}')


def raster(file: str, alt: str, image: Image.Image) -> Picture:
    """Make a picture of pixels, of the format that the file's name asks for."""
    content, kind = io.BytesIO(), "jpeg" if file.endswith(".jpg") else "png"
    image.save(content, kind, quality=88)
    inline = f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
    return Picture(file, alt, content.getvalue(), inline)


def line_of(number: int) -> tuple[str, Any]:
    """Colour and dashes of a line; the colours come again with other dashes."""
    again, place = divmod(number, len(LINES))
    return LINES[place][0], LINES[(place + again) % len(LINES)][1]


def plot_curves(axes: Any, curves: np.ndarray[Any, Any], line: tuple[str, Any]) -> None:
    """Plot the mean of [runs, epochs] and, from two runs on, the band from the lowest to the highest."""
    epochs = np.arange(1, curves.shape[1] + 1)
    axes.plot(epochs, curves.mean(0), color=line[0], linestyle=line[1], marker="o" if len(epochs) == 1 else None)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(curves) > 1:
        axes.fill_between(epochs, curves.min(0), curves.max(0), color=line[0], alpha=0.18, linewidth=0)


def label_ends(axes: Any, ends: Sequence[tuple[float, str, tuple[str, Any]]]) -> None:
    """Write (height, text, line) at the right of the axes, moved apart where they would overlap."""
    axes.get_ylim()  # settles the limits
    step = 0.21 / axes.figure.get_size_inches()[1]  # a line of text, as a share of the axes
    place = -math.inf
    ends = sorted((end for end in ends if math.isfinite(end[0])), key=lambda end: end[:2])
    for i, (height, text, (colour, dashes)) in enumerate(ends):
        wanted = min(max(axes.transLimits.transform(axes.transScale.transform((1, height)))[1], 0), 1)
        place = max(place + step, min(wanted, 1 - step * (len(ends) - 1 - i)), 0)
        line = {"arrowstyle": "-", "color": colour, "linestyle": dashes, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)}
        axes.annotate(text, (1, wanted), (1.12, place), xycoords="axes fraction", color=colour, va="center", arrowprops=line)


def shortened(name: str) -> str:
    """Cut a name that is too long for a plot."""
    return name if len(name) <= 32 else f"{name[:31]}…"


def plot_all(rows: Sequence[Row], *, enlarged: bool) -> Picture:
    """Plot the validation accuracy of all settings: the whole range, or the top of it enlarged."""
    title = "the top, enlarged" if enlarged else "the whole range"
    highest = [float(row.curves("validation_accuracy").mean(0).max()) for row in rows]
    top = max(float(row.curves("validation_accuracy").max()) for row in rows)

    def paint(figure: Any) -> None:
        axes, ends = figure.subplots(), []
        for row in rows:
            curves, line = row.curves("validation_accuracy"), line_of(row.number)
            plot_curves(axes, curves if len(rows) <= len(LINES) else curves.mean(0)[None], line)  # many bands hide each other
            end, name = float(curves.mean(0)[-1]), shortened(row.name)
            ends.append((end, f"{name} {end:.1f}" + ("" if row.done else " (unfinished)"), line))
        if enlarged:
            bottom = min(highest) - 3
            first = min(int((row.curves("validation_accuracy").mean(0) >= bottom).argmax()) for row in rows)
            axes.set(xlim=(max(0, first - 1), None), ylim=(bottom, top + 0.5))
        axes.set_title(title, loc="left")
        axes.set(xlabel="epoch", ylabel="validation accuracy (%)")
        label_ends(axes, ends)

    reached = join([f"{row.name} {value:.1f} %" for row, value in zip(rows, highest, strict=True)])
    alt = f"Validation accuracy by epoch, {title}; highest: {reached}"
    return draw("all-settings-top" if enlarged else "all-settings", alt, (4.6, 3.1), paint)


def plot_one(row: Row) -> Picture:
    """Plot training and validation accuracy of one setting, the kept epochs and, below, the learning rate."""
    colour, _ = line_of(row.number)
    dotted = (MUTED, (0, (1.5, 1)))

    def paint(figure: Any) -> None:
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
        train, validation, lr = (row.curves(key) for key in ("train_accuracy", "validation_accuracy", "lr"))
        plot_curves(axes, train, dotted)
        plot_curves(axes, validation, (colour, "-"))
        for run in row.done:
            epoch = run.result["best_epoch"]
            axes.plot(epoch, run.curve("validation_accuracy")[epoch - 1], "o", color=colour, markeredgecolor=PAPER)
        axes.set(ylabel="accuracy (%)", ylim=(max(0, axes.get_ylim()[0] - 3), 101))
        label_ends(axes, [(train.mean(0)[-1], "training", dotted), (validation.mean(0)[-1], "validation", (colour, "-"))])
        plot_curves(below, lr[:1], (MUTED, "-"))
        below.set(xlabel="epoch", ylabel="lr", ylim=(0, 1.15 * row.setting.lr), yticks=[0, row.setting.lr])

    alt = f"{row.name}: training and validation accuracy by epoch, the learning rate below"
    return draw(f"{row.number + 1}-{slug(row.name)}", alt, (3.7, 2.7), paint)


def plot_differences(baseline: Row, rows: Sequence[tuple[Row, float, float, float]]) -> Picture:
    """Plot what each row gained over the baseline: (row, difference, low, high) in points, sorted, with 95 % intervals.

    The axis is linear within two points of zero and logarithmic beyond, so that small and large differences can be read.
    """

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.set_xscale("symlog", linthresh=2)
        for i, (_, difference, low, high) in enumerate(rows):
            colour = LINES[0][0] if low > 0 or high < 0 else MUTED
            axes.plot([low, high], [i, i], color=colour)
            axes.plot(difference, i, "o", color=colour, markersize=4)
            figures = f"{difference:+.2f} ({low:+.2f} to {high:+.2f})".replace("-", "−")
            axes.text(1.02, i, figures, color=colour, fontsize="small", va="center", transform=axes.get_yaxis_transform())
        axes.axvline(0, color=INK, linewidth=0.8)
        left, right = axes.get_xlim()
        axes.set_xticks([tick for tick in TICKS if left < tick < right])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yticks(range(len(rows)), [row.name for row, *_ in rows])
        axes.set(xlabel=f"test accuracy against {baseline.name} (points)", ylim=(-0.7, len(rows) - 0.3))

    told = join([f"{row.name} {difference:+.2f} ({low:+.2f} to {high:+.2f})" for row, difference, low, high in rows])
    alt = f"Test accuracy against {baseline.name}, in points: {told}"
    return draw("differences", alt, (8, 0.9 + 0.27 * len(rows)), paint)


def plot_signals(groups: Sequence[Sequence[Row]], *, back: bool) -> Picture:
    """Plot how large the outputs of the blocks are in the untrained networks, one of each group, or the gradients there."""
    from matplotlib.ticker import LogLocator, NullFormatter

    title = "backward: gradients, last block = 1" if back else "forward: outputs of the blocks"
    lines = []
    for first, *more in groups:
        activation, gradient = first.signals  # type: ignore[misc]
        sizes = gradient[::-1] / gradient[-1] if back else activation
        lines.append((sizes, shortened(first.name) + (f" + {len(more)} more" if more else ""), line_of(first.number)))

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for sizes, _, (colour, dashes) in lines:
            axes.plot(np.arange(len(sizes)) + (not back), sizes, color=colour, linestyle=dashes)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(title, loc="left")
        axes.set(xlabel="blocks back from the last" if back else "block", ylabel="root mean square")
        label_ends(axes, [(float(sizes[-1]), name, line) for sizes, name, line in lines])

    told = join([f"{sizes[-1]:.3g} ({name})" for sizes, name, _ in lines])
    alt = f"Signals in the untrained networks, {title}; in the {'first' if back else 'last'} block: {told}"
    return draw(f"signals-{'backward' if back else 'forward'}", alt, (5.6, 3.4), paint)


def plot_confusion(metrics: dict[str, Any], split: str) -> Picture:
    """Plot how many images of each true class (rows) were taken for each class (columns)."""
    from matplotlib.patches import Rectangle

    names, counts = list(metrics["per_class"]), np.array(metrics["confusion"])
    side = min(12, max(4.4, 0.4 * len(names) + 0.8))

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(visible=False)
        for true, taken in np.argwhere(counts):
            share = counts[true, taken] / counts[true].sum()
            cell = Rectangle((taken - 0.48, true - 0.48), 0.96, 0.96, color=LINES[0][0], alpha=share**0.6, linewidth=0)
            axes.add_patch(cell)
            axes.text(taken, true, str(counts[true, taken]), ha="center", va="center", fontsize=min(8, 20 * side / len(names)),
                      color=PAPER if share > 0.4 else INK, in_layout=False)  # fmt: skip
        axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5), aspect="equal")
        axes.set(xlabel="taken for", ylabel="true class")
        size = min(9, 60 * side / len(names))
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=size)
        axes.set_yticks(range(len(names)), names, fontsize=size)

    return draw("confusion", f"Confusion matrix of {metrics['n']:,} {split} images", (side, side), paint)
