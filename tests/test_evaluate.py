"""Every metric against scikit-learn, a plain loop, or published values."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn import metrics as sk

from resnet_cifar10 import evaluate as ev
from resnet_cifar10 import progress as progress_module
from resnet_cifar10.model import ResNet
from torture.inputs import TRAIN

CLASSES = tuple("abcdefg")


def random_case(n: int = 500, classes: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, classes] that know something about the labels [n]."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=rng)
    logits = 2 * torch.randn(n, classes, generator=rng)
    logits[torch.arange(n), labels] += 2
    return logits, labels


def calibrated_case(n: int = 8_000, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose softmax is the very distribution that the labels are drawn from."""
    rng = torch.Generator().manual_seed(1)
    logits = 1.5 * torch.randn(n, classes, generator=rng)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=rng)[:, 0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_metrics_equal_scikit_learn(seed):
    logits, labels = random_case(seed=seed)
    predicted, probabilities = logits.argmax(1), logits.double().softmax(1)
    expected = 100 * sk.top_k_accuracy_score(labels, logits, k=2)
    assert ev.top2_accuracy(logits, labels) == pytest.approx(expected, abs=1e-10)
    assert ev.accuracy(logits, labels) == pytest.approx(100 * sk.accuracy_score(labels, predicted), abs=1e-10)
    assert ev.confusion(logits, labels).tolist() == sk.confusion_matrix(labels, predicted).tolist()
    assert ev.negative_log_likelihood(logits, labels) == pytest.approx(sk.log_loss(labels, probabilities), abs=1e-10)


def test_of_equal_logits_accuracy_and_confusion_count_the_same():
    logits, labels = torch.zeros(50, 5), torch.arange(50) % 5
    assert ev.accuracy(logits, labels) == 2 * int(ev.confusion(logits, labels).diagonal().sum()) == 20


def test_the_summary_equals_scikit_learn():
    logits, labels = random_case()
    summary = ev.evaluate(logits, labels, CLASSES, temperature=2.0)
    assert (summary["n"], summary["confusion"]) == (500, ev.confusion(logits, labels).tolist())
    assert summary["interval_95"] == ev.wilson_interval(summary["accuracy"], 500)
    precision, recall, _, support = sk.precision_recall_fscore_support(labels, logits.argmax(1))
    assert list(summary["per_class"]) == list(CLASSES)
    rows = summary["per_class"].values()
    assert [row["precision"] for row in rows] == pytest.approx(100 * precision)
    assert [row["recall"] for row in rows] == pytest.approx(100 * recall)
    assert [row["n"] for row in rows] == support.tolist()
    for key in ("accuracy", "top2_accuracy", "negative_log_likelihood", "calibration_error"):
        assert summary[key] == getattr(ev, key)(logits, labels)
    for key in ("negative_log_likelihood", "calibration_error"):
        assert summary[f"{key}_scaled"] == getattr(ev, key)(logits / 2, labels)


def test_what_cannot_be_told_of_a_class_is_none():
    logits = torch.tensor([[5.0, 0, 0, 0], [5.0, 0, 0, 0], [0, 0, 5.0, 0]])
    labels = torch.tensor([0, 1, 0])
    rows = ev.evaluate(logits, labels, tuple("abcd"), 1.0)["per_class"]
    assert rows["a"] == {"precision": 50, "recall": 50, "n": 2}
    assert rows["b"] == {"precision": None, "recall": 0, "n": 1}
    assert rows["c"] == {"precision": 0, "recall": None, "n": 0}
    assert rows["d"] == {"precision": None, "recall": None, "n": 0}


# --- calibration ---


def plain_calibration_error(logits: torch.Tensor, labels: torch.Tensor, bins: int) -> float:
    """Sum over bins (m-1)/bins < confidence <= m/bins: share of the images times |accuracy - confidence| (Guo et al. 2017)."""
    total = 0.0
    rows = list(zip(logits.double().softmax(1).tolist(), labels.tolist(), strict=True))
    for m in range(1, bins + 1):
        inside = [(max(p), p.index(max(p)) == label) for p, label in rows if (m - 1) / bins < max(p) <= m / bins]
        if inside:
            confidence = sum(c for c, _ in inside) / len(inside)
            accuracy = sum(hit for _, hit in inside) / len(inside)
            total += len(inside) / len(rows) * abs(accuracy - confidence)
    return 100 * total


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("seed", [4, 5, 6])
def test_calibration_error_equals_a_plain_loop(bins, seed):
    logits, labels = random_case(60, seed=seed)  # few images: gaps of both signs
    assert ev.calibration_error(logits, labels, bins) == pytest.approx(plain_calibration_error(logits, labels, bins), abs=1e-9)
    assert ev.calibration_error(logits, labels) == ev.calibration_error(logits, labels, 15)


@pytest.mark.parametrize(
    ("confidence", "hits", "error"),  # of 10 images with two classes, all as confident
    [(0.8, 8, 0), (0.8, 5, 30), (0.8, 10, 20), (0.95, 0, 95), (1 - 1e-12, 10, 0), (1 - 1e-12, 0, 100), (0.5 + 1e-9, 5, 0)],
)
def test_calibration_error_by_hand(confidence, hits, error):
    logits = torch.tensor([[math.log(confidence / (1 - confidence)), 0.0]], dtype=torch.float64).repeat(10, 1)
    labels = torch.tensor([0] * hits + [1] * (10 - hits))
    assert ev.calibration_error(logits, labels) == pytest.approx(error, abs=1e-5)


def test_full_confidence_belongs_to_the_last_bin():
    logits = torch.tensor([0.95, 1.0], dtype=torch.float64).logit().clamp(max=100).repeat_interleave(10)[:, None]
    labels = torch.tensor([0] * 10 + [0] * 9 + [1])  # gaps of -5 and +10 points in one bin
    assert ev.calibration_error(logits * torch.tensor([1.0, 0.0]), labels) == pytest.approx(2.5, abs=1e-9)


@pytest.mark.parametrize("factor", [1.0, 3.0, 0.4])
def test_temperature_undoes_a_scaling_of_calibrated_logits(factor):
    logits, labels = calibrated_case()
    temperature = ev.fit_temperature(factor * logits, labels)
    assert temperature == pytest.approx(factor, rel=0.05)
    best = ev.negative_log_likelihood(factor * logits / temperature, labels)
    for other in (0.98, 1.02):
        assert best < ev.negative_log_likelihood(factor * logits / (other * temperature), labels)
    assert ev.calibration_error(factor * logits / temperature, labels) < 1.5


@pytest.mark.parametrize("size", [0.5, 10.0])
def test_without_a_mistake_one_image_in_n_plus_2_is_taken_to_be_one(size):
    logits = size * torch.eye(5).repeat(10, 1)
    probabilities = (logits / ev.fit_temperature(logits, logits.argmax(1))).softmax(1)
    assert float(probabilities.max(1).values.mean()) == pytest.approx(51 / 52, abs=1e-3)


# --- the interval ---


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (81, 263, 25.53, 36.62),  # Newcombe 1998, table I, method 3
        (15, 148, 6.24, 16.05),
        (0, 20, 0, 16.11),
        (1, 29, 0.61, 17.18),
    ],
)
def test_interval_equals_published_values(hits, n, low, high):
    assert ev.wilson_interval(100 * hits / n, n) == pytest.approx((low, high), abs=0.005)
    mirrored = ev.wilson_interval(100 * (n - hits) / n, n)
    assert mirrored == pytest.approx((100 - high, 100 - low), abs=0.005)


