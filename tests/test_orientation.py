"""Pictures that a camera was turned for: every path sets them upright as Pillow's `exif_transpose` does, or none."""

import io
import json
import math
import struct
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_packages import FAST, only
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import se_flax
from se_flax import Preprocess
from se_flax.cli.images import padded_batches
from se_flax.images.decode import open_image, orientation, to_rgb
from train.config import Data
from train.data.images import eval_image, random_box, train_image
from train.data.loader import DataSplits, eval_batches, open_data, train_loader
from train.data.tfds_source import TfdsSource

PACKAGES = pytest.mark.parametrize(
    "packages", [(), *((name,) for name in FAST), FAST], ids=lambda names: "+".join(names)
)
TURNS = range(1, 9)
SCALE, RATIO = (0.08, 1.0), (0.75, 4 / 3)


def smooth(height, width, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def taken(turn, kind="JPEG", height=30, width=44, seed=0, order="<", **options):
    """A file whose EXIF data give this orientation."""
    exif = Image.Exif()
    exif.endian = order
    exif[0x010F], exif[0x0112], exif[0x0131] = "maker", turn, "software"
    buffer = io.BytesIO()
    smooth(height, width, seed).save(buffer, kind, exif=exif, **options)
    return buffer.getvalue()


def upright(file):
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB"))


def stored(file):
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("turn", TURNS)
def test_every_orientation_is_pillows(turn, kind, order, tmp_path):
    file = taken(turn, kind, order=order)
    assert orientation(open_image(file)) == turn
    expected = upright(file)
    np.testing.assert_array_equal(np.asarray(to_rgb(open_image(file))), expected)
    np.testing.assert_array_equal(np.asarray(to_rgb(open_image(file), exif_orientation=False)), stored(file))
    (tmp_path / "photo").write_bytes(file)
    for mode in ("center", "squash"):
        prepare = Preprocess(image_size=20, crop=0.8, crop_mode=mode)
        wanted = prepare.pixels(expected)
        for form in (file, tmp_path / "photo", Image.open(io.BytesIO(file))):
            np.testing.assert_array_equal(prepare.pixels(form), wanted)
        plain = Preprocess(image_size=20, crop=0.8, crop_mode=mode, exif_orientation=False)
        np.testing.assert_array_equal(plain.pixels(file), prepare.pixels(stored(file)))


def test_a_tiff_is_turned_by_pillow_itself():
    for turn in TURNS:
        file = taken(turn, "TIFF")
        np.testing.assert_array_equal(np.asarray(to_rgb(open_image(file))), upright(file))


def test_a_picture_that_was_set_upright_is_not_turned_again():
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(taken(6))))
    np.testing.assert_array_equal(np.asarray(to_rgb(picture)), upright(taken(6)))


def test_exif_behind_a_pngs_pixels_counts():
    parts, at, file = [], 8, taken(6, "PNG")
    while at < len(file):
        (length,) = struct.unpack_from(">I", file, at)
        parts.append(file[at : at + length + 12])
        at += length + 12
    parts.sort(key=lambda part: {b"IHDR": 0, b"IDAT": 1, b"eXIf": 2, b"IEND": 3}.get(part[4:8], 0))
    moved = file[:8] + b"".join(parts)
    assert moved != file
    for crop in ("resize", "center", "random_resized"):
        image, wanted = (
            train_image(form, np.random.default_rng(0), size=16, crop=crop) for form in (moved, upright(file))
        )
        np.testing.assert_array_equal(image, wanted)


