"""Decoding, colour conversion and resizing of single images on the host, as torchvision and timm do them."""

import contextlib
import functools
import io
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image

INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

FORMATS = ("JPEG", "PNG", "WebP", "BMP", "GIF", "TIFF", "AVIF", "PPM")
"""What a file's content may be, whatever its name. Pillow knows many more, and starts other programs for some."""

MOST_PIXELS = 1 << 25
"""What a resize may take beyond the image's own pixels; 128 MiB, as Pillow holds four bytes for each."""

ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets an image upright, by its orientation in EXIF; 1 is upright already. From 5 on, width and height change."""


class UnreadableImage(Exception):
    """An image that cannot be decoded; the message is the reason in a few words."""


class ExtremeShape(UnreadableImage):
    """An image that is so much longer than wide that resizing it would take too much memory."""


@contextlib.contextmanager
def damage_is_unreadable() -> Iterator[None]:
    """Turns whatever reading or decoding an image raises into `UnreadableImage`.

    Raises:
      UnreadableImage: with the reason.
    """
    try:
        yield
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError as error:  # its own text holds a memory address
        raise UnreadableImage(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from error
    except MemoryError as error:
        raise UnreadableImage("not enough memory for it") from error
    except Exception as error:  # what a decoder raises depends on the format and on where the damage is
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImage(" ".join(str(reason).split())) from error


def open_image(image: bytes | np.ndarray) -> Image.Image:
    """Reads the header of an encoded image; the pixels follow when they are converted.

    Args:
      image: an encoded image, or uint8 `[H, W, C]` with 1 or 3 channels.

    Returns:
      The image, not yet decoded where it is a file.

    Raises:
      UnreadableImage: it is empty, of none of the `FORMATS`, or an array of another shape or dtype.
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
    Image.init()  # Pillow may have been built without some
    return tuple(name.upper() for name in FORMATS if name.upper() in Image.OPEN)


def orientation(image: Image.Image) -> int:
    """How the camera was held, as EXIF says it (or XMP in its place, as Pillow's own `exif_transpose` reads it).

    Args:
      image: it is decoded, unless it is a JPEG, which says so before its pixels.

    Returns:
      1 to 8, see `ORIENTATIONS`; 1 where nothing is said or the EXIF data are damaged, as viewers do.

    Raises:
      UnreadableImage: when it cannot be decoded.
    """
    if image.format not in ("JPEG", "MPO"):
        with damage_is_unreadable():
            image.load()
    try:
        turn = image.getexif().get(ExifTags.Base.Orientation)
        return turn if turn in ORIENTATIONS else 1
    except Exception:  # what damaged EXIF data raise depends on the damage; the pixels are none the worse
        return 1


def to_rgb(image: Image.Image, mode: str = "RGB", *, exif_orientation: bool = True) -> Image.Image:
    """Decodes, converts to RGB and sets upright.

    Transparency is dropped, as torchvision, timm and TensorFlow do: published weights were trained that way. 16-bit
    greys keep their high byte, as Pillow itself does with 16-bit colours; its own conversion of greys would turn
    everything above 255 white.

    Args:
      image: of any mode.
      mode: `RGB`, or another one of eight bits a channel that a network takes: `L`, `RGBA`.
      exif_orientation: turn the image as its EXIF data say; False leaves it as it is stored, as torchvision does (but
        for TIFF, which Pillow turns by itself).

    Returns:
      The decoded image in that mode.

    Raises:
      UnreadableImage: when it cannot be decoded.
    """
    with damage_is_unreadable():
        image.load()
        turn = ORIENTATIONS.get(orientation(image)) if exif_orientation else None
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        if "transparency" in image.info:
            image = image.convert("RGBA")  # a palette with transparency warns when it goes straight to RGB
        image = image if image.mode == mode else image.convert(mode)  # to its own mode it would copy
        return image if turn is None else image.transpose(turn)


def resized(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """The image at another size (width, height), antialiased; at its own size untouched, bit by bit.

    Raises:
      UnreadableImage: it takes too much memory, see `check_resize`.
    """
    if image.size == size:
        return image
    check_resize(image.size, size)
    with damage_is_unreadable():
        return image.resize(size, resample)


def check_resize(given: tuple[int, int], wanted: tuple[int, int]) -> None:
    """Refuses what would take more than `MOST_PIXELS` on its way, and more than the image and the square it ends in.

    A strip of 2 x 6000 pixels fits into 150 bytes, and with a short side of 256 it has 197 million pixels.

    Args:
      given: width and height before.
      wanted: width and height after; a resize goes from one to the other a direction at a time.

    Raises:
      ExtremeShape: with the numbers.
    """
    width, height = (max(pair) for pair in zip(given, wanted, strict=True))
    most = max(MOST_PIXELS, given[0] * given[1], min(wanted) ** 2)
    if width * height > most:
        raise ExtremeShape(
            f"{given[0]} x {given[1]} pixels would take {width} x {height} while they are resized, and {most:,} pixels "
            "are allowed"
        )


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
