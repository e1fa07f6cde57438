"""Sources of images: layouts, splits, and the sentence for everything that may be missing."""

import io
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from se_flax.errors import UserError
from train.config import Data
from train.data.sources import ImageData, open_data, stratified_split


def write(path, value=0, size=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, value, value)).save(path)


def class_folders(root, classes=("cat", "dog"), count=6, suffix=".png"):
    for label, name in enumerate(classes):
        for i in range(count):
            write(root / name / f"{i}{suffix}", value=10 * label + i)
    return root


def folder(path, **changes):
    return open_data(Data(source=f"folder:{path}", **changes))


def names(source):
    return [os.path.relpath(source.name(i), source.root) for i in range(len(source))]


# ---- digits


def test_digits_are_split_always_the_same():
    splits = open_data(Data())
    assert (len(splits.train), len(splits.eval)) == (1437, 360)
    assert splits.class_names == tuple("0123456789")
    counts = np.bincount([splits.eval[i]["label"] for i in range(360)])
    assert counts.min() >= 34 and counts.max() <= 37
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    seen = [splits.train[i] for i in range(1437)] + [splits.eval[i] for i in range(360)]
    for example in seen[:3]:
        assert example["image"].shape == (8, 8, 3) and example["image"].dtype == np.uint8
    # Together they are the whole data set, each image once, with its label; 0 ... 16 became 0 ... 255.
    mine = sorted((example["label"], np.round(example["image"][..., 0] / 255 * 16).tobytes()) for example in seen)
    theirs = sorted((label, image.tobytes()) for image, label in zip(images, labels, strict=True))
    assert mine == theirs
    assert max(example["image"].max() for example in seen) == 255


def test_digits_have_two_splits():
    both = open_data(Data(eval_split="train"))
    assert len(both.eval) == 1437
    with pytest.raises(UserError, match=r"data.eval_split='tests' is not a split of digits; closest: test"):
        open_data(Data(eval_split="tests"))


# ---- folders


def test_classes_are_counted_without_a_look_at_images(tmp_path, prepared, monkeypatch):
    for part in ("train", "val"):
        class_folders(tmp_path / "halves" / part, classes=("cat", "cow", "dog"))
    class_folders(tmp_path / "whole")
    monkeypatch.setattr("train.data.sources.pictures_by_class", lambda root: pytest.fail("looked for images"))

    def count(source, **changes):
        return ImageData(Data(source=source, **changes)).count_classes()

    assert count("digits") == 10
    assert (count(f"folder:{tmp_path}/halves"), count(f"folder:{tmp_path}/whole")) == (3, 2)
    assert count("tfds:tiny_shapes", data_dir=str(prepared)) == 2
    assert [count(source) for source in (f"folder:{tmp_path}/none", "folder:", "digit")] == [0, 0, 0]


def test_one_folder_is_split_by_fraction(tmp_path):
    class_folders(tmp_path, count=10)
    write(tmp_path / "cat" / "deep" / "UPPER.JPG")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    write(tmp_path / "cat" / "._hidden.png")
    write(tmp_path / ".ipynb_checkpoints" / "x.png")
    splits = folder(tmp_path, eval_fraction=0.2)
    assert splits.class_names == ("cat", "dog")
    assert (len(splits.train), len(splits.eval)) == (16, 5)
    assert not set(names(splits.train)) & set(names(splits.eval))
    assert "cat/deep/UPPER.JPG" in names(splits.train) + names(splits.eval)
    for source in (splits.train, splits.eval):
        for i, name in enumerate(names(source)):
            assert splits.class_names[source[i]["label"]] == name.split("/")[0]
    with open(splits.train.name(0), "rb") as file:
        assert splits.train[0]["image"] == file.read()
    again = pickle.loads(pickle.dumps(splits))
    assert again == splits