@PACKAGES
def test_xmp_counts_where_exif_is_silent(packages):
    """Adobe's programs may write it alone; Pillow's `exif_transpose` reads it."""
    buffer = io.BytesIO()
    smooth(30, 44).save(buffer, "JPEG", xmp=b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>')
    file = buffer.getvalue()
    assert upright(file).shape == (44, 30, 3)
    with only(packages):
        for crop in ("resize", "center", "random_resized"):
            image, wanted = (
                train_image(form, np.random.default_rng(0), size=16, crop=crop) for form in (file, upright(file))
            )
            np.testing.assert_array_equal(image, wanted)


def with_exif(data):
    buffer = io.BytesIO()
    smooth(30, 44).save(buffer, "JPEG", exif=b"Exif\0\0" + data)
    return buffer.getvalue()


def entry(tag, kind, value, order="<"):
    return struct.pack(order + "HHI", tag, kind, 1) + (
        struct.pack(order + "I", value) if kind == 4 else struct.pack(order + "HH", value, 0)
    )


@pytest.mark.parametrize(
    ("data", "turn"),
    [
        (b"", 1),
        (b"II*\0", 1),
        (b"XX*\0\x08\0\0\0\x01\0" + entry(0x112, 3, 6), 1),
        (b"II*\0\xff\xff\xff\xff", 1),  # points behind the end
        (b"II*\0\x08\0\0\0\xff\xff" + entry(0x10F, 3, 6), 1),  # fewer entries than promised
        (b"II*\0\x08\0\0\0\x01\0" + entry(0x112, 4, 8), 8),  # a 32-bit number, as some programs write it
        (b"MM\0*\0\0\0\x08\0\x01" + entry(0x112, 3, 3, ">"), 3),
        (b"II*\0\x08\0\0\0\x01\0" + entry(0x112, 3, 0), 1),
        (b"II*\0\x08\0\0\0\x01\0" + entry(0x112, 3, 9), 1),
    ],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's, when it opens such a file
def test_damaged_exif_data_leave_a_picture_readable(data, turn):
    file = with_exif(data)
    assert orientation(open_image(file)) == turn
    image = eval_image(file, size=16)
    quarters = {1: 0, 8: 1, 3: 2, 6: 3}[turn]  # counterclockwise
    np.testing.assert_array_equal(image, eval_image(np.rot90(stored(file), quarters), size=16))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=60))
def test_exif_data_may_be_anything(data):
    assert eval_image(with_exif(b"II*\0" + data), size=8).shape == (8, 8, 3)


@PACKAGES
@pytest.mark.parametrize("crop", ["resize", "center", "random_resized"])
def test_crops_for_training_are_cut_out_of_the_upright_picture(packages, crop):
    with only(packages):
        for turn in TURNS:
            for kind in ("JPEG", "PNG"):
                file = taken(turn, kind)
                for given_, exif, seed in ((upright(file), True, 1), (stored(file), False, 2)):
                    options = {"size": 24, "crop": crop}
                    image = train_image(file, np.random.default_rng(seed), exif_orientation=exif, **options)
                    wanted = train_image(given_, np.random.default_rng(seed), **options)
                    # The other resizer rounds differently, but it has the same pixels here.
                    np.testing.assert_array_equal(image, wanted)


