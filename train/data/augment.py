"""Augmentation inside the jitted train step: pure functions of images and keys, vmapped over the batch.

Images are float32 RGB in [0, 1], *before* normalisation. Every image has its own key, derived from the step's key and
the image's index in the global batch, so the result does not depend on how the batch is distributed over devices. Every
operation has its own number, folded into that key, so that switching one on changes no random numbers of the others.
Operations that are off are not traced and cost nothing.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from se_flax.arrays import check_array
from se_flax.errors import UserError, closest
from se_flax.lowering.dispatch import by_platform
from train.config import Augment
from train.data.randaugment import MAX_MAGNITUDE, blend, luma, randaugment

BLACK = (0.0, 0.0, 0.0)
# Shares of the area, and aspect ratios; torchvision's bounds (Zhong et al. 2020 have an area of up to 0.4).
ERASE_AREA = (0.02, 0.33)
ERASE_ASPECT = (0.3, 3.3)
_ERASE_TRIES = 10
PAD_MODES = ("constant", "reflect")
# Folded into an example's key, one number per operation. The numbers must not change: they are part of a run's seed.
_CROP, _FLIP, _RANDAUGMENT, _JITTER, _ERASE, _CUTOUT, _MIX = range(7)


def check(settings: Augment, image_size: int) -> None:
    """Validates the settings before anything is compiled.

    Args:
      settings: the augmentation's settings.
      image_size: height and width of the training images in pixels.

    Raises:
      UserError: a setting is out of range.
    """
    if settings.pad_mode not in PAD_MODES:
        raise UserError(f"unknown augment.pad_mode {settings.pad_mode!r}; {closest(settings.pad_mode, PAD_MODES)}")
    if settings.alternate_flip and not settings.flip:
        raise UserError("augment.alternate_flip=True needs augment.flip=True: it says when an image is mirrored")
    _within("pad", settings.pad, 0, image_size - 1, f"use a few pixels; the images are {image_size} pixels wide")
    _within("cutout", settings.cutout, 0, image_size, f"the images are {image_size} pixels wide; 0 switches it off")
    for name in ("brightness", "contrast", "saturation"):
        _within(name, getattr(settings, name), 0, 1, "0 switches it off, 0.4 is usual")
    _within("hue", settings.hue, 0, 0.5, "it is a share of the full turn; 0 switches it off")
    _within("randaugment_layers", settings.randaugment_layers, 0, 16, "0 switches it off, 2 is usual")
    _within("randaugment_magnitude", settings.randaugment_magnitude, 0, int(MAX_MAGNITUDE), "9 is usual")
    _within("erase", settings.erase, 0, 1, "it is a probability; 0 switches it off")
    for name in ("mixup", "cutmix"):
        alpha = getattr(settings, name)
        if not (alpha >= 0 and math.isfinite(alpha)):
            what = "it is the alpha of a Beta distribution; 0 switches it off"
            raise UserError(f"augment.{name}={alpha} must be 0 or more: {what}")


def check_pairs(settings: Augment, local_batch: int) -> None:
    """Validates, once the devices are known, that images can be mixed in pairs.

    Args:
      settings: what to do.
      local_batch: images that one device sees in one (micro-)batch.

    Raises:
      UserError: images are mixed, and `local_batch` is odd.
    """
    for name in ("mixup", "cutmix"):
        alpha = getattr(settings, name)
        if alpha > 0 and local_batch % 2:
            what = f"mixes pairs of neighbours, but a device sees {local_batch} images at a time, an odd number"
            remedy = "choose data.batch_size so that every device's share is even, or switch it off with"
            raise UserError(f"augment.{name}={alpha} {what}: {remedy} augment.{name}=0")


def _within(name: str, value: float, low: float, high: float, remedy: str) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise UserError(f"augment.{name}={value} must lie between {low} and {high}: {remedy}")


def example_keys(key: jax.Array, global_index: jax.Array) -> jax.Array:
    """One key per example, whichever device has the example.

    Args:
      key: the step's key (`jax.random.key` or the older uint32 pair).
      global_index: integers [n], indices of the examples in the global batch.

    Returns:
      n keys.

    Raises:
      UserError: an array of another shape or dtype.
    """
    global_index = check_array(global_index, "the indexes of example_keys", "[n]", kind="integer")
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, global_index)


def augment(
    images: jax.Array,
    keys: jax.Array,
    settings: Augment,
    fill: tuple[float, ...] = BLACK,
    mirrored: jax.Array | None = None,
) -> jax.Array:
    """The operations on single images (all but mixup and CutMix).

    Their order is: pad and crop, flip, RandAugment, colour jitter, random erasing, Cutout. RandAugment's geometric
    operations fill with mid-grey, as published, whatever `fill` is.

    Args:
      images: float [N, H, W, 3] in [0, 1].
      keys: N keys, from `example_keys`.
      settings: the augmentation's settings; static (read while tracing).
      fill: RGB in [0, 1] for padding, erasing and Cutout. The ResNet paper (He et al. 2016, section 4.2) and Cutout
        fill with zeros *after* normalisation, which are the mean colour before it: pass the mean for that.
      mirrored: bool [N], which images `flip` mirrors; None for half of them, by chance.

    Returns:
      [N, H, W, 3] in [0, 1], of the images' dtype; computed in float32.

    Raises:
      UserError: the images are not floating-point RGB.
    """
    images = check_array(images, "augment", "[N, H, W, 3]", hint=", in [0, 1]")
    jitter = (settings.brightness, settings.contrast, settings.saturation, settings.hue)

    def one(image, key, mirror=None):
        key_of = functools.partial(jax.random.fold_in, key)
        if settings.pad:
            image = pad_and_crop(image, key_of(_CROP), settings.pad, fill, settings.pad_mode)
        if settings.flip:
            image = flip(image, key_of(_FLIP)) if mirror is None else jnp.where(mirror, image[:, ::-1], image)
        if (layers := settings.randaugment_layers) > 0:
            image = randaugment(image, key_of(_RANDAUGMENT), layers, settings.randaugment_magnitude)
        if any(jitter):
            image = colour_jitter(image, key_of(_JITTER), *jitter)
        if settings.erase:
            image = random_erase(image, key_of(_ERASE), settings.erase, fill)
        if settings.cutout:
            image = cutout(image, key_of(_CUTOUT), settings.cutout, fill)
        return image

    each = jax.vmap(one)
    if settings.randaugment_layers:
        # On a CPU batching gains nothing, and one image at a time computes only the operations that it drew.
        each = functools.partial(by_platform, cpu=_one_by_one(one), default=each)
    given = () if mirrored is None else (mirrored,)
    return each(images.astype(jnp.float32), keys, *given).astype(images.dtype)


def _one_by_one(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda *arrays: jax.lax.map(lambda items: function(*items), arrays)


def pad_and_crop(
    image: jax.Array, key: jax.Array, pad: int, fill: tuple[float, ...] = BLACK, mode: str = "constant"
) -> jax.Array:
    """Pads every side and crops the original size at a random place (He et al. 2016, section 4.2).

    Args:
      image: float32 [H, W, 3].
      key: the draw's key.
      pad: pixels on every side; static.
      fill: RGB of the padding.
      mode: `constant`, or `reflect`: the image mirrored at its border, without `fill`.

    Returns:
      float32 [H, W, 3].

    Raises:
      UserError: an array of another shape or dtype.
    """
    image = check_array(image, "pad_and_crop", "[H, W, 3]")
    height, width, _ = image.shape
    if mode == "reflect":
        canvas = jnp.pad(image, [(pad, pad), (pad, pad), (0, 0)], mode="reflect")
    else:
        canvas = jnp.broadcast_to(jnp.asarray(fill, image.dtype), (height + 2 * pad, width + 2 * pad, 3))
        canvas = canvas.at[pad : pad + height, pad : pad + width].set(image)
    top, left = _whole(jax.random.uniform(key, (2,)), 2 * pad + 1)
    return jax.lax.dynamic_slice(canvas, (top, left, 0), image.shape)


def flip(image: jax.Array, key: jax.Array) -> jax.Array:
    """Mirrors the image left to right with probability 1/2.

    Args:
      image: float32 [H, W, 3].
      key: the draw's key.

    Returns:
      float32 [H, W, 3].

    Raises:
      UserError: an array of another shape or dtype.
    """
    image = check_array(image, "flip", "[H, W, 3]")
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def colour_jitter(
    image: jax.Array, key: jax.Array, brightness: float, contrast: float, saturation: float, hue: float
) -> jax.Array:
    """Random brightness, contrast, saturation and hue, with the arguments of torchvision's ColorJitter.

    torchvision shuffles the four operations; here they always have this order. Factors are uniform in [1 - x, 1 + x],
    the shift of the hue in [-hue, hue] turns.

    Args:
      image: float32 [H, W, 3] in [0, 1].
      key: the draw's key.
      brightness: 0 (off) ... 1; static, as are the others.
      contrast: 0 ... 1.
      saturation: 0 ... 1.
      hue: 0 ... 0.5.

    Returns:
      float32 [H, W, 3] in [0, 1].

    Raises:
      UserError: an array of another shape or dtype.
    """
    image = check_array(image, "colour_jitter", "[H, W, 3]")
    draws = jax.random.uniform(key, (4,), minval=-1.0, maxval=1.0)
    if brightness:
        image = blend(jnp.zeros_like(image), image, 1.0 + brightness * draws[0])
    if contrast:
        image = blend(luma(jnp.mean(image, axis=(0, 1))), image, 1.0 + contrast * draws[1])
    if saturation:
        image = blend(luma(image), image, 1.0 + saturation * draws[2])
    if hue:
        image = shift_hue(image, hue * draws[3])
    return image


def shift_hue(image: jax.Array, turns: float | jax.Array) -> jax.Array:
    """Shifts the hue, at the same saturation and value (HSV).

    Args:
      image: float32 [..., 3] in [0, 1].
      turns: the shift as a fraction of the full circle.

    Returns:
      float32 [..., 3] in [0, 1].

    Raises:
      UserError: an array of another shape or dtype.
    """
    image = check_array(image, "shift_hue", "[..., 3]")
    red, green, blue = jnp.moveaxis(image, -1, 0)
    value = jnp.max(image, axis=-1)
    chroma = value - jnp.min(image, axis=-1)
    divisor = jnp.where(chroma > 0, chroma, 1.0)
    sixths = jnp.where(
        (red >= green) & (red >= blue),  # not value == red: XLA may compute red twice, with different rounding
        (green - blue) / divisor,
        jnp.where(green >= blue, 2.0 + (blue - red) / divisor, 4.0 + (red - green) / divisor),
    )
    # HSV to RGB without its six cases: channel = value - chroma * clip(min(k, 4 - k), 0, 1), with k = (n + 6 * hue)
    # mod 6 and n = 5, 3, 1 for red, green, blue.
    position = jnp.array([5.0, 3.0, 1.0]) + (sixths + 6.0 * turns)[..., None]
    position = position - 6.0 * jnp.floor(position / 6.0)
    fall = jnp.clip(jnp.minimum(position, 4.0 - position), 0.0, 1.0)
    return jnp.clip(value[..., None] - chroma[..., None] * fall, 0.0, 1.0)


def random_erase(image: jax.Array, key: jax.Array, probability: float, fill: tuple[float, ...] = BLACK) -> jax.Array:
    """Fills a random rectangle (Zhong et al. 2020, algorithm 1).

    The paper draws until a rectangle fits; like torchvision, this function gives up after ten draws. The aspect ratio
    is log-uniform, so that wide and tall rectangles are equally frequent.

    Args:
      image: float32 [H, W, 3].
      key: the draw's key.
      probability: of erasing; static.
      fill: RGB of the rectangle.

    Returns:
      float32 [H, W, 3].

    Raises:
      UserError: an array of another shape or dtype.
    """
    image = check_array(image, "random_erase", "[H, W, 3]")
    height, width, _ = image.shape
    draws = jax.random.uniform(key, (3 + 2 * _ERASE_TRIES,))
    chance, down, along = draws[:3]
    low, high = (bound * height * width for bound in ERASE_AREA)
    area = low + (high - low) * draws[3 : 3 + _ERASE_TRIES]
    low, high = (math.log(bound) for bound in ERASE_ASPECT)
    aspect = jnp.exp(low + (high - low) * draws[3 + _ERASE_TRIES :])
    rows, columns = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (rows >= 1) & (rows < height) & (columns >= 1) & (columns < width)
    first = jnp.argmax(fits)
    rows, columns = rows[first].astype(jnp.int32), columns[first].astype(jnp.int32)
    top, left = _whole(down, height - rows + 1), _whole(along, width - columns + 1)
    erase = (chance < probability) & jnp.any(fits)
    box = _box(height, width, top, left, top + rows, left + columns)
    return jnp.where(box & erase, jnp.asarray(fill, image.dtype), image)


def cutout(image: jax.Array, key: jax.Array, side: int, fill: tuple[float, ...] = BLACK) -> jax.Array:
    """Fills a square around a random pixel; part of the square can be outside the image.

    DeVries & Taylor 2017, "Improved Regularization of CNNs with Cutout", section 3.2.

    Args:
      image: float32 [H, W, 3].
      key: the draw's key.
      side: of the square, in pixels; static.
      fill: RGB of the square.

    Returns:
      float32 [H, W, 3].

    Raises:
      UserError: an array of another shape or dtype.
    """
    image = check_array(image, "cutout", "[H, W, 3]")
    height, width, _ = image.shape
    top, left = _whole(jax.random.uniform(key, (2,)), jnp.array([height, width])) - side // 2
    box = _box(height, width, top, left, top + side, left + side)
    return jnp.where(box, jnp.asarray(fill, image.dtype), image)


def mix(
    images: jax.Array, labels: jax.Array, keys: jax.Array, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Mixup (Zhang et al. 2018, equation 1) and CutMix (Yun et al. 2019, section 3.1) between neighbours.

    Images 2i and 2i+1 are mixed with each other. In a shuffled batch the pairs are random, and they do not depend on
    the number of devices. A pair draws one lambda from the key of its even image; if both alphas are positive it draws
    one of the two methods, each with probability 1/2. CutMix's lambda is exactly the share of the image outside the
    box.

    Args:
      images: float [N, H, W, 3], N even.
      labels: float [N, classes], one-hot or soft.
      keys: N keys, from `example_keys`.
      mixup_alpha: of Beta(alpha, alpha), static; 0 switches mixup off.
      cutmix_alpha: likewise for CutMix.

    Returns:
      images [N, H, W, 3] and labels [N, classes] of the dtypes given; computed in float32.

    Raises:
      UserError: N is odd, or an array of another shape or dtype.
    """
    images = check_array(images, "mix", "[N, H, W, 3]")
    labels = check_array(labels, "the labels of mix", f"[{images.shape[0]}, classes]")
    if not (mixup_alpha or cutmix_alpha):
        return images, labels
    count, height, width, _ = images.shape
    if count % 2:
        raise UserError(f"mixup and CutMix take an even number of images, not {count}: choose an even batch per device")

    def draw(key):
        """A pair's weight for each pixel [H, W, 1] and for the label."""
        which_key, mixup_key, cutmix_key = jax.random.split(jax.random.fold_in(key, _MIX), 3)
        plain = boxed = None
        if mixup_alpha:
            share = _beta(mixup_key, mixup_alpha)
            plain = jnp.broadcast_to(share, (height, width, 1)), share
        if cutmix_alpha:
            top, left, bottom, right = cutmix_box(cutmix_key, cutmix_alpha, height, width)
            keep = ~_box(height, width, top, left, bottom, right)
            boxed = keep.astype(jnp.float32), 1.0 - (bottom - top) * (right - left) / (height * width)
        if plain is None or boxed is None:
            return boxed or plain
        chosen = jax.random.bernoulli(which_key)
        return jnp.where(chosen, boxed[0], plain[0]), jnp.where(chosen, boxed[1], plain[1])

    def with_partner(values, weight):
        pairs = values.astype(jnp.float32).reshape(count // 2, 2, *values.shape[1:])
        # Not partner + weight * difference: weights 0 and 1 must copy exactly.
        return (weight * pairs + (1.0 - weight) * pairs[:, ::-1]).reshape(values.shape).astype(values.dtype)

    weight, share = jax.vmap(draw)(keys[::2])
    return with_partner(images, weight[:, None]), with_partner(labels, share[:, None, None])


def cutmix_box(key: jax.Array, alpha: float, height: int, width: int) -> tuple[jax.Array, ...]:
    """A box with 1 - lambda of the area and a random centre, clipped at the borders (Yun et al. 2019, equation 2).

    Args:
      key: the draw's key.
      alpha: lambda is drawn from Beta(alpha, alpha).
      height: of the image.
      width: of the image.

    Returns:
      int32 scalars top, left, bottom, right; bottom and right are exclusive. The box may be empty.
    """
    share_key, place_key = jax.random.split(key)
    side = jnp.sqrt(1.0 - _beta(share_key, alpha))
    size = jnp.array([height, width])
    extent = (side * size).astype(jnp.int32)
    start = _whole(jax.random.uniform(place_key, (2,)), size) - extent // 2
    return *jnp.clip(start, 0, size), *jnp.clip(start + extent, 0, size)


def _beta(key, alpha):
    """A draw from Beta(alpha, alpha); alpha = 1 is the uniform distribution, which needs no rejection sampling."""
    if isinstance(alpha, float | int) and alpha == 1:
        return jax.random.uniform(key)
    return jax.random.beta(key, alpha, alpha)


def _whole(uniform, count):
    """Converts a uniform draw in [0, 1) to an integer 0 ... count - 1. Compiles to less than `jax.random.randint`."""
    return jnp.floor(uniform * count).astype(jnp.int32)


def _box(height: int, width: int, top: jax.Array, left: jax.Array, bottom: jax.Array, right: jax.Array) -> jax.Array:
    """True inside the box, bool [H, W, 1]."""
    row, column = jnp.arange(height)[:, None], jnp.arange(width)
    return ((row >= top) & (row < bottom) & (column >= left) & (column < right))[..., None]
