"""Data sources: random access to images and labels.

A source is opened once, in the main process, and can be pickled to worker processes. If possible it returns images
undecoded, since only the decoding code knows the wanted size.
"""

import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from se_flax.errors import UserError, closest
from se_flax.images.class_folders import (
    SPLITS,
    SUFFIXES,
    canonical,
    class_folders,
    pictures_beside_folders,
    pictures_by_class,
)
from train.config import Data
from train.data.images import FIXED_CROPS, INTERPOLATIONS, TRAIN_CROPS
from train.data.tfds_source import listed, open_tfds, tfds_features

KINDS = ("digits", "folder:<path>", "tfds:<name>")
EVAL_FOLDERS = SPLITS[1:]
PLACES = ("auto", "host", "device")


class Source(Protocol):
    """Random access to labelled images; picklable."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`{"image": encoded bytes or uint8 [H, W, C], "label": int}`."""
        ...

    def name(self, index: int) -> str:
        """Name of an example for messages: a file's path, or split and number."""
        ...


@dataclass(frozen=True)
class DataSplits:
    """The training and evaluation data of a run.

    Attributes:
      train: the training examples.
      eval: the held-out examples.
      class_names: names of the labels `0 ... len - 1`.
    """

    train: Source
    eval: Source
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class ImageData:
    """The data that the settings name, which are checked once, here, before anything is read.

    Attributes:
      settings: the run's `data` section.

    Raises:
      UserError: a setting is out of range; naming it, its value and what is allowed.
    """

    settings: Data

    def __post_init__(self) -> None:
        check_settings(self.settings)

    def count_classes(self) -> int:
        """Classes of the training data, from the names of its folders or its metadata; no image is looked for.

        Returns:
          Their number; 0 where the data cannot be opened, and `open` says why.
        """
        try:
            kind, rest = self._kind()
            if kind == "folder":
                return len(class_folders(_split_folders(Path(rest).expanduser(), self.settings)[0]))
            return len(tfds_features(rest, self.settings).class_names) if kind == "tfds" else 10
        except UserError:
            return 0

    def open(self) -> DataSplits:
        """Opens the two splits. No image is decoded and nothing is downloaded.

        Raises:
          UserError: the data is not there, not complete or not what it should be.
        """
        kind, rest = self._kind()
        if kind == "folder":
            return _open_folder(Path(rest).expanduser(), self.settings)
        return DataSplits(*open_tfds(rest, self.settings)) if kind == "tfds" else _open_digits(self.settings)

    def _kind(self) -> tuple[str, str]:
        source = self.settings.source
        kind, _, rest = source.partition(":")
        if source == "digits" or (kind in ("folder", "tfds") and rest):
            return kind, rest
        hint = closest(kind, KINDS)
        if os.path.isdir(os.path.expanduser(source)):
            hint = f"for that folder, write folder:{source}"
        raise UserError(f"data.source={source!r} is not a source of images; {hint}.")


def open_data(data: Data) -> DataSplits:
    """Opens the two splits that the settings name. No image is decoded and nothing is downloaded.

    Args:
      data: the settings.

    Returns:
      The splits.

    Raises:
      UserError: a setting is out of range, or the data is missing, incomplete or of the wrong kind.
    """
    return ImageData(data).open()