@PACKAGES
@settings(max_examples=60, deadline=None)
@given(
    turn=st.sampled_from(TURNS),
    width=st.integers(60, 400),
    height=st.integers(60, 400),
    size=st.integers(4, 40),
    subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    seed=st.integers(0, 2**16),
)
def test_a_turned_jpeg_is_decoded_small_at_the_right_place(packages, turn, width, height, size, subsampling, seed):
    """Pillow's own shrunk picture, set upright, cut and scaled."""
    file = taken(turn, height=height, width=width, seed=seed, quality=90, subsampling=subsampling)
    across, down = (height, width) if turn >= 5 else (width, height)
    left, upper, right, lower = random_box(np.random.default_rng(seed), across, down, SCALE, RATIO)
    factor = max([f for f in (2, 4, 8) if min(right - left, lower - upper) >= 2 * f * size], default=1)
    picture = Image.open(io.BytesIO(file))
    picture.draft(None, (width // factor, height // factor))
    assert picture.size == (math.ceil(width / factor), math.ceil(height / factor))
    picture = ImageOps.exif_transpose(picture)
    x, y = picture.width / across, picture.height / down
    box = (round(left * x), round(upper * y), round(right * x), round(lower * y))
    wanted = np.asarray(picture.crop(box).resize((size, size), Image.Resampling.BILINEAR))
    with only(packages):
        image = train_image(file, np.random.default_rng(seed), size=size, crop="random_resized")
    assert np.abs(image.astype(int) - wanted).max() <= (1 if "cykooz_resizer" in packages else 0)


@PACKAGES
def test_a_phones_file_of_several_pictures(packages):
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth(300, 400).save(buffer, "MPO", save_all=True, append_images=[smooth(30, 44, 1)], exif=exif)
    file = buffer.getvalue()
    assert Image.open(io.BytesIO(file)).format == "MPO"
    np.testing.assert_array_equal(np.asarray(to_rgb(open_image(file))), upright(file))
    with only(packages):
        image = train_image(file, np.random.default_rng(0), size=8, crop="random_resized")
    with only(()):
        wanted = train_image(file, np.random.default_rng(0), size=8, crop="random_resized")
    assert np.abs(image.astype(int) - wanted).max() <= (1 if "cykooz_resizer" in packages else 0)


# ---- the same picture through every door


@pytest.fixture
def photos(tmp_path):
    """Two class folders of one turned photograph each, and the same as records of a data set."""
    files = {name: taken(turn, height=40, width=60, seed=turn) for name, turn in (("a", 6), ("b", 3))}
    for split in ("train", "val"):
        for name, file in files.items():
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "photo.jpg").write_bytes(file)
    return tmp_path, files


@pytest.mark.parametrize("exif", [True, False])
def test_training_evaluation_and_prediction_see_the_same_picture(photos, exif):
    root, files = photos
    prepare = Preprocess(image_size=16, crop=0.8, interpolation="bilinear", exif_orientation=exif)
    wanted = [prepare.pixels((upright if exif else stored)(file)) for file in files.values()]
    settings_ = {"image_size": 16, "eval_crop_fraction": 0.8, "interpolation": "bilinear", "batch_size": 2}
    data = Data(source=f"folder:{root}", train_crop="center", exif_orientation=exif, **settings_)
    records = [{"picture": file, "class": label} for label, file in enumerate(files.values())]
    prepared = TfdsSource(records, "picture", "class", 2, "tfds:tiny train")
    for splits in (open_data(data), DataSplits(prepared, prepared, ("a", "b"))):
        (batch,) = eval_batches(splits, data, process_index=0, process_count=1)
        np.testing.assert_array_equal(batch["image"], wanted)
        batch = next(train_loader(splits, data, seed=0, process_index=0, process_count=1))
        for image, label in zip(batch["image"], batch["label"], strict=True):
            file = list(files.values())[label]
            given_ = (upright if exif else stored)(file)
            np.testing.assert_array_equal(image, train_image(given_, np.random.default_rng(0), size=16, crop="center"))
    # predict, eval and gates read their pictures here.
    loaded = SimpleNamespace(preprocess=prepare)
    ((images, count),) = padded_batches(loaded, [root / "val" / name / "photo.jpg" for name in files], 2)
    np.testing.assert_array_equal(images, prepare.normalise(np.stack(wanted)))
    assert count == 2


@pytest.mark.parametrize("exif", [True, False])
def test_a_run_saves_how_it_read_its_pictures(exif, tmp_path):
    from train.config import Config
    from train.run.save_model import save_model

    model = se_flax.create_model("seresnet20", num_classes=2)
    config = Config()
    config.model.name, config.data.mean, config.data.std = "seresnet20", (0.5,) * 3, (0.25,) * 3
    config.data.interpolation, config.data.exif_orientation = "bilinear", exif
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    save_model(tmp_path / "model", config, variables, ("a", "b"), None, 1)
    assert se_flax.load_pretrained(tmp_path / "model").preprocess.exif_orientation is exif
    described = json.loads((tmp_path / "model" / "se_flax.json").read_text())
    assert described["preprocess"]["exif_orientation"] is exif
