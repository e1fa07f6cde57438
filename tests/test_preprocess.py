"""Images on their way to a network: against formulas, Pillow alone, and published settings."""

import dataclasses
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import se_flax
from se_flax import Preprocess, UserError

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (60, 90, 3), np.uint8)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def test_values_are_scaled_shifted_and_divided():
    prepare = Preprocess(image_size=8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    pixels = RNG.integers(0, 256, (3, 8, 8, 3), np.uint8)
    expected = (pixels.astype(np.float64) / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 2.0]
    given_values = prepare(pixels)
    assert given_values.dtype == np.float32
    np.testing.assert_allclose(given_values, expected, rtol=1e-6, atol=1e-6)


def test_blue_first_and_bytes():
    prepare = Preprocess(
        image_size=8, mean=(104.0, 117.0, 123.0), std=(1.0, 2.0, 4.0), color_order="bgr", input_max=255
    )
    pixels = RNG.integers(0, 256, (8, 8, 3), np.uint8)
    expected = (pixels[..., ::-1].astype(np.float64) - [104, 117, 123]) / [1, 2, 4]
    np.testing.assert_allclose(prepare(pixels)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("crop", "resize"), [(0.875, 256), (0.95, 235), (1.0, 224), (0.965, 232), (0.904, 247)])
def test_the_side_before_the_crop_is_rounded_down(crop, resize):
    assert Preprocess(image_size=224, crop=crop).resize == resize  # timm: math.floor(224 / crop_pct)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_short_side_then_centre(interpolation):
    resample = getattr(Image.Resampling, interpolation.upper())
    # 60 x 90 -> 40 x 60, of which the central 32 x 32.
    expected = np.asarray(Image.fromarray(PHOTO).resize((60, 40), resample))[4:36, 14:46]
    prepare = Preprocess(image_size=32, crop=0.8, interpolation=interpolation)
    np.testing.assert_array_equal(prepare.pixels(Image.fromarray(PHOTO)), expected)


def test_squash_keeps_everything():
    expected = np.asarray(Image.fromarray(PHOTO).resize((32, 32), Image.Resampling.BICUBIC))
    prepare = Preprocess(image_size=32, crop=1.0, crop_mode="squash")
    np.testing.assert_array_equal(prepare.pixels(PHOTO), expected)


def test_every_kind_of_input_gives_the_same(tmp_path):
    prepare = Preprocess(image_size=32)
    path = tmp_path / "photo.png"
    path.write_bytes(png(PHOTO))
    expected = prepare(PHOTO)
    assert expected.shape == (1, 32, 32, 3)
    for one in (
        path,
        str(path),
        path.read_bytes(),
        Image.open(path),
        PHOTO[None],
        [PHOTO],
        [path],
        (x for x in [path]),
    ):
        np.testing.assert_array_equal(prepare(one), expected)
    assert prepare([path, PHOTO, Image.fromarray(PHOTO)]).shape == (3, 32, 32, 3)


def test_an_array_of_the_networks_size_is_only_normalised_but_a_picture_is_cropped():
    prepare = Preprocess(image_size=32, crop=0.5)
    array = np.ascontiguousarray(PHOTO[:32, :32])
    np.testing.assert_array_equal(prepare.pixels(array), array)
    resized = np.asarray(Image.fromarray(array).resize((64, 64), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(prepare.pixels(Image.fromarray(array)), resized[16:48, 16:48])


def test_grey_and_transparent_networks():
    rgb = Preprocess(image_size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    grey, four = rgb.for_channels(1), rgb.for_channels(4)
    assert grey.mean == pytest.approx((0.5,)) and grey.std == pytest.approx((0.3,))
    assert four.mean == (0.4, 0.5, 0.6, 0.4) and four.std == (0.2, 0.3, 0.4, 0.2)
    assert grey(Image.fromarray(PHOTO)).shape == (1, 32, 32, 1)
    assert four(Image.fromarray(PHOTO)).shape == (1, 32, 32, 4)
    with pytest.raises(UserError, match=r"got 2 channels; images are read with 1 \(grey\), 3 \(RGB\) or 4 \(RGBA\)"):
        rgb.for_channels(2)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("missing.jpg", "missing.jpg: no such file; give a path, a PIL image"),
        (
            b"not an image",
            "the image cannot be read as an image: not a JPEG, .* or PPM image; give a path",
        ),
        (b"", "the file is empty"),
        (png(PHOTO)[:200], "cannot be read as an image"),
        (PHOTO.astype(np.float32) / 255, r"array of float32; give uint8 values .*\(255 \* x\).round"),
        (PHOTO.astype(np.int64), "array of int64; give uint8 values from 0 to 255$"),
        (PHOTO[..., :2], r"shape \(60, 90, 2\); this network takes images \[H, W, 3\]"),
        (PHOTO[..., 0], r"shape \(60, 90\)"),
        (3, "got int; give a path"),
        ([None], "got NoneType; give a path"),
    ],
)
def test_what_is_no_image_is_refused_in_one_sentence(image, message):
    with pytest.raises(UserError, match=message) as caught:
        Preprocess(image_size=32)(image)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic'; closest: bicubic"),
        ({"crop_mode": "border"}, "unknown crop_mode 'border'; allowed: center, squash"),
        ({"color_order": "gbr"}, "unknown color_order 'gbr'"),
        ({"image_size": 0}, "got image_size=0; give a whole number of pixels"),
        ({"image_size": 1e9}, "got image_size=1000000000.0"),
        ({"crop": 0.0}, "got crop=0.0"),
        ({"mean": (0.5,)}, r"got mean=\(0.5,\) and std="),
        ({"mean": (0.5, 0.5, float("nan"))}, "give finite numbers"),
        ({"std": (0.5, 0.5, 0.0)}, "both must be greater than 0"),
        ({"colour": "rgb"}, "unknown preprocessing setting 'colour'"),
        ({"mean": "abc"}, "cannot be used"),
        ({"crop": None}, "cannot be used"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        Preprocess.from_json(Preprocess().to_json() | change)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 40),
    st.floats(0.3, 1.0),
    st.sampled_from(["center", "squash"]),
    st.sampled_from(["bilinear", "bicubic"]),
)
def test_any_picture_comes_out_in_the_networks_size(height, width, size, crop, mode, interpolation):
    prepare = Preprocess(size, crop, mode, interpolation)
    assert Preprocess.from_json(json.loads(json.dumps(prepare.to_json()))) == prepare
    picture = Image.fromarray(np.full((height, width, 3), 128, np.uint8))
    np.testing.assert_array_equal(prepare.pixels(picture), 128)  # no black border anywhere


def test_published_settings():
    weights = next(w for w in se_flax.get_variant("seresnet50").weights if w.tag == "ra2_in1k")
    prepare = Preprocess.of(weights)
    assert (prepare.image_size, prepare.crop, prepare.interpolation) == (224, 0.875, "bicubic")
    large = Preprocess.of(weights, test_size=True)
    assert (large.image_size, large.crop) == (288, 0.95)
    assert dataclasses.replace(prepare, image_size=64).resize == 73


@pytest.mark.parametrize("nothing", [[], (), np.zeros((0, 30, 40, 3), np.uint8)], ids=["list", "tuple", "array"])
def test_no_images_are_an_empty_batch(nothing):
    batch = se_flax.Preprocess(image_size=32)(nothing)
    assert batch.shape == (0, 32, 32, 3) and batch.dtype == np.float32
