"""Checkpoints by name, folder and file: what comes back is what was saved, and nothing else is believed."""

import dataclasses
import functools
import json
import shutil
import tarfile

import flax.traverse_util
import h5py
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import real_data
import safetensors.numpy
from small_checkpoints import NAME, PREPARE, assert_same_bits, draw, flat, timm_folder

import se_flax
from se_flax import ECA, SqueezeExcite, UserError, load_pretrained, save_pretrained
from se_flax.cli.images import accuracy
from se_flax.cli.labelled import labelled_images
from se_flax.images.labels import imagenet_labels
from se_flax.nn.norm import GroupNorm


@pytest.fixture(scope="module")
def variables():
    return draw()


@pytest.fixture
def saved(variables, tmp_path):
    """A folder with everything in it."""
    save_pretrained(
        tmp_path / "mine",
        NAME,
        variables,
        preprocess=PREPARE,
        labels=[f"class {i}" for i in range(10)],
        provenance={"recipe": "configs/cifar10.py"},
    )
    return tmp_path / "mine"


def test_a_saved_network_comes_back_bit_by_bit(saved, variables):
    loaded = load_pretrained(saved)
    assert_same_bits(loaded.variables, variables)
    assert loaded.name == NAME and loaded.notes == ()
    assert loaded.preprocess == PREPARE
    assert loaded.labels == tuple(f"class {i}" for i in range(10))
    assert loaded.provenance == {"recipe": "configs/cifar10.py"}
    images = loaded.preprocess(np.zeros((2, 32, 32, 3), np.uint8))
    assert loaded.model.apply(loaded.variables, images).shape == (2, 10)
    description = json.loads((saved / "se_flax.json").read_text())
    assert description["architecture"] == NAME and description["digests"]


def test_what_was_spread_over_devices_comes_back_on_one(variables, tmp_path):
    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())
    save_pretrained(tmp_path / "eight", NAME, jax.device_put(variables, everywhere), preprocess=PREPARE)
    loaded = load_pretrained(tmp_path / "eight")
    assert_same_bits(loaded.variables, variables)
    assert {len(x.devices()) for x in jax.tree.leaves(loaded.variables)} == {1}


def test_arguments_travel_with_the_weights(tmp_path):
    arguments = {
        "attention": functools.partial(ECA, kernel_size=5),
        "stages": (3, 4),
        "placement": "pre",
        "num_classes": 7,
        "in_channels": 1,
        "dtype": jnp.bfloat16,
    }
    variables = draw(**arguments)
    save_pretrained(tmp_path / "eca", NAME, variables, arguments=arguments, preprocess=PREPARE.for_channels(1))
    loaded = load_pretrained(tmp_path / "eca")
    assert_same_bits(loaded.variables, variables)
    assert loaded.model.num_classes == 7 and loaded.model.in_channels == 1 and loaded.model.dtype == jnp.bfloat16
    assert loaded.model.attention.func is ECA and loaded.model.attention.keywords == {"kernel_size": 5}
    assert loaded.preprocess.channels == 1
    loaded.save(tmp_path / "again")
    assert_same_bits(load_pretrained(tmp_path / "again").variables, variables)


def test_another_norm_travels_too(tmp_path):
    norm = functools.partial(se_flax.BatchNorm, epsilon=1e-3, axis_name="data")
    variables = draw(norm=norm)
    save_pretrained(tmp_path / "norm", NAME, variables, arguments={"norm": norm}, preprocess=PREPARE)
    loaded = load_pretrained(tmp_path / "norm")
    # The axis belongs to the program that trained.
    assert loaded.model.norm.func is se_flax.BatchNorm and loaded.model.norm.keywords == {"epsilon": 1e-3}
    group = functools.partial(GroupNorm, group_size=4)
    variables = draw(norm=group)
    save_pretrained(tmp_path / "group", NAME, variables, arguments={"norm": group}, preprocess=PREPARE)
    assert_same_bits(load_pretrained(tmp_path / "group").variables, variables)


def test_a_function_of_your_own_cannot_be_saved(variables, tmp_path):
    mine = functools.partial(SqueezeExcite, activation=lambda x: x)
    with pytest.raises(UserError, match=r"cannot be saved as an argument .*SqueezeExcite, "):
        save_pretrained(tmp_path / "x", NAME, variables, arguments={"attention": mine})
    assert not list(tmp_path.iterdir())


