"""How the views of a photo, the rule that joins them and the score of "none of these" were chosen: tables of docs/photos.md.

Members are held-out validation images of CIFAR-10, made into photos with four kinds of background. None of the ten classes
is in the pictures that come with scikit-image, scikit-learn and matplotlib (but those left out below) and in five kinds of
synthetic pictures. Members and strangers of one and the same source are cut out of photographs: Tux Paint's stamps, which
Debian has as tuxpaint-stamps-default. Other photos (--photos, folders by class and "none") are measured, and choose nothing.

    python benchmarks/framing.py resnet32 --data data --stamps /usr/share/tuxpaint/stamps [--photos photos]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import skimage
import sklearn
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sklearn.metrics import roc_auc_score

from resnet_cifar10.data import hold_out
from resnet_cifar10.evaluate import predict
from resnet_cifar10.export import EXCESS_WEIGHT, describe
from resnet_cifar10.finish import SHORT_SIDE, framed, mirrored_tiles
from resnet_cifar10.infer import SIZE, Classifier
from resnet_cifar10.model import ResNet
from resnet_cifar10.photo import boxes, read_photo, reduced, views
from resnet_cifar10.sources import load
from resnet_cifar10.storage import load_model

Array = np.ndarray[Any, np.dtype[Any]]
MEMBERS = 1000  # of the held-out images
REAL = {
    "coffee.png",
    "camera.png",
    "clock_motion.png",
    "astronaut.png",
    "motorcycle_left.png",
    "moon.png",
    "rocket.jpg",
    "coins.png",
    "flower.jpg",
    "china.jpg",
    "grace_hopper.jpg",
}
TEXTURES = {
    "brick.png",
    "cell.png",
    "chessboard_RGB.png",
    "color.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "logo.png",
    "logo2.png",
    "microaneurysms.png",
    "page.png",
    "retina.jpg",
    "text.png",
}

STAMPS = {
    "bird": ["animals/birds/*"],
    "frog": ["animals/amphibians/*"],
    "horse": ["animals/mammals/equines/horse"],
    "deer": ["animals/mammals/deer/*"],
    "dog": ["animals/mammals/dogs/d*"],
    "automobile": ["vehicles/auto/s*"],
    "truck": ["vehicles/garbagetruck", "vehicles/emergency/firetruck", "vehicles/auto/truck"],
    "airplane": ["vehicles/flight/planes/747", "military/vehicles/f22_raptor"],
    "ship": ["vehicles/ship/*"],
    "plants": ["food/fruit/*", "food/vegetables/*", "food/nuts/*", "plants/flowers/*", "plants/mushrooms/*"],
    "things": ["household/*", "household/tools/*", "household/dishes/*", "hobbies/music/string/*", "sports/*", "town/*"],
    "animals": ["animals/fish/*", "animals/insects/*", "animals/shellfish/*", "animals/mammals/*"]
    + [f"animals/mammals/{kind}/*" for kind in ("rodents", "bovines", "apes", "aquatic")],
}
NO_STAMPS = {"hedgehog", "rubberduck", "rugby_goal_posts"}  # a drawing, nearly a bird, hardly anything
STAMP_SCENES = 6  # of each


def candidates(width: int, height: int) -> dict[str, tuple[float, float, float, float]]:
    """Name the boxes that could be views: the whole, three squares, and closer ones of both."""
    short = min(width, height)

    def centred(w: float, h: float) -> tuple[float, float, float, float]:
        return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2

    found = {
        "whole": centred(width, height),
        "square": centred(short, short),
        "first": (0.0, 0.0, float(short), float(short)),
        "last": (width - short, height - short, float(width), float(height)),
    }
    found |= {f"whole {share} %": centred(share / 100 * width, share / 100 * height) for share in (85, 70)}
    return found | {f"square {share} %": centred(share / 100 * short, share / 100 * short) for share in (85, 75, 60)}


def backgrounds(images: Array, rng: np.random.Generator) -> dict[str, Callable[[Array], Image.Image | None]]:
    """Name the backgrounds of a member: own colours, mirrored tiles of itself, corners of other images, a plain gradient."""

    def corners(_: Array) -> Image.Image:
        canvas = Image.new("RGB", (2 * SIZE, 2 * SIZE))
        for x, y in itertools.product((0, 1), repeat=2):
            other = Image.fromarray(images[rng.integers(len(images))])
            corner = other.crop((x * SIZE // 2, y * SIZE // 2, (x + 1) * SIZE // 2, (y + 1) * SIZE // 2))
            canvas.paste(corner.resize((SIZE, SIZE), Image.Resampling.BICUBIC), (x * SIZE, y * SIZE))
        return canvas.filter(ImageFilter.GaussianBlur(1))

    def gradient(_: Array) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (2, 1, 3), np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)

    return {"own colours": lambda _: None, "gradient": gradient, "corners of others": corners, "mirrored": mirrored_tiles}


def crops(picture: Image.Image, count: int, rng: np.random.Generator) -> list[Image.Image]:
    """Cut photo-shaped parts out of a picture, 45 to 100 % as large as fit."""
    found = []
    for _ in range(count):
        shape = rng.permuted([1.0, rng.choice([1, 4 / 3, 3 / 2, 16 / 9])])
        width, height = shape * rng.uniform(0.45, 1) * min(picture.size / shape)
        x, y = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
        size = (round(SHORT_SIDE * shape[0]), round(SHORT_SIDE * shape[1]))
        found.append(picture.resize(size, Image.Resampling.BOX, box=(x, y, x + width, y + height)))
    return found


def strangers(images: Array, rng: np.random.Generator) -> dict[str, list[Image.Image]]:
    """Collect pictures of nothing in the ten classes: photos, textures and text, synthetic ones."""
    folders = (
        Path(skimage.data_dir),
        Path(sklearn.__file__).parent / "datasets/images",
        Path(matplotlib.get_data_path()) / "sample_data",
    )
    files = sorted(file for folder in folders for file in folder.iterdir())
    found = {
        kind: [crop for file in files if file.name in names for crop in crops(read_photo(file), 12, rng)]
        for kind, names in (("photos", REAL), ("textures", TEXTURES))
    }
    synthetic = found["synthetic"] = []
    kinds = backgrounds(images, rng)
    for image in images[rng.permutation(len(images))[:40]]:
        blocks = image.reshape(4, 8, 4, 8, 3).swapaxes(1, 2).reshape(16, 8, 8, 3)[rng.permutation(16)]
        synthetic.append(framed(blocks.reshape(4, 4, 8, 8, 3).swapaxes(1, 2).reshape(SIZE, SIZE, 3), rng))
        blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(4))
        noise = Image.fromarray(rng.integers(0, 256, (*rng.integers(2, 24, 2), 3), np.uint8))
        for scene in (kinds["corners of others"](image), kinds["gradient"](image), blurred, noise):
            assert scene
            synthetic.append(scene.resize((round(SHORT_SIDE * 4 / 3), SHORT_SIDE), Image.Resampling.BICUBIC))
        page = Image.new("RGB", (160, SHORT_SIDE), "white")
        font = ImageFont.load_default(int(rng.integers(8, 40)))
        for y in range(0, SHORT_SIDE, int(1.2 * font.size)):
            ImageDraw.Draw(page).text((4, y), " ".join(rng.choice(__doc__.split(), 6)), "black", font)
        synthetic.append(page)
    return found


def stamps(folder: Path, images: Array, rng: np.random.Generator) -> dict[str, list[Image.Image]]:
    """Paste cut-out photographs into scenes; they fill 60 to 100 % of what fits."""
    kinds = backgrounds(images, rng)
    kinds["blurred"] = lambda image: Image.fromarray(image).filter(ImageFilter.GaussianBlur(3))
    behind = [kinds[name] for name in ("gradient", "corners of others", "blurred")]

    def scene(file: Path) -> Image.Image:
        stamp = Image.open(file).convert("RGBA")
        stamp = stamp.crop(stamp.getbbox())
        shape = rng.permuted([1.0, rng.choice([1, 4 / 3, 3 / 2, 16 / 9])])
        width, height = (1.5 * SHORT_SIDE * shape).round().astype(int).tolist()
        made = behind[rng.integers(len(behind))](images[rng.integers(len(images))])
        assert made
        photo = made.resize((width, height), Image.Resampling.BICUBIC)
        scale = rng.uniform(0.6, 1) * min(width / stamp.width, height / stamp.height)
        stamp = stamp.resize((round(stamp.width * scale), round(stamp.height * scale)), Image.Resampling.LANCZOS)
        left, top = ((np.array(photo.size) - stamp.size) * rng.triangular(0, 0.5, 1, 2)).round().astype(int).tolist()
        photo.paste(stamp, (left, top), stamp)
        return photo

    def usable(file: Path) -> bool:
        stem = file.stem
        return not (stem in NO_STAMPS or stem.endswith(("_mirror", "_flip"))) and min(Image.open(file).size) >= 60

    files = {
        kind: [file for part in parts for file in sorted(folder.glob(f"{part}.png")) if usable(file)]
        for kind, parts in STAMPS.items()
    }
    return {kind: [scene(file) for file in found for _ in range(STAMP_SCENES)] for kind, found in files.items()}


def look(model: ResNet, config: dict[str, Any], images: Array) -> tuple[Array, Array, Array]:
    """Map images [N, 32, 32, 3] to logits [N, classes], features [N, 64] and contrasts [N, 32]."""
    pictures, both = torch.from_numpy(images), lambda x: torch.cat(describe(model, x)[:2], 1)
    features, contrasts = predict(both, pictures, config["mean"], config["std"]).tensor_split([model.widths[2]], 1)
    with torch.inference_mode():
        return model.linear(features).numpy(), features.numpy(), contrasts.numpy()


def softmax(logits: Array) -> Array:
    """Map logits [..., classes] to probabilities."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def weighted(p: Array) -> Array:
    """Average the views' probabilities [N, V, classes], each weighed with the square of its highest one."""
    weights = p.max(2, keepdims=True) ** 2
    return (weights * p).sum(1) / weights.sum(1)


