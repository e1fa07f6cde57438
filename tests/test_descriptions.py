"""What belongs to weights goes along with every conversion; what nobody says is assumed aloud, whatever the name."""

import functools
import itertools
import json
import re
import shutil
import tarfile

import flax.traverse_util
import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import real_data
import safetensors.numpy

import se_flax
from se_flax import ECA, Preprocess, UserError, load_pretrained, save_pretrained
from se_flax.checkpoints import keras, keras_files
from se_flax.checkpoints.convert import variable_shapes
from se_flax.checkpoints.resolve import locate
from se_flax.cli import main
from se_flax.cli.images import accuracy
from se_flax.cli.labelled import labelled_images
from se_flax.images.preprocess import SETTINGS

NAME = "seresnet20"
LABELS = ("crème, brûlée", "日本", 'a "quoted" {name}')
# Nothing in it is a default.
PREPARE = Preprocess(24, 0.75, "squash", "bilinear", (10.0, 20.0, 30.0), (40.0, 50.0, 60.0), "bgr", 255.0, False)
ARGUMENTS = {"num_classes": 3, "attention": functools.partial(ECA, kernel_size=5), "stages": (3, 4)}
UNSAID = "does not say how its images are prepared; assumed: "


def drawn(name=NAME, **arguments):
    model = se_flax.create_model(name, **arguments)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32) ** 2, shapes)


