"""From an encoded image to uint8 [size, size, 3] on the host: crops and resizing for training and evaluation.

Everything else (flips, colour, normalisation) happens on the accelerator. Crops and sizes follow torchvision, so that
a network evaluated here sees the pixels that its published accuracy was measured on.
"""

import math

import numpy as np
from PIL import Image

from se_flax.images import (
    INTERPOLATIONS,
    UnreadableImage,
    damage_is_unreadable,
    open_image,
    resized,
    short_side_and_centre,
    to_rgb,
)

__all__ = ["INTERPOLATIONS", "TRAIN_CROPS", "UnreadableImage", "eval_image", "random_box", "train_image"]

TRAIN_CROPS = ("resize", "random_resized", "center")

Box = tuple[int, int, int, int]  # left, upper, right, lower, in pixels


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
    opened = open_image(image)
    resample = INTERPOLATIONS[interpolation]
    if crop == "center":
        return short_side_and_centre(to_rgb(_shrunk(opened, min(opened.size), size)), size, size, resample)
    if crop == "resize":
        return np.asarray(resized(to_rgb(_shrunk(opened, min(opened.size), size)), (size, size), resample))
    width, height = opened.size
    left, upper, right, lower = random_box(rng, width, height, scale, ratio)
    rgb = to_rgb(_shrunk(opened, min(right - left, lower - upper), size))
    # The box was drawn in full-size pixels, so that it does not depend on how the file is decoded.
    across, down = rgb.width / width, rgb.height / height
    box = (round(left * across), round(upper * down), round(right * across), round(lower * down))
    return np.asarray(resized(rgb.crop(box), (size, size), resample))


def eval_image(
    image: bytes | np.ndarray, *, size: int, crop_fraction: float = 1.0, interpolation: str = "bilinear"
) -> np.ndarray:
    """One evaluation image, decoded at full size: nothing is approximated here.

    Args:
      image: an encoded image, or uint8 `[H, W, C]` with 1 or 3 channels.
      size: side of the result in pixels.
      crop_fraction: 1 resizes the whole image to `size` x `size` without keeping its aspect (an image of that size
        passes bit by bit). Less than 1 resizes the short side to `size / crop_fraction`, rounded down, and crops the
        centre.
      interpolation: `bilinear` or `bicubic`, both antialiased.

    Returns:
      uint8 `[size, size, 3]`.

    Raises:
      UnreadableImage: when it cannot be decoded.
    """
    rgb = to_rgb(open_image(image))
    resample = INTERPOLATIONS[interpolation]
    if crop_fraction == 1.0:
        return np.asarray(resized(rgb, (size, size), resample))
    return short_side_and_centre(rgb, math.floor(size / crop_fraction), size, resample)


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


def _shrunk(image: Image.Image, side: int, size: int) -> Image.Image:
    """Asks the JPEG decoder for fewer pixels when `side` source pixels become `size`; no other format can."""
    share = 2 * size / side
    if share <= 0.5 and image.format == "JPEG":
        with damage_is_unreadable():
            image.draft(None, (math.ceil(image.width * share), math.ceil(image.height * share)))
    return image
