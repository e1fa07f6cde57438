"""Decoding, colour conversion and resizing of single images on the host, as torchvision and timm do them."""

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

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


class UnreadableImage(Exception):
    """An image that cannot be decoded; the message is the reason in a few words."""


@contextlib.contextmanager
def damage_is_unreadable() -> Iterator[None]:
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


def open_image(image: bytes | np.ndarray) -> Image.Image:
    """Reads the header of an encoded image; the pixels follow when they are converted.

    Args:
      image: an encoded image, or uint8 `[H, W, C]` with 1 or 3 channels.

    Returns:
      The image, not yet decoded where it is a file.

    Raises:
      UnreadableImage: it is empty, of no format that Pillow knows, or an array of another shape or dtype.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3):
            raise UnreadableImage(f"uint8 [H, W, 1 or 3] is needed, not {image.dtype} {list(image.shape)}")
        return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    if not image:
        raise UnreadableImage("the file is empty")
    with damage_is_unreadable():
        return Image.open(io.BytesIO(image))


def to_rgb(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """Decodes and converts to RGB.

    Transparency is dropped and the orientation tag ignored, as torchvision, timm and TensorFlow do: published weights
    were trained that way. 16-bit greys keep their high byte, as Pillow itself does with 16-bit colours; its own
    conversion of greys would turn everything above 255 white.

    Args:
      image: of any mode.
      mode: `RGB`, or another one of eight bits a channel that a network takes: `L`, `RGBA`.

    Returns:
      The decoded image in that mode.

    Raises:
      UnreadableImage: when it cannot be decoded.
    """
    with damage_is_unreadable():
        image.load()
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        if "transparency" in image.info:
            image = image.convert("RGBA")  # a palette with transparency warns when it goes straight to RGB
        return image if image.mode == mode else image.convert(mode)  # to its own mode it would copy


def resized(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """The image at another size (width, height), antialiased; at its own size untouched, bit by bit."""
    return image if image.size == size else image.resize(size, resample)


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """The central `size` x `size` pixels, rounded as torchvision does; black where the image is smaller.

    Returns:
      uint8 `[size, size, C]`, without the last axis for a grey image.
    """
    left, upper = round((image.width - size) / 2), round((image.height - size) / 2)
    return np.asarray(image.crop((left, upper, left + size, upper + size)))


def short_side_and_centre(image: Image.Image, short: int, size: int, resample: Image.Resampling) -> np.ndarray:
    """Short side to `short`, the other rounded down, then the central `size` x `size`; see `centre_crop`."""
    least = min(image.size)
    return centre_crop(resized(image, (short * image.width // least, short * image.height // least), resample), size)