def test_another_classifier_and_stem_are_said(saved):
    loaded = load_pretrained(saved, num_classes=3)  # asked for, so a note and no warning, which would be an error here
    assert loaded.notes == (
        "seresnet20: the classifier was initialised anew for 3 classes (the checkpoint's: 10 classes)",
    )
    assert loaded.labels is None and loaded.model.num_classes == 3
    loaded = load_pretrained(saved, in_channels=1)
    assert loaded.notes == ("seresnet20: the stem was adapted from 3 channels to 1 (summed over the colours)",)
    assert loaded.preprocess.channels == 1 and loaded.labels is not None
    assert loaded.model.apply(loaded.variables, loaded.preprocess(np.zeros((1, 32, 32, 1), np.uint8))).shape == (1, 10)


def test_nothing_is_overwritten_unasked(saved, variables):
    with pytest.raises(UserError, match="exists already; choose another folder, or pass overwrite=True"):
        save_pretrained(saved, NAME, variables)
    changed = jax.tree.map(lambda x: x + 1, variables)
    save_pretrained(saved, NAME, changed, preprocess=PREPARE, overwrite=True)
    assert_same_bits(load_pretrained(saved).variables, changed)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]  # nothing temporary stays


def test_a_folder_of_something_else_is_never_replaced(variables, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not a saved checkpoint; choose another folder"):
        save_pretrained(tmp_path, NAME, variables, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_failed_save_changes_nothing(saved, variables, monkeypatch):
    from se_flax.checkpoints import pretrained

    def no_space(path, host):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained, "_save_orbax", no_space)
    with pytest.raises(UserError, match="could not be written: No space left on device; nothing was changed"):
        save_pretrained(saved, NAME, jax.tree.map(lambda x: x + 1, variables), overwrite=True)
    assert_same_bits(load_pretrained(saved).variables, variables)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_what_would_not_load_is_not_saved(variables, tmp_path):
    with pytest.raises(UserError, match=r"the checkpoint does not fit seresnet32; missing: "):
        save_pretrained(tmp_path / "x", "seresnet32", variables)
    with pytest.raises(UserError, match="got 3 labels for 10 classes"):
        save_pretrained(tmp_path / "x", NAME, variables, labels=["a", "b", "c"])
    with pytest.raises(UserError, match="without its variables"):
        save_pretrained(tmp_path / "x", NAME)
    assert not list(tmp_path.iterdir())


def test_every_changed_byte_is_noticed(saved):
    files = sorted(p for p in (saved / "variables").rglob("*") if p.is_file())
    assert files
    for file in files:
        original = file.read_bytes()
        if not original:
            continue
        file.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        with pytest.raises(UserError, match=r"is damaged: .* is not as it was saved"):
            load_pretrained(saved)
        file.write_bytes(original)
    (saved / "variables" / "more").write_text("x")
    with pytest.raises(UserError, match="is damaged: 'more' is not as it was saved"):
        load_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2; this version reads 1"),
        ({"architecture": "seresnet21"}, "unknown model 'seresnet21'; closest: "),
        ({"architecture": None}, "has architecture=None; the name of a network is needed"),
        ({"architecture": "seresnet32"}, "does not fit seresnet32; missing: "),
        ({"arguments": {"attention": {"class": "os.system", "arguments": {}}}}, "unknown module 'os.system'"),
        ({"arguments": {"attention": {"class": ["ECA"], "arguments": {}}}}, r"unknown module \['ECA'\]"),
        ({"arguments": {"attention": {"eval": "1"}}}, "is not an argument of a network"),
        ({"arguments": {"dtype": {"dtype": "object"}}}, "unknown dtype 'object'"),
        ({"arguments": {"depht": 3}}, "has no attribute 'depht'; closest: depth"),
        ({"preprocess": None}, "lacks arguments, preprocess or digests"),
        ({"digests": {"../../etc/passwd": "0"}}, "is damaged"),
    ],
)
def test_a_description_is_not_believed(saved, change, message):
    where = saved / "se_flax.json"
    where.write_text(json.dumps(json.loads(where.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_pretrained(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": ' * 5000, "\x00\xff"])
def test_a_description_that_is_no_json(saved, text):
    (saved / "se_flax.json").write_text(text)
    with pytest.raises(UserError, match=r"se_flax.json (is not readable JSON|holds list instead of an object)"):
        load_pretrained(saved)


def test_a_folder_of_timms(variables, tmp_path):
    loaded = load_pretrained(timm_folder(tmp_path / "timm", variables))
    assert_same_bits(loaded.variables, variables)
    p = loaded.preprocess
    assert (p.image_size, p.crop, p.interpolation, p.mean, p.std) == (40, 0.9, "bilinear", (0.5,) * 3, (0.25,) * 3)
    assert loaded.labels == tuple("abcdefghij")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "vit_base_patch16_224"}, "unknown model 'vit_base_patch16_224'"),
        ({"num_classes": 5}, r"of another shape: .*linear\.bias \(10,\) instead of \(5,\)"),
        ({"num_classes": "many"}, "got num_classes='many'"),
        ({"model_args": {"img_size": 3}}, "asks for img_size=3, an argument of timm's that has no counterpart here"),
        ({"pretrained_cfg": {"input_size": [3, 224, 192]}}, r"has input_size \[3, 224, 192\]"),
        ({"pretrained_cfg": {"interpolation": "random"}}, "unknown interpolation 'random'"),
        ({"pretrained_cfg": {"input_size": [3, 10**9, 10**9]}}, "got image_size=1000000000"),
    ],
)
def test_timms_description_is_checked(variables, tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        load_pretrained(timm_folder(tmp_path / "timm", variables, **config))


def test_files_by_their_names(variables, tmp_path):
    state = se_flax.to_timm(NAME, variables)
    safetensors.numpy.save_file(state, tmp_path / "seresnet20-8efdb4bb.safetensors")
    np.savez(tmp_path / "weights.npz", **state)
    np.savez(tmp_path / "seresnet20.npz", **flat(variables))
    for file in ("seresnet20-8efdb4bb.safetensors", "seresnet20.npz"):
        assert_same_bits(load_pretrained(tmp_path / file, preprocess=PREPARE).variables, variables)
    loaded = load_pretrained(str(tmp_path / "weights.npz"), name=NAME, preprocess=PREPARE)
    assert_same_bits(loaded.variables, variables)
    with pytest.raises(UserError, match=r"weights.npz does not say which network it holds; pass name=\.\.\."):
        load_pretrained(tmp_path / "weights.npz")
    with pytest.raises(UserError, match="does not fit seresnet32"):
        load_pretrained(tmp_path / "weights.npz", name="seresnet32")


def save_h5(path, arrays):
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value


SAVE = {
    "safetensors": lambda path, arrays: safetensors.numpy.save_file(arrays, path),
    "npz": lambda path, arrays: np.savez(path, **arrays),
    "h5": save_h5,
}


@pytest.mark.parametrize("suffix", SAVE)
def test_a_prefix_of_all_names_is_taken_off_and_said(suffix, variables, tmp_path):
    path = tmp_path / f"seresnet20.{suffix}"
    for prefix in ("module.", "_orig_mod.", "model.", "backbone.", "model._orig_mod."):
        SAVE[suffix](path, {prefix + key: value for key, value in se_flax.to_timm(NAME, variables).items()})
        loaded = load_pretrained(path, preprocess=PREPARE)
        assert_same_bits(loaded.variables, variables)
        assert loaded.notes == (f"the prefix {prefix!r} of all names in the checkpoint was removed",)
    SAVE[suffix](path, {f"model/{key}": value for key, value in flat(variables).items()})
    assert_same_bits(load_pretrained(path, preprocess=PREPARE).variables, variables)
    SAVE[suffix](path, {f"module.{key}": value for key, value in se_flax.to_timm(NAME, draw(num_classes=4)).items()})
    assert load_pretrained(path, preprocess=PREPARE).model.num_classes == 4


@pytest.mark.parametrize("suffix", ["npz", "h5"])
def test_bfloat16_that_numpy_and_hdf5_save_without_a_name(suffix, variables, tmp_path):
    path = tmp_path / f"seresnet20.{suffix}"
    halves = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), variables)
    SAVE[suffix](path, {"/".join(key): x for key, x in flax.traverse_util.flatten_dict(halves).items()})
    loaded = load_pretrained(path, preprocess=PREPARE)
    assert_same_bits(loaded.variables, jax.tree.map(lambda x: x.astype(np.float32), halves))
    count = len(jax.tree.leaves(variables))
    assert loaded.notes == (f"{count} arrays of dtype |V2 were read as bfloat16, which NumPy saves under that name",)
    SAVE[suffix](path, {"conv1.weight": np.zeros((16, 3, 3, 3), ml_dtypes.float8_e4m3fn)})
    text = r"'conv1.weight' has dtype \|V1, raw bytes as NumPy saves types that it does not know; save it as float32"
    with pytest.raises(UserError, match=text):
        load_pretrained(path, preprocess=PREPARE)


