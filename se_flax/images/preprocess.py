"""Image preprocessing as plain data that is saved with the weights."""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from se_flax.errors import UserError, closest
from se_flax.images.decode import (
    INTERPOLATIONS,
    ExtremeShape,
    UnreadableImage,
    centre_crop,
    open_image,
    resized,
    to_rgb,
)
from se_flax.variant import Weights

CROP_MODES = ("center", "squash")
COLOR_ORDERS = ("rgb", "bgr")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_FLOAT32 = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

SETTINGS = ("image_size", "crop", "crop_mode", "interpolation", "mean", "std")
"""The settings that a checkpoint may define; the others are assumed."""

ImageLike: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray


@dataclass(frozen=True)
class Preprocess:
    """Resize, crop and normalisation that belong to a checkpoint.

    An image is decoded, set upright and resized to `resize` pixels by `interpolation`; the centre of `image_size`
    pixels is cropped, the values are scaled to [0, `input_max`] and normalised as `(value - mean) / std`. This is
    timm's evaluation transform (`timm/data/transforms_factory.py`, `transforms_imagenet_eval`), with Pillow's
    antialiased resize.

    Attributes:
      image_size: height and width of the network's input in pixels.
      crop: `image_size` over the size after the resize; 1 crops nothing from the resized short side.
      crop_mode: `center` keeps the aspect ratio and resizes the short side; `squash` resizes both sides.
      interpolation: `bilinear` or `bicubic`.
      mean: per channel, in the network's colour order, of values in [0, input_max].
      std: likewise.
      color_order: `rgb` or `bgr`.
      input_max: greatest value of a channel before the mean is subtracted: 1, or 255 for networks trained on bytes.
      exif_orientation: rotate an image as its EXIF data say (photographs of phones); False takes it as stored, as
        torchvision and timm do.
      assumed: names of the settings that the checkpoint does not define; `load_pretrained` assumes and reports them.
    """

    image_size: int = 224
    crop: float = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    color_order: str = "rgb"
    input_max: float = 1.0
    exif_orientation: bool = True
    assumed: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for name, given, allowed in (
            ("interpolation", self.interpolation, INTERPOLATIONS),
            ("crop_mode", self.crop_mode, CROP_MODES),
            ("color_order", self.color_order, COLOR_ORDERS),
        ):
            if given not in allowed:
                raise UserError(f"unknown {name} {given!r}; {closest(str(given), allowed)}")
        if not (isinstance(self.image_size, int) and 1 <= self.image_size <= 1 << 14):
            raise UserError(f"got image_size={self.image_size!r}; give a whole number of pixels from 1 to 16384")
        if not 0.05 <= self.crop <= 1:
            raise UserError(f"got crop={self.crop!r}; give the share of the side that the crop keeps, 0.05 to 1")
        if len(self.mean) != len(self.std) or len(self.mean) not in _MODES:
            raise UserError(f"got mean={self.mean} and std={self.std}; give one of each for 1, 3 or 4 channels")
        if not all(math.isfinite(x) for x in (*self.mean, *self.std, self.input_max)):
            raise UserError(f"got mean={self.mean}, std={self.std}, input_max={self.input_max}; give finite numbers")
        if min(self.std) <= 0 or self.input_max <= 0:
            raise UserError(f"got std={self.std} and input_max={self.input_max}; both must be greater than 0")
        largest = (self.input_max + max(map(abs, self.mean))) / min(self.std)
        if largest > _FLOAT32[1] or self.input_max / max(self.std) < _FLOAT32[0]:
            raise UserError(
                f"got mean={self.mean}, std={self.std}, input_max={self.input_max}; (value - mean) / std must be a "
                "number that float32 holds"
            )
        if not isinstance(self.exif_orientation, bool):
            raise UserError(f"got exif_orientation={self.exif_orientation!r}; give True or False")
        for name in self.assumed:
            if name not in SETTINGS:
                raise UserError(f"got assumed={self.assumed}, and there is no setting {name!r}; allowed: {SETTINGS}")

    @property
    def resize(self) -> int:
        """Size after the resize (of the short side under `center`), in pixels; rounded down as in timm."""
        return math.floor(self.image_size / self.crop)

    @property
    def channels(self) -> int:
        """Number of the network's input channels."""
        return len(self.mean)

    def __call__(self, images: ImageLike | Iterable[ImageLike]) -> np.ndarray:
        """Prepares one or several images.

        Args:
          images: a path, the bytes of a file, a PIL image, a uint8 array `[H, W, C]` or `[N, H, W, C]` (RGB, 0 to
            255), or a list of these. An array with height and width `image_size` is only normalised; all other images
            are resized and cropped first.

        Returns:
          float32 `[N, image_size, image_size, channels]`; N is 1 for a single image.

        Raises:
          UserError: there is no such file, it is not an image, its aspect ratio is too extreme, or an array has another
            shape or dtype.
        """
        if isinstance(images, np.ndarray) and images.ndim == 4:
            items: list[ImageLike] = list(images)
        elif isinstance(images, str | os.PathLike | bytes | Image.Image) or hasattr(images, "__array__"):
            items = [images]  # type: ignore[list-item]
        elif isinstance(images, Iterable):
            items = list(images)
        else:
            raise UserError(f"got {type(images).__name__}; {_ACCEPTED}")
        batch = np.empty((len(items), self.image_size, self.image_size, self.channels), np.uint8)
        for row, item in zip(batch, items, strict=True):
            row[:] = self.pixels(item).reshape(row.shape)
        return self.normalise(batch)

    def pixels(self, image: ImageLike) -> np.ndarray:
        """Resizes and crops one image.

        Args:
          image: as for `__call__`.

        Returns:
          uint8 `[image_size, image_size, channels]`, RGB.

        Raises:
          UserError: as for `__call__`.
        """
        if hasattr(image, "__array__") and not isinstance(image, Image.Image):
            array = np.asarray(image)
            self._check_array(array)
            if array.shape[:2] == (self.image_size, self.image_size):
                return array
            image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
        named = str(image) if isinstance(image, str | os.PathLike) else "the image"
        resample, side = INTERPOLATIONS[self.interpolation], self.resize
        try:
            picture = to_rgb(_opened(image), _MODES[self.channels], exif_orientation=self.exif_orientation)
            least = min(picture.size)
            squash = self.crop_mode == "squash"
            size = (side, side) if squash else (side * picture.width // least, side * picture.height // least)
            return np.atleast_3d(centre_crop(resized(picture, size, resample), self.image_size))
        except ExtremeShape as error:
            raise UserError(f"{named} cannot be used: {error}; crop it first") from error
        except UnreadableImage as error:
            raise UserError(f"{named} cannot be read as an image: {error}; {_ACCEPTED}") from error

    def _check_array(self, array: np.ndarray) -> None:
        if array.ndim != 3 or array.shape[-1] != self.channels or 0 in array.shape:
            raise UserError(f"got an array of shape {array.shape}; this network takes images [H, W, {self.channels}]")
        if array.dtype != np.uint8:
            hint = "; from floats in [0, 1]: (255 * x).round().astype(np.uint8)" if array.dtype.kind == "f" else ""
            raise UserError(f"got an array of {array.dtype}; give uint8 values from 0 to 255{hint}")

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """Scales values: `(pixels * input_max / 255 - mean) / std`, in the network's colour order.

        Args:
          pixels: uint8 `[..., channels]`, RGB.

        Returns:
          float32, of the same shape.
        """
        if self.color_order == "bgr":
            pixels = pixels[..., [2, 1, 0, *range(3, self.channels)]] if self.channels > 1 else pixels
        # One multiplication and one addition in float64, rounded once. Libraries differ in the order of operations and
        # so in the last bit of float32; this is the value that all of them approximate.
        scale = self.input_max / 255 / np.asarray(self.std)
        return (pixels * scale - np.asarray(self.mean) / np.asarray(self.std)).astype(np.float32)

    def for_channels(self, channels: int) -> "Preprocess":
        """The same preprocessing for a network whose stem was adapted to another number of channels.

        For grey, mean and std are averaged over the colours. A fourth channel has those of the first colour, since its
        weights are copies of the first colour's.

        Args:
          channels: 1, 3 or 4.

        Raises:
          UserError: `channels` is another number.
        """
        if channels not in _MODES:
            raise UserError(f"got {channels} channels; images are read with 1 (grey), 3 (RGB) or 4 (RGBA)")
        if channels == self.channels:
            return self
        mean: tuple[float, ...]
        std: tuple[float, ...]
        if channels == 1:
            mean, std = (sum(self.mean) / len(self.mean),), (sum(self.std) / len(self.std),)
        else:
            mean, std = ((values * channels)[:channels] for values in (self.mean, self.std))
        return replace(self, mean=mean, std=std)

    def to_json(self) -> dict[str, Any]:
        """The settings as plain data, for JSON."""
        data = asdict(self)
        return data if self.assumed else {key: value for key, value in data.items() if key != "assumed"}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Preprocess":
        """The inverse of `to_json`.

        Raises:
          UserError: a name is unknown, or a value invalid.
        """
        names = {f.name for f in fields(cls)}
        for name in data:
            if name not in names:
                raise UserError(f"unknown preprocessing setting {name!r}; {closest(str(name), names)}")
        try:
            lists: dict[str, Any] = {n: tuple(float(x) for x in data[n]) for n in ("mean", "std") if n in data}
            lists |= {name: tuple(map(str, data[name])) for name in ("assumed",) if name in data}
            return cls(**{**data, **lists})
        except (TypeError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"the preprocessing {dict(data)!r} cannot be used: {error}") from error

    def words(self, names: Iterable[str] = SETTINGS) -> str:
        """Some of the settings as text: `image_size=224, crop=0.875`."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    @classmethod
    def of(cls, weights: Weights, *, test_size: bool = False) -> "Preprocess":
        """The preprocessing of a published checkpoint.

        Args:
          weights: the checkpoint.
          test_size: take the larger image size at which the checkpoint is most accurate, if its source names one.
        """
        size, crop = weights.image_size, weights.crop
        if test_size:
            size, crop = weights.test_image_size or size, weights.test_crop or crop
        return cls(size, crop, weights.crop_mode, weights.interpolation, weights.mean, weights.std)


_ACCEPTED = "give a path, a PIL image, a uint8 array [H, W, C] or [N, H, W, C] in RGB, or a list of these"


def _opened(image: ImageLike) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, bytes):
        return open_image(image)
    if not isinstance(image, str | os.PathLike):
        raise UserError(f"got {type(image).__name__}; {_ACCEPTED}")
    path = Path(image)
    if not path.is_file():
        raise UserError(f"{image}: {'not a file' if path.exists() else 'no such file'}; {_ACCEPTED}")
    try:
        return open_image(path.read_bytes())
    except OSError as error:
        raise UserError(f"{image} cannot be opened: {error.strerror or error}") from error
