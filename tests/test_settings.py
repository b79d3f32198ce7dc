"""The table of settings: the one asked for, overrides, every mistake as one clear line; the learning rate that follows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT, one_line
from hypothesis import given
from hypothesis import strategies as st

from resnet_cifar10.settings import Setting, load_settings, slug
from resnet_cifar10.train import learning_rate, patience_ended

ASSIGNMENT = ROOT / "settings" / "assignment.toml"


# --- the tables of the project ---


def test_assignment_is_the_table_asked_for():
    common = {
        "batch_size": 128,
        "activation": "relu",
        "weight_init": "he_normal",
        "optimizer": "sgd",
        "momentum": 0.9,
        "nesterov": False,
        "lr": 0.1,
        "epochs": 200,
        "normalization": "batch",
        "weight_decay": 1e-4,
        "augmentation": "crop_flip",
        "block": "post",
        "shortcut": "identity",
        "label_smoothing": 0.0,
        "warmup": 0.0,
        "validation_size": 5_000,
    }
    rows = {
        "Setting #1": {"model": "resnet32", "lr_decay": "none", "patience": 60},
        "Setting #2": {"model": "resnet32", "lr_decay": "step", "patience": None},
        "Setting #3": {"model": "resnet20", "lr_decay": "step", "patience": None},
    }
    table = load_settings(ASSIGNMENT)
    assert [setting.name for setting in table] == list(rows)
    for setting in table:
        wanted = common | rows[setting.name]
        assert {key: getattr(setting, key) for key in wanted} == wanted


def test_assignment_decays_times_a_tenth_at_epochs_100_and_150():
    constant, *decayed = load_settings(ASSIGNMENT)
    by_epoch = {0: 0.1, 99: 0.1, 100: 0.01, 149: 0.01, 150: 0.001, 199: 0.001}  # finished epochs
    for setting in decayed:
        assert [learning_rate(setting, epoch / 200) for epoch in by_epoch] == pytest.approx(list(by_epoch.values()))
    assert [learning_rate(constant, epoch / 200) for epoch in by_epoch] == [0.1] * 6


def test_the_network_is_the_one_that_the_row_asks_for():
    asked = {
        "width": 24,
        "block": "pre",
        "activation": "leaky_relu",
        "leaky_slope": 0.3,
        "normalization": "group",
        "weight_init": "xavier_normal",
    }
    row = Setting(name="a", model="resnet14", shortcut="none", **asked)
    assert row.architecture(7) == {"depth": 14, "classes": 7, "shortcut": False, **asked}


@pytest.mark.parametrize("table", sorted((ROOT / "settings").glob("*.toml")), ids=lambda table: table.name)
def test_every_table_of_the_project_is_right(table):
    assert load_settings(table)


# --- rows, overrides, choice ---


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "table.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_a_row_wins_over_defaults_and_an_override_over_both(tmp_path):
    file = write(tmp_path, '[defaults]\nepochs = 5\nlr = 1\n[[setting]]\nname = "a"\n[[setting]]\nname = "b"\nepochs = 7')
    assert [(s.epochs, s.lr, s.batch_size) for s in load_settings(file)] == [(5, 1.0, 128), (7, 1.0, 128)]
    assert [s.epochs for s in load_settings(file, epochs=3)] == [3, 3]
    assert [s.epochs for s in load_settings(file, epochs=None, seeds=None)] == [5, 7]
    assert [s.seeds for s in load_settings(file, seeds=[4, 2])] == [[4, 2], [4, 2]]


def test_only_keeps_the_named_rows():
    assert [s.name for s in load_settings(ASSIGNMENT, only=["Setting #3"])] == ["Setting #3"]
    assert [s.name for s in load_settings(ASSIGNMENT, only=["setting-1", "Setting #2"])] == ["Setting #1", "Setting #2"]
    with pytest.raises(ValueError) as error:
        load_settings(ASSIGNMENT, only=["Setting #4"])
    for part in ("assignment.toml", "Setting #4", "'Setting #1', 'Setting #2', 'Setting #3'"):
        assert part in one_line(error)


@pytest.mark.parametrize(("name", "folder"), [("Setting #2", "setting-2"), ("  A__b--C! ", "a-b-c"), ("7, or 40", "7-or-40")])
def test_a_slug_has_letters_digits_and_single_dashes(name, folder):
    assert slug(name) == folder


# --- mistakes ---

WRONG_ROWS = {  # the line in the row, and what the sentence must name
    "typo": ("epoch = 3", ["'epoch'", "'epochs'"]),
    "typo of two letters": ('wieght_decay = 0.1\nlr_decay = "step"', ["wieght_decay", "'weight_decay'"]),
    "British spelling": ('optimiser = "sgd"', ["optimiser", "'optimizer'"]),
    "text for a number": ('lr = "0.1"', ["'lr'", "0.1"]),
    "fraction for a count": ("epochs = 2.5", ["'epochs'", "2.5"]),
    "text for a count": ('batch_size = "128"', ["'batch_size'", "128"]),
    "number for text": ("model = 32", ["'model'", "32"]),
    "number for yes or no": ("nesterov = 1", ["'nesterov'", "1"]),
    "bool for a count": ("epochs = true", ["'epochs'", "True"]),
    "bool for a number": ("lr = true", ["'lr'", "True"]),
    "bool for a seed": ("seeds = [true]", ["seeds", "True"]),
    "date for a number": ("lr = 2020-01-01", ["'lr'", "2020"]),
    "table for a number": ("lr = {value = 0.1}", ["'lr'", "value"]),
    "number for a list": ("seeds = 3", ["'seeds'", "3"]),
    "NaN": ("lr = nan", ["'lr'", "nan"]),
    "infinite": ("weight_decay = inf", ["'weight_decay'", "inf"]),
    "NaN in a list": ('lr_decay = "step"\nlr_milestones = [0.5, nan]', ["lr_milestones", "nan"]),
    "lr zero": ("lr = 0", ["'lr'", "0", "greater than 0"]),
    "lr negative": ("lr = -0.1", ["'lr'", "-0.1", "greater than 0"]),
    "no epoch": ("epochs = 0", ["'epochs'", "0"]),
    "huge count": (f"epochs = 0x{'f' * 8_000}", ["'epochs'"]),
    "batch of one": ("batch_size = 1", ["'batch_size'", "1"]),
    "negative weight decay": ("weight_decay = -1e-4", ["'weight_decay'", "-0.0001"]),
    "momentum one": ("momentum = 1.0", ["'momentum'", "1.0"]),
    "warm-up all the way": ("warmup = 1.0", ["'warmup'", "1.0"]),
    "smoothing all the way": ("label_smoothing = 1.0", ["'label_smoothing'", "1.0"]),
    "depth not 6n+2": ('model = "resnet33"', ["'model'", "resnet33", "6n+2"]),
    "depth too small": ('model = "resnet2"', ["'model'", "resnet2", "6n+2"]),
    "depth with a zero": ('model = "resnet032"', ["'model'", "resnet032", "6n+2"]),
    "width of half a group": ("width = 20", ["'width'", "20", "multiple of 8"]),
    "depth in other digits": ('model = "resnet3२"', ["'model'", "6n+2"]),
    "another network": ('model = "vgg16"', ["'model'", "vgg16", "6n+2"]),
    "unknown activation": ('activation = "relu6"', ["'activation'", "relu6", "leaky_relu"]),
    "unknown initialisation": ('weight_init = "he"', ["'weight_init'", "he_normal"]),
    "unknown optimizer": ('optimizer = "lion"', ["'optimizer'", "lion", "adamw"]),
    "unknown normalization": ('normalization = "batchy"', ["'normalization'", "batchy", "group"]),
    "unknown decay": ('lr_decay = "exponential"', ["'lr_decay'", "exponential", "cosine"]),
    "unknown augmentation": ('augmentation = "crop_flop"', ["'augmentation'", "crop_flop", "cutout"]),
    "augmentation twice": ('augmentation = "crop_crop"', ["'augmentation'", "crop_crop"]),
    "two flips": ('augmentation = "crop_flip_altflip_photo"', ["crop_flip_altflip_photo", "one flip at most"]),
    "patience without validation": ("patience = 5\nvalidation_size = 0", ["'patience'", "validation_size"]),
    "patience that never ends": ('patience = 5\nlr_decay = "cosine"', ["'patience'", "'step'"]),
    "no patience": ("patience = 0", ["'patience'", "0"]),
    "nesterov without momentum": ("nesterov = true\nmomentum = 0", ["'nesterov'", "momentum"]),
    "milestones out of order": ("lr_milestones = [0.75, 0.5]", ["'lr_milestones'", "[0.75, 0.5]"]),
    "no milestones": ('lr_decay = "step"\nlr_milestones = []', ["lr_milestones", "at least 1"]),
    "milestones in epochs": ("lr_milestones = [100, 150]", ["'lr_milestones'", "100"]),
    "no seed": ("seeds = []", ["'seeds'", "[]"]),
    "seed twice": ("seeds = [1, 1]", ["'seeds'", "[1, 1]"]),
    "negative seed": ("seeds = [-1]", ["'seeds'", "[-1]"]),
    "value of many lines": ('activation = "re\\nlu"', ["'activation'"]),
    "value with an escape": ('activation = "\\u001b[31mrelu"', ["'activation'"]),
    "key in capitals": ("LR = 0.1", ["unknown key 'LR'", "did you mean 'lr'"]),
    "key like another": ("batch = 2", ["unknown key 'batch'", "did you mean 'batch_size'"]),
    "key like no other": ("learning_rate = 2", ["unknown key 'learning_rate'", "allowed: name, model", " lr,"]),
    "key with an escape": ('"\\u001b[31mlr" = 1', ["unknown key", "lr"]),
    "key nested deeply": (f"lr{'.a' * 2_000} = 1", ["'lr'"]),
}


@pytest.mark.parametrize(("line", "named"), WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_a_mistake_in_a_row_names_file_row_and_key(tmp_path, line, named):
    file = write(tmp_path, f'[[setting]]\nname = "Good"\n[[setting]]\nname = "My row"\n{line}\n')
    with pytest.raises(ValueError) as error:
        load_settings(file)
    assert str(file) in one_line(error)
    for part in ("My row", *named):
        assert part in one_line(error).replace(str(file), "")


def test_a_mistake_in_the_defaults_names_the_key(tmp_path):
    with pytest.raises(ValueError, match=r"'lr'.*-3"):
        load_settings(write(tmp_path, '[defaults]\nlr = -3\n[[setting]]\nname = "a"'))


def test_a_misspelt_table_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"unknown key 'settings'; did you mean 'setting'\?"):
        load_settings(write(tmp_path, '[[settings]]\nname = "a"'))


def test_a_mistake_in_an_override_names_the_key():
    with pytest.raises(ValueError) as error:
        load_settings(ASSIGNMENT, epochs=0)
    assert "'epochs'" in one_line(error)


def test_a_long_path_hides_neither_row_nor_key(tmp_path):
    folder = tmp_path / ("long" * 50)
    folder.mkdir()
    with pytest.raises(ValueError) as error:
        load_settings(write(folder, '[[setting]]\nname = "My row"\nlr = 0'))
    assert "My row" in one_line(error) and "'lr'" in one_line(error)


WRONG_NAMES = {
    "missing": "lr = 0.1",
    "empty": 'name = ""',
    "no letter or digit": 'name = "###"',
    "only letters that make no folder": 'name = "設定"',
    "two lines": 'name = "a\\nb"',
    "terminal escape": 'name = "a\\u001b[2J"',
    "separator of lines": 'name = "a\\u2028b"',
    "too long": f'name = "{"n" * 81}"',
    "a number": "name = 3",
}


@pytest.mark.parametrize("line", WRONG_NAMES.values(), ids=WRONG_NAMES)
def test_a_wrong_name_names_file_and_key(tmp_path, line):
    file = write(tmp_path, f"[[setting]]\n{line}\n")
    with pytest.raises(ValueError) as error:
        load_settings(file)
    assert str(file) in one_line(error) and "name" in one_line(error).replace(str(file), "")


@pytest.mark.parametrize(("first", "second"), [("same", "same"), ("Setting #1", "setting 1")])
def test_names_that_share_a_run_folder_are_refused(tmp_path, first, second):
    file = write(tmp_path, f'[[setting]]\nname = "{first}"\n[[setting]]\nname = "{second}"\n')
    with pytest.raises(ValueError) as error:
        load_settings(file)
    for part in (str(file), first, second, slug(first)):
        assert part in one_line(error)


ROW = '[[setting]]\nname = "a"\n'
WRONG_FILES = {  # the content, and what the sentence must name
    "empty": ("", "[[setting]]"),
    "no row": ("[defaults]\nlr = 0.1", "[[setting]]"),
    "one bracket": ('[setting]\nname = "a"', "[[setting]]"),
    "rows that are no tables": ("setting = [1, 2]", "[[setting]]"),
    "defaults that are no table": (f"defaults = 3\n{ROW}", "defaults"),
    "table misspelt": (f"[default]\nlr = 0.1\n{ROW}", "default"),
    "key above the tables": (f"lr = 0.1\n{ROW}", "lr"),
    "table name with an escape": (f'["\\u001b[2J"]\n{ROW}', "unknown key"),
    "not TOML": ("lr: 0.1", "not a TOML"),
    "word without quotation marks": (f"{ROW}optimizer = adam\n", ": optimizer = adam (words need"),
    "comma for point": (f"{ROW}lr = 0,1", ": lr = 0,1 (words need"),
    "key twice": (f"{ROW}lr = 1\nlr = 2", ": lr = 2 (words need"),
    "unfinished": ('[[setting]]\nname = "a', "not a TOML"),
    "unfinished line": ('[[setting]]\nname = "a\n', ': name = "a (words need'),
    "not UTF-8": (b'[[setting]]\nname = "\xff\xfe"\n', "not in UTF-8"),
    "UTF-16": (ROW.encode("utf-16"), "not in UTF-8"),
    "huge": (ROW + "# comment\n" * 200_000, "larger than"),
    "arrays in arrays": (f"{ROW}lr = {'[' * 50_000}{']' * 50_000}", "not a TOML"),
    "tables in tables": (f"{ROW}lr = {'{a = ' * 50_000}1{'}' * 50_000}", "not a TOML"),
    "number of many digits": (f"{ROW}epochs = {'9' * 10_000}", "not a TOML"),
}


@pytest.mark.parametrize(("content", "named"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_wrong_file_is_named(tmp_path, content, named):
    file = write(tmp_path, content)
    with pytest.raises(ValueError) as error:
        load_settings(file)
    assert str(file) in one_line(error) and named in one_line(error)


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_missing_file_or_a_folder_is_named(tmp_path, name):
    with pytest.raises(ValueError) as error:
        load_settings(tmp_path / name)
    assert str(tmp_path / name) in one_line(error)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["insert", "delete", "replace"]),
        st.integers(0, 2_000),
        st.binary(min_size=1, max_size=3) | st.sampled_from([b"\n", b'"', b"[", b"]", b"=", b".", b"-", b"9", b"nan", b"true"]),
    ),
    min_size=1,
    max_size=4,
)


@given(edits=EDITS)
def test_a_damaged_table_gives_settings_or_one_line(edits, tmp_path_factory):
    content = ASSIGNMENT.read_bytes()
    for kind, position, piece in edits:
        start = position % len(content)
        stop = start if kind == "insert" else start + len(piece)
        content = content[:start] + (b"" if kind == "delete" else piece) + content[stop:]
    file = write(tmp_path_factory.getbasetemp(), content)
    try:
        table = load_settings(file)
    except ValueError as error:
        assert str(error).startswith(f"{file}: ") and str(error).isprintable()
    else:
        assert table and all(isinstance(setting, Setting) for setting in table)
        assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug(setting.name)) for setting in table)


# --- the learning rate that a row asks for ---


@pytest.mark.parametrize(
    ("row", "rates"),
    [
        ({"lr_decay": "none"}, {0: 1, 0.5: 1, 0.999: 1}),
        ({"lr_decay": "step"}, {0: 1, 0.499: 1, 0.5: 0.1, 0.749: 0.1, 0.75: 0.01, 0.999: 0.01}),
        ({"lr_decay": "step", "lr_milestones": [0.2], "lr_factor": 0.5}, {0.199: 1, 0.2: 0.5, 0.9: 0.5}),
        ({"lr_decay": "cosine"}, {0: 1, 1 / 3: 0.75, 0.5: 0.5, 2 / 3: 0.25, 1: 0}),
        ({"lr_decay": "linear"}, {0: 1, 0.25: 0.75, 0.5: 0.5, 1: 0}),
        ({"lr_decay": "none", "warmup": 0.2}, {0: 0, 0.05: 0.25, 0.1: 0.5, 0.2: 1, 0.9: 1}),
        ({"lr_decay": "step", "warmup": 0.1}, {0.05: 0.5, 0.1: 1, 0.5: 0.1, 0.75: 0.01}),
        ({"lr_decay": "cosine", "warmup": 0.2}, {0.1: 0.5, 0.2: 1, 0.6: 0.5, 1: 0}),
        ({"lr_decay": "linear", "warmup": 0.2}, {0.1: 0.5, 0.2: 1, 0.6: 0.5, 1: 0}),
    ],
)
def test_learning_rate_at_known_points(row, rates):
    setting = Setting(name="a", lr=0.4, **row)
    found = [learning_rate(setting, progress) / 0.4 for progress in rates]
    assert found == pytest.approx(list(rates.values()), abs=1e-12)


@pytest.mark.parametrize(
    ("row", "last_epoch"),  # the epoch after which a run of 200 ends if its first epoch stays the best
    [
        ({"lr_decay": "none", "patience": 60}, 61),
        ({"lr_decay": "none", "patience": 60, "warmup": 0.5}, 160),
        ({"lr_decay": "step", "patience": 10}, 160),
        ({"lr_decay": "step", "patience": 10, "lr_milestones": [0.2]}, 50),
        ({"lr_decay": "step", "patience": 10, "lr_milestones": [0.55]}, 120),  # 0.55 * 200 is a little above 110
        ({"lr_decay": "step", "patience": 60}, None),
        ({"lr_decay": "none"}, None),
    ],
)
def test_patience_counts_from_the_best_epoch_or_the_last_decay(row, last_epoch):
    setting = Setting(name="a", **row)
    assert next((epoch for epoch in range(1, 200) if patience_ended(setting, epoch, best_epoch=1)), None) == last_epoch


def test_a_better_epoch_starts_patience_anew():
    setting = Setting(name="a", lr_decay="step", patience=10)
    assert patience_ended(setting, 160, best_epoch=150) and not patience_ended(setting, 160, best_epoch=151)


@given(
    decay=st.sampled_from(["none", "step"]),
    milestones=st.lists(st.integers(1, 19), min_size=1, max_size=4, unique=True).map(lambda m: sorted(x / 20 for x in m)),
    warmup=st.sampled_from([0.0, 0.1, 0.5]),
    epochs=st.integers(1, 50),
)
def test_patience_never_ends_a_run_before_its_last_decay(decay, milestones, warmup, epochs):
    setting = Setting(name="a", lr_decay=decay, lr_milestones=milestones, warmup=warmup, epochs=epochs, patience=1)
    ended = next((epoch for epoch in range(1, epochs) if patience_ended(setting, epoch, best_epoch=0)), epochs)
    still_to_come = {learning_rate(setting, step / 1000) for step in range(1000 * (ended - 1) // epochs + 1, 1000)}
    assert ended == epochs or len(still_to_come) == 1
