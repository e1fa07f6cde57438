"""Pictures that nobody should decode: extreme shapes, damage of every kind, formats that nobody asked for."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from se_flax import Preprocess, UserError
from se_flax.images.decode import FORMATS, MOST_PIXELS, ExtremeShape, UnreadableImage, check_resize, open_image, to_rgb
from train.config import Data
from train.data.images import eval_image, train_image
from train.data.loader import BadImages, eval_batches, open_data, train_loader
from train.validate import check_settings_of_run


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def strip(width, height, kind="PNG"):
    return encoded(Image.new("RGB", (width, height), (10, 20, 30)), kind)


def draw():
    return np.random.default_rng(0)


# ---- shapes


@pytest.fixture
def no_resize(monkeypatch):
    """A resize would be too late: it takes the memory."""

    def resize(self, size, *_, **__):
        raise AssertionError(f"{self.size} was resized to {size}")

    monkeypatch.setattr(Image.Image, "resize", resize)


@pytest.mark.parametrize(
    ("width", "height", "taken"),
    [(2, 6000, "256 x 768000"), (6000, 2, "768000 x 256"), (1, 40000, "256 x 10240000"), (40000, 1, "10240000 x 256")],
)
def test_a_strip_is_refused_before_it_takes_memory(no_resize, tmp_path, width, height, taken):
    (tmp_path / "strip.png").write_bytes(strip(width, height))
    message = (
        rf"strip.png cannot be used: {width} x {height} pixels would take {taken} while they are resized, and "
        r"33,554,432 pixels are allowed; crop it first$"
    )
    with pytest.raises(UserError, match=message) as caught:
        Preprocess()(tmp_path / "strip.png")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="the image cannot be used"):
        Preprocess()(np.zeros((height, width, 3), np.uint8))
    with pytest.raises(ExtremeShape, match=f"would take {taken}"):
        eval_image(strip(width, height), size=224, crop_fraction=0.875)


@pytest.mark.parametrize("crop", ["resize", "center"])
def test_a_strip_is_refused_in_training(no_resize, crop):
    given_ = np.zeros((200_000, 1, 3), np.uint8)  # 224 columns of it, before the rows are scaled down
    with pytest.raises(ExtremeShape, match="1 x 200000 pixels would take 224 x "):
        train_image(given_, draw(), size=224, crop=crop)
    with pytest.raises(UserError, match="1 x 200000 pixels would take 256 x 200000"):
        Preprocess(crop_mode="squash")(given_)


def test_a_random_crop_of_a_strip_is_small():
    image = train_image(strip(1, 40000), draw(), size=32, crop="random_resized")
    assert (image == (10, 20, 30)).all()


@pytest.mark.parametrize(
    ("width", "height", "prepare"),
    [
        (8000, 400, Preprocess()),  # a panorama
        (30, 3000, Preprocess()),  # a line of text
        (2, 6000, Preprocess(crop_mode="squash", crop=1.0)),
        (300, 300, Preprocess(image_size=1024)),
    ],
)
def test_usual_pictures_are_far_below_the_bound(width, height, prepare):
    (image,) = prepare(Image.new("RGB", (width, height), (10, 20, 30)))
    np.testing.assert_allclose(image, np.broadcast_to(prepare.normalise(np.uint8([10, 20, 30])), image.shape))


@settings(max_examples=200)
@given(
    st.tuples(st.integers(1, 10**8), st.integers(1, 10**8)),
    st.tuples(st.integers(1, 16384), st.integers(1, 10**8)).flatmap(st.permutations).map(tuple),
)
def test_what_is_allowed_fits_into_memory(given_, wanted):
    """Pillow scales columns first, cykooz_resizer rows: neither may take more than the bound, the picture, the end."""
    try:
        check_resize(given_, wanted)
    except ExtremeShape:
        return
    largest = max(MOST_PIXELS, given_[0] * given_[1], min(wanted) ** 2)
    for across, down in ((wanted[0], given_[1]), (given_[0], wanted[1]), wanted):
        assert across * down <= largest


def folder(root, bad):
    for split in ("train", "val"):
        for label, name in enumerate(("a", "b")):
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (20, 20), (label, i, 0)).save(root / split / name / f"{i}.png")
        (root / split / "a" / "bad.png").write_bytes(bad)
    common = {"image_size": 16, "batch_size": 7, "eval_crop_fraction": 0.8, "train_crop": "center"}
    return Data(source=f"folder:{root}", bad_images="skip", **common)


def passed_over(data, reason):
    """Both splits are read to their end; the one bad file is named with its reason."""
    splits = open_data(data)
    bad = BadImages(splits, data)
    (batch,) = eval_batches(splits, data, process_index=0, process_count=1, bad=bad)
    assert batch["mask"].tolist() == [True] * 3 + [False] + [True] * 3
    next(train_loader(splits, data, seed=0, process_index=0, process_count=1, bad=bad))
    report = bad.report()
    assert report.startswith("1 of 7 training images could not be read and were replaced: ")
    assert report.count(f"bad.png ({reason}") == 2, report


@pytest.mark.parametrize("size", [(1, 200_000), (200_000, 1)])
def test_a_run_passes_over_a_strip(tmp_path, size):
    data = folder(tmp_path, strip(*size))
    passed_over(data, f"{size[0]} x {size[1]} pixels would take ")
    splits = open_data(data)
    with pytest.raises(UserError, match=r"bad.png could not be read \(.* pixels are allowed\); replace or remove it"):
        data.bad_images = "error"
        list(eval_batches(splits, data, process_index=0, process_count=1))


@pytest.mark.parametrize("method", ["load", "resize"])
def test_memory_that_is_not_there_is_a_reason_too(tmp_path, monkeypatch, method):
    data = folder(tmp_path, strip(30, 40))
    (tmp_path / "bad.png").write_bytes(strip(30, 40))
    kind = ImageFile.ImageFile if method == "load" else Image.Image
    ours = getattr(kind, method)

    def greedy(self, *args, **kwargs):
        if self.size == (30, 40):
            raise MemoryError
        return ours(self, *args, **kwargs)

    monkeypatch.setattr(kind, method, greedy)
    passed_over(data, "not enough memory for it)")
    with pytest.raises(UserError, match=r"bad.png cannot be read as an image: not enough memory for it; give a path"):
        Preprocess(image_size=16)(tmp_path / "bad.png")


def test_a_file_larger_than_the_memory_is_passed_over(tmp_path, monkeypatch):
    from train.data.sources import FolderSource

    data, read = folder(tmp_path, strip(20, 20)), FolderSource.__getitem__

    def greedy(self, index):
        if self.name(index).endswith("bad.png"):
            raise MemoryError
        return read(self, index)

    monkeypatch.setattr(FolderSource, "__getitem__", greedy)
    passed_over(data, "not enough memory for it)")


# ---- damage


@pytest.mark.parametrize("error", [RuntimeError("failed\nto decode"), NotImplementedError(), ArithmeticError("odd")])
def test_whatever_a_decoder_raises_is_damage(tmp_path, monkeypatch, error):
    data = folder(tmp_path, strip(30, 40))
    load = ImageFile.ImageFile.load

    def failing(self):
        if self.size == (30, 40):
            raise error
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", failing)
    passed_over(data, " ".join(str(error).split()) or "NotImplementedError")


HERE = {*Image.registered_extensions().values()}  # AVIF only from Pillow 11.3 on


@pytest.mark.parametrize("kind", [name for name in FORMATS if name != "AVIF" or name in HERE])
def test_every_format_is_read_and_its_damage_named(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8))
    file = encoded(noise, kind)
    assert eval_image(file, size=8).shape == (8, 8, 3)
    rng = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(file)
        for at in rng.integers(0, len(file), 6):
            damaged[at] = rng.integers(256)
        try:
            eval_image(bytes(damaged[: rng.integers(len(file) // 2, len(file))]), size=8)
        except UnreadableImage as error:
            assert str(error) and "\n" not in str(error)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    "file", [POSTSCRIPT, encoded(Image.new("RGB", (16, 16)), "ICO"), encoded(Image.new("RGB", (9, 9)), "PCX")]
)
def test_no_other_decoder_is_started_whatever_the_name(file, tmp_path):
    assert Image.open(io.BytesIO(file)).format in ("EPS", "ICO", "PCX")  # Pillow would; for EPS it runs Ghostscript
    (tmp_path / "photo.jpg").write_bytes(file)
    for given_ in (file, tmp_path / "photo.jpg"):
        with pytest.raises(UserError, match="not a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or PPM image; give a path"):
            Preprocess(image_size=8)(given_)
    passed_over(folder(tmp_path / "data", file), "not a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or PPM image")


def test_a_picture_that_you_opened_yourself_may_be_of_any_format():
    picture = Image.open(io.BytesIO(encoded(Image.new("RGB", (9, 9), (1, 2, 3)), "PCX")))
    assert (Preprocess(image_size=9, crop=1.0).pixels(picture) == (1, 2, 3)).all()


def test_a_format_that_this_pillow_lacks_is_passed_over(monkeypatch):
    from se_flax.images import decode

    monkeypatch.setattr(decode, "FORMATS", (*FORMATS, "NoSuch"))
    decode._formats.cache_clear()
    try:
        assert to_rgb(open_image(strip(3, 4))).size == (3, 4)
        with pytest.raises(UnreadableImage, match="not a JPEG"):
            open_image(b"nothing")
    finally:
        decode._formats.cache_clear()


# ---- numbers


@pytest.mark.parametrize(
    "change",
    [
        {"std": (0.2, 0.2, 1e-320)},
        {"std": (1e-39,) * 3},
        {"std": (1e300,) * 3},
        {"mean": (1e300, 0.0, 0.0)},
        {"input_max": 3e38, "std": (0.2,) * 3},
    ],
)
def test_scales_that_float32_lacks_are_refused(change):
    with pytest.raises(UserError, match=r"got mean=.*; \(value - mean\) / std must be a number that float32 holds"):
        Preprocess.from_json(Preprocess().to_json() | change)


@pytest.mark.parametrize("change", [{"input_max": 10**400}, {"mean": (10**400, 0, 0)}])
def test_numbers_that_no_float_holds_are_refused(change):
    with pytest.raises(UserError, match="cannot be used: "):
        Preprocess.from_json(Preprocess().to_json() | change)


@settings(max_examples=100)
@given(
    st.tuples(*(st.floats(-1e30, 1e30),) * 3),
    st.tuples(*(st.floats(0, 1e40, exclude_min=True),) * 3),
    st.floats(1e-3, 1e30),
)
def test_what_is_accepted_gives_finite_pixels(mean, std, input_max):
    try:
        prepare = Preprocess(image_size=2, mean=mean, std=std, input_max=input_max)
    except UserError:
        return
    pixels = prepare(np.stack([np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)]))
    assert np.isfinite(pixels).all()


@pytest.mark.parametrize("std", [(0.2, 0.2, 1e-320), (0.2, 0.2, float("nan"))])
def test_a_run_is_refused_too(std):
    from train.config import Config

    config = Config()
    config.data.std = std
    with pytest.raises(
        UserError, match=r"data.mean and data.std cannot be used: got .*float32|data.std cannot be used"
    ):
        check_settings_of_run(config)


def test_the_setting_is_true_or_false():
    with pytest.raises(UserError, match="got exif_orientation='no'; give True or False"):
        Preprocess.from_json({"exif_orientation": "no"})
