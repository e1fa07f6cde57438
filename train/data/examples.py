"""Examples of a source by index, and the handling of unreadable images."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from se_flax.errors import UserError
from train.config import INTERPOLATION, Data
from train.data.images import UnreadableImage, eval_image, train_image
from train.data.sources import Source

_MOST_IN_A_ROW = 100  # more unreadable images in a row mean that the data set is broken


def _read(source: Source, index: int) -> dict[str, Any]:
    try:
        return source[index]
    except OSError as error:  # other errors, such as a wrong label, are not about the image
        raise UnreadableImage(error.strerror or str(error)) from error
    except MemoryError as error:
        raise UnreadableImage("not enough memory for it") from error


@dataclass(frozen=True)
class PrepareTrain:
    """Makes a training example from an index and random numbers; `skipped` counts unreadable images from `index` on."""

    source: Source
    data: Data

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """The example of an index, or the next readable one."""
        data, total = self.data, len(self.source)
        for skipped in range(min(total, _MOST_IN_A_ROW)):
            at = (index + skipped) % total
            try:
                example = _read(self.source, at)
                image = _train_image(example["image"], rng, data)
            except UnreadableImage as error:
                _raise_unless_skipped(error, self.source, at, data)
                continue
            label = np.int32(example["label"])
            return {"image": image, "label": label, "index": np.int64(index), "skipped": np.int64(skipped)}
        raise UserError(
            f"{min(total, _MOST_IN_A_ROW)} images in a row from {self.source.name(index)} on could not be read; "
            "check the data."
        )


@dataclass(frozen=True)
class PrepareEval:
    """Makes an evaluation example from an index; masked zeros beyond the end and for an unreadable image."""

    source: Source
    data: Data

    def __call__(self, index: int) -> dict[str, Any]:
        """The example of an index, with its mask."""
        size, skipped = self.data.image_size, 0
        image, label, good = np.zeros((size, size, 3), np.uint8), 0, False
        if index < len(self.source):
            try:
                example = _read(self.source, index)
                image = _eval_image(example["image"], self.data)
                label, good = example["label"], True
            except UnreadableImage as error:
                _raise_unless_skipped(error, self.source, index, self.data)
                skipped = 1
        notes = {"index": np.int64(index), "skipped": np.int64(skipped)}
        return {"image": image, "label": np.int32(label), "mask": np.bool_(good), **notes}


def sample_images(source: Source, data: Data, count: int) -> np.ndarray:
    """Images from all over a source, prepared as for evaluation.

    Args:
      source: the source.
      data: the settings.
      count: how many, at most; every k-th of the source, as class folders are in the order of the classes.

    Returns:
      uint8 [n, S, S, 3], without those that `data.bad_images="skip"` leaves out.

    Raises:
      UserError: an image could not be read.
    """
    prepare = PrepareEval(source, data)
    indices = np.linspace(0, len(source), min(count, len(source)), endpoint=False).astype(int)
    examples = [prepare(int(index)) for index in indices]
    return np.stack([example["image"] for example in examples if example["mask"]])


def _raise_unless_skipped(error: UnreadableImage, source: Source, index: int, data: Data) -> None:
    if data.bad_images == "error":
        raise UserError(
            f"{source.name(index)} could not be read ({error}); replace or remove it, or skip such images "
            "with --config.data.bad_images=skip."
        ) from error


def _train_image(image: bytes | np.ndarray, rng: np.random.Generator, data: Data) -> np.ndarray:
    return train_image(
        image,
        rng,
        size=data.image_size,
        crop=data.train_crop,
        scale=data.crop_scale,
        ratio=data.crop_ratio,
        interpolation=data.interpolation or INTERPOLATION,
        exif_orientation=data.exif_orientation,
    )


def _eval_image(image: bytes | np.ndarray, data: Data) -> np.ndarray:
    return eval_image(
        image,
        size=data.image_size,
        crop_fraction=data.eval_crop_fraction,
        interpolation=data.interpolation or INTERPOLATION,
        exif_orientation=data.exif_orientation,
    )


def why_bad(source: Source, index: int, data: Data, training: bool) -> str:
    """The reason why an image could not be prepared, found by a second try.

    Args:
      source: the source of the image.
      index: index in the source.
      data: the settings.
      training: whether the image was prepared for training or for evaluation.

    Returns:
      The reason in a few words.
    """
    try:
        image = _read(source, index)["image"]
        eval_image(image, size=8)  # decodes the whole image: a crop of a JPEG misses damage below it
        if training:
            _train_image(image, np.random.default_rng(0), data)
        else:
            _eval_image(image, data)
    except UnreadableImage as error:
        return str(error)
    return "readable by now"