@pytest.fixture(scope="module")
def plain():
    """Variables of the network as its name says it."""
    return drawn()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A saved network that differs from every default."""
    folder = tmp_path_factory.mktemp("models") / "whole"
    provenance = {"recipe": "configs/mine.py", "licence": "mit"}
    variables = drawn(**ARGUMENTS)
    save_pretrained(
        folder, NAME, variables, arguments=ARGUMENTS, preprocess=PREPARE, labels=LABELS, provenance=provenance
    )
    return folder


def flat(variables):
    return {"/".join(path): np.asarray(x) for path, x in flax.traverse_util.flatten_dict(dict(variables)).items()}


def same(loaded, original):
    assert loaded.preprocess == original.preprocess and loaded.preprocess.assumed == original.preprocess.assumed
    assert (loaded.name, loaded.labels, loaded.notes) == (original.name, original.labels, original.notes)
    assert (loaded.provenance, loaded.arguments.keys()) == (original.provenance, original.arguments.keys())
    mine, theirs = flat(loaded.variables), flat(original.variables)
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert value.tobytes() == theirs[key].tobytes(), key


def test_every_conversion_keeps_all_of_it(whole, tmp_path, capsys):
    """Through every format and layout, under names that say nothing, and back."""
    original, ref = load_pretrained(whole), whole
    picture = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    steps = [
        ("a.safetensors", "timm"),
        ("b.npz", "timm"),
        ("c.safetensors", "se-flax"),
        ("d.npz", "se-flax"),
        ("e", None),
        ("f.npz", "timm"),
    ]
    for target, layout in steps:
        words = ["--layout", layout] if layout else []
        assert main(["convert", str(ref), str(tmp_path / target), *words]) == 0
        ref = tmp_path / target
        loaded = load_pretrained(ref)
        same(loaded, original)
        np.testing.assert_array_equal(loaded.preprocess(picture), original.preprocess(picture))
    attention = loaded.model.attention
    assert (attention.func, attention.keywords, loaded.model.stages) == (ECA, {"kernel_size": 5}, (3, 4))
    assert capsys.readouterr().err == ""


def test_the_header_is_plain_json_and_the_arrays_are_timms(whole, tmp_path):
    main(["convert", str(whole), str(tmp_path / "a.safetensors")])
    with safetensors.safe_open(tmp_path / "a.safetensors", "numpy") as file:
        said = json.loads(file.metadata()["se_flax"])
    assert said["architecture"] == NAME and said["labels"] == list(LABELS)
    assert Preprocess.from_json(said["preprocess"]) == PREPARE
    assert "conv1.weight" in safetensors.numpy.load_file(tmp_path / "a.safetensors")


def test_a_name_may_be_repeated_but_not_contradicted(whole, tmp_path):
    for target in ("a.safetensors", "a.npz"):
        main(["convert", str(whole), str(tmp_path / target)])
        assert load_pretrained(tmp_path / target, name=NAME).labels == LABELS
        where = target if target == "a.safetensors" else "a.npz.json"
        with pytest.raises(UserError, match=rf"{where} is seresnet20, not the given name=seresnet32; leave that out"):
            load_pretrained(tmp_path / target, name="seresnet32")


def test_a_description_is_of_one_file_alone(whole, plain, tmp_path, capsys):
    main(["convert", str(whole), str(tmp_path / "a.npz")])
    np.savez(tmp_path / "a.npz", **se_flax.to_timm(NAME, plain))  # other weights under the same name
    with pytest.raises(UserError, match=r"a.npz.json describes another file than .*a.npz, .*, or remove a.npz.json$"):
        load_pretrained(tmp_path / "a.npz")
    (tmp_path / "a.npz").unlink()
    assert main(["convert", str(whole), str(tmp_path / "a.npz")]) == 1
    assert "a.npz.json exists already; choose another name, or pass --overwrite" in capsys.readouterr().err
    assert main(["convert", str(whole), str(tmp_path / "a.npz"), "--overwrite"]) == 0
    same(load_pretrained(tmp_path / "a.npz"), load_pretrained(whole))


# ---- written by hand


def h5(path, arrays):
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value


def bare(path, variables):
    """A file of arrays that says nothing."""
    arrays = flat(variables)
    writers = {".npz": np.savez, ".safetensors": lambda p, **a: safetensors.numpy.save_file(a, p), ".h5": None}
    if path.suffix == ".h5":
        h5(path, arrays)
    else:
        writers[path.suffix](path, **arrays)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".h5", ".safetensors"])
def test_a_file_from_elsewhere_can_be_described_by_hand(plain, tmp_path, suffix):
    path, labels = bare(tmp_path / f"mine{suffix}", plain), [f"class {i}" for i in range(10)]
    beside = tmp_path / f"mine{suffix}.json"
    said = {"architecture": NAME, "preprocess": PREPARE.to_json(), "labels": labels}
    beside.write_text(json.dumps(said))
    loaded = load_pretrained(path)
    assert (loaded.name, loaded.preprocess, loaded.labels, loaded.notes) == (NAME, PREPARE, tuple(labels), ())
    beside.write_text(json.dumps({"preprocess": {"image_size": 24, "mean": [0.5] * 3, "std": [0.25] * 3}}))
    with pytest.warns(UserWarning, match=rf"{UNSAID}crop=0.875, crop_mode=center, interpolation=bicubic; pass "):
        loaded = load_pretrained(path, name=NAME)
    assert (loaded.preprocess.image_size, loaded.preprocess.mean) == (24, (0.5,) * 3)
    assert loaded.preprocess.assumed == ("crop", "crop_mode", "interpolation")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not readable JSON"),
        ("[]", "holds list instead of an object"),
        ('{"format": 2}', "has format 2; this version reads 1"),
        ('{"architecture": 3}', "has architecture=3; the name of a network is needed"),
        ('{"architecture": "seresnet21"}', "unknown model 'seresnet21'; closest: "),
        ('{"preprocess": [224]}', r"has preprocess=\[224\]; an object is needed, or null"),
        ('{"preprocess": {"size": 224}}', "unknown preprocessing setting 'size'"),
        ('{"preprocess": {"mean": 0.5}}', "cannot be used: "),
        ('{"preprocess": {"assumed": {"a": 1}, "std": [0, 1, 1]}}', "both must be greater than 0"),
        ('{"labels": {"0": "cat"}}', "has labels={'0': 'cat'}; a list of names is needed, or null"),
        (
            '{"labels": ["cat", "dog"]}',
            r"has 10 classes and is described with 2 labels; correct the description, or leave",
        ),
        ('{"arguments": [1]}', r"has arguments=\[1\]; an object is needed"),
        ('{"arguments": {"attention": {"class": "os.system", "arguments": {}}}}', "unknown module 'os.system'"),
        ('{"provenance": "me"}', "has provenance='me'; an object is needed"),
        ('{"sha256": "0"}', "describes another file"),
        ('{"sha256": {}}', "describes another file"),
    ],
)
def test_a_description_is_not_believed(plain, tmp_path, text, message):
    path = bare(tmp_path / "seresnet20.npz", plain)
    (tmp_path / "seresnet20.npz.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(path, preprocess={"crop": 1.0})
    assert "\n" not in str(caught.value)
    if "sha256" in text:
        return
    safetensors.numpy.save_file(flat(plain), tmp_path / "b.safetensors", {"se_flax": text})
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path / "b.safetensors", name=None if "architecture" in text else NAME)


# ---- what nobody says


ASSUMED = "image_size=32, crop=0.875, crop_mode=center, interpolation=bicubic, mean=(0.485, 0.456, 0.406), std="


def test_what_is_assumed_is_said(plain, tmp_path, capsys):
    """The same for every name and format, in Python and on the command line, now and after every conversion."""
    paths = [bare(tmp_path / name, plain) for name in ("x.npz", "seresnet20.npz", "x.h5", "seresnet20_x.safetensors")]
    for path in paths:
        with pytest.warns(UserWarning, match=re.escape(f"{path.name} {UNSAID}{ASSUMED}")) as caught:
            loaded = load_pretrained(path, name=NAME)
        assert loaded.notes == (str(caught[0].message),) and loaded.preprocess.assumed == SETTINGS
        assert "pass preprocess= (--image-size, --crop, --mean, ...) where that is wrong" in loaded.notes[0]
    ref = paths[0]
    for target in ("a.safetensors", "b.npz", "c"):
        assert main(["convert", str(ref), str(tmp_path / target), "--name", NAME]) == 0
        ref = tmp_path / target
        said = capsys.readouterr().err
        assert said.startswith("se-flax: ") and UNSAID + ASSUMED in said and said.count("\n") == 1
        with pytest.warns(UserWarning, match=re.escape(f"{target} {UNSAID}{ASSUMED}")):
            load_pretrained(ref)


def test_what_you_say_is_not_assumed(plain, tmp_path, capsys):
    path, target = bare(tmp_path / "x.npz", plain), tmp_path / "y.safetensors"
    words = ["convert", str(path), str(target), "--name", NAME]
    assert main([*words, "--image-size", "40", "--mean", "0.1,0.2,0.3", "--std=0.3,0.2,0.1"]) == 0
    rest = f"{UNSAID}crop=0.875, crop_mode=center, interpolation=bicubic; pass"
    assert rest in capsys.readouterr().err
    with pytest.warns(UserWarning, match=rest):
        loaded = load_pretrained(target)
    assert (loaded.preprocess.image_size, loaded.preprocess.mean) == (40, (0.1, 0.2, 0.3))
    final = tmp_path / "folder"
    settings = ["--crop", "1", "--crop-mode", "squash", "--interpolation", "bilinear", "--no-exif-orientation"]
    assert main(["convert", str(target), str(final), *settings]) == 0
    assert capsys.readouterr().err == ""
    expected = Preprocess(40, 1.0, "squash", "bilinear", (0.1, 0.2, 0.3), (0.3, 0.2, 0.1), exif_orientation=False)
    assert load_pretrained(final).preprocess == expected
    assert load_pretrained(path, name=NAME, preprocess=expected).preprocess == expected
    single = {"image_size": 40, "crop": 1.0}
    with pytest.warns(UserWarning, match="assumed: crop_mode=center, interpolation=bicubic, mean="):
        assert load_pretrained(path, name=NAME, preprocess=single).preprocess.resize == 40
    with pytest.raises(UserError, match="unknown preprocessing setting 'size'; "):
        load_pretrained(path, name=NAME, preprocess={"size": 40})


def test_a_saved_network_without_preprocessing_says_so(plain, tmp_path):
    with pytest.warns(UserWarning, match=re.escape(f"mine {UNSAID}{ASSUMED}")):
        save_pretrained(tmp_path / "mine", NAME, plain)
    with pytest.warns(UserWarning, match=re.escape(f"mine {UNSAID}{ASSUMED}")):
        loaded = load_pretrained(tmp_path / "mine")
    save_pretrained(tmp_path / "sure", loaded, preprocess=PREPARE)
    assert load_pretrained(tmp_path / "sure").preprocess == PREPARE


def test_an_orbax_folder_without_a_description_says_so(whole, tmp_path):
    shutil.copytree(whole / "variables", tmp_path / "bare")
    with pytest.warns(UserWarning, match=f"bare {UNSAID}"):
        load_pretrained(tmp_path / "bare", name=NAME, **ARGUMENTS)


FULL = {
    "input_size": [3, 40, 40],
    "crop_pct": 0.9,
    "crop_mode": "squash",
    "interpolation": "bilinear",
    "mean": [0.5] * 3,
    "std": [0.25] * 3,
}


@pytest.mark.parametrize("missing", [(), ("crop_mode",), ("crop_pct",), ("input_size", "mean", "std"), tuple(FULL)])
@pytest.mark.parametrize("how", ["absent", "null"])
def test_what_timms_description_leaves_out_is_timms_default(tmp_path, missing, how):
    """timm/models/_pretrained.py: 0.875, center, bicubic and ImageNet's values; here seresnet50's own crop is 0.95."""
    (tmp_path / "model.safetensors").touch()
    cfg = FULL | dict.fromkeys(missing) if how == "null" else {k: v for k, v in FULL.items() if k not in missing}
    config = {"architecture": "seresnet50", "num_classes": 1000, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = locate(tmp_path).preprocess
    ours = {"input_size": "image_size", "crop_pct": "crop"}
    said = Preprocess(40, 0.9, "squash", "bilinear", (0.5,) * 3, (0.25,) * 3)
    for key in FULL:
        name = ours.get(key, key)
        assert getattr(found, name) == getattr(Preprocess() if key in missing else said, name)
        assert (name in found.assumed) == (key in missing and key != "crop_mode")


ODD = (5, -1, True, "x", 1e308, 10**400, float("nan"), [1, 2], [[]], {"a": {}}, 2**63)


@pytest.mark.parametrize("key", ["model_args", "num_classes", "label_names", "pretrained_cfg", "architecture"])
@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:12])
def test_odd_values_in_timms_description_are_one_sentence_or_without_effect(tmp_path, key, value):
    (tmp_path / "model.safetensors").touch()
    config = {"architecture": "seresnet50", "num_classes": 1000, "pretrained_cfg": FULL} | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        found = locate(tmp_path)
        se_flax.create_model(found.name, **found.arguments)
    except UserError as error:
        assert len(str(error)) < 700 and "\n" not in str(error)
    if key == "model_args" and not isinstance(value, dict):
        with pytest.raises(UserError, match=r"has model_args .*; arguments by name are needed"):
            locate(tmp_path)


def test_a_message_that_quotes_a_file_is_one_printable_line(tmp_path):
    for architecture in ("a\x1b[31m\nb\u202e\ud800", "x" * 100_000):
        (tmp_path / "se_flax.json").write_text(json.dumps({"format": 1, "architecture": architecture}))
        with pytest.raises(UserError, match="unknown model") as caught:
            locate(tmp_path)
        text = str(caught.value)
        assert text.isprintable() and len(text) < 4000
    assert str(UserError("a\x1b[31m\r\nb\u202e\ud800é")) == "a?[31m b??é"


# ---- what a file's name says


@pytest.mark.parametrize(
    ("file", "name", "tag"),
    [
        ("seresnet50.ra2_in1k.pth", "seresnet50", "ra2_in1k"),
        ("seresnet50.ra2_in1k-c3c1a7f2.pth", "seresnet50", "ra2_in1k"),
        ("seresnet50_ra2-c3c1a7f2.pth", "seresnet50", "ra2_in1k"),
        ("SEResNet50-ra2.pth", "seresnet50", "ra2_in1k"),
        ("tf_efficientnet_b0_ap-f262efe1.pth", "tf_efficientnet_b0", "ap_in1k"),
        ("tf_efficientnet_b0_ns-c0e6a31c.pth", "tf_efficientnet_b0", "ns_jft_in1k"),
        ("tf_efficientnetv2_b3.in21k_ft_in1k.pth", "tf_efficientnetv2_b3", "in21k_ft_in1k"),
        ("tf_efficientnetv2_b3.in21k.pth", "tf_efficientnetv2_b3", "in21k"),
        ("efficientnet_b5.sw_in12k_ft_in1k.pth", "efficientnet_b5", "sw_in12k_ft_in1k"),
        ("tf_efficientnetv2_s_21ft1k-d7dafa41.pth", "tf_efficientnetv2_s", None),
        ("seresnet50-8efdb4bb.pth", "seresnet50", None),
        ("seresnet50_a.pth", "seresnet50", None),
        ("seresnet50.pth", "seresnet50", None),
        ("weights.pth", "seresnet50", None),
    ],
)
def test_a_published_checkpoint_by_its_files_name(tmp_path, file, name, tag):
    """With and without the network's name beside it; a tag that begins like another is not taken for it."""
    (tmp_path / file).touch()
    found = [locate(tmp_path / file, name=name)]
    if file != "weights.pth":
        found.append(locate(tmp_path / file))
    rows = {weights.tag: weights for weights in se_flax.get_variant(name).weights}
    for source in found:
        assert source.name == name
        if tag is None:
            assert source.preprocess.assumed == SETTINGS
        else:
            assert source.preprocess == Preprocess.of(rows[tag]) and source.preprocess.assumed == ()


