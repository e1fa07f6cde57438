"""Augmentation against formulas in NumPy, colorsys and PIL, its statistics, and its independence of the split."""

import colorsys
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from PIL import Image, ImageEnhance

from se_flax.errors import UserError
from se_flax.lowering.dispatch import force
from train.config import IMAGENET_MEAN, Augment
from train.data import augment as aug

SIZE = 16
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
EVERYTHING = Augment(flip=True, pad=2, randaugment_layers=1, erase=0.5, cutout=4, **JITTER)


def pictures(count, size=SIZE, seed=0):
    return jnp.asarray(np.random.default_rng(seed).random((count, size, size, 3)), jnp.float32)


def keys_of(count, seed=0):
    return aug.example_keys(jax.random.key(seed), jnp.arange(count))


@functools.cache
def jitted(**changes):
    fill = changes.pop("fill", aug.BLACK)
    return jax.jit(lambda images, keys: aug.augment(images, keys, Augment(**changes), fill))


def numpy_luma(image):
    return image @ np.array([0.299, 0.587, 0.114])


# ---- keys, composition


def test_everything_off_returns_the_images():
    images = pictures(2)
    np.testing.assert_array_equal(jitted()(images, keys_of(2)), images)
    assert not jax.make_jaxpr(lambda x, k: aug.augment(x, k, Augment()))(images, keys_of(2)).jaxpr.eqns


@pytest.mark.program
def test_on_a_cpu_an_image_pays_for_the_operations_it_drew_alone():
    images, keys = pictures(8), keys_of(8)
    step = jitted(randaugment_layers=2, flip=True)
    forms = []
    for platform in ("cpu", "cuda"):
        with force(platform):
            forms.append(step.lower(images, keys).compile())
    np.testing.assert_allclose(*(form(images, keys) for form in forms), atol=2e-6)
    assert [" conditional(" in form.as_text() for form in forms] == [True, False]


def step(images, labels, keys):
    return aug.mix(aug.augment(images, keys, EVERYTHING), labels, keys, 0.4, 1.0)


@pytest.fixture(scope="module")
def whole():
    """A batch of eight, its labels and keys, and what comes of it in one piece."""
    batch = pictures(8), jnp.eye(8), aug.example_keys(jax.random.key(5), jnp.arange(8))
    return batch, jax.jit(step)(*batch)


def test_result_does_not_depend_on_how_the_batch_is_split(whole):
    (images, labels, _), expected = whole
    jitted_step, key = jax.jit(step), jax.random.key(5)
    halves = [
        jitted_step(images[i : i + 4], labels[i : i + 4], aug.example_keys(key, jnp.arange(i, i + 4))) for i in (0, 4)
    ]
    for piece, parts in zip(expected, zip(*halves, strict=True), strict=True):
        np.testing.assert_allclose(piece, jnp.concatenate(parts), atol=2e-6)
    assert float(expected[0].min()) >= 0 and float(expected[0].max()) <= 1
    assert not np.any(np.all(expected[0] == images, axis=(1, 2, 3)))