def test_the_split_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    class_folders(tmp_path, count=10)
    first = folder(tmp_path)
    scandir = os.scandir

    class Backwards:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = iter(sorted(entries, key=lambda entry: entry.name, reverse=True))

        def __iter__(self):
            return self.entries

        def __next__(self):
            return next(self.entries)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def close(self):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert folder(tmp_path) == first
    assert names(folder(tmp_path, split_seed=1).eval) != names(first.eval)


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_stratified_split_holds_out_the_same_share_of_every_class(counts, fraction, seed):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    keys = [f"{i}.jpg" for i in range(len(labels))]
    train, held_out = stratified_split(labels, keys, fraction, seed)
    assert sorted(train + held_out) == list(range(len(labels)))
    for label, count in enumerate(counts):
        out = sum(labels[i] == label for i in held_out)
        if count == 1:
            assert out == 0
        else:
            assert 1 <= out < count
            assert out in (1, count - 1) or abs(out - count * fraction) < 1


def test_one_more_image_moves_at_most_one_other():
    keys = [f"{i}.jpg" for i in range(100)]
    _, before = stratified_split([0] * 100, keys, 0.1, 0)
    _, after = stratified_split([0] * 101, [*keys, "new.jpg"], 0.1, 0)
    assert len(set(before) - set(after)) <= 1


@pytest.mark.parametrize("eval_name", ["val", "valid", "validation", "test"])
def test_train_and_eval_folders(tmp_path, eval_name):
    class_folders(tmp_path / "train", ("a", "b", "c"))
    class_folders(tmp_path / eval_name, ("c", "b"), count=2)  # "a" may be missing here
    splits = folder(tmp_path)
    assert splits.class_names == ("a", "b", "c")
    assert (len(splits.train), len(splits.eval)) == (18, 4)
    assert [splits.eval[i]["label"] for i in range(4)] == [1, 1, 2, 2]


def test_settings_choose_the_folders(tmp_path):
    for name in ("small", "train", "test", "val"):
        class_folders(tmp_path / name, count=len(name))
    splits = folder(tmp_path, train_split="small", eval_split="test")
    assert (len(splits.train), len(splits.eval)) == (10, 8)
    with pytest.raises(UserError, match=r"data.eval_split: .* has no folder 'tset'; closest: test"):
        folder(tmp_path, eval_split="tset")


def test_a_class_may_be_called_train(tmp_path):
    assert folder(class_folders(tmp_path, ("bus", "train"))).class_names == ("bus", "train")


def test_eval_classes_must_be_known(tmp_path):
    class_folders(tmp_path / "train", ("a", "b"))
    class_folders(tmp_path / "val", ("a", "B", "z"))
    with pytest.raises(UserError, match=r"val has class folders that training does not have: B, z;"):
        folder(tmp_path)


def test_folder_errors(tmp_path):
    with pytest.raises(UserError, match=r"the folder .*nowhere of data.source does not exist"):
        folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no class folders"):
        folder(tmp_path)
    write(tmp_path / "one.png")
    with pytest.raises(UserError, match=r"one.png of data.source is a file; give the folder"):
        folder(tmp_path / "one.png")
    (tmp_path / "one.png").unlink()
    write(tmp_path / "cat" / "1.png")
    with pytest.raises(UserError, match=r"has only one class folder \(cat\)"):
        folder(tmp_path)
    (tmp_path / "dog").mkdir()
    with pytest.raises(UserError, match=r"empty class: no image .* in .*dog; add images or remove the folder"):
        folder(tmp_path)
    write(tmp_path / "dog" / "1.png")
    with pytest.raises(UserError, match=r"every class in .* holds a single image"):
        folder(tmp_path)


