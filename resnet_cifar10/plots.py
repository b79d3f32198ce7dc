"""The plots of the report, each as PNG for Markdown and as SVG for the page, whose colours follow light and dark."""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFont

from .photo import encoded
from .results import Comparison, Row, join, signed
from .settings import slug

INK, MUTED, GRID, PAPER = "#1c2026", "#5d6673", "#dfe3e8", "#fefefe"
# Colours apart for the colour-blind (after Okabe & Ito), dashes apart in grey print.
LINES: list[tuple[str, Any]] = [
    ("#0b66a8", "-"),
    ("#c4490c", (0, (5, 1.5))),
    ("#00805c", (0, (1.5, 1))),
    ("#9c4480", (0, (6, 1.5, 1.5, 1.5))),
    ("#8a6a00", (0, (4, 1, 1, 1, 1, 1))),
    ("#3f4752", (0, (9, 2))),
]
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
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,
        "text.color": INK,
        "font.size": 9,
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "axes.titlecolor": MUTED,
        "axes.titlesize": 9,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "lines.linewidth": 1.4,
    }
    png, svg = io.BytesIO(), io.StringIO()
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a letter that the PNG cannot show; the page can
        figure = Figure(size, layout="constrained")
        paint(figure)
        figure.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
        figure.set_layout_engine("none")  # what was found for the one is right for the other too
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    # Inside HTML a drawing needs no name spaces; size, font and colours (light or dark) are the page's.
    opening, body = svg.getvalue().split("<svg", 1)[1].split(">", 1)
    body = re.sub(r'<metadata>.*?</metadata>|<style.*?</style>|(?<=<g) id="[^"]*"', "", body, flags=re.DOTALL)
    for colour, shade in SHADES.items():
        body = body.replace(colour, f"var(--{shade})")
    box = opening.split('viewBox="')[1].split('"')[0]
    return Picture(f"plots/{name}.png", alt, png.getvalue(), f'<svg viewBox="{box}" aria-hidden="true">{body}')


def font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's own font, which has the letters of most alphabets, in pixels."""
    from matplotlib.font_manager import findfont

    return ImageFont.truetype(findfont("DejaVu Sans"), size)


def raster(name: str, alt: str, image: Image.Image) -> Picture:
    """Make a picture of pixels."""
    content = encoded(image, "PNG")
    return Picture(f"plots/{name}.png", alt, content, f"data:image/png;base64,{base64.b64encode(content).decode()}")


def line_of(number: int) -> tuple[str, Any]:
    """Colour and dashes of a line; the colours come again with other dashes."""
    again, place = divmod(number, len(LINES))
    return LINES[place][0], LINES[(place + again) % len(LINES)][1]


def plot_curves(axes: Any, curves: NDArray[Any], line: tuple[str, Any], first: float = 1) -> None:
    """Plot the mean of [runs, epochs] and, from two runs on, the band from the lowest to the highest."""
    epochs = np.arange(curves.shape[1]) + first
    alone = {"marker": "o", "clip_on": False} if len(epochs) == 1 else {}
    axes.plot(epochs, curves.mean(0), color=line[0], linestyle=line[1], **alone)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if len(curves) > 1:
        axes.fill_between(epochs, curves.min(0), curves.max(0), color=line[0], alpha=0.18, linewidth=0)


def label_ends(axes: Any, ends: Sequence[tuple[float, float, str, tuple[str, Any]]]) -> None:
    """Write (x, height, text, line) at the right of the axes, moved apart where they would overlap."""
    axes.get_ylim()  # settles the limits
    step = 0.21 / axes.get_position().height / axes.figure.get_size_inches()[1]  # a line of text, as a share of the axes
    place = -math.inf
    ends = sorted((end for end in ends if math.isfinite(end[1])), key=lambda end: end[1:3])
    for i, (x, height, text, (colour, _)) in enumerate(ends):
        across, up = axes.transAxes.inverted().transform(axes.transData.transform((x, height)))
        up = min(max(up, 0), 1)
        place = max(place + step, min(up, 1 - step * (len(ends) - 1 - i)), 0)
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)}
        leader["linestyle"] = "-" if across > 0.9 else (0, (1, 3))  # else it would look like a curve
        axes.annotate(text, (across, up), (1.06, place), xycoords="axes fraction", color=colour, va="center", arrowprops=leader)


def shortened(name: str, letters: int = 32) -> str:
    """Cut a name that is too long for a plot."""
    return name if len(name) <= letters else f"{name[: letters - 1]}…"


def mark_kept(axes: Any, row: Row, colour: str) -> None:
    """Put a dot where the weights were kept, one for each seed."""
    for run in row.done:
        epoch = run.result["best_epoch"]
        axes.plot(epoch, run.curve("validation_accuracy")[epoch - 1], "o", color=colour, markeredgecolor=PAPER, markersize=5)


