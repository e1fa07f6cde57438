"""RandAugment on the accelerator (Cubuk et al. 2020, section 3): a few random operations per image.

The fourteen operations of the paper act on one float32 RGB image in [0, 1] and are vmapped over a batch. Under `vmap`
all operations are computed for every image, so they share work: the geometric operations are one affine warp, and four
colour operations are one blend with a degenerate image. Under `jax.lax.map` only the drawn operations are computed.
The ranges are those of the paper's published TensorFlow code (Apache-2.0), including its peculiarities: a higher
magnitude makes posterize and solarize *weaker*, and magnitude 5 does not change color, contrast, brightness and
sharpness. There are three deliberate differences: the warp is bilinear, not nearest; values stay float32 between
operations instead of being rounded to 8 bits; posterize keeps at least one bit (the published code keeps none below
magnitude 2.5 and returns a black image).

Gathers and scatters of single pixels are slow on a TPU (compiled for v5e, XLA's estimate for one warp of 128 images of
224x224 is 320 ms by gathers and under 2 ms as matrix products). So the warp and equalize's histogram and table have a
second implementation with matrix products, chosen by the platform for which the step is compiled.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from se_flax.arrays import check_array
from se_flax.lowering.dispatch import by_platform

OPS = (
    "identity",
    "autocontrast",
    "equalize",
    "rotate",
    "solarize",
    "color",
    "posterize",
    "contrast",
    "brightness",
    "sharpness",
    "shear-x",
    "shear-y",
    "translate-x",
    "translate-y",
)
MAX_MAGNITUDE = 10.0
GREY = (128 / 255, 128 / 255, 128 / 255)  # fill of the geometric operations, as in the published code
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL's mode "L"


def randaugment(
    image: jax.Array, key: jax.Array, layers: int, magnitude: float, fill: tuple[float, ...] = GREY
) -> jax.Array:
    """Applies `layers` operations, each drawn uniformly (with replacement) from `OPS`.

    Cubuk et al. 2020, figure 2. Geometric operations draw their direction with probability 1/2.

    Args:
      image: float32 [H, W, 3] in [0, 1].
      key: the image's key.
      layers: number of operations (the paper's N); static.
      magnitude: 0 ... 10 (the paper's M); static.
      fill: RGB in [0, 1] of pixels that a geometric operation takes from outside the image.

    Returns:
      float32 [H, W, 3] in [0, 1].

    Raises:
      UserError: an array of another shape or dtype.
    """
    image = check_array(image, "randaugment", "[H, W, 3]")
    for which, direction in jax.random.uniform(key, (layers, 2)):
        op = jnp.floor(which * len(OPS)).astype(jnp.int32)
        sign = jnp.where(direction < 0.5, -1.0, 1.0)
        image = apply_op(image, op, magnitude, sign, fill)
    return image


def apply_op(
    image: jax.Array,
    op: int | jax.Array,
    magnitude: float,
    sign: float | jax.Array = 1.0,
    fill: tuple[float, ...] = GREY,
) -> jax.Array:
    """Applies one operation.

    Args:
      image: float32 [H, W, 3] in [0, 1].
      op: int32 scalar, an index into `OPS`; may be traced.
      magnitude: 0 ... 10; static.
      sign: +1 or -1, the direction of a geometric operation; +1 rotates counter-clockwise, as PIL does.
      fill: RGB in [0, 1] of pixels that a geometric operation takes from outside the image.

    Returns:
      float32 [H, W, 3] in [0, 1].

    Raises:
      UserError: an array of another shape or dtype.
    """
    image = check_array(image, "apply_op", "[H, W, 3]")
    share = magnitude / MAX_MAGNITUDE

    # The degenerate image that each colour operation blends with.
    degenerates = {
        "color": lambda: jnp.broadcast_to(luma(image), image.shape),
        "contrast": lambda: jnp.broadcast_to(luma(jnp.mean(image, axis=(0, 1))), image.shape),
        "brightness": lambda: jnp.zeros_like(image),
        "sharpness": lambda: _smooth(image),
    }

    def blended() -> jax.Array:
        return blend(_switch(op, degenerates), image, 0.1 + 1.8 * share)

    def warped() -> jax.Array:
        return warp(image, _affine(op, share * jnp.float32(sign), image.shape[0], image.shape[1]), fill)

    return _switch(
        op,
        {
            "identity": lambda: image,
            "autocontrast": lambda: autocontrast(image),
            "equalize": lambda: equalize(image),
            "solarize": lambda: solarize(image, int(share * 256)),
            "posterize": lambda: posterize(image, max(1, int(share * 4))),
            **dict.fromkeys(degenerates, blended),
            **dict.fromkeys(("rotate", "shear-x", "shear-y", "translate-x", "translate-y"), warped),
        },
    )


def _switch(op: int | jax.Array, branches: Mapping[str, Callable[[], jax.Array]]) -> jax.Array:
    """`branches[OPS[op]]()`; names with the same branch share it. Names without a branch may get any."""
    distinct = list(dict.fromkeys(branches.values()))
    numbers = [distinct.index(branches[name]) if name in branches else 0 for name in OPS]
    # `take`, since indexing fails in JAX 0.10 under vmap inside shard_map.
    return jax.lax.switch(jnp.take(jnp.array(numbers), op), distinct)


def blend(degenerate: jax.Array, image: jax.Array, factor: float | jax.Array) -> jax.Array:
    """`degenerate + factor * (image - degenerate)`, clipped to [0, 1]: PIL's ImageEnhance.

    Args:
      degenerate: float32 [..., 3], the image at factor 0.
      image: float32 [..., 3], the image at factor 1.
      factor: above 1 extrapolates.

    Returns:
      float32 [..., 3] in [0, 1].

    Raises:
      UserError: an array of another shape or dtype.
    """
    image = check_array(image, "blend", "[..., 3]")
    degenerate = check_array(degenerate, "the degenerate of blend", "[...]")
    return jnp.clip(degenerate + factor * (image - degenerate), 0.0, 1.0)


def luma(image: jax.Array) -> jax.Array:
    """The grey value of each pixel, with ITU-R 601 weights as in PIL and torchvision.

    Args:
      image: float32 [..., 3].

    Returns:
      float32 [..., 1].

    Raises:
      UserError: an array of another shape or dtype.
    """
    image = check_array(image, "luma", "[..., 3]")
    red, green, blue = (image[..., c : c + 1] for c in range(3))
    return _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue


def _smooth(image: jax.Array) -> jax.Array:
    """PIL's ImageFilter.SMOOTH: [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13, with the outermost pixels unchanged."""
    rows = image[:-2] + image[1:-1] + image[2:]
    inner = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4.0 * image[1:-1, 1:-1]) / 13.0
    frame = ((1, 1), (1, 1), (0, 0))
    kept = jnp.pad(jnp.zeros_like(inner, bool), frame, constant_values=True)
    return jnp.where(kept, image, jnp.pad(inner, frame))  # a select fuses; writing a slice copies the image


def autocontrast(image: jax.Array) -> jax.Array:
    """Stretches each channel to [0, 1]; a constant channel is unchanged (PIL's ImageOps.autocontrast).

    Args:
      image: float32 [H, W, 3] in [0, 1].

    Returns:
      float32 [H, W, 3] in [0, 1].

    Raises:
      UserError: an array of another shape or dtype.
    """
    image = check_array(image, "autocontrast", "[H, W, 3]")
    low, high = jnp.min(image, axis=(0, 1)), jnp.max(image, axis=(0, 1))
    flat = high <= low
    stretched = (image - low) / jnp.where(flat, 1.0, high - low)
    return jnp.where(flat, image, jnp.clip(stretched, 0.0, 1.0))


def _levels(image: jax.Array) -> jax.Array:
    """The nearest of the 256 grey levels, int32."""
    return jnp.round(jnp.clip(image, 0.0, 1.0) * 255.0).astype(jnp.int32)


def solarize(image: jax.Array, threshold: int) -> jax.Array:
    """Inverts the values at and above a threshold (PIL's ImageOps.solarize).

    Args:
      image: float32 [H, W, 3] in [0, 1].
      threshold: 0 ... 256, in grey levels; 256 inverts nothing.

    Returns:
      float32 [H, W, 3] in [0, 1].

    Raises:
      UserError: an array of another shape or dtype.
    """
    image = check_array(image, "solarize", "[H, W, 3]")
    return jnp.where(_levels(image) < threshold, image, 1.0 - image)


def posterize(image: jax.Array, bits: int) -> jax.Array:
    """Keeps the highest bits of each 8-bit value (PIL's ImageOps.posterize).

    Args:
      image: float32 [H, W, 3] in [0, 1].
      bits: 1 ... 8; static.

    Returns:
      float32 [H, W, 3] in [0, 1].

    Raises:
      UserError: an array of another shape or dtype.
    """
    image = check_array(image, "posterize", "[H, W, 3]")
    mask = 256 - 2 ** (8 - bits)
    return (_levels(image) & mask).astype(jnp.float32) / 255.0


def equalize(image: jax.Array) -> jax.Array:
    """Flattens the histogram of each channel, with PIL's integer arithmetic (ImageOps.equalize).

    Args:
      image: float32 [H, W, 3] in [0, 1].

    Returns:
      float32 [H, W, 3], multiples of 1/255; a channel with (nearly) all pixels at one level is unchanged.

    Raises:
      UserError: an array of another shape or dtype.
    """
    image = check_array(image, "equalize", "[H, W, 3]")
    levels = _levels(image)
    counts = by_platform(levels, tpu=_count_by_products, default=_count_by_scatter)
    highest = jnp.max(levels, axis=(0, 1))  # [3]
    last = jnp.take_along_axis(counts, highest[:, None], axis=1)
    step = (levels.shape[0] * levels.shape[1] - last) // 255  # [3, 1]
    below = jnp.cumsum(counts, axis=1) - counts
    table = jnp.clip((below + step // 2) // jnp.maximum(step, 1), 0, 255).astype(jnp.float32)
    equalized = by_platform(table, levels, tpu=_look_up_by_products, default=_look_up_by_gather)
    return jnp.where(step[:, 0] == 0, image, equalized / 255.0)


def _count_by_scatter(levels: jax.Array) -> jax.Array:
    """Histograms [3, 256] of int32 levels [H, W, 3]."""
    bins = (levels + 256 * jnp.arange(3)).reshape(-1)
    return jnp.zeros(3 * 256, jnp.int32).at[bins].add(1, mode="promise_in_bounds").reshape(3, 256)


def _nibbles(levels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One-hot codes [H, W, 3, 16] of the upper and of the lower four bits: 32 numbers per value instead of 256."""
    digits = jnp.arange(16)
    upper = (levels[..., None] >> 4) == digits
    lower = (levels[..., None] & 15) == digits
    return upper.astype(jnp.float32), lower.astype(jnp.float32)


def _count_by_products(levels: jax.Array) -> jax.Array:
    """The same histograms by matrix products; exact in bfloat16 too, since a TPU adds the products in float32."""
    upper, lower = _nibbles(levels)
    return jnp.einsum("hwcu,hwcl->cul", upper, lower).reshape(3, 256).astype(jnp.int32)


def _look_up_by_gather(table: jax.Array, levels: jax.Array) -> jax.Array:
    """`table[c, levels[h, w, c]]` for a table [3, 256] and levels [H, W, 3]."""
    return table.reshape(-1).at[levels + 256 * jnp.arange(3)].get(mode="promise_in_bounds")


def _look_up_by_products(table: jax.Array, levels: jax.Array) -> jax.Array:
    """The same by matrix products; exact in bfloat16 too, which represents all integers up to 256."""
    upper, lower = _nibbles(levels)
    rows = jnp.einsum("hwcu,cul->hwcl", upper, table.reshape(3, 16, 16))
    return jnp.sum(rows * lower, axis=-1)


def _affine(op: int | jax.Array, amount: jax.Array, height: int, width: int) -> jax.Array:
    """The matrix for `warp` of a geometric operation at `amount` in [-1, 1] of its range.

    Ranges: rotation by 30 degrees about the centre, shear by 0.3 about the upper left corner, translation by 100 / 224
    of the image's size (the published code has 100 pixels for every size).
    """
    angle = amount * (jnp.pi / 6)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y = width / 2, height / 2
    zero, one = jnp.zeros_like(cos), jnp.ones_like(cos)
    shear, shift = 0.3 * amount, amount * (100 / 224)
    matrices = {
        "rotate": (*(cos, -sin, x - cos * x + sin * y), *(sin, cos, y - sin * x - cos * y)),
        "shear-x": (one, shear, zero, zero, one, zero),
        "shear-y": (one, zero, zero, shear, one, zero),
        "translate-x": (one, zero, shift * width, zero, one, zero),
        "translate-y": (one, zero, zero, zero, one, shift * height),
    }
    matrix = jnp.stack((one, zero, zero, zero, one, zero))
    for name, entries in matrices.items():
        matrix = jnp.where(jnp.asarray(op) == OPS.index(name), jnp.stack(entries), matrix)
    return matrix


def warp(image: jax.Array, matrix: jax.Array, fill: tuple[float, ...] = GREY) -> jax.Array:
    """Affine warp with bilinear interpolation, in the convention of PIL's `Image.transform(size, AFFINE, matrix)`.

    The output at (x, y) is the input at (a x + b y + c, d x + e y + f), where pixel i has its centre at i + 1/2.

    Args:
      image: float32 [H, W, 3].
      matrix: float32 [6], (a, b, c, d, e, f); a must not be near 0.
      fill: RGB if the input position is outside the image.

    Returns:
      float32 [H, W, 3].

    Raises:
      UserError: an array of another shape or dtype.
    """
    image, matrix = check_array(image, "warp", "[H, W, 3]"), check_array(matrix, "the matrix of warp", "[6]")
    height, width, _ = image.shape
    a, b, c, d, e, f = matrix
    x, y = jnp.arange(width) + 0.5, (jnp.arange(height) + 0.5)[:, None]
    x, y = a * x + b * y + c, d * x + e * y + f  # [H, W] each
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    warped = by_platform(image, matrix, x, y, tpu=_sample_by_products, default=_sample_by_gather)
    return jnp.where(inside[..., None], warped, jnp.asarray(fill, jnp.float32))


def _sample_by_gather(image: jax.Array, matrix: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Bilinear samples at positions x, y [H, W]; beyond the outermost pixel centres the border's values continue."""
    del matrix
    height, width, _ = image.shape
    x, y = jnp.clip(x - 0.5, 0.0, width - 1.0), jnp.clip(y - 0.5, 0.0, height - 1.0)
    left, top = x.astype(jnp.int32), y.astype(jnp.int32)
    right, bottom = jnp.minimum(left + 1, width - 1), jnp.minimum(top + 1, height - 1)
    along, down = (x - left)[..., None], (y - top)[..., None]
    pixels = image.reshape(-1, 3)

    def at(row, column):
        return pixels.at[row * width + column].get(mode="promise_in_bounds")

    upper = at(top, left) * (1.0 - along) + at(top, right) * along
    lower = at(bottom, left) * (1.0 - along) + at(bottom, right) * along
    return upper * (1.0 - down) + lower * down


def _sample_by_products(image: jax.Array, matrix: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """The same by two one-dimensional passes, each a product with hat functions that XLA computes on the fly.

    The first pass resamples every column, the second every row. Shears and translations equal those by gathers. A
    rotation interpolates along a slanted line, which differs by about as much as bilinear interpolation does from the
    true surface.
    """
    del y
    height, width, _ = image.shape
    a, b, c, d, e, f = matrix
    column, row = (jnp.arange(width) + 0.5)[:, None], jnp.arange(height) + 0.5
    along_column = d * (column - b * row - c) / a + e * row + f  # [W, H]: position in column u for output row y

    def hats(position, size):
        position = jnp.clip(position - 0.5, 0.0, size - 1.0)
        return jnp.maximum(0.0, 1.0 - jnp.abs(position[..., None] - jnp.arange(size)))

    columns = jnp.einsum("uyv,vuc->yuc", hats(along_column, height), image, precision="highest")
    return jnp.einsum("yxu,yuc->yxc", hats(x, width), columns, precision="highest")
