"""Which files are pictures and which folders classes: the same for training, `se-flax eval`, `gates` and `predict`."""

import os
import unicodedata

import pytest
from PIL import Image

from se_flax.cli import main
from se_flax.cli.labelled import labelled_images
from se_flax.errors import UserError
from se_flax.images.class_folders import SUFFIXES, class_folders, pictures_below
from se_flax.images.labels import imagenet_labels
from train.config import Config, Data, Model, Optim, Parallel
from train.data.sources import open_data
from train.run.loop import run
from train.run.report import read_metrics

IMAGENET = tuple(label.name for label in imagenet_labels())


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def trained(root):
    """Labels of a training in `root`/train, and the label that it gives every file of `root`/val."""
    splits = open_data(Data(source=f"folder:{root}"))
    held_out = {splits.eval.name(i): splits.eval.labels[i] for i in range(len(splits.eval))}
    return splits.class_names, held_out


def evaluated(root, labels, num_classes):
    return {str(example.path): example.label for example in labelled_images(root, labels, num_classes)}


# ---- folders of a training mean the same in an evaluation

SETS = {
    "from one": ["1", "2", "3"],
    "twelve numbers": [str(i) for i in range(12)],
    "zeros in front": ["01", "1", "001"],
    "signs": ["-1", "0", "1", "+1", "0.5", "1.5"],
    "cases": ["Polish", "polish", "POLISH"],
    "punctuation": ["a b", "a_b", "a-b", "a.b", "!", "#", "C", "C#", "C++"],
    "commas": ["dog", "dog, brown", "cat, black", "black"],
    "scripts": ["猫", "犬", "кошка", "Кошка", "γάτα", "قط", "बिल्ली", "बल्ली", "แมว", "고양이"],
    "compositions": ["café", "cafe", "naïve", "Ångström", "ﬁn", "fin", "ß", "ss", "İ", "i"],
    "emojis": ["😀", "😁", "👩‍🔬", "👩"],
    "WordNet": ["n01440764", "n01443537", "tench", "goldfish"],
    "splits": ["train", "test"],
}


@pytest.mark.parametrize("names", SETS.values(), ids=SETS.keys())
@pytest.mark.parametrize("spelling", ["NFC", "NFD"])
def test_every_folder_has_the_class_that_training_gave_it(names, spelling, tmp_path):
    """Training on Linux (NFC), the pictures also on a Mac (NFD)."""
    for name in names:
        for split in ("train", "val"):
            on_disk = unicodedata.normalize(spelling if split == "val" else "NFC", name)
            touch(tmp_path / split / on_disk / "1.png")
    labels, held_out = trained(tmp_path)
    assert len(labels) == len(names) == len(held_out)
    for path, label in held_out.items():
        assert unicodedata.normalize("NFC", os.path.basename(os.path.dirname(path))) == labels[label]
    assert evaluated(tmp_path / "val", labels, len(labels)) == held_out


def test_some_of_the_folders_have_the_same_classes_as_all(tmp_path):
    for name in SETS["twelve numbers"]:
        touch(tmp_path / "train" / name / "1.png")
    for name in ("10", "2"):
        touch(tmp_path / "val" / name / "1.png")
    labels, held_out = trained(tmp_path)
    assert labels[2] == "10" and list(held_out.values()) == [2, 4]
    assert evaluated(tmp_path / "val", labels, 12) == held_out