def reached(row: Row) -> tuple[float, str]:
    """The validation accuracy of the kept weights, of an unfinished row the last one, and the words of a plot for it."""
    value = float(np.mean(row.accuracies("validation") or row.curves("validation_accuracy")[:, -1]))
    return value, f"{shortened(row.name)} {value:.1f}" + ("" if row.done else " (not finished)")


def plot_all(rows: Sequence[Row], *, enlarged: bool) -> Picture:
    """Plot the validation accuracy of all settings: the whole range, or the top of it enlarged, where it is smoothed."""
    title = "the top, enlarged" if enlarged else "the whole range"
    told = [(row, row.curves("validation_accuracy"), line_of(row.number), *reached(row)) for row in rows]

    def paint(figure: Any) -> None:
        axes, ends, starts = figure.subplots(), [], []
        bottom = min(value for *_, value, _ in told) - 6
        for row, curves, line, _, text in told:
            mean = curves.mean(0)
            starts.append(1 + int((mean > bottom).argmax()))
            if enlarged:
                window = max(1, len(mean) // 20)
                axes.plot(np.arange(1, len(mean) + 1), mean, color=line[0], alpha=0.3, linewidth=0.7)
                smooth = [np.convolve(each, np.ones(window) / window, "valid") for each in curves]
                plot_curves(axes, np.stack(smooth), line, (window + 1) / 2)
                mean = np.mean(smooth, 0)
            else:
                plot_curves(axes, curves, line)
            mark_kept(axes, row, line[0])
            ends.append((curves.shape[1], float(mean[-1]), text, line))
        if enlarged:
            axes.set(xlim=(min(starts), None), ylim=(bottom, max(curves.max() for _, curves, *_ in told) + 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.set_title(title, loc="left")
        axes.set(xlabel="epoch", ylabel="validation accuracy (%)")
        label_ends(axes, ends)

    alt = f"Validation accuracy by epoch in percent, {title}: {join([text for *_, text in told])}"
    return draw("all-settings-top" if enlarged else "all-settings", alt, (5.4, 3.3), paint)


def plot_panels(rows: Sequence[Row], baseline: Row | None) -> Picture:
    """Plot the validation accuracy of each of many settings in a panel of its own, the baseline's in grey behind it."""
    columns = 4
    told = [(row, *reached(row)) for row in rows]

    def paint(figure: Any) -> None:
        panels = list(figure.subplots(math.ceil(len(rows) / columns), columns, sharex=True, sharey=True, squeeze=False).flat)
        for axes, (row, value, _) in zip(panels, told, strict=False):
            if baseline:
                plot_curves(axes, baseline.curves("validation_accuracy").mean(0)[None], (MUTED, "-"))
            plot_curves(axes, row.curves("validation_accuracy"), (LINES[0][0], "-"))
            axes.set_title(shortened(row.name), loc="left", fontsize=8)
            height = 0.06 if value > 25 else 0.2  # above a curve that stays below
            axes.text(0.97, height, f"{value:.1f}", color=LINES[0][0], ha="right", transform=axes.transAxes)
        for axes in panels[max(0, len(rows) - columns) : len(rows)]:
            axes.tick_params("x", labelbottom=True)
        for axes in panels[len(rows) :]:
            axes.remove()
        figure.supxlabel("epoch", color=MUTED, fontsize=9)
        figure.supylabel("validation accuracy (%)", color=MUTED, fontsize=9)

    alt = f"Validation accuracy of each setting by epoch: {join([f'{text} %' for *_, text in told])}"
    return draw("all-settings", alt, (8, 0.4 + 1.35 * math.ceil(len(rows) / columns)), paint)


def plot_one(row: Row) -> Picture:
    """Plot accuracy and loss of one setting in training and validation, the kept epochs and, below, the learning rate."""
    s, (colour, _) = row.setting, line_of(row.number)
    parts = ("train", "training", (MUTED, (0, (1.5, 1)))), ("validation", "validation", (colour, "-"))

    def paint(figure: Any) -> None:
        axes, losses, below = figure.subplots(3, 1, sharex=True, height_ratios=(5, 3, 1.3))
        for panel, what in ((axes, "accuracy"), (losses, "loss")):
            curves = [(row.curves(f"{part}_{what}"), name, line) for part, name, line in parts]
            for values, _, line in curves:
                plot_curves(panel, values, line)
            if what == "accuracy":
                mark_kept(panel, row, colour)
                panel.set(ylabel="accuracy (%)", ylim=(max(0, panel.get_ylim()[0] - 3), 101))
            else:
                panel.set(ylabel="loss", ylim=(0, None))
            label_ends(panel, [(values.shape[1], float(values.mean(0)[-1]), name, line) for values, name, line in curves])
        plot_curves(below, row.curves("lr")[:1], (MUTED, "-"))
        below.set(xlabel="epoch", ylabel="lr")
        if s.lr_decay == "step":
            below.lines[0].set_drawstyle("steps-mid")
            below.set_yscale("log")
            below.set_yticks([s.lr * s.lr_factor**falls for falls in range(1 + len(s.lr_milestones))])
            below.minorticks_off()
        else:
            below.set(ylim=(0, None), yticks=(0, s.lr))
        below.yaxis.set_major_formatter("{x:g}")

    alt = f"{row.name}: accuracy and loss in training and validation by epoch, the learning rate below"
    return draw(f"{row.number + 1}-{slug(row.name)}", alt, (3.7, 3.6), paint)


def plot_differences(baseline: Row, compared: Sequence[Comparison]) -> Picture:
    """Plot what each row gained over the baseline with its 95 % interval, the lowest first.

    The axis is linear within two points of zero and logarithmic beyond, so that small and large differences can be read.
    """
    told = [
        (each, *each.interval, f"{signed(each.gain)} ({' to '.join(map(signed, each.interval))})")
        for each in reversed(compared)
        if each.interval
    ]

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.set_xscale("symlog", linthresh=2)
        for i, (each, low, high, figures) in enumerate(told):
            colour = MUTED if each.told == "no" else LINES[0][0]
            axes.plot([low, high], [i, i], color=colour, marker="|", markersize=7)
            inside = PAPER if each.told == "by itself only" else colour
            axes.plot(each.gain, i, "o", color=colour, markersize=5, markerfacecolor=inside)
            axes.text(1.02, i, figures, color=colour, fontsize="small", va="center", transform=axes.get_yaxis_transform())
        axes.axvline(0, color=INK, linewidth=0.8)
        left, right = axes.get_xlim()
        axes.set_xticks([tick for tick in TICKS if left < tick < right])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.tick_params("x", labelsize="small")
        axes.set_yticks(range(len(told)), [shortened(each.row.name) for each, *_ in told])
        axes.set(xlabel=f"test accuracy against {shortened(baseline.name)} (points)", ylim=(-0.7, len(told) - 0.3))

    gains = join([f"{each.row.name} {figures}" for each, *_, figures in told])
    alt = f"Test accuracy against {baseline.name}, in points: {gains}"
    return draw("differences", alt, (8, 0.9 + 0.27 * len(told)), paint)


def plot_signals(groups: Sequence[Sequence[Row]], *, back: bool) -> Picture:
    """Plot how large the outputs of the blocks are in the untrained networks, one of each group, or the gradients there."""
    from matplotlib.ticker import LogLocator

    title = "backward: gradients, last block = 1" if back else "forward: outputs of the blocks"
    first = 0 if back else 1  # the number of the first block shown
    lines = []
    for number, (row, *more) in enumerate(groups):
        activation, gradient = row.signals  # type: ignore[misc]
        sizes = gradient[::-1] if back else activation
        lines.append((sizes, shortened(row.name) + (f" + {len(more)} more" if more else ""), line_of(number)))

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for sizes, _, (colour, dashes) in lines:
            axes.plot(np.arange(first, first + len(sizes)), sizes, color=colour, linestyle=dashes)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        steps = range(1, 10) if high < 10 * low else (1, 2, 3, 5) if high < 2e4 * low else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=99))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.set_title(title, loc="left")
        axes.set(xlabel="blocks back from the last" if back else "block", ylabel="root mean square")
        label_ends(axes, [(first + len(sizes) - 1, float(sizes[-1]), name, line) for sizes, name, line in lines])

    told = join([f"{sizes[-1]:.3g} ({name})" for sizes, name, _ in lines])
    alt = f"Signals in the untrained networks, {title}; in the {'first' if back else 'last'} block: {told}"
    return draw(f"signals-{'backward' if back else 'forward'}", alt, (5.6, 3.4), paint)


def plot_confusion(metrics: dict[str, Any], split: str) -> Picture:
    """Plot how many images of each true class (rows) were taken for each class (columns)."""
    from matplotlib.patches import Rectangle

    names, counts = [shortened(name, 18) for name in metrics["per_class"]], np.array(metrics["confusion"])
    side = min(12, max(4.4, 0.4 * len(names) + 0.8))
    centred = {"ha": "center", "va": "center", "in_layout": False, "fontsize": min(8, 20 * side / len(names))}

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(visible=False)
        for true, taken in np.argwhere(counts):
            share = counts[true, taken] / counts[true].sum()
            cell = Rectangle((taken - 0.48, true - 0.48), 0.96, 0.96, color=LINES[0][0], alpha=share**0.6, linewidth=0)
            axes.add_patch(cell)
            axes.text(taken, true, str(counts[true, taken]), color=PAPER if share > 0.4 else INK, **centred)
        axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5), aspect="equal")
        axes.set(xlabel="taken for", ylabel="true class")
        size = min(9, 60 * side / len(names))
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=size)
        axes.set_yticks(range(len(names)), names, fontsize=size)

    return draw("confusion", f"Confusion matrix of {metrics['n']:,} {split} images", (side, side), paint)