@pytest.mark.parametrize("suffix", SAVE)
def test_files_without_a_classifier_or_with_a_grey_stem(suffix, tmp_path):
    path = tmp_path / f"seresnet20.{suffix}"
    SAVE[suffix](path, se_flax.to_timm(NAME, draw(num_classes=0)))
    with pytest.raises(UserError, match="it has no classifier: pass num_classes=0 for a network without one, or"):
        load_pretrained(path, preprocess=PREPARE)
    loaded = load_pretrained(path, num_classes=0, preprocess=PREPARE)
    assert loaded.notes == () and loaded.model.num_classes == 0
    assert load_pretrained(path, num_classes=3, preprocess=PREPARE).notes == (
        "seresnet20: the classifier was initialised anew for 3 classes (the checkpoint's: none)",
    )
    grey = draw(in_channels=1)
    SAVE[suffix](path, se_flax.to_timm(NAME, grey))
    loaded = load_pretrained(path, preprocess=PREPARE)
    assert_same_bits(loaded.variables, grey)
    assert loaded.arguments == {"in_channels": 1} and loaded.notes == () and loaded.preprocess.channels == 1
    images = loaded.preprocess(np.zeros((1, 32, 32, 1), np.uint8))
    assert loaded.model.apply(loaded.variables, images).shape == (1, 10)
    loaded.save(tmp_path / "grey")
    assert_same_bits(load_pretrained(tmp_path / "grey").variables, grey)
    with pytest.raises(UserError, match=r"its stem takes 1 channel: pass in_channels=1$"):
        load_pretrained(path, in_channels=3, preprocess=PREPARE)


