"""Decoding and cropping on the host, against NumPy, known pixels and the distributions the paper asks for."""

import io
import math

import numpy as np
import pytest
from fast_packages import FAST, only
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from train.data.images import UnreadableImage, eval_image, random_box, train_image

SCALE, RATIO = (0.08, 1.0), (0.75, 4 / 3)
# Which of the optional packages a test pretends to have.
PACKAGES = pytest.mark.parametrize(
    "packages", [(), *((name,) for name in FAST), FAST], ids=lambda names: "+".join(names)
)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def draw():
    return np.random.default_rng(0)


def test_an_image_of_the_right_size_is_untouched():
    image = noise(12, 12)
    for form in (image, encoded(image)):
        np.testing.assert_array_equal(eval_image(form, size=12), image)
        np.testing.assert_array_equal(train_image(form, draw(), size=12, crop="resize"), image)
        np.testing.assert_array_equal(train_image(form, draw(), size=12, crop="center"), image)


def grey(value):
    return [value] * 3


def palette(transparent):
    image = Image.new("P", (2, 2), 1)
    image.putpalette([9, 9, 9, 10, 200, 30])
    return encoded(image, transparency=bytes([0, 128])) if transparent else encoded(image)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (encoded(Image.new("L", (2, 2), 77)), grey(77)),
        (encoded(Image.new("1", (2, 2), 1)), grey(255)),
        (encoded(Image.new("LA", (2, 2), (77, 3))), grey(77)),
        (encoded(Image.new("RGBA", (2, 2), (1, 2, 3, 0))), [1, 2, 3]),  # hidden colours stay, as in torchvision
        (palette(transparent=False), [10, 200, 30]),
        (palette(transparent=True), [10, 200, 30]),
        (encoded(Image.fromarray(np.full((2, 2), 0x8F12, np.uint16))), grey(0x8F)),
        (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), [255, 0, 0]),
        (encoded(Image.new("RGB", (2, 2), (9, 8, 7)), "BMP"), [9, 8, 7]),
        (encoded(Image.new("RGB", (2, 2), (9, 8, 7)), "WEBP", lossless=True), [9, 8, 7]),
        (encoded(Image.new("P", (2, 2), 0), "GIF"), grey(0)),
        (np.full((2, 2, 1), 5, np.uint8), grey(5)),
    ],
)
def test_every_mode_becomes_rgb(given, expected):
    image = eval_image(given, size=2)
    assert image.dtype == np.uint8
    assert image.shape == (2, 2, 3)
    assert np.abs(image.astype(int) - expected).max() <= 2  # JPEG rounds


def test_eval_crop_is_the_centre():
    image = noise(40, 60)
    np.testing.assert_array_equal(eval_image(image, size=20, crop_fraction=0.5), image[10:30, 20:40])
    np.testing.assert_array_equal(train_image(image, draw(), size=40, crop="center"), image[:, 10:50])


def test_eval_resizes_the_short_side():
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None], (256, 512, 3))
    image = eval_image(ramp, size=28, crop_fraction=0.875)  # 256 rows -> 32, of which the central 28: 8 rows each
    np.testing.assert_allclose(image[:, 5, 0], np.arange(28) * 8 + 19.5, atol=1)


def test_plain_resize_does_not_keep_the_aspect():
    halves = np.zeros((10, 40, 3), np.uint8)
    halves[:, 20:] = 200
    image = eval_image(halves, size=10)
    assert image[0, 0, 0] == 0
    assert image[0, -1, 0] == 200


@pytest.mark.parametrize("crop", ["resize", "random_resized", "center"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(5, 9), (90, 40), (1, 1)])
def test_every_crop_gives_the_wanted_shape(crop, interpolation, shape):
    image = train_image(encoded(noise(*shape), "JPEG"), draw(), size=16, crop=crop, interpolation=interpolation)
    assert image.shape == (16, 16, 3)
    assert image.dtype == np.uint8


