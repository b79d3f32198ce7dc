"""The command line: sub-commands, options and exit statuses."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from .errors import Interrupted, JobFailed, printable
from .files import check_file, portable, write
from .progress import progress

if TYPE_CHECKING:
    from .data import Split

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="ResNets for small images: train a table of settings, evaluate, report, classify photos.",
)

MODEL_HELP = "A model folder, a finished run folder or a built-in name (resnet32)."
DATA_HELP = "A folder, cifar-10-python.tar.gz, or 'digits'."
RAY_HELP = "Run on the Ray cluster at HOST:PORT, on this machine's (auto), or start one here (without an ADDRESS)."
Framework = Annotated[Literal["pytorch", "tensorflow"], typer.Option(help="The library that trains and evaluates.")]
EXTRAS = {  # of pyproject.toml, each with its packages by the names that are imported
    "train": ("torch", "safetensors", "simplejpeg", "pyarrow", "onnx", "onnxscript"),
    "report": ("matplotlib", "jinja2", "markdown_it", "scipy"),
    "serve": ("starlette", "uvicorn", "python_multipart"),
    "ray": ("ray",),
    "tensorflow": ("tensorflow", "keras"),
    "pytorch": (),  # comes with "train"
}
FIGURE_PHOTOS = 120  # pictures that are higher are not shown everywhere
PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"resnet-cifar10 {metadata.version('resnet-cifar10')}")


@app.command()
def train(
    settings: Annotated[Path, typer.Argument(help="A table of settings, such as settings/assignment.toml.")],
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    out: Annotated[Path, typer.Option(help="Where the run folders go: OUT/<setting>/seed-<n>/.")],
    setting: Annotated[list[str] | None, typer.Option(help="Only this setting; repeatable.", metavar="NAME")] = None,
    seed: Annotated[
        list[int] | None, typer.Option(min=0, max=2**32 - 1, help="Instead of the file's; repeatable.", metavar="N")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the file's; schedules scale.", metavar="N")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    seeds: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Seeds 0 to N-1 instead of the file's.", metavar="N")
    ] = None,
    ray: Annotated[str | None, typer.Option(help=RAY_HELP, metavar="[ADDRESS]")] = None,
    cpus: Annotated[int, typer.Option(min=1, help="With --ray: the threads of each run.", metavar="N")] = 1,
    gpus: Annotated[float | None, typer.Option(min=0, help="With --ray: the share of a GPU for each.", metavar="SHARE")] = None,
    framework: Framework = "pytorch",
) -> None:
    """Train what is not done yet; the same command again resumes and skips."""
    from .settings import load_settings

    if seeds and seed:
        raise ValueError("--seed, --seeds: found both; allowed: one of them")
    rows = load_settings(
        settings, setting or [], epochs=epochs, seeds=list(range(seeds)) if seeds else seed and list(dict.fromkeys(seed))
    )
    _need("train", framework, *(["ray"] if ray else []))
    if not ray and (cpus != 1 or gpus is not None):
        raise ValueError("--cpus, --gpus: found without --ray; allowed: together with it")
    if ray and framework != "pytorch":
        raise ValueError(f"--framework: found {framework!r}; allowed with --ray: pytorch")
    if ray:
        from .cluster import study_on_ray

        study_on_ray(rows, data, out, device, ray, cpus, gpus)
    else:
        from .machine import keep_memory
        from .study import study

        keep_memory()
        study(rows, data, out, device, framework)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    framework: Framework = "pytorch",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Evaluate a model on the test split of a data set."""
    _need("train", framework)
    from .study import evaluate_model

    metrics = evaluate_model(model, _test_images(data), framework=framework)
    if as_json:
        print(json.dumps(metrics))
        return
    low, high = metrics["interval_95"]
    print(f"{model} on {metrics['data']}, {metrics['n']:,} test images")
    print(f"accuracy           {metrics['accuracy']:.2f} %  (95 % interval {low:.2f} to {high:.2f})")
    print(f"top-2 accuracy     {metrics['top2_accuracy']:.2f} %")
    scaled = f"at temperature {metrics['temperature']:.2f}"
    for key, name, unit in (("negative_log_likelihood", "log-loss", "nats"), ("calibration_error", "calibration error", "%")):
        print(f"{name:<18} {metrics[key]:.3f} {unit}, {scaled} {metrics[key + '_scaled']:.3f} {unit}")
    print(f"{'class':<18} {'precision':>9} {'recall':>9} {'images':>7}")
    for name, row in metrics["per_class"].items():
        precision, recall = ("–" if row[key] is None else f"{row[key]:.2f} %" for key in ("precision", "recall"))
        print(f"{name:<18} {precision:>9} {recall:>9} {row['n']:>7,}")