def test_runs_inside_shard_map(whole):
    batch, expected = whole
    devices = max(n for n in (1, 2, 4) if n <= jax.device_count())
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
    )
    spread = jax.shard_map(step, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
    for ours, theirs in zip(jax.jit(spread)(*batch), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_keys_are_folded_from_the_global_index():
    key = jax.random.key(7)
    keys = aug.example_keys(key, jnp.array([3, 11]))
    assert keys[1] == jax.random.fold_in(key, 11)
    old_style = aug.example_keys(jax.random.PRNGKey(7), jnp.array([3, 11]))
    np.testing.assert_array_equal(jax.random.key_data(keys), old_style)


def test_switching_one_operation_on_leaves_the_draws_of_the_others():
    images, keys = pictures(8), keys_of(8)
    flipped = jitted(flip=True)(images, keys)
    both = jitted(flip=True, cutout=4, fill=(9.0, 9.0, 9.0))(images, keys)
    np.testing.assert_array_equal(np.where(both == 9, flipped, both), flipped)


def test_keeps_bfloat16_and_refuses_what_is_not_a_picture():
    images, keys = pictures(2), keys_of(2)
    out = aug.augment(images.astype(jnp.bfloat16), keys, Augment(flip=True))
    assert out.dtype == jnp.bfloat16
    with pytest.raises(
        UserError, match=r"\(2, 16, 16, 3\) and dtype uint8 for augment; give float \[N, .*3\], in \[0, 1\]"
    ):
        aug.augment(jnp.zeros((2, 16, 16, 3), jnp.uint8), keys, Augment())
    with pytest.raises(UserError, match=r"shape \(2, 16, 16, 1\) and dtype float32 for augment"):
        aug.augment(images[..., :1], keys, Augment())


# ---- crop, flip


def test_flip_mirrors_half_of_the_images():
    images = pictures(1000, size=4)
    out = jitted(flip=True)(images, keys_of(1000))
    mirrored = np.all(out == images[:, :, ::-1], axis=(1, 2, 3))
    same = np.all(out == images, axis=(1, 2, 3))
    assert np.all(mirrored ^ same)
    assert 440 < mirrored.sum() < 560  # four standard deviations are 63


@pytest.mark.parametrize("fill", [aug.BLACK, IMAGENET_MEAN])
def test_crop_offsets_cover_all_evenly(fill):
    count, pad, size = 2500, 2, 6
    image = pictures(1, size=size)
    out = np.asarray(jitted(pad=pad, fill=fill)(jnp.repeat(image, count, axis=0), keys_of(count)))
    canvas = np.empty((size + 2 * pad, size + 2 * pad, 3), np.float32)
    canvas[:] = fill
    canvas[pad:-pad, pad:-pad] = image[0]
    found = 0
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = canvas[top : top + size, left : left + size]
            matches = np.all(out == crop, axis=(1, 2, 3)).sum()
            assert 60 < matches < 140  # 100 expected, standard deviation 10
            found += matches
    assert found == count


# ---- colour


def test_hue_is_that_of_colorsys():
    image, turns = np.asarray(pictures(1)[0], np.float64), 0.17
    image[0, :4] = [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.2], [0.3, 0.7, 0.7]]  # grey, and two largest channels alike

    def shifted(pixel):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        return colorsys.hsv_to_rgb((hue + turns) % 1.0, saturation, value)

    expected = np.array([shifted(pixel) for pixel in image.reshape(-1, 3)]).reshape(image.shape)
    np.testing.assert_allclose(aug.shift_hue(jnp.asarray(image, jnp.float32), turns), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "enhancer"),
    [("brightness", ImageEnhance.Brightness), ("contrast", ImageEnhance.Contrast), ("saturation", ImageEnhance.Color)],
)
def test_jitter_is_pils_enhancement_by_a_uniform_factor(name, enhancer):
    picture = np.random.default_rng(3).integers(20, 200, (SIZE, SIZE, 3), dtype=np.uint8)
    count, strength = 64, 0.4
    images = jnp.repeat(jnp.asarray(picture[None], jnp.float32) / 255, count, axis=0)
    out = np.asarray(jitted(**{name: strength})(images, keys_of(count)), np.float64)
    # The factor, read off by least squares from values that cannot have been clipped.
    image = picture / 255.0
    base = {
        "brightness": np.zeros_like(image),
        "contrast": np.full_like(image, numpy_luma(image).mean()),
        "saturation": np.repeat(numpy_luma(image)[..., None], 3, axis=-1),
    }[name]
    usable = (out > 0.001) & (out < 0.999)
    slope, rise = (image - base)[None] * usable, (out - base) * usable
    factors = (slope * rise).sum(axis=(1, 2, 3)) / (slope**2).sum(axis=(1, 2, 3))
    assert factors.min() >= 1 - strength - 1e-4 and factors.max() <= 1 + strength + 1e-4
    assert factors.min() < 1 - 0.8 * strength and factors.max() > 1 + 0.8 * strength
    for factor, ours in list(zip(factors, out, strict=True))[:8]:
        theirs = np.asarray(enhancer(Image.fromarray(picture)).enhance(factor), np.float64)
        np.testing.assert_allclose(ours * 255, theirs, atol=1.6)


def test_jitter_goes_brightness_contrast_saturation_hue():
    image, key = pictures(1)[0], jax.random.key(2)
    # Jitted: XLA may compute a channel twice, rounded differently, and the hue must not depend on that.
    ours = jax.jit(lambda image: aug.colour_jitter(image, key, 0.3, 0.2, 0.5, 0.1))(image)
    b, c, s, h = np.asarray(jax.random.uniform(key, (4,), minval=-1.0, maxval=1.0))
    expected = np.clip(np.asarray(image) * (1 + 0.3 * b), 0, 1)
    mean = numpy_luma(expected).mean()
    expected = np.clip(mean + (1 + 0.2 * c) * (expected - mean), 0, 1)
    grey = numpy_luma(expected)[..., None]
    expected = np.clip(grey + (1 + 0.5 * s) * (expected - grey), 0, 1).astype(np.float32)
    np.testing.assert_allclose(ours, aug.shift_hue(jnp.asarray(expected), 0.1 * h), atol=1e-5)