def test_large_jpegs_are_decoded_small_in_training_only():
    smooth = Image.fromarray(noise(12, 12)).resize((384, 384), Image.Resampling.BICUBIC)
    given = encoded(smooth, "JPEG", quality=95)
    exact = np.asarray(Image.open(io.BytesIO(given)).resize((24, 24), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(eval_image(given, size=24), exact)
    for crop in ("resize", "center"):
        quick = train_image(given, draw(), size=24, crop=crop)
        assert not np.array_equal(quick, exact)
        assert np.abs(quick.astype(int) - exact).mean() < 2
    # At three times the size nothing is gained by approximating.
    exact = np.asarray(Image.open(io.BytesIO(given)).resize((128, 128), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(train_image(given, draw(), size=128), exact)


def test_random_crop_of_a_shrunk_jpeg_shows_the_same_part():
    smooth = Image.fromarray(noise(6, 9)).resize((600, 400), Image.Resampling.BICUBIC)
    small, large = (encoded(smooth, kind, **opts) for kind, opts in (("JPEG", {"quality": 98}), ("PNG", {})))
    for seed in range(20):
        a, b = (
            train_image(given, np.random.default_rng(seed), size=16, crop="random_resized", scale=(0.3, 0.6))
            for given in (small, large)
        )
        assert np.abs(a.astype(int) - b).mean() < 8  # the box is rounded to the coarser pixels; another box is 60 off


def test_random_box_is_uniform_in_area_place_and_log_aspect():
    rng = np.random.default_rng(0)
    width, height, scale, ratio = 900, 1000, (0.1, 0.5), (0.75, 4 / 3)  # small enough that no try fails
    boxes = np.array([random_box(rng, width, height, scale, ratio) for _ in range(4000)])
    left, upper, right, lower = boxes.T
    assert left.min() >= 0 and upper.min() >= 0 and right.max() <= width and lower.max() <= height
    share = (right - left) * (lower - upper) / (width * height)
    aspect = (right - left) / (lower - upper)
    assert scale[0] * 0.99 < share.min() and share.max() < scale[1] * 1.01
    assert ratio[0] * 0.99 < aspect.min() and aspect.max() < ratio[1] * 1.01
    # Means of uniform variables: standard error is (b - a) / sqrt(12 n); five of them are allowed.
    for values, (least, most) in (
        (share, scale),
        (np.log(aspect), (math.log(ratio[0]), math.log(ratio[1]))),
        (left / (width - (right - left)), (0, 1)),
        (upper / (height - (lower - upper)), (0, 1)),
    ):
        assert abs(values.mean() - (least + most) / 2) < 5 * (most - least) / math.sqrt(12 * len(values))


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(1000, 10, (493, 0, 506, 10)), (10, 1000, (0, 493, 10, 506)), (30, 30, (0, 0, 30, 30))],
)
def test_random_box_falls_back_to_the_centre(width, height, expected):
    # The whole area with an aspect that a long strip cannot have; for the square, an area that is too large.
    scale = (1.0, 1.0) if width != height else (1.9, 2.0)
    assert random_box(draw(), width, height, scale, (0.75, 4 / 3)) == expected


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (b"", "the file is empty"),
        (b"no image at all", "not a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or PPM image"),
        (encoded(noise(30, 30), "JPEG")[:-400], "truncated"),
        (encoded(noise(30, 30), "PNG")[:-400], "truncated|broken"),
        (np.zeros((4, 4, 3), np.float32), r"uint8 \[H, W, 1 or 3\] is needed, not float32"),
    ],
)
def test_damage_is_named(given, reason):
    with pytest.raises(UnreadableImage, match=reason):
        eval_image(given, size=8)
    with pytest.raises(UnreadableImage, match=reason):
        train_image(given, draw(), size=8, crop="random_resized")


# ---- random crops with and without the optional packages


def cropped(given, packages, *, seed=0, size=24, interpolation="bilinear"):
    rng = np.random.default_rng(seed)
    with only(packages):
        return train_image(given, rng, size=size, crop="random_resized", interpolation=interpolation)


