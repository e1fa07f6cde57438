"""From an encoded image to uint8 [size, size, 3] on the host: decoding, conversion to RGB, crops and resizing.

Everything else (flips, colour, normalisation) happens on the accelerator. Crops and sizes follow torchvision, so that
a network evaluated here sees the pixels that its published accuracy was measured on.
"""

import contextlib
import io
import math
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
TRAIN_CROPS = ("resize", "random_resized", "center")

# What Pillow raises for damaged files, depending on the format and on where the damage is.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

Box = tuple[int, int, int, int]  # left, upper, right, lower, in pixels


class UnreadableImage(Exception):
    """An image that cannot be decoded; the message is the reason in a few words."""


@contextlib.contextmanager
def _damage_is_unreadable() -> Iterator[None]:
    """Turns whatever reading or decoding an image raises into `UnreadableImage`.

    Raises:
      UnreadableImage: with the reason.
    """
    try:
        yield
    except Image.UnidentifiedImageError as error:  # its own text holds a memory address
        raise UnreadableImage("not an image that Pillow knows") from error
    except _DAMAGE as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImage(reason) from error


def train_image(
    image: bytes | np.ndarray,
    rng: np.random.Generator,
    *,
    size: int,
    crop: str = "resize",
    scale: tuple[float, ...] = (0.08, 1.0),
    ratio: tuple[float, ...] = (0.75, 4.0 / 3.0),
    interpolation: str = "bilinear",
) -> np.ndarray:
    """One training image.

    A JPEG at least four times larger than needed is decoded at a half, a quarter or an eighth of its size, which
    leaves at least two source pixels for each wanted one. An image of `size` x `size` passes `resize` and `center` bit
    by bit.

    Args:
      image: an encoded image, or uint8 `[H, W, C]` with 1 or 3 channels.
      rng: draws the crop of `random_resized`; the other crops draw nothing.
      size: side of the result in pixels.
      crop: `resize` (the whole image, aspect not kept), `random_resized` (Inception's crop, see `random_box`), or
        `center` (short side to `size`, then the centre).
      scale: `random_resized`: least and greatest share of the area.
      ratio: `random_resized`: least and greatest width / height.
      interpolation: `bilinear` or `bicubic`, both antialiased.

    Returns:
      uint8 `[size, size, 3]`.

    Raises:
      UnreadableImage: when it cannot be decoded.
    """
    opened = _open(image)
    resample = INTERPOLATIONS[interpolation]
    if crop == "center":
        return _short_side_and_centre(_rgb(_shrunk(opened, min(opened.size), size)), size, size, resample)
    if crop == "resize":
        return np.asarray(_resized(_rgb(_shrunk(opened, min(opened.size), size)), (size, size), resample))
    width, height = opened.size
    left, upper, right, lower = random_box(rng, width, height, scale, ratio)
    rgb = _rgb(_shrunk(opened, min(right - left, lower - upper), size))
    # The box was drawn in full-size pixels, so that it does not depend on how the file is decoded.
    across, down = rgb.width / width, rgb.height / height
    box = (round(left * across), round(upper * down), round(right * across), round(lower * down))
    return np.asarray(_resized(rgb.crop(box), (size, size), resample))


def eval_image(
    image: bytes | np.ndarray, *, size: int, crop_fraction: float = 1.0, interpolation: str = "bilinear"
) -> np.ndarray:
    """One evaluation image, decoded at full size: nothing is approximated here.

    Args:
      image: an encoded image, or uint8 `[H, W, C]` with 1 or 3 channels.
      size: side of the result in pixels.
      crop_fraction: 1 resizes the whole image to `size` x `size` without keeping its aspect (an image of that size
        passes bit by bit). Less than 1 resizes the short side to `round(size / crop_fraction)` and crops the centre.
      interpolation: `bilinear` or `bicubic`, both antialiased.

    Returns:
      uint8 `[size, size, 3]`.

    Raises:
      UnreadableImage: when it cannot be decoded.
    """
    rgb = _rgb(_open(image))
    resample = INTERPOLATIONS[interpolation]
    if crop_fraction == 1.0:
        return np.asarray(_resized(rgb, (size, size), resample))
    return _short_side_and_centre(rgb, round(size / crop_fraction), size, resample)


def random_box(
    rng: np.random.Generator, width: int, height: int, scale: tuple[float, ...], ratio: tuple[float, ...]
) -> Box:
    """Inception's crop: a random share of the area with a random aspect at a random place.

    "Going deeper with convolutions" (Szegedy et al. 2014, section 6), as torchvision's `RandomResizedCrop` draws it:
    area uniform, aspect log-uniform, ten tries, then the largest central crop with an allowed aspect.

    Args:
      rng: where the numbers come from.
      width: of the image.
      height: of the image.
      scale: least and greatest share of the area.
      ratio: least and greatest width / height.

    Returns:
      `(left, upper, right, lower)`, inside the image.
    """
    for _ in range(10):
        area = width * height * rng.uniform(scale[0], scale[1])
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, upper, left + w, upper + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def _open(image: bytes | np.ndarray) -> Image.Image:
    """Reads the header only; the pixels of a file follow in `_rgb`."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3):
            raise UnreadableImage(f"uint8 [H, W, 1 or 3] is needed, not {image.dtype} {list(image.shape)}")
        return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    if not image:
        raise UnreadableImage("the file is empty")
    with _damage_is_unreadable():
        return Image.open(io.BytesIO(image))


def _shrunk(image: Image.Image, side: int, size: int) -> Image.Image:
    """Asks the JPEG decoder for fewer pixels when `side` source pixels become `size`; no other format can."""
    share = 2 * size / side
    if share <= 0.5 and image.format == "JPEG":
        with _damage_is_unreadable():
            image.draft(None, (math.ceil(image.width * share), math.ceil(image.height * share)))
    return image


def _rgb(image: Image.Image) -> Image.Image:
    """Decodes and converts to RGB.

    Transparency is dropped and the orientation tag ignored, as torchvision, timm and TensorFlow do: published weights
    were trained that way. 16-bit greys keep their high byte, as Pillow itself does with 16-bit colours; its own
    conversion of greys would turn everything above 255 white.
    """
    with _damage_is_unreadable():
        image.load()
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        if "transparency" in image.info:
            image = image.convert("RGBA")  # a palette with transparency warns when it goes straight to RGB
        return image.convert("RGB")


def _resized(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    return image if image.size == size else image.resize(size, resample)


def _short_side_and_centre(image: Image.Image, short: int, size: int, resample: Image.Resampling) -> np.ndarray:
    """Short side to `short`, the other rounded down, then the central `size` x `size`."""
    least = min(image.size)
    image = _resized(image, (short * image.width // least, short * image.height // least), resample)
    left, upper = round((image.width - size) / 2), round((image.height - size) / 2)
    return np.asarray(image.crop((left, upper, left + size, upper + size)))