def check_settings(data: Data) -> None:
    """Validates the settings, before anything is read.

    Args:
      data: the settings.

    Raises:
      UserError: a setting is unknown or out of range.
    """
    choices = {
        "train_crop": TRAIN_CROPS,
        "interpolation": tuple(INTERPOLATIONS),
        "bad_images": ("error", "skip"),
        "place": PLACES,
    }
    for name, allowed in choices.items():
        value = getattr(data, name)
        if name == "interpolation" and not value:  # left to `init_from`
            continue
        if value not in allowed:
            raise UserError(f"data.{name}={value!r} is not known; {closest(str(value), allowed)}.")
    if data.place == "device" and data.train_crop not in FIXED_CROPS:
        raise UserError(
            "data.place='device' keeps images that are the same in every epoch, but "
            f"data.train_crop={data.train_crop!r} crops each one anew on the host; use data.place='host', or "
            "data.train_crop='resize' (augment.pad crops at random on the device)."
        )
    ranges = {
        "image_size": (data.image_size >= 1, "at least 1"),
        "batch_size": (data.batch_size >= 1, "at least 1"),
        "eval_batch_size": (data.eval_batch_size >= 0, "at least 1, or 0 for data.batch_size"),
        "workers": (data.workers >= 0, "at least 0"),
        "eval_fraction": (0 < data.eval_fraction < 1, "between 0 and 1, both excluded"),
        "eval_crop_fraction": (0 < data.eval_crop_fraction <= 1, "above 0 and at most 1"),
        "crop_scale": (_ordered(data.crop_scale) and data.crop_scale[1] <= 1, "two numbers, 0 < least <= most <= 1"),
        "crop_ratio": (_ordered(data.crop_ratio), "two numbers, 0 < least <= most"),
    }
    for name, (good, allowed_range) in ranges.items():
        if not good:
            raise UserError(f"data.{name}={getattr(data, name)!r} is out of range: it must be {allowed_range}.")


def _ordered(pair: tuple[float, ...]) -> bool:
    return len(pair) == 2 and 0 < pair[0] <= pair[1]


def stratified_split(
    labels: Sequence[int], keys: Sequence[str], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Holds out the same share of every class, with the same result on every machine.

    Examples are ranked by a hash of seed and key, so the order of the file system and the version of NumPy do not
    matter, and adding an image moves at most one other image to the other split.

    Args:
      labels: label of each example.
      keys: a unique name of each example.
      fraction: share to hold out; the total is rounded up and distributed by largest remainder. A class of one image
        stays in training; every other class is in both splits.
      seed: of the hash.

    Returns:
      Indices to train on and indices held out, each ascending.
    """
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    exact = {label: len(indices) * fraction for label, indices in members.items()}
    left_over = math.ceil(round(len(labels) * fraction, 6)) - sum(math.floor(share) for share in exact.values())
    by_remainder = sorted(exact, key=lambda label: (math.floor(exact[label]) - exact[label], label))
    rounded_up = set(by_remainder[:left_over])
    held_out: set[int] = set()
    for label, indices in members.items():
        wanted = math.floor(exact[label]) + (label in rounded_up)
        count = min(max(wanted, 1), len(indices) - 1)
        ranked = sorted(indices, key=lambda index: hashlib.sha256(f"{seed}:{keys[index]}".encode()).digest())
        held_out.update(ranked[:count])
    return [index for index in range(len(labels)) if index not in held_out], sorted(held_out)


@dataclass(frozen=True)
class ArraySource:
    """Images in memory.

    Attributes:
      images: uint8 `[N, H, W, C]`.
      labels: int `[N]`.
      title: name of the split, for messages.
    """

    images: np.ndarray
    labels: np.ndarray
    title: str

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def name(self, index: int) -> str:
        """Split and number."""
        return f"{self.title} {index}"


def _open_digits(data: Data) -> DataSplits:
    """Scikit-learn's 1,797 handwritten digits, 8x8 grey; they are part of the package, so nothing is downloaded."""
    from sklearn.datasets import load_digits  # imported here because it takes a second

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=-1)
    labels = digits.target.astype(np.int32)
    # Always the same 1,437 and 360 images, so that results on the digits are comparable.
    train, test = stratified_split(labels.tolist(), [str(i) for i in range(len(labels))], fraction=0.2, seed=0)
    parts = {
        title: ArraySource(images[indices], labels[indices], f"digits {title}")
        for title, indices in (("train", train), ("test", test))
    }
    wanted = {"train_split": data.train_split or "train", "eval_split": data.eval_split or "test"}
    for setting, split in wanted.items():
        if split not in parts:
            raise UserError(f"data.{setting}={split!r} is not a split of digits; {closest(split, parts)}.")
    return DataSplits(parts[wanted["train_split"]], parts[wanted["eval_split"]], tuple("0123456789"))