def plainly_cropped(given, *, seed=0, size=24, interpolation="bilinear", factor=1):
    """The whole picture decoded, the box cut out, resized, by Pillow."""
    image = Image.open(io.BytesIO(given))
    left, upper, right, lower = random_box(np.random.default_rng(seed), *image.size, SCALE, RATIO)
    width, height = image.size
    image.draft(None, (width // factor, height // factor))
    assert image.size == (math.ceil(width / factor), math.ceil(height / factor))
    across, down = image.width / width, image.height / height
    box = (round(left * across), round(upper * down), round(right * across), round(lower * down))
    resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    return np.asarray(image.convert("RGB").crop(box).resize((size, size), resample))


def assert_close(image, expected, packages):
    """Pillow's pixels; the other resizer rounds differently."""
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - expected).max() <= (1 if "cykooz_resizer" in packages else 0)


@PACKAGES
@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(8, 90),
    height=st.integers(8, 90),
    grey=st.booleans(),
    subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    quality=st.integers(20, 100),
    progressive=st.booleans(),
    restart=st.integers(0, 3),
    seed=st.integers(0, 2**16),
    size=st.integers(4, 40),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
)
def test_a_random_crop_is_cut_out_of_the_whole_picture(
    packages, width, height, grey, subsampling, quality, progressive, restart, seed, size, interpolation
):
    picture = Image.fromarray(noise(height, width, seed))
    options = {"quality": quality, "progressive": progressive, "restart_marker_blocks": restart}
    options |= {} if grey else {"subsampling": subsampling}
    given = encoded(picture.convert("L") if grey else picture, "JPEG", **options)
    left, upper, right, lower = random_box(np.random.default_rng(seed), width, height, SCALE, RATIO)
    factor = max([f for f in (2, 4, 8) if min(right - left, lower - upper) >= 2 * f * size], default=1)
    expected = plainly_cropped(given, seed=seed, size=size, interpolation=interpolation, factor=factor)
    assert_close(cropped(given, packages, seed=seed, size=size, interpolation=interpolation), expected, packages)


@PACKAGES
@pytest.mark.parametrize("size", [64, 32, 16, 5])
def test_a_random_crop_of_a_large_picture(packages, size):
    smooth = Image.fromarray(noise(12, 9)).resize((701, 997), Image.Resampling.BICUBIC)
    given = encoded(smooth, "JPEG", quality=95)
    factors = set()
    for seed in range(8):
        left, upper, right, lower = random_box(np.random.default_rng(seed), 701, 997, SCALE, RATIO)
        factor = max([f for f in (2, 4, 8) if min(right - left, lower - upper) >= 2 * f * size], default=1)
        expected = plainly_cropped(given, seed=seed, size=size, factor=factor)
        assert_close(cropped(given, packages, seed=seed, size=size), expected, packages)
        factors.add(factor)
    assert max(factors) == {64: 4, 32: 8, 16: 8, 5: 8}[size]


@PACKAGES
@pytest.mark.parametrize(
    "given",
    [
        encoded(Image.new("CMYK", (40, 30), (0, 255, 255, 0)), "JPEG"),
        encoded(noise(30, 40), "JPEG") + b"left behind by a camera",
        encoded(noise(30, 40), "JPEG", exif=b"Exif\0\0" + encoded(noise(9, 9), "JPEG")),  # with a thumbnail
        encoded(noise(30, 40)),
        encoded(noise(24, 24), "BMP"),
    ],
    ids=["CMYK", "trailing bytes", "thumbnail", "PNG", "BMP"],
)
def test_random_crops_of_other_files(packages, given):
    for seed in range(5):
        assert_close(cropped(given, packages, seed=seed), plainly_cropped(given, seed=seed), packages)


@PACKAGES
def test_the_generator_is_used_alike_whatever_decodes(packages):
    for form in (encoded(noise(40, 50), "JPEG"), encoded(noise(40, 50)), noise(40, 50)):
        rng, alone = np.random.default_rng(3), np.random.default_rng(3)
        with only(packages):
            train_image(form, rng, size=8, crop="random_resized")
        random_box(alone, 50, 40, SCALE, RATIO)
        assert rng.bit_generator.state == alone.bit_generator.state


@PACKAGES
@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (encoded(noise(90, 90), "JPEG")[:-2], "truncated"),
        (encoded(noise(90, 90), "JPEG")[:-900], "truncated"),
        (b"\xff\xd8\xff\xd9", "not a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or PPM image|cannot|truncated|broken"),
        (b"\xff\xd8" + bytes(100) + b"\xff\xd9", "not a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or PPM image"),
        (b"\xff\xd8\xff\xc0\x00\x0b\x08\x00\x20\x00\x20\x01\x01\x11\x00\xff\xd9", "truncated|broken|cannot"),
        (b"\xff\xd8\xff\xc0\xff\xd9", "not a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or PPM image|Truncated|truncated"),
    ],
)
def test_a_damaged_jpeg_is_named_whatever_decodes(packages, given, reason):
    with pytest.raises(UnreadableImage, match=reason):
        cropped(given, packages)