B0 = "tf_efficientnetv2_b0"


@pytest.fixture(scope="module")
def keras_arrays():
    layout = keras.layout(B0)
    shapes = variable_shapes(se_flax.create_model(B0), 64)
    return {layout.key(path): np.zeros(layout.shape(path, x.shape), np.float32) for path, x in shapes.items()}


def test_keras_weights_have_keras_preprocessing_under_every_name(keras_arrays, tmp_path, capsys):
    """Keras gives EfficientNetV2-B0 224 pixels; timm's checkpoint of it, which is assumed otherwise, has 192."""
    np.savez(tmp_path / "efficientnetv2-b0.npz", **keras_arrays)
    known = locate(tmp_path / "efficientnetv2-b0.npz").preprocess
    assert (known.image_size, known.assumed) == (224, ())
    shutil.copy(tmp_path / "efficientnetv2-b0.npz", tmp_path / "weights.npz")
    safetensors.numpy.save_file(keras_arrays, tmp_path / f"{B0}.safetensors")
    h5(tmp_path / "x.h5", keras_arrays)
    for name in ("weights.npz", f"{B0}.safetensors", "x.h5"):
        found = locate(tmp_path / name, name=B0).preprocess
        assert found == known and found.assumed == SETTINGS, name
    # timm's names under a name of Keras's are not Keras's.
    np.savez(tmp_path / "efficientnetv2-b0-mine.npz", **{"conv_stem.weight": np.zeros(3)})
    found = locate(tmp_path / "efficientnetv2-b0-mine.npz").preprocess
    assert (found.image_size, found.assumed) == (192, SETTINGS)
    # The documented chain.
    model, folder = str(tmp_path / "model.safetensors"), str(tmp_path / "my-model")
    assert main(["convert", str(tmp_path / "efficientnetv2-b0.npz"), model]) == 0
    assert main(["convert", model, folder, "--name", B0]) == 0
    assert capsys.readouterr().err == ""
    loaded = load_pretrained(folder)
    assert loaded.preprocess == known and len(loaded.labels) == 1000