def test_train_without_eval_folder(tmp_path):
    class_folders(tmp_path / "train")
    with pytest.raises(UserError, match=r"has train/ but no folder to evaluate on .* give folder:.*train to hold out"):
        folder(tmp_path)
    (tmp_path / "val" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no image .* in any class folder of .*val"):
        folder(tmp_path)


# ---- TensorFlow Datasets


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with two data sets prepared by TFDS itself: images encoded beforehand need no TensorFlow."""
    import tensorflow_datasets as tfds

    def png(value):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), (value, value, value)).save(buffer, "PNG")
        buffer.seek(0)
        return buffer

    class TinyShapes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = None
        splits_and_labels = (("train", (0, 1, 1) * 5), ("validation", (1, 0)), ("unlabelled", (-1, -1)))
        label = tfds.features.ClassLabel(names=["square", "disc"])

        def _info(self):
            features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": self.label}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(labels) for split, labels in self.splits_and_labels}

        def _generate_examples(self, labels):
            for i, label in enumerate(labels):
                yield i, {"image": png(max(0, int(100 * label) + i)), "label": label}

    class TinyDepths(TinyShapes):
        splits_and_labels = (("train", (0.5, 1.0)),)
        label = tfds.features.Scalar(np.float32)

    folder = tmp_path_factory.mktemp("tfds")
    for builder in (TinyShapes, TinyDepths):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def tiny(prepared, name="tiny_shapes", **changes):
    return open_data(Data(source=f"tfds:{name}", data_dir=str(prepared), **changes))


def test_tfds_without_tensorflow(prepared, monkeypatch):
    class NoTensorFlow:
        def find_spec(self, name, *_):
            if name.partition(".")[0] == "tensorflow":
                raise AssertionError("TensorFlow was imported")

    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    monkeypatch.setattr(sys, "meta_path", [NoTensorFlow(), *sys.meta_path])
    splits = tiny(prepared)
    assert splits.class_names == ("square", "disc")
    assert (len(splits.train), len(splits.eval)) == (15, 2)
    for source in (splits.train, pickle.loads(pickle.dumps(splits.train))):
        examples = [source[i] for i in range(15)]
        assert sorted(example["label"] for example in examples) == [0] * 5 + [1] * 10
        for example in examples:
            value = np.asarray(Image.open(io.BytesIO(example["image"])))[0, 0, 0]
            assert (value >= 100) == (example["label"] == 1)
    assert splits.train.name(3) == "tfds:tiny_shapes train example 3"


def test_tfds_splits(prepared):
    splits = tiny(prepared, train_split="train[:80%]", eval_split="train[80%:]")
    assert (len(splits.train), len(splits.eval)) == (12, 3)
    with pytest.raises(UserError, match=r"data.train_split='trian' is not a split of tfds:tiny_shapes; closest: train"):
        tiny(prepared, train_split="trian")
    unlabelled = tiny(prepared, eval_split="unlabelled")
    with pytest.raises(UserError, match=r"unlabelled example 0 has the label -1, but the data has the classes 0 ... 1"):
        unlabelled.eval[0]


def test_tfds_errors(prepared):
    with pytest.raises(UserError, match=r"tfds:cifar10 is not prepared in .*pip install 'se-flax\[tfds\]'.*'cifar10'"):
        tiny(prepared, "cifar10")
    with pytest.raises(UserError, match=r"tfds:cifra10 is neither in .* closest: cifar10"):
        tiny(prepared, "cifra10")
    with pytest.raises(UserError, match="tfds:no such! is neither"):
        tiny(prepared, "no such!")
    with pytest.raises(UserError, match=r"tfds:tiny_depths is not image classification: .* and has image, label"):
        tiny(prepared, "tiny_depths")


# ---- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "digit"}, r"data.source='digit' is not a source of images; closest: digits"),
        ({"source": "folder:"}, r"data.source='folder:' is not a source of images"),
        ({"source": os.path.dirname(__file__)}, r"for that folder, write folder:"),
        ({"image_size": 0}, r"data.image_size=0 is out of range: it must be at least 1"),
        ({"batch_size": 0}, r"data.batch_size=0"),
        ({"eval_batch_size": -1}, r"data.eval_batch_size=-1 .* 0 for data.batch_size"),
        ({"workers": -1}, r"data.workers=-1"),
        ({"train_crop": "random_resize"}, r"data.train_crop='random_resize' is not known; closest: random_resized"),
        ({"interpolation": "area"}, r"data.interpolation='area' is not known; allowed: bicubic, bilinear"),
        ({"bad_images": "ignore"}, r"data.bad_images='ignore' is not known; allowed: error, skip"),
        ({"eval_fraction": 1.0}, r"data.eval_fraction=1.0 is out of range"),
        ({"eval_crop_fraction": 1.1}, r"data.eval_crop_fraction=1.1 is out of range"),
        ({"crop_scale": (0.5, 0.1)}, r"data.crop_scale=\(0.5, 0.1\) is out of range"),
        ({"crop_ratio": (0.5,)}, r"data.crop_ratio=\(0.5,\) is out of range"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(UserError, match=message):
        open_data(Data(**changes))


def test_heavy_imports_happen_only_for_the_source_that_needs_them():
    code = "import sys, train.data.loader; print({'tensorflow', 'tensorflow_datasets', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