@pytest.mark.parametrize("n", [1, 3, 7, 10, 359, 10_000])
def test_interval_stays_between_0_and_100(n):
    assert ev.wilson_interval(0.0, n)[0] >= 0
    assert ev.wilson_interval(100.0, n)[1] <= 100


# --- logits of a whole split ---


def test_logits_do_not_depend_on_the_batch_size():
    torch.manual_seed(0)
    network = ResNet(8).eval()
    images = torch.from_numpy(TRAIN[0][:13])
    one_by_one = ev.predict(network, images, [0.5] * 3, [0.25] * 3, batch_size=1)
    assert one_by_one.shape == (13, 10) and one_by_one.dtype == torch.float32
    assert len({tuple(row) for row in one_by_one.tolist()}) == 13
    for batch_size in (4, 5, 13, 500):
        logits = ev.predict(network, images, [0.5] * 3, [0.25] * 3, batch_size)
        torch.testing.assert_close(logits, one_by_one, rtol=1e-4, atol=1e-5)


def test_the_network_sees_normalised_images_in_their_order():
    images = torch.from_numpy(TRAIN[0])
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
    seen = ev.predict(lambda x: x.mean((2, 3)), images, mean, std, batch_size=7)
    expected = (images.double().mean((1, 2)) / 255 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(seen, expected.float(), rtol=1e-4, atol=1e-5)


def test_progress_in_a_pipe_is_told_with_the_time_left(capsys, monkeypatch):
    monkeypatch.setattr(progress_module, "LINE_SECONDS", -1)
    assert list(progress_module.progress("abc", "photos")) == ["a", "b", "c"]
    assert capsys.readouterr().err == "photos: 33 % done, 0 s left\nphotos: 67 % done, 0 s left\n"