RULES: dict[str, Callable[[Array, float], Array]] = {  # logits [N, V, classes] and temperature to [N, classes]
    "mean of probabilities": lambda z, t: softmax(z / t).mean(1),
    "mean of logits": lambda z, t: softmax(z.mean(1) / t),
    "weighted by confidence": lambda z, t: weighted(softmax(z / t)),
    "highest of the views": lambda z, t: softmax(z.max(1) / t),
}


def scores(z: Array, f: Array, c: Array, t: float, means: Array, precision: Array, usual: Array) -> dict[str, Array]:
    """Compute each rejection score of photos from logits [N, V, classes], features [N, V, 64] and contrasts [N, V, 32]."""
    p, unit = softmax(z / t), means / np.linalg.norm(means, axis=1, keepdims=True)
    offset = f[:, :, None] - means
    cosine = f @ unit.T / np.linalg.norm(f, axis=2, keepdims=True)
    nearest, weighted_cosine = cosine.max(2), (p * cosine).sum(2)
    odd = (c - usual.mean(0)) / usual.std(0)
    oddity, excess = np.linalg.norm(odd, axis=2), odd.clip(0).mean(2)
    return {
        "highest mean probability": p.mean(1).max(1),
        "mean of highest probabilities": p.max(2).mean(1),
        "entropy of the mean": (p.mean(1) * np.log(p.mean(1) + 1e-12)).sum(1),
        "agreement of views": (z.argmax(2) == p.mean(1).argmax(1)[:, None]).mean(1),
        "energy": np.log(np.exp(z).sum(2)).mean(1),
        "highest logit": z.max(2).mean(1),
        "cosine to the nearest class mean": nearest.mean(1),
        "cosines weighted with probabilities": weighted_cosine.mean(1),
        "highest probability times its cosine": (p * cosine).max(2).mean(1),
        "oddity of contrasts": -oddity.mean(1),
        "excess of contrasts": -excess.mean(1),
        "nearest cosine less 0.02 x oddity": (nearest - 0.02 * oddity).mean(1),
        **{
            f"weighted cosines less {weight} x excess": (weighted_cosine - weight * excess).mean(1)
            for weight in (EXCESS_WEIGHT / 2, EXCESS_WEIGHT, 2 * EXCESS_WEIGHT)
        },
        "distance to a class mean": -np.linalg.norm(offset, axis=3).min(2).mean(1),
        "Mahalanobis distance": -np.sqrt(np.einsum("nvcf,fg,nvcg->nvc", offset, precision, offset).min(2)).mean(1),
    }


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder, a finished run folder or a built-in name")
    parser.add_argument("--data", required=True, help="CIFAR-10, as for resnet-cifar10 train")
    parser.add_argument("--stamps", type=Path, required=True, help="the folder of Tux Paint's stamps")
    parser.add_argument("--photos", type=Path, help="folders of photos, named like the classes and 'none'")
    options = parser.parse_args()
    model, config = load_model(options.model)
    train = load(options.data, "train")
    assert train
    held = train.subset(hold_out(train.labels, config["setting"]["validation_size"], config["seed"])[1])
    rng = np.random.default_rng(0)
    images, temperature = held.images.numpy(), config["temperature"]
    chosen = rng.permutation(len(images))[:MEMBERS]
    labels, kinds = held.labels.numpy()[chosen], backgrounds(images, rng)
    kind_of = np.arange(len(chosen)) % len(kinds)
    makers = list(kinds.values())
    sets = {"members": [framed(images[i], rng, makers[k](images[i])) for i, k in zip(chosen, kind_of, strict=True)]}
    sets |= strangers(images, rng)
    cut_out = stamps(options.stamps, images, rng)
    sets["stamps"] = [photo for kind, photos in cut_out.items() if kind in held.classes for photo in photos]
    sets |= {kind: photos for kind, photos in cut_out.items() if kind not in held.classes}
    names = list(candidates(1, 1))

    def seen(photos: list[Image.Image]) -> list[Array]:
        upright = np.array([[reduced(photo, box) for box in candidates(*photo.size).values()] for photo in photos])
        both = np.stack([upright, upright[:, :, :, ::-1]], 2)  # [N, boxes, 2, 32, 32, 3]
        return [x.reshape(*both.shape[:3], -1) for x in look(model, config, both.reshape(-1, SIZE, SIZE, 3))]

    looked = {kind: seen(photos) for kind, photos in sets.items()}

    def accuracy(places: tuple[int, ...], mirrored: int, rule: str) -> float:
        z = looked["members"][0][:, places, :mirrored].reshape(len(chosen), -1, len(held.classes))
        right = RULES[rule](z, temperature).argmax(1) == labels
        return 100 * float(np.mean([right[labels == c].mean() for c in range(len(held.classes))]))

    print(f"Members: {len(chosen)} held-out images as photos. Mean over classes of the accuracy, in percent.\n")
    print(f"| views | number | {' | '.join(RULES)} |\n| --- | --- |{' --- |' * len(RULES)}")
    rows = []
    for count, mirrored in ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2), (4, 1), (5, 1), (6, 1)):
        table = [
            ([accuracy(places, mirrored, rule) for rule in RULES], places)
            for places in itertools.combinations(range(len(names)), count)
        ]
        best = sorted(table, key=lambda row: -max(row[0]))
        rows += [(values, places, mirrored) for values, places in (best if (count, mirrored) == (1, 1) else best[:2])]
    here = tuple(int(np.abs(np.array(list(candidates(4, 3).values())) - box).sum(1).argmin()) for box in boxes(4, 3))
    rows.append(([accuracy(here, 2, rule) for rule in RULES], here, 2))
    for number, (values, places, mirrored) in enumerate(rows, 1):
        text = " + ".join(names[place] for place in places) + (", mirrored" if mirrored == 2 else "")
        text = f"**{text}**" if number == len(rows) else text  # the views of the package
        print(f"| {text} | {mirrored * len(places)} | {' | '.join(f'{value:.1f}' for value in values)} |")

    _, f, usual = look(model, config, images)
    means = np.stack([f[held.labels.numpy() == c].mean(0) for c in range(len(held.classes))])
    precision = np.linalg.inv(np.cov((f - means[held.labels.numpy()]).T) + 1e-3 * np.eye(f.shape[1]))
    flat = {kind: [x[:, here].reshape(len(x), -1, x.shape[-1]) for x in each] for kind, each in looked.items()}
    found = {kind: scores(*each, temperature, means, precision, usual) for kind, each in flat.items()}
    strange = {"members": ["photos", "textures", "synthetic"], "stamps": ["plants", "things", "animals"]}
    print(f"\nAUROC; pictures: {', '.join(f'{len(photos)} {kind}' for kind, photos in sets.items())}.\n")
    print(f"| score | {' | mean | '.join(' | '.join(others) for others in strange.values())} | mean |\n| --- |{' --- |' * 8}")
    for score in found["members"]:
        cells = []
        for own, others in strange.items():
            areas = [
                roc_auc_score([1] * len(sets[own]) + [0] * len(sets[kind]), np.r_[found[own][score], found[kind][score]])
                for kind in others
            ]
            cells += [*areas, np.mean(areas)]
        print(f"| {score} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")

    classifier = Classifier(options.model)
    answers = {kind: [classifier.classify(views(photo)) for photo in photos] for kind, photos in sets.items()}
    refused = {kind: np.array([answer.rejected for answer in given]) for kind, given in answers.items()}
    print("\nRefused by the threshold of the model, in percent:\n\n| photos | refused |\n| --- | --- |")
    for k, kind in enumerate(kinds):
        print(f"| members, {kind} | {100 * refused['members'][kind_of == k].mean():.1f} |")
    for kind in sets:
        if kind != "members":
            print(f"| {kind} | {100 * refused[kind].mean():.1f} |")
    wanted = [kind for kind, photos in cut_out.items() if kind in held.classes for _ in photos]
    right = np.array([answer.label == label for answer, label in zip(answers["stamps"], wanted, strict=True)])
    print(f"\nOf {len(wanted)} members among the stamps {100 * right.mean():.1f} % are named rightly.")
    if options.photos:
        measure(classifier, options.photos)


def measure(classifier: Classifier, folder: Path) -> None:
    """Print what the model makes of real photos in folders named like the classes and "none"."""
    found = {
        name: [classifier.classify(views(read_photo(file))) for file in sorted((folder / name).iterdir())]
        for name in [*classifier.classes, "none"]
    }
    recall = {name: 100 * np.mean([answer.label == name for answer in found[name]]) for name in classifier.classes}
    memberships = [(name != "none", answer.membership) for name, answers in found.items() for answer in answers]
    refused = [answer.rejected for name, answers in found.items() if name != "none" for answer in answers]
    print(
        f"\nReal photos, which chose nothing: mean over classes {np.mean(list(recall.values())):.1f} %, AUROC of none "
        f"{roc_auc_score(*zip(*memberships, strict=True)):.3f}; of {len(refused)} members {sum(refused)} are refused, of "
        f"{len(found['none'])} others {sum(answer.rejected for answer in found['none'])}."
    )
    print(", ".join(f"{name} {value:.0f} %" for name, value in recall.items()))


if __name__ == "__main__":
    main()
