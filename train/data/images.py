"""Decoding, crops and resizing of encoded images to uint8 [size, size, 3] on the host.

Everything else (flips, colour, normalisation) runs on the accelerator. Crops and sizes follow torchvision, so that a
network is evaluated on the pixels that its published accuracy was measured on.

Two optional packages speed up random crops; without them Pillow does the same (`benchmarks/loader.py` compares).
simplejpeg decodes to exactly Pillow's pixels; cykooz_resizer resizes bilinearly to Pillow's pixels up to rounding (at
most one of 255 levels). For the same pixels on all hosts, install the same packages on all hosts.
"""

import functools
import importlib
import math
import struct
from typing import Any

import numpy as np
from PIL import Image

from se_flax.images.decode import (
    INTERPOLATIONS,
    UnreadableImage,
    check_resize,
    damage_is_unreadable,
    open_image,
    orientation,
    resized,
    short_side_and_centre,
    to_rgb,
)

__all__ = ["FIXED_CROPS", "INTERPOLATIONS", "TRAIN_CROPS", "UnreadableImage", "eval_image", "random_box", "train_image"]


def _optional(name: str) -> Any:
    """A module, or None if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


simplejpeg, cykooz_resizer = _optional("simplejpeg"), _optional("cykooz_resizer")

TRAIN_CROPS = ("resize", "random_resized", "center")
FIXED_CROPS = ("resize", "center")  # which draw nothing: an image is the same in every epoch

Box = tuple[int, int, int, int]  # left, upper, right, lower, in pixels
Frame = tuple[int, int, int]  # of a JPEG: position of the number of rows in its header, width, height

# Rows below a crop that its last row depends on: chroma of half height is interpolated with the row below.
_CONTEXT_ROWS = 2
_SOF = (0xC0, 0xC1, 0xC2)  # frame headers of sequential and progressive JPEGs with Huffman coding


def train_image(
    image: bytes | np.ndarray,
    rng: np.random.Generator,
    *,
    size: int,
    crop: str = "resize",
    scale: tuple[float, ...] = (0.08, 1.0),
    ratio: tuple[float, ...] = (0.75, 4.0 / 3.0),
    interpolation: str = "bilinear",
    exif_orientation: bool = True,
) -> np.ndarray:
    """One training image.

    A JPEG at least four times larger than needed is decoded at a half, a quarter or an eighth of its size, which leaves
    at least two source pixels per output pixel in each direction. `resize` and `center` return an image of `size` x
    `size` unchanged.

    Args:
      image: an encoded image, or uint8 `[H, W, C]` with 1 or 3 channels.
      rng: draws the crop of `random_resized`; the other crops draw nothing.
      size: height and width of the result in pixels.
      crop: `resize` (the whole image, aspect ratio not kept), `random_resized` (Inception's crop, see `random_box`), or
        `center` (short side to `size`, then the centre).
      scale: of `random_resized`: least and greatest share of the area.
      ratio: of `random_resized`: least and greatest width / height.
      interpolation: `bilinear` or `bicubic`, both antialiased.
      exif_orientation: rotate the image as its EXIF data say.

    Returns:
      uint8 `[size, size, 3]`.

    Raises:
      UnreadableImage: the image cannot be decoded, or its aspect ratio is too extreme.
    """
    if crop == "random_resized":
        return _random_resized(image, rng, size, scale, ratio, interpolation, exif_orientation)
    opened = open_image(image)
    resample = INTERPOLATIONS[interpolation]
    rgb = to_rgb(_shrunk(opened, _shrink_factor(min(opened.size), size)), exif_orientation=exif_orientation)
    if crop == "center":
        return short_side_and_centre(rgb, size, size, resample)
    return np.asarray(resized(rgb, (size, size), resample))


def eval_image(
    image: bytes | np.ndarray,
    *,
    size: int,
    crop_fraction: float = 1.0,
    interpolation: str = "bilinear",
    exif_orientation: bool = True,
) -> np.ndarray:
    """One evaluation image, decoded at full size, without approximations.

    Args:
      image: an encoded image, or uint8 `[H, W, C]` with 1 or 3 channels.
      size: height and width of the result in pixels.
      crop_fraction: 1 resizes the whole image to `size` x `size` without keeping its aspect ratio (an image of that
        size is unchanged). Less than 1 resizes the short side to `size / crop_fraction`, rounded down, and crops the
        centre.
      interpolation: `bilinear` or `bicubic`, both antialiased.
      exif_orientation: rotate the image as its EXIF data say.

    Returns:
      uint8 `[size, size, 3]`.

    Raises:
      UnreadableImage: the image cannot be decoded, or its aspect ratio is too extreme.
    """
    rgb = to_rgb(open_image(image), exif_orientation=exif_orientation)
    resample = INTERPOLATIONS[interpolation]
    if crop_fraction == 1.0:
        return np.asarray(resized(rgb, (size, size), resample))
    return short_side_and_centre(rgb, math.floor(size / crop_fraction), size, resample)


def random_box(
    rng: np.random.Generator, width: int, height: int, scale: tuple[float, ...], ratio: tuple[float, ...]
) -> Box:
    """Inception's crop: a random share of the area with a random aspect ratio at a random place.

    "Going deeper with convolutions" (Szegedy et al. 2014, section 6), drawn as in torchvision's `RandomResizedCrop`:
    area uniform, aspect ratio log-uniform, ten tries, then the largest central crop with an allowed aspect ratio.

    Args:
      rng: random number generator.
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


def _random_resized(
    image: bytes | np.ndarray,
    rng: np.random.Generator,
    size: int,
    scale: tuple[float, ...],
    ratio: tuple[float, ...],
    interpolation: str,
    exif_orientation: bool,
) -> np.ndarray:
    """Draws the box, decodes the part that it needs, resizes. The box is in pixels of the full, upright image."""
    frame = _jpeg_frame(image)
    # FF E1 begins the segment of a JPEG that may hold EXIF data; the two bytes cannot occur in the pixels' data.
    read_header = frame is None or (exif_orientation and isinstance(image, bytes) and b"\xff\xe1" in image)
    opened = open_image(image) if read_header else None
    turn = orientation(opened) if opened is not None and exif_orientation else 1
    width, height = frame[1:] if frame is not None else opened.size  # type: ignore[union-attr]
    if turn >= 5:
        width, height = height, width
    box = random_box(rng, width, height, scale, ratio)
    factor = _shrink_factor(min(box[2] - box[0], box[3] - box[1]), size)
    window = None
    if isinstance(image, bytes) and frame is not None:
        window = _window_of_jpeg(image, frame, box, factor, turn)
    if window is None:
        rgb = to_rgb(_shrunk(opened or open_image(image), factor), exif_orientation=exif_orientation)
        return _scaled(rgb.crop(_coarser(box, rgb.width / width, rgb.height / height)), size, interpolation)
    return _scaled(window, size, interpolation)


def _coarser(box: Box, across: float, down: float) -> Box:
    """The box in pixels of the reduced image."""
    left, upper, right, lower = box
    return round(left * across), round(upper * down), round(right * across), round(lower * down)


def _shrink_factor(side: int, size: int) -> int:
    """Factor (1, 2, 4 or 8) by which a JPEG decoder may reduce `side` source pixels that become `size`."""
    return next((factor for factor in (8, 4, 2) if side >= 2 * factor * size), 1)


def _shrunk(image: Image.Image, factor: int) -> Image.Image:
    """Lets the JPEG decoder reduce the image; other formats cannot."""
    if factor > 1 and image.format in ("JPEG", "MPO"):  # MPO: several JPEGs in one file, as phones write
        with damage_is_unreadable():
            image.draft(None, (image.width // factor, image.height // factor))
    return image


def _jpeg_frame(image: bytes | np.ndarray) -> Frame | None:
    """Reads a JPEG's frame header; None for files that Pillow must decode.

    These are other formats, JPEGs that simplejpeg cannot convert to RGB (CMYK), images that Pillow refuses for their
    size, and files without a JPEG's end marker, for which simplejpeg fills missing data with grey.
    """
    if simplejpeg is None or not isinstance(image, bytes):
        return None
    if not (image.startswith(b"\xff\xd8") and image.endswith(b"\xff\xd9")):
        return None
    at = 2
    while at + 10 <= len(image) and image[at] == 0xFF:
        if image[at + 1] in _SOF:
            bits, height, width, channels = struct.unpack_from(">BHHB", image, at + 4)
            fits = 0 < width * height <= (Image.MAX_IMAGE_PIXELS or math.inf)
            return (at + 5, width, height) if bits == 8 and channels in (1, 3) and fits else None
        at += 2 + int.from_bytes(image[at + 2 : at + 4], "big")
    return None


def _window_of_jpeg(jpeg: bytes, frame: Frame, box: Box, factor: int, turn: int) -> np.ndarray | None:
    """Decodes the rows down to the end of the box and crops the box; None if Pillow must decode.

    Rows are stored from top to bottom, so decoding stops early if the header is changed to fewer rows, and the rows
    before are bit by bit the same. Damage further down is not noticed. No library with wheels skips the rows above a
    box or the columns beside it.

    Args:
      jpeg: the file.
      frame: from `_jpeg_frame`.
      box: in pixels of the full, upright image.
      factor: from `_shrink_factor`.
      turn: orientation, see `se_flax.images.decode.ORIENTATIONS`.

    Returns:
      uint8 `[height, width, 3]`, upright, a view.
    """
    at, width, height = frame
    wide, high = (math.ceil(side / factor) for side in (width, height))
    across, down = wide / width, high / height
    coarse = _coarser(box, across, down) if turn < 5 else _coarser(box, down, across)
    left, upper, right, lower = _as_stored(coarse, turn, wide, high)
    rows = min(height, (lower + _CONTEXT_ROWS) * factor)
    high = math.ceil(rows / factor)
    cut = bytearray(jpeg)
    cut[at : at + 2] = rows.to_bytes(2, "big")
    least = {"min_height": high, "min_width": wide} if factor > 1 else {}
    try:
        # Not strict, which would report the rows after the changed end as damage. Then both tolerate the same damage.
        pixels = simplejpeg.decode_jpeg(cut, "RGB", strict=False, **least)
    except Exception:  # Pillow decides
        return None
    if pixels.shape[:2] != (high, wide):
        return None
    return _upright(pixels[upper:lower, left:right], turn)


# Each orientation is a transposition (from 5 on), then a mirroring of columns, rows or both.
_MIRRORED_COLUMNS, _MIRRORED_ROWS = (2, 3, 6, 7), (3, 4, 7, 8)


def _as_stored(box: Box, turn: int, width: int, height: int) -> Box:
    """The box of the upright image in the coordinates of the stored image, which is `width` x `height`."""
    if turn >= 5:
        width, height = height, width
    left, upper, right, lower = box
    if turn in _MIRRORED_COLUMNS:
        left, right = width - right, width - left
    if turn in _MIRRORED_ROWS:
        upper, lower = height - lower, height - upper
    return (upper, left, lower, right) if turn >= 5 else (left, upper, right, lower)


def _upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    """The same as `Image.transpose` with `ORIENTATIONS[turn]`, as a view."""
    if turn >= 5:
        pixels = pixels.swapaxes(0, 1)
    if turn in _MIRRORED_COLUMNS:
        pixels = pixels[:, ::-1]
    return pixels[::-1] if turn in _MIRRORED_ROWS else pixels


def _scaled(window: Image.Image | np.ndarray, size: int, interpolation: str) -> np.ndarray:
    """Resizes the window to uint8 `[size, size, 3]`, antialiased; a window of that size is unchanged.

    Raises:
      UnreadableImage: the aspect ratio is too extreme.
    """
    if cykooz_resizer is None or interpolation != "bilinear":
        # Bicubic overshoots are clipped between the two passes, and cykooz_resizer has the passes in another order.
        image = window if isinstance(window, Image.Image) else Image.fromarray(window)
        return np.asarray(resized(image, (size, size), INTERPOLATIONS[interpolation]))
    pixels = np.asarray(window)
    height, width, _ = pixels.shape
    if height == width == size:
        return pixels
    kind = cykooz_resizer.PixelType.U8x3
    check_resize((width, height), (size, size))
    source = cykooz_resizer.ImageData(width, height, kind, pixels.tobytes())
    target = cykooz_resizer.ImageData(size, size, kind)
    # A new resizer per call, since threads may not share one.
    cykooz_resizer.Resizer().resize(source, target, _bilinear())
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(size, size, 3)


@functools.cache
def _bilinear() -> Any:
    algorithm = cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.bilinear)
    return cykooz_resizer.ResizeOptions(resize_alg=algorithm, use_alpha=False)