@dataclass(frozen=True)
class FolderSource:
    """Image files.

    Attributes:
      root: the folder above the class folders.
      files: paths below `root`.
      labels: label of each file.
    """

    root: str
    files: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with open(self.name(index), "rb") as file:
            return {"image": file.read(), "label": self.labels[index]}

    def name(self, index: int) -> str:
        """The file's path."""
        return os.path.join(self.root, self.files[index])

    def subset(self, indices: Iterable[int]) -> "FolderSource":
        """The same source with only these files."""
        kept = list(indices)
        return FolderSource(self.root, tuple(self.files[i] for i in kept), tuple(self.labels[i] for i in kept))


def _open_folder(root: Path, data: Data) -> DataSplits:
    train, held_out = _split_folders(root, data)
    train_source, names = _scan(train)
    if held_out is not None:
        return DataSplits(train_source, _scan(held_out, names)[0], names)
    keys = [canonical(file) for file in train_source.files]
    kept, rest = stratified_split(train_source.labels, keys, data.eval_fraction, data.split_seed)
    if not rest:
        raise UserError(f"every class in {root} holds a single image, so none can be held out; add images.")
    return DataSplits(train_source.subset(kept), train_source.subset(rest), names)


def _split_folders(root: Path, data: Data) -> tuple[Path, Path | None]:
    """Where the class folders of the two splits lie; without the second one, a share of the first is held out."""
    if not root.exists():
        raise UserError(f"the folder {root} of data.source does not exist; check the path.")
    if not root.is_dir():
        raise UserError(f"{root} of data.source is a file; give the folder that holds the class folders.")
    folders = class_folders(root)
    if not (data.train_split or data.eval_split or _is_split(root / "train")):
        return root, None
    train_name = data.train_split or "train"
    eval_name = data.eval_split or next((name for name in EVAL_FOLDERS if name in folders), "")
    if not eval_name:
        raise UserError(
            f"{root} has {train_name}/ but no folder to evaluate on ({', '.join(EVAL_FOLDERS)}); name it in "
            f"data.eval_split, or give folder:{root / train_name} to hold out a share of it."
        )
    for setting, name in (("train_split", train_name), ("eval_split", eval_name)):
        if name not in folders:
            raise UserError(f"data.{setting}: {root} has no folder {name!r}; {closest(name, folders)}.")
    return root / train_name, root / eval_name


def _is_split(path: Path) -> bool:
    """Whether this holds class folders; a folder of images called `train` is the class of railway vehicles."""
    return path.is_dir() and bool(class_folders(path))


def _scan(root: Path, class_names: tuple[str, ...] | None = None) -> tuple[FolderSource, tuple[str, ...]]:
    """Lists class folders. With `class_names` (those of training) a class may be missing, but none may be new."""
    # Names are compared and saved in canonical spelling; files are opened by their own spelling.
    folders = {canonical(name): name for name in class_folders(root)}
    if not folders:
        raise UserError(f"{root} has no class folders; put the images of each class into a folder named after it.")
    if class_names is not None and (unknown := sorted(folders.keys() - set(class_names))):
        raise UserError(
            f"{root} has class folders that training does not have: {listed(unknown)}; "
            "remove them or add them to the training images."
        )
    found = pictures_by_class(root)
    images = {name: found[folder] for name, folder in folders.items()}
    if class_names is None:
        if empty := [name for name, files in images.items() if not files]:
            raise UserError(
                f"empty class: no image ({', '.join(SUFFIXES)}) in {listed(str(root / name) for name in empty)}; "
                "add images or remove the folder."
            )
        if len(folders) < 2:
            raise UserError(
                f"{root} has only one class folder ({next(iter(folders))}); classification needs at least two."
            )
    elif not any(images.values()):
        raise UserError(
            f"no image ({', '.join(SUFFIXES)}) in any class folder of {root}; there is nothing to evaluate."
        )
    if beside := pictures_beside_folders(root):
        raise UserError(
            f"{root} holds images beside class folders, such as {beside[0]}; move them away or into a class folder."
        )
    names = class_names or tuple(folders)
    labels = {name: label for label, name in enumerate(names)}
    rows = [(f"{folders[name]}/{file}", labels[name]) for name, files in images.items() for file in files]
    return FolderSource(str(root), tuple(file for file, _ in rows), tuple(label for _, label in rows)), names