@pytest.mark.parametrize("names", [SETS["from one"], SETS["twelve numbers"]], ids=["1 2 3", "0 1 10 11 2 ... 9"])
def test_eval_counts_what_training_reported(names, tmp_path, capsys):
    """Classes of different sizes: answers that were counted for other classes would come to other sums."""
    data = tmp_path / "data"
    for split, most in (("train", 4), ("val", 2)):
        for i, name in enumerate(names):
            for j in range(most + i):
                touch(data / split / name / f"{j}.png")
                colour = (20 * i, 255 - 20 * i, 60 * (i % 4))
                Image.new("RGB", (8, 8), colour).save(data / split / name / f"{j}.png")
    config = Config(
        model=Model(name="seresnet20"),
        data=Data(source=f"folder:{data}", image_size=8, batch_size=16, eval_crop_fraction=1.0),
        optim=Optim(learning_rate=0.1, schedule="constant"),
        parallel=Parallel(devices=1),
        steps=25,
        eval_every_epochs=100,
        compilation_cache="",  # the test run's own, see conftest.py
    )
    outcome = run(config, tmp_path / "run")
    result = outcome.result
    assert result.count == sum(2 + i for i in range(len(names))) and result.top1 > result.count / len(names)
    assert main(["eval", str(tmp_path / "run"), str(data / "val")]) == 0
    out = capsys.readouterr().out
    reported = {f"top-{name[3:]}": hits for name, hits in result.counts().items()}
    counted = {
        line.partition(":")[0]: int(line.split("(")[1].split()[0]) for line in out.splitlines() if "top-" in line
    }
    assert counted == reported
    # Among at most five classes every answer is right within five.
    assert list(reported) == (["top-1"] if len(names) <= 5 else ["top-1", "top-5"])
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    (row,) = (row for row in rows if "eval_loss" in row)
    assert {"top1", "top5"} & {key[5:] for key in row} == result.counts().keys()
    assert ("top-5" in str(outcome)) == (len(names) > 5)
    # Under other names for the same folders the run does not go on.
    for split in ("train", "val"):
        (data / split / names[-1]).rename(data / split / "0a")
    other = sorted([*names[:-1], "0a"])
    first = next(i for i, pair in enumerate(zip(sorted(names), other, strict=True)) if pair[0] != pair[1])
    message = (
        rf"a run on other classes \(class {first} is '{sorted(names)[first]}' there and '{other[first]}' here\); use"
    )
    with pytest.raises(UserError, match=message):
        run(config, tmp_path / "run")


def test_two_folders_are_never_one_class(tmp_path):
    for labels, folders, message in (
        (
            ("cat", "dog"),
            ("cat", "Cat"),
            r"the folders 'Cat' and 'cat' of .* are both class 0 \('cat'\); leave one folder",
        ),
        (("cat", "dog"), ("1", "01"), r"the folders '01' and '1' of .* are both class 1 \('dog'\)"),
        (
            IMAGENET,
            ("tench", "n01440764"),
            r"the folders 'n01440764' and 'tench' of .* are both class 0 \('tench, Tinca",
        ),
    ):
        root = tmp_path / folders[0]
        for name in folders:
            touch(root / name / "1.png")
        with pytest.raises(UserError, match=message):
            labelled_images(root, labels, len(labels))


def test_folders_whose_number_is_right_by_chance_are_refused(tmp_path):
    """As many folders as classes say nothing about which is which."""
    for name in ("a", "b", "c"):
        touch(tmp_path / name / "1.png")
    with pytest.raises(UserError, match=r"the folder 'a' of .* names none of the network's 3 classes \(3 of 3 names"):
        labelled_images(tmp_path, ("blue", "green", "red"), 3)


# ---- a network without labels


@pytest.mark.parametrize(
    ("folders", "num_classes", "classes"),
    [
        (("a", "b", "c"), 3, {"a": 0, "b": 1, "c": 2}),
        (("1", "2", "3"), 3, {"1": 0, "2": 1, "3": 2}),
    ],
)
def test_without_labels_the_order_counts_and_is_said(folders, num_classes, classes, tmp_path, capsys):
    for name in folders:
        touch(tmp_path / unicodedata.normalize("NFD", name) / "1.png")
    found = evaluated(tmp_path, None, num_classes)
    assert {unicodedata.normalize("NFC", path.split("/")[-2]): label for path, label in found.items()} == classes
    said = capsys.readouterr().err
    assert said.startswith("the network has no labels; the folders are its classes in sorted order: ")
    assert said.endswith(", ".join(f"{name} = {i}" for i, name in enumerate(classes)) + "\n")


def test_without_labels_numbers_count_where_they_agree_with_the_order(tmp_path, capsys):
    for name in ("00", "01", "10"):
        touch(tmp_path / name / "1.png")
    assert set(evaluated(tmp_path, None, 12).values()) == {0, 1, 10}
    for i in range(12):
        touch(tmp_path / f"{i:02}" / "1.png")
    assert sorted(evaluated(tmp_path, None, 12).values()) == list(range(12))
    assert not capsys.readouterr().err
    for i in range(10):
        (tmp_path / f"{i:02}").rename(tmp_path / str(i))
    with pytest.raises(
        UserError, match=r"no labels, and the folder '10' of .* is class 10 by its number and class 2 in s"
    ):
        labelled_images(tmp_path, None, 12)