def test_a_grey_stem_in_a_folder_of_timms(tmp_path):
    grey = draw(in_channels=1)
    loaded = load_pretrained(timm_folder(tmp_path / "timm", grey))
    assert_same_bits(loaded.variables, grey)
    assert loaded.model.in_channels == loaded.preprocess.channels == 1


def test_a_bare_orbax_folder(saved, variables, tmp_path):
    shutil.copytree(saved / "variables", tmp_path / "bare")
    assert_same_bits(load_pretrained(tmp_path / "bare", name=NAME, preprocess=PREPARE).variables, variables)
    with pytest.raises(UserError, match=r"holds neither se_flax.json .* say which network it is: name="):
        load_pretrained(tmp_path / "bare")


def test_imagenets_names():
    labels = imagenet_labels()
    assert len(labels) == 1000 and [x.wordnet_id for x in labels] == sorted({x.wordnet_id for x in labels})
    assert labels[0] == ("n01440764", "tench, Tinca tinca") and labels[207].name == "golden retriever"
    assert labels[999].name.startswith("toilet tissue")


def test_a_bare_file_says_its_classes_by_its_classifier(tmp_path):
    few = draw(num_classes=4)
    np.savez(tmp_path / "seresnet20.npz", **se_flax.to_timm(NAME, few))
    loaded = load_pretrained(tmp_path / "seresnet20.npz", preprocess=PREPARE)
    assert loaded.model.num_classes == 4 and loaded.arguments == {"num_classes": 4}
    assert_same_bits(loaded.variables, few)


@pytest.mark.parametrize(
    ("reference", "change"),
    [
        ("resize256_bicubic_crop224", {}),
        ("resize256_bilinear_crop224", {"interpolation": "bilinear"}),
        ("resize224_bilinear", {"interpolation": "bilinear", "crop": 1.0, "crop_mode": "squash"}),
    ],
)
def test_real_weights_on_real_photographs(reference, change, tmp_path):
    """Right answers on 300 photographs, within one of an independent implementation with the same weights."""
    weights, photos = "efficientnetv2_b0_imagenet_keras.npz", "imagenet-sample-300.tar"
    logits = "efficientnetv2_b0_imagenet_keras-reference-logits-300.npz"
    folder = real_data.folder(weights, photos, logits)
    if folder is None:
        pytest.skip(real_data.REASON)
    with tarfile.open(folder / photos) as archive:
        archive.extractall(tmp_path, filter="data")
    theirs = np.load(folder / logits)
    right = int((theirs[reference].argmax(1) == theirs["index"]).sum())
    loaded = load_pretrained(folder / weights)
    loaded = dataclasses.replace(loaded, preprocess=dataclasses.replace(loaded.preprocess, **change))
    found = accuracy(loaded, labelled_images(tmp_path, loaded.labels, 1000), batch_size=50)
    assert found.count == 300 and abs(found.top1 - right) <= 1