@app.command()
def infer(
    photo: Annotated[list[str], typer.Argument(metavar="photo", help="Photos, folders of photos, or '-' for standard input.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "resnet32",
    figure: Annotated[Path | None, typer.Option(help="Draw the photos, their labels and where it looked (PNG).")] = None,
    explain: Annotated[Path | None, typer.Option(help="Draw where it looked, over the one photo (PNG).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Classify photos; needs no PyTorch."""
    from .infer import Classifier
    from .photo import MAX_BYTES, encoded, read_photo, views

    names = _photos(photo)
    taken = {os.path.realpath(name) for name in names}
    for file in filter(None, (figure, explain)):
        check_file(file, ".png")
        if os.path.realpath(file) in taken:
            raise ValueError(f"--figure, --explain: found {printable(str(file))} twice; allowed: a file that is nothing else")
        taken.add(os.path.realpath(file))
    if figure and len(names) > FIGURE_PHOTOS:
        raise ValueError(f"--figure: found {len(names)} photos; allowed: at most {FIGURE_PHOTOS}")
    if explain and len(names) > 1:
        raise ValueError(f"--explain: found {len(names)} photos; allowed: one (--figure draws several)")
    classifier = Classifier(model)
    answers, pictures = [], []
    for name in progress(names, "photos") if as_json else names:  # else each photo's line tells it
        try:
            given = sys.stdin.buffer.read(MAX_BYTES + 1) if name == "-" and sys.stdin else b""  # None: closed by the shell
            image = read_photo(BytesIO(given) if name == "-" else name)
        except ValueError as error:  # the other photos still count
            print(f"error: {printable(str(error))}", file=sys.stderr)
            continue
        prediction = classifier.classify(views(image))
        answers.append({"file": name, **asdict(prediction)})
        if not as_json:
            print(printable(f"{name}: {prediction}"))
        if figure or explain:
            from .explain import activation, heat_map

            heat = heat_map(image, activation(classifier, image, prediction.label))
            if figure:
                from .figure import entry
                from .figure import figure as draw

                pictures.append(entry(portable(name), image, heat, prediction))
    if as_json:
        print(json.dumps(answers))
    if explain and answers:
        write(explain, encoded(heat, "PNG"))
    if figure and pictures:
        write(figure, encoded(draw(pictures), "PNG"))
    if len(answers) < len(names):
        raise typer.Exit(2)


def _photos(arguments: list[str]) -> list[str]:
    names: list[str] = []
    for argument in arguments:
        inside = [argument]
        if os.path.isdir(argument):  # unlike Path, os.path takes names that no disk does
            seen = sorted(file for file in Path(argument).iterdir() if file.name[0] != ".")
            # a broken link is told, a pipe would be waited for
            files = [file for file in seen if os.path.isfile(file) or not os.path.exists(file)]
            inside = [str(file) for file in files if file.suffix.lower() in PHOTO_SUFFIXES]
            others = [file.name for file in files if file.suffix.lower() not in PHOTO_SUFFIXES]
            if inside and others:
                shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if others[3:] else "")
                print(printable(f"{argument}: left out, for they do not end like photos: {shown}"), file=sys.stderr)
        if not inside:
            raise ValueError(
                f"{argument}: holds no photo of its own, and folders in it are not looked into; "
                f"allowed: {', '.join(sorted(PHOTO_SUFFIXES))}"
            )
        names += inside
    return names


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that 'train --out' wrote.")],
    out: Annotated[Path, typer.Option(help="Where report.html, report.md and the plots go.")],
    photo: Annotated[
        list[str] | None, typer.Option(help="A photo to classify, or a folder of photos; repeatable.", metavar="PHOTO")
    ] = None,
    photo_model: Annotated[str | None, typer.Option(help=f"{MODEL_HELP} Default: the best run.")] = None,
    words: Annotated[Path | None, typer.Option(help="A Markdown file for 'Why'; '# ...' above it is the title.")] = None,
    baseline: Annotated[str | None, typer.Option(help="The setting that the others are compared with.")] = None,
    goal: Annotated[float | None, typer.Option(min=0, max=100, help="The test accuracy in percent that was asked for.")] = None,
    archive: Annotated[Path | None, typer.Option("--zip", help="Pack code and report, such as StudentID_Name.zip.")] = None,
) -> None:
    """Write the report of finished and unfinished runs."""
    _need("train", "report")
    from .report import pack
    from .report import report as write_report

    if archive:
        check_file(archive, ".zip")
    photos = [Path(name) for name in _photos(photo or [])]
    if len(photos) > FIGURE_PHOTOS:
        raise ValueError(f"--photo: found {len(photos)} photos; allowed: at most {FIGURE_PHOTOS}")
    print(f"report: {write_report(runs, out, photos, photo_model, words, baseline, goal)}")
    if archive:
        pack(archive, out, Path(__file__).resolve().parent.parent)
        print(f"packed: {archive}")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    out: Annotated[Path, typer.Option(help="The ONNX file.", dir_okay=False)],
    data: Annotated[str | None, typer.Option(help=f"{DATA_HELP} Its test images instead of 256 random ones.")] = None,
) -> None:
    """Write a model as one self-contained ONNX file and compare it with PyTorch."""
    _need("train")
    from .export import export as write_onnx

    test = _test_images(data) if data else None
    difference, differing = write_onnx(model, out, test.images if test else None)
    images = f"{len(test):,} test images of {test.source}" if test else "256 random images"
    print(f"{out}: written; against PyTorch on {images}: probabilities within {difference:.1e}, other labels on {differing}")


@app.command()
def serve(
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "resnet32",
    host: Annotated[str, typer.Option(help="The address to listen on; 127.0.0.1 is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
) -> None:
    """Serve a web page that classifies photos; nothing leaves this machine."""
    _need("serve")
    from .serve import serve as serve_page

    serve_page(model, host, port)


@app.command()
def data(
    folder: Annotated[Path, typer.Argument(help="Where cifar-10-python.tar.gz goes.")],
    url: Annotated[str | None, typer.Option(help="An address of your own instead of the mirrors.")] = None,
) -> None:
    """Download CIFAR-10 (170 MB); a broken download is resumed."""
    from .download import download

    print(f"CIFAR-10: {download(folder, url)}")


def _need(*extras: str) -> None:
    for extra in extras:
        if missing := [package for package in EXTRAS[extra] if find_spec(package) is None]:
            raise ValueError(f"this command needs {', '.join(missing)}: pip install 'resnet-cifar10[{extra}]'")


def _test_images(data: str) -> Split:
    from .sources import load

    test = load(data, "test", os.cpu_count() or 1)
    if test is None:
        raise ValueError(f"{data}: has no test split; allowed: data with one, such as a folder with test/<class>/*")
    return test


def _fail(message: object, status: int) -> NoReturn:
    print(f"error: {printable(' '.join(str(message).split()))}", file=sys.stderr)
    sys.exit(status)


def main() -> None:
    """Run the command line: 0 done, 1 the job failed, 2 wrong input, 130 Ctrl-C, 143 SIGTERM."""
    interrupted: list[int] = []

    def interrupt(number: int, frame: object) -> NoReturn:
        interrupted.append(number)
        if len(interrupted) > 1:  # the first one is still ending things, or a library swallowed it
            os.write(2, b"error: stopped\n")
            os._exit(130)
        raise SystemExit(130)  # of a KeyboardInterrupt typer would make a result

    signal.signal(signal.SIGINT, interrupt)
    if sys.stderr is None:  # closed by the shell, as in "2>&-": print() would take standard output instead
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper):
        # a name that this terminal cannot show is no reason to stop; in a pipe too each line comes at once
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    if any(not argument or re.fullmatch("--[a-z-]+=", argument) for argument in sys.argv):
        _fail("found an empty argument, perhaps a variable that is not set; allowed: a value", 2)
    after = [*sys.argv[1:], "-"]  # the ADDRESS of --ray may be left out, which typer does not know
    sys.argv = ["--ray=local" if (a, b[:1]) == ("--ray", "-") else a for a, b in zip(sys.argv, after, strict=True)]
    try:
        status: Any = app(standalone_mode=False)
    except BaseException as error:
        if interrupted or isinstance(error, Interrupted):  # one line is enough
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if interrupted:  # libraries that Ctrl-C meets as they are imported raise all sorts of things
            _fail("stopped", 130)
        if isinstance(error, Interrupted):
            _fail("stopped; the same command again goes on from the last whole epoch", 128 + error.args[0])
        if isinstance(error, typer.TyperException):
            message = error.format_message().replace("Value error, ", "")  # a word of pydantic's, by which typer checks
            causes: Any = getattr(error.__cause__, "errors", list)()
            found = [repr(cause["input"]) for cause in causes]
            _fail(message + "".join(f"; found {value}" for value in found if value not in message), 2)
        if isinstance(error, ValueError | OSError | JobFailed):
            impossible = isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.EACCES)  # a path from outside
            plain = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
            _fail(plain, 2 if isinstance(error, ValueError) or impossible else 1)
        raise
    sys.exit(status if isinstance(status, int) else 0)