def test_without_labels_other_folders_are_refused(tmp_path):
    for name in ("cat", "dog"):
        touch(tmp_path / name / "1.png")
    with pytest.raises(
        UserError, match=r"has no labels and 3 classes, and .* has 2 folders; name folders by class numb"
    ):
        labelled_images(tmp_path, None, 3)
    with pytest.raises(UserError, match=r"this network has no classifier \(num_classes=0\)"):
        labelled_images(tmp_path, None, 0)


@pytest.mark.parametrize("labels", [None, ("cat", "dog")])
def test_splits_are_no_classes(labels, tmp_path):
    for split in ("train", "val"):
        touch(tmp_path / split / "cat" / "1.png")
    with pytest.raises(
        UserError, match=r"holds splits \(train, val\) and no classes; give one of them, such as .*val$"
    ):
        labelled_images(tmp_path, labels, 2)


# ---- pictures without class folders


def test_file_names_follow_the_same_rule(tmp_path):
    for name in ("1_a.png", "1_b.png", "3_a.png"):
        touch(tmp_path / name)
    assert list(evaluated(tmp_path, ("1", "2", "3"), 3).values()) == [0, 0, 2]
    assert list(evaluated(tmp_path, ("w", "x", "y", "z"), 4).values()) == [1, 1, 3]
    with pytest.raises(UserError, match=r"the name '3' of pictures in .* names none of the network's 2 classes"):
        labelled_images(tmp_path, ("x", "y"), 2)
    touch(tmp_path / "01_a.png")
    with pytest.raises(
        UserError, match=r"the name '01' of pictures .* \(class numbers do not count, as the labels have"
    ):
        labelled_images(tmp_path, ("1", "2", "3"), 3)
    touch(tmp_path / "ILSVRC2012_val_00000293_n01440764.JPEG")
    with pytest.raises(UserError, match="JPEG names no class"):
        labelled_images(tmp_path, ("w", "x", "y", "z"), 4)


# ---- which files


def dirty(root):
    """Two classes with one picture each, and what systems and tools leave beside them."""
    for name in ("cat/1.png", "dog/deep/UPPER.JPG"):
        touch(root / name)
    for name in (
        ".hidden.png",
        "._1.png",
        "notes.txt",
        "cat/._1.png",
        "cat/.DS_Store",
        "cat/.ipynb_checkpoints/1-checkpoint.png",
        "cat/notes.txt",
        "cat/png",
        ".ipynb_checkpoints/x.png",
        "__MACOSX/cat/1.png",
        "dog/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg",
    ):
        touch(root / name)
    (root / "cat" / "folder.png").mkdir()
    return root


def test_hidden_files_count_nowhere(tmp_path):
    for split in ("train", "val"):
        dirty(tmp_path / split)
    labels, held_out = trained(tmp_path)
    root = tmp_path / "val"
    pictures = {str(root / "cat" / "1.png"): 0, str(root / "dog" / "deep" / "UPPER.JPG"): 1}
    assert labels == ("cat", "dog") and held_out == pictures
    assert evaluated(root, labels, 2) == pictures
    assert [str(root / name) for name in pictures_below(root)] == list(pictures)


def test_an_empty_class_folder_is_a_class(tmp_path):
    """Training counts it, so that position and refusal do not depend on which pictures are there."""
    for name in ("a", "c"):
        touch(tmp_path / name / "1.png")
    (tmp_path / "b").mkdir()
    assert list(evaluated(tmp_path, None, 3).values()) == [0, 2]
    with pytest.raises(UserError, match=r"the folder 'b' of .* names none"):
        labelled_images(tmp_path, ("a", "c"), 2)


def test_pictures_beside_class_folders_are_refused(tmp_path):
    for name in ("a/1.png", "b/1.png", "c.png"):
        touch(tmp_path / name)
    for use in (lambda: labelled_images(tmp_path, ("a", "b"), 2), lambda: open_data(Data(source=f"folder:{tmp_path}"))):
        with pytest.raises(
            UserError, match=r"beside class folders, such as c.png; move them away or into a class folder"
        ):
            use()