def test_keras_networks_are_resized_as_timm_does_for_the_same_weights():
    assert set(keras.APPLICATIONS) == keras_files.NETWORKS
    found = {name: keras_files.preprocess(name) for name in keras_files.NETWORKS}
    # Sides: keras.applications. Crop and interpolation: timm/models/efficientnet.py and mobilenetv3.py.
    for name, size, crop, mode, interpolation in (
        ("tf_efficientnet_b0", 224, 0.875, "center", "bicubic"),
        ("tf_efficientnet_b1", 240, 0.882, "center", "bicubic"),
        ("tf_efficientnet_b7", 600, 0.949, "center", "bicubic"),
        (B0, 224, 0.875, "center", "bicubic"),
        ("tf_efficientnetv2_b3", 300, 0.904, "center", "bicubic"),
        ("tf_efficientnetv2_s", 384, 1.0, "center", "bicubic"),
        ("tf_efficientnetv2_m", 480, 1.0, "squash", "bicubic"),
        ("tf_mobilenetv3_large_100", 224, 0.875, "center", "bilinear"),
    ):
        p = found[name]
        assert (p.image_size, p.crop, p.crop_mode, p.interpolation) == (size, crop, mode, interpolation), name


def test_imagenets_labels_are_said_where_they_are_assumed(keras_arrays, tmp_path):
    np.savez(tmp_path / "weights.npz", **keras_arrays)
    with pytest.warns(UserWarning, match=r"image_size=224, .*; its 1,000 classes are taken for ImageNet's; pass"):
        loaded = load_pretrained(tmp_path / "weights.npz", name=B0)
    assert loaded.labels[0] == "tench, Tinca tinca"


def test_real_weights_keep_their_accuracy_through_conversions(tmp_path):
    """275 of 300 photographs before and after; with the pixels of another checkpoint it was 270."""
    weights, photos = "efficientnetv2_b0_imagenet_keras.npz", "imagenet-sample-300.tar"
    folder = real_data.folder(weights, photos)
    if folder is None:
        pytest.skip(real_data.REASON)
    with tarfile.open(folder / photos) as archive:
        archive.extractall(tmp_path / "photos", filter="data")
    steps = [str(folder / weights), *(str(tmp_path / name) for name in ("model.safetensors", "b.npz", "my-model"))]
    for source, target in itertools.pairwise(steps):
        assert main(["convert", source, target]) == 0
    loaded = load_pretrained(steps[-1])
    found = accuracy(loaded, labelled_images(tmp_path / "photos", loaded.labels, 1000), batch_size=50)
    assert (found.count, found.top1) == (300, 275)
