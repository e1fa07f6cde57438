"""RandAugment against PIL, operation by operation, and the TPU's matrix products against gathers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from se_flax.lowering.dispatch import force
from train.data import randaugment as ra

HEIGHT, WIDTH = 28, 36  # not square: a swap of the axes shows
FILL = (50, 128, 200)


def photograph(seed=0, height=HEIGHT, width=WIDTH):
    """A smooth picture with uneven histograms and some noise, uint8."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(20, 230, (6, 7, 3), dtype=np.uint8))
    picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float64)
    return np.clip(picture + random.normal(0, 2, picture.shape), 5, 240).astype(np.uint8)


def as_float(image):
    return jnp.asarray(image, jnp.float32) / 255


def as_grey_levels(image):
    return np.asarray(image, np.float64) * 255


@functools.cache
def apply(magnitude):
    """One compilation for all operations: the index and the sign are traced."""
    fill = tuple(value / 255 for value in FILL)
    return jax.jit(lambda image, op, sign: ra.apply_op(image, op, magnitude, sign, fill))


def run(name, image, magnitude, sign=1.0):
    return as_grey_levels(apply(magnitude)(as_float(image), ra.OPS.index(name), sign))


def transform(picture, matrix):
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=FILL)


def pil(name, image, magnitude, sign=1.0):
    """The published ranges, written down once more, on PIL's operations."""
    picture, share = Image.fromarray(image), magnitude / 10
    operations = {
        "identity": lambda: picture,
        "autocontrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
        "rotate": lambda: picture.rotate(sign * 30 * share, Image.Resampling.BILINEAR, fillcolor=FILL),
        "solarize": lambda: ImageOps.solarize(picture, int(256 * share)),
        "color": lambda: ImageEnhance.Color(picture).enhance(0.1 + 1.8 * share),
        "posterize": lambda: ImageOps.posterize(picture, int(4 * share)),
        "contrast": lambda: ImageEnhance.Contrast(picture).enhance(0.1 + 1.8 * share),
        "brightness": lambda: ImageEnhance.Brightness(picture).enhance(0.1 + 1.8 * share),
        "sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(0.1 + 1.8 * share),
        "shear-x": lambda: transform(picture, (1, sign * 0.3 * share, 0, 0, 1, 0)),
        "shear-y": lambda: transform(picture, (1, 0, 0, sign * 0.3 * share, 1, 0)),
        "translate-x": lambda: transform(picture, (1, 0, sign * share * WIDTH * 100 / 224, 0, 1, 0)),
        "translate-y": lambda: transform(picture, (1, 0, 0, 0, 1, sign * share * HEIGHT * 100 / 224)),
    }
    return np.asarray(operations[name](), np.float64)


GEOMETRIC = ("rotate", "shear-x", "shear-y", "translate-x", "translate-y")


@pytest.mark.parametrize("magnitude", [3.0, 9.0])
@pytest.mark.parametrize("name", [name for name in ra.OPS if name not in GEOMETRIC])
def test_colour_operation_is_pils(name, magnitude):
    image = photograph()
    # PIL rounds the degenerate image to 8 bits before it extrapolates, by up to 0.8 of the difference.
    np.testing.assert_allclose(run(name, image, magnitude), pil(name, image, magnitude), atol=1.6)