# ---- rectangles


def boxes_of(marked):
    """For each image's mask [N, H, W]: top, left, bottom, right of the marked pixels, which must fill their box."""
    for mask in marked:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
        assert mask.sum() == (box[2] - box[0]) * (box[3] - box[1])
        yield box


def test_erasing_fills_one_rectangle_of_the_stated_area_and_aspect():
    count, size = 600, 32
    fill = (0.25, 0.5, 0.75)
    images = jnp.full((count, size, size, 3), 2.0)  # no value of fill
    out = np.asarray(jitted(erase=0.5, fill=fill)(images, keys_of(count)))
    marked = np.all(out == np.float32(fill), axis=-1)
    assert np.all((out == 2).all(axis=-1) | marked)
    erased = marked.any(axis=(1, 2))
    assert 240 < erased.sum() < 360
    boxes = np.array(list(boxes_of(marked[erased])))
    tall, wide = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    least, most = (tall - 0.5) * (wide - 0.5), (tall + 0.5) * (wide + 0.5)  # before the sides were rounded
    assert np.all(least <= 0.33 * size**2) and np.all(most >= 0.02 * size**2)
    assert np.all((tall - 0.5) / (wide + 0.5) <= 3.3) and np.all((tall + 0.5) / (wide - 0.5) >= 0.3)
    assert 0.35 < (tall > wide).mean() < 0.65
    assert boxes[:, :2].min() == 0 and boxes[:, 2:].max() == size


@pytest.mark.parametrize("side", [3, 4])
def test_cutout_is_a_square_anywhere_clipped_at_the_border(side):
    count, size = 600, 8
    out = np.asarray(jitted(cutout=side)(jnp.ones((count, size, size, 3)), keys_of(count)))
    boxes = np.array(list(boxes_of(np.all(out == 0, axis=-1))))
    assert set(np.unique(out)) == {0.0, 1.0}
    centre = side // 2
    expected = {
        (max(0, y - centre), max(0, x - centre), min(size, y - centre + side), min(size, x - centre + side))
        for y in range(size)
        for x in range(size)
    }
    assert {tuple(map(int, box)) for box in boxes} == expected


# ---- mixup, CutMix


def test_mixup_is_the_papers_formula_on_neighbours():
    images, labels = pictures(200, size=4), jnp.eye(200)
    mixed, soft = jax.jit(lambda *args: aug.mix(*args, mixup_alpha=0.2))(images, labels, keys_of(200))
    share = np.asarray(soft)[np.arange(200), np.arange(200)]
    partner = np.arange(200) ^ 1
    np.testing.assert_allclose(np.asarray(soft)[np.arange(200), partner], 1 - share, atol=1e-6)
    np.testing.assert_array_equal(share[::2], share[1::2])
    weight = share[:, None, None, None]
    expected = weight * np.asarray(images) + (1 - weight) * np.asarray(images)[partner]
    np.testing.assert_allclose(mixed, expected, atol=1e-6)
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)).
    assert abs(share[::2].mean() - 0.5) < 0.15
    assert abs(share[::2].var() - 1 / (4 * 1.4)) < 0.05


jitted_cutmix = jax.jit(lambda images, labels, keys: aug.mix(images, labels, keys, cutmix_alpha=1.0))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_cutmix_label_is_the_share_of_pixels(seed):
    height, width = 11, 14
    images = jnp.broadcast_to(jnp.arange(8.0)[:, None, None, None], (8, height, width, 3))
    mixed, soft = jitted_cutmix(images, jnp.eye(8), keys_of(8, seed))
    mixed, soft = np.asarray(mixed), np.asarray(soft)
    for i in range(8):
        own, others = mixed[i, ..., 0] == i, mixed[i, ..., 0] == (i ^ 1)
        assert np.all(own ^ others)  # copied exactly
        np.testing.assert_allclose([soft[i, i], soft[i, i ^ 1]], [own.mean(), others.mean()], atol=1e-6)
        if others.any():
            list(boxes_of(others[None]))
    np.testing.assert_array_equal(mixed[::2, ..., 0] == np.arange(0, 8, 2)[:, None, None], mixed[1::2, ..., 0] % 2 == 1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1), alpha=st.floats(0.05, 8.0), height=st.integers(1, 300), width=st.integers(1, 300)
)
def test_cutmix_box_lies_inside(seed, alpha, height, width):
    top, left, bottom, right = map(int, jitted_box(jax.random.key(seed), alpha, height, width))
    assert 0 <= top <= bottom <= height and 0 <= left <= right <= width