def everywhere(root, message):
    """One sentence from training, evaluation and prediction."""
    for use in (
        lambda: open_data(Data(source=f"folder:{root}")),
        lambda: labelled_images(root, ("a", "b"), 2),
        lambda: pictures_below(root),
    ):
        with pytest.raises(UserError, match=message):
            use()


def test_a_format_that_is_not_read_is_not_left_out_in_silence(tmp_path):
    for name in ("a/1.png", "b/1.png", "b/2.HEIC", "b/deep/3.tif"):
        touch(tmp_path / name)
    everywhere(tmp_path, r"b.2.HEIC is a picture in a format that is not read \(2 such in .*\); convert to JPEG or PNG")


@pytest.mark.parametrize("target", ["..", ".", "../b", "../../outside"])
def test_a_folder_that_is_read_twice_is_refused(tmp_path, target):
    for name in ("in/a/1.png", "in/b/1.png"):
        touch(tmp_path / name)
    (tmp_path / "outside").symlink_to(tmp_path)
    (tmp_path / "in" / "a" / "loop").symlink_to(target)
    everywhere(
        tmp_path / "in", r"is the same folder as .*, by a link, so its pictures would count twice; remove the link"
    )


def test_links_to_folders_and_pictures_elsewhere_are_followed(tmp_path):
    for name in ("elsewhere/a/1.png", "elsewhere/a/deep/2.png", "in/b/1.png"):
        touch(tmp_path / name)
    (tmp_path / "in" / "a").symlink_to("../elsewhere/a")
    (tmp_path / "in" / "b" / "2.png").symlink_to("../../elsewhere/a/1.png")
    (tmp_path / "in" / "b" / "gone.png").symlink_to("nowhere.png")  # refused by whoever reads it
    assert pictures_below(tmp_path / "in") == ["a/1.png", "a/deep/2.png", "b/1.png", "b/2.png", "b/gone.png"]


@pytest.mark.parametrize("target", ["/nowhere/c", "c"])
def test_a_class_that_is_a_link_to_nothing_is_refused(tmp_path, target):
    for name in ("a/1.png", "b/1.png"):
        touch(tmp_path / name)
    (tmp_path / "c").symlink_to(target)
    everywhere(tmp_path, rf"c is a link to {target}, which is not there; correct or remove it")


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    for name in ("a/1.png", "b/deep/1.png"):
        touch(tmp_path / name)
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    everywhere(tmp_path, r"the folder .*deep cannot be read \(Permission denied\)")


def test_names_that_cannot_be_labels_are_refused(tmp_path):
    for name in (b"caf\xe9", b"dog"):
        os.mkdir(os.path.join(os.fsencode(tmp_path), name))
    with pytest.raises(UserError, match=r"the name of the folder .*caf\\udce9' is not UTF-8, so it names no class"):
        class_folders(tmp_path)
    os.rmdir(os.path.join(os.fsencode(tmp_path), b"caf\xe9"))
    for spelling in ("NFC", "NFD"):
        touch(tmp_path / unicodedata.normalize(spelling, "café") / "1.png")
    with pytest.raises(UserError, match=r"has two folders named 'café' \(in two spellings of Unicode\); rename one"):
        class_folders(tmp_path)


def test_the_split_is_the_same_on_a_mac(tmp_path):
    for spelling in ("NFC", "NFD"):
        for i in range(20):
            for name in ("é", "ea"):
                touch(tmp_path / spelling / unicodedata.normalize(spelling, f"{name}/ü{i}.png"))
    both = [open_data(Data(source=f"folder:{tmp_path / spelling}")) for spelling in ("NFC", "NFD")]
    first, second = (
        (splits.class_names, [unicodedata.normalize("NFC", x) for x in splits.eval.files], splits.eval.labels)
        for splits in both
    )
    assert first == second and len(first[1]) == 4


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_is_a_format_that_pillow_reads(suffix):
    formats = {"jpg": "JPEG", "jpeg": "JPEG", "jfif": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "gif": "GIF"}
    Image.init()
    assert Image.EXTENSION[suffix] == formats[suffix[1:]] and formats[suffix[1:]] in Image.OPEN