@pytest.mark.parametrize("magnitude", [3.0, 9.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_operation_is_pils(name, sign, magnitude):
    image = photograph()
    ours, theirs = run(name, image, magnitude, sign), pil(name, image, magnitude, sign)
    # A position that rounding puts on the other side of the border is filled here and not there; nothing else differs.
    differ = np.abs(ours - theirs).max(axis=-1) > 1.01
    assert differ.sum() <= 2
    filled = (theirs == FILL).all(axis=-1)
    assert filled.any() and not filled.all()


def test_changes_what_its_name_says():
    image = photograph()
    for name in ra.OPS:
        changed = np.abs(run(name, image, 9.0) - image).max() > 1.01
        assert changed == (name != "identity"), name


def test_identity_is_exact_and_magnitude_five_leaves_the_blends_as_they_are():
    image = as_float(photograph())
    np.testing.assert_array_equal(apply(9.0)(image, 0, 1.0), image)
    for name in ("color", "contrast", "brightness", "sharpness"):
        np.testing.assert_allclose(apply(5.0)(image, ra.OPS.index(name), 1.0), image, atol=1e-6)


def test_posterize_never_returns_a_black_image():
    image = photograph()
    np.testing.assert_allclose(run("posterize", image, 0.0), np.where(image >= 128, 128, 0), atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    low=st.integers(0, 255),
    spread=st.integers(0, 255),
)
def test_equalize_is_pils_on_any_histogram(seed, low, spread):
    levels = np.random.default_rng(seed).integers(low, min(255, low + spread) + 1, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    ours = as_grey_levels(jitted_equalize(as_float(levels)))
    np.testing.assert_allclose(ours, np.asarray(ImageOps.equalize(Image.fromarray(levels)), np.float64), atol=1e-3)


jitted_equalize = jax.jit(ra.equalize)


def test_constant_image_survives_autocontrast_and_equalize():
    image = jnp.full((HEIGHT, WIDTH, 3), 0.3, jnp.float32)
    for name in ("autocontrast", "equalize"):
        np.testing.assert_array_equal(apply(9.0)(image, ra.OPS.index(name), 1.0), image)


def test_equalize_on_a_tpu_is_pils():
    image = photograph()
    with force("tpu"):
        ours = as_grey_levels(jitted_equalize(as_float(image)))
    np.testing.assert_allclose(ours, np.asarray(ImageOps.equalize(Image.fromarray(image)), np.float64), atol=1e-3)


warp_all = jax.jit(jax.vmap(functools.partial(ra.warp, fill=(0.0, 0.0, 0.0)), in_axes=(None, 0)))


def both_samplers(image, matrices):
    by_gather = warp_all(image, matrices)
    with force("tpu"):
        by_products = warp_all(image, matrices)
    return jnp.abs(by_products - by_gather)


def compare_samplers(image, amount):
    matrices = jnp.stack([ra._affine(ra.OPS.index(name), jnp.float32(amount), 32, 40) for name in GEOMETRIC])
    return dict(zip(GEOMETRIC, as_grey_levels(both_samplers(image, matrices)), strict=True))


@pytest.mark.parametrize("amount", [0.9, -0.9, 0.37])
def test_warp_by_products_is_the_warp_by_gather(amount):
    levels = compare_samplers(as_float(photograph(height=32, width=40)), amount)
    for name in GEOMETRIC[1:]:
        assert levels[name].max() < 0.01, name
    assert levels["rotate"].max() > 0.01  # two forms indeed
    assert levels["rotate"].mean() < 0.5
    assert levels["rotate"][8:-8, 8:-8].max() < 5  # on noise, where bilinear interpolation is worst


def test_warp_by_products_is_exact_for_an_affine_ramp():
    rows, columns = jnp.mgrid[0:32, 0:40]
    image = jnp.stack([rows / 31, columns / 39, (rows + 2 * columns) / 109], axis=-1).astype(jnp.float32)
    # Away from the border either way of interpolating reproduces a plane.
    assert compare_samplers(image, 0.9)["rotate"][8:-8, 8:-8].max() < 0.005


def test_draws_every_operation_and_both_directions():
    keys = jax.random.split(jax.random.key(0), 400)
    image = as_float(photograph(height=20, width=20))
    results = np.asarray(jax.jit(jax.vmap(lambda key: ra.randaugment(image, key, 1, 7.0)))(keys))
    distinct, counts = np.unique(results.reshape(400, -1).round(3), axis=0, return_counts=True)
    assert len(distinct) == 14 + 5  # five operations have two directions
    assert counts.min() >= 4 and counts.max() <= 60
    assert results.min() >= 0 and results.max() <= 1


def test_layers_follow_each_other():
    image, key = as_float(photograph()), jax.random.key(3)
    expected = image
    for which, direction in np.asarray(jax.random.uniform(key, (2, 2))):
        expected = apply(9.0)(expected, int(which * 14), -1.0 if direction < 0.5 else 1.0)
    fill = tuple(value / 255 for value in FILL)
    both = jax.jit(lambda image: ra.randaugment(image, key, 2, 9.0, fill))(image)
    np.testing.assert_allclose(both, expected, atol=1e-5)