jitted_box = jax.jit(aug.cutmix_box)


def test_cutmix_lambda_is_uniform_before_clipping():
    boxes = jax.jit(jax.vmap(lambda key: jnp.stack(aug.cutmix_box(key, 1.0, 1000, 1000))))(keys_of(2000))
    boxes = np.asarray(boxes)
    inner = np.all((boxes[:, :2] > 0) & (boxes[:, 2:] < 1000), axis=1)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 1e6
    # A box of area a lies inside with probability (1 - sqrt a)^2, so the inner ones have the density 6 (1 - sqrt a)^2.
    assert abs(inner.mean() - 1 / 6) < 0.04
    assert abs(area[inner].mean() - 1 / 5) < 0.04


def test_with_both_each_pair_draws_one_of_the_two():
    count = 400
    images = jnp.broadcast_to(jnp.arange(count)[:, None, None, None] % 2.0, (count, 8, 8, 3))
    mixed, _ = jax.jit(lambda *args: aug.mix(*args, 1.0, 1.0))(images, jnp.eye(count), keys_of(count))
    blended = np.any((np.asarray(mixed) > 0) & (np.asarray(mixed) < 1), axis=(1, 2, 3))
    np.testing.assert_array_equal(blended[::2], blended[1::2])
    assert 70 < blended[::2].sum() < 130


def test_nothing_to_mix_returns_what_was_given_and_an_odd_batch_is_refused():
    images, labels = pictures(3), jnp.eye(3)
    assert aug.mix(images, labels, keys_of(3)) == (images, labels)
    with pytest.raises(UserError, match="even number of images, not 3: choose an even batch per device"):
        aug.mix(images, labels, keys_of(3), mixup_alpha=0.2)


# ---- validation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad": -1}, r"augment\.pad=-1 must lie between 0 and 31: use a few pixels; the images are 32 pixels wide"),
        ({"pad": 32}, r"augment\.pad=32 must lie between 0 and 31"),
        ({"cutout": 33}, r"augment\.cutout=33 must lie between 0 and 32: the images are 32 pixels wide"),
        ({"brightness": -0.1}, r"augment\.brightness=-0\.1 must lie between 0 and 1: 0 switches it off"),
        ({"contrast": 1.5}, r"augment\.contrast=1\.5 must lie between 0 and 1"),
        ({"saturation": float("nan")}, r"augment\.saturation=nan must lie between 0 and 1"),
        ({"hue": 0.6}, r"augment\.hue=0\.6 must lie between 0 and 0\.5: it is a share of the full turn"),
        ({"randaugment_layers": -2}, r"augment\.randaugment_layers=-2 must lie between 0 and 16"),
        ({"randaugment_magnitude": 11.0}, r"augment\.randaugment_magnitude=11\.0 must lie between 0 and 10"),
        ({"erase": 25}, r"augment\.erase=25 must lie between 0 and 1: it is a probability"),
        ({"mixup": -0.2}, r"augment\.mixup=-0\.2 must be 0 or more: it is the alpha of a Beta distribution"),
        ({"cutmix": float("inf")}, r"augment\.cutmix=inf must be 0 or more"),
    ],
)
def test_check_names_value_range_and_remedy(changes, message):
    with pytest.raises(UserError, match=message):
        aug.check(dataclasses.replace(EVERYTHING, **changes), 32)


def test_check_accepts_good_settings_and_refuses_an_odd_batch_only_for_mixing():
    aug.check(Augment(), 32)
    aug.check(EVERYTHING, 32)
    aug.check_pairs(Augment(), 5)
    aug.check_pairs(EVERYTHING, 5)
    aug.check_pairs(Augment(mixup=0.2), 4)
    with pytest.raises(UserError, match=r"augment\.cutmix=1\.0 mixes pairs .* sees 5 images .* augment\.cutmix=0"):
        aug.check_pairs(Augment(cutmix=1.0), 5)
