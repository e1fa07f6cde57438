"""Decoding, colour conversion and resizing of single images on the host, as torchvision and timm do them."""

import contextlib
import functools
import io
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image

INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

FORMATS = ("JPEG", "PNG", "WebP", "BMP", "GIF", "TIFF", "AVIF", "PPM")
"""Allowed formats of a file's content, whatever its suffix. Pillow has more, and starts other programs for some."""

MOST_PIXELS = 1 << 25
"""Most pixels of intermediate and final images of a resize; 128 MiB at Pillow's four bytes per pixel."""

ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that sets an image upright, by its EXIF orientation; 1 is upright. From 5 on it swaps width and height.
"""


class UnreadableImage(Exception):
    """An image that cannot be decoded; the message is the reason in a few words."""


class ExtremeShape(UnreadableImage):
    """An image with such an extreme aspect ratio that resizing it would take too much memory."""


@contextlib.contextmanager
def damage_is_unreadable() -> Iterator[None]:
    """Turns any exception from reading or decoding an image into `UnreadableImage`.

    Raises:
      UnreadableImage: with the reason.
    """
    try:
        yield
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError as error:  # its message has a memory address
        raise UnreadableImage(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from error
    except MemoryError as error:
        raise UnreadableImage("not enough memory for it") from error
    except Exception as error:  # which exception depends on the format and the damage
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImage(" ".join(str(reason).split())) from error


def open_image(image: bytes | np.ndarray) -> Image.Image:
    """Opens an image; of an encoded one only the header is read, and the pixels when they are converted.

    Args:
      image: an encoded image, or uint8 `[H, W, C]` with 1 or 3 channels.

    Returns:
      The image, not decoded yet if it is encoded.

    Raises:
      UnreadableImage: the image is empty, of none of the `FORMATS`, or an array of another shape or dtype.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3):
            raise UnreadableImage(f"uint8 [H, W, 1 or 3] is needed, not {image.dtype} {list(image.shape)}")
        return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    if not image:
        raise UnreadableImage("the file is empty")
    with damage_is_unreadable():
        return Image.open(io.BytesIO(image), formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()  # Pillow may be built without some formats
    return tuple(name.upper() for name in FORMATS if name.upper() in Image.OPEN)


def orientation(image: Image.Image) -> int:
    """The orientation in an image's EXIF data (or in XMP, as in Pillow's `exif_transpose`).

    Args:
      image: the image; it is decoded unless it is a JPEG, whose EXIF data come before the pixels.

    Returns:
      1 to 8, see `ORIENTATIONS`; 1 without EXIF data or for damaged ones, as in viewers.

    Raises:
      UnreadableImage: the image cannot be decoded.
    """
    if image.format not in ("JPEG", "MPO"):
        with damage_is_unreadable():
            image.load()
    try:
        turn = image.getexif().get(ExifTags.Base.Orientation)
        return turn if turn in ORIENTATIONS else 1
    except Exception:  # the EXIF data are damaged; the pixels can still be read
        return 1


def to_rgb(image: Image.Image, mode: str = "RGB", *, exif_orientation: bool = True) -> Image.Image:
    """Decodes, converts to RGB and sets upright.

    Transparency is dropped, as in torchvision, timm and TensorFlow, and so in the training of published weights. 16-bit
    grey values keep their high byte, as Pillow does for 16-bit colours; Pillow's conversion of 16-bit grey would turn
    everything above 255 white.

    Args:
      image: of any mode.
      mode: `RGB`, `L` or `RGBA`, whichever the network takes.
      exif_orientation: rotate the image as its EXIF data say; False leaves it as stored, as torchvision does (except
        for TIFF, which Pillow rotates by itself).

    Returns:
      The decoded image in that mode.

    Raises:
      UnreadableImage: the image cannot be decoded.
    """
    with damage_is_unreadable():
        image.load()
        turn = ORIENTATIONS.get(orientation(image)) if exif_orientation else None
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        if "transparency" in image.info:
            image = image.convert("RGBA")  # Pillow warns for a palette with transparency
        image = image if image.mode == mode else image.convert(mode)  # converting to the same mode would copy
        return image if turn is None else image.transpose(turn)


def resized(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """Resizes to (width, height), antialiased; an image of that size is returned unchanged.

    Raises:
      UnreadableImage: the resize takes too much memory, see `check_resize`.
    """
    if image.size == size:
        return image
    check_resize(image.size, size)
    with damage_is_unreadable():
        return image.resize(size, resample)


def check_resize(given: tuple[int, int], wanted: tuple[int, int]) -> None:
    """Refuses a resize with more pixels than `MOST_PIXELS`, the image itself, and the square of the new short side.

    A strip of 2 x 6000 pixels fits into 150 bytes; resized to a short side of 256 it has 197 million pixels.

    Args:
      given: width and height before.
      wanted: width and height after. Pillow resizes one direction after the other, so the intermediate image counts.

    Raises:
      ExtremeShape: the resize takes too many pixels.
    """
    width, height = (max(pair) for pair in zip(given, wanted, strict=True))
    most = max(MOST_PIXELS, given[0] * given[1], min(wanted) ** 2)
    if width * height > most:
        raise ExtremeShape(
            f"{given[0]} x {given[1]} pixels would take {width} x {height} while they are resized, and {most:,} pixels "
            "are allowed"
        )


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """The central `size` x `size` pixels, with torchvision's rounding; black outside of a smaller image.

    Returns:
      uint8 `[size, size, C]`, without the last axis for a grey image.
    """
    left, upper = round((image.width - size) / 2), round((image.height - size) / 2)
    return np.asarray(image.crop((left, upper, left + size, upper + size)))


def short_side_and_centre(image: Image.Image, short: int, size: int, resample: Image.Resampling) -> np.ndarray:
    """Resizes the short side to `short`, the other rounded down, then crops the central `size` x `size` pixels."""
    least = min(image.size)
    return centre_crop(resized(image, (short * image.width // least, short * image.height // least), resample), size)
