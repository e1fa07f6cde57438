"""The command `se-flax` as a person meets it: output, refusals, exit codes."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import se_flax
from se_flax import Preprocess
from se_flax.cli import images, main

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
NAMES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def ref(tmp_path_factory):
    """A network that tells the three colours apart: random features, and a classifier fitted to them exactly."""
    model = se_flax.create_model("seresnet20", num_classes=3)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    prepare = Preprocess(image_size=16, crop=1.0)
    images = prepare([np.full((16, 16, 3), COLOURS[name], np.uint8) for name in NAMES])
    _, stages = model.apply(variables, images, return_features=True)
    features = np.asarray(stages[-1]).mean((1, 2))
    kernel = np.linalg.pinv(features) @ (10 * np.eye(3))
    params = {**variables["params"], "linear": {"kernel": kernel.astype(np.float32), "bias": np.zeros(3, np.float32)}}
    folder = tmp_path_factory.mktemp("models") / "colours"
    variables = {**variables, "params": params}
    se_flax.save_pretrained(
        folder, "seresnet20", variables, arguments={"num_classes": 3}, preprocess=prepare, labels=NAMES
    )
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three pictures of each colour in class folders, of different shapes."""
    root = tmp_path_factory.mktemp("photos")
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for i, size in enumerate(((16, 16), (20, 31), (64, 40))):
            Image.new("RGB", size, colour).save(root / name / f"{i}.png")
    return root


def run(capsys, *words):
    status = main([str(word) for word in words])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_list_is_a_table(capsys):
    status, out, _ = run(capsys, "list", "seresnet50*")
    lines = out.splitlines()
    assert status == 0 and lines[0].split() == ["name", "parameters", "input", "checkpoints", "source"]
    row = next(line for line in lines if line.startswith("seresnet50 "))
    assert "28.09 M" in row and "224" in row and "ra2_in1k" in row
    assert lines[-1].endswith("published checkpoints")


def test_list_as_json_and_only_pretrained(capsys):
    _, out, _ = run(capsys, "list", "--json")
    everything = json.loads(out)
    assert [row["name"] for row in everything] == se_flax.list_models()
    _, out, _ = run(capsys, "list", "--json", "--pretrained", "*resnet*")
    assert all(row["checkpoints"] and "resnet" in row["name"] for row in json.loads(out))


def test_info_names_every_checkpoint(capsys):
    for asked in ("seresnet50", "seresnet50.ra2_in1k"):
        status, out, _ = run(capsys, "info", asked)
        assert status == 0 and out.startswith("seresnet50: 28,088,024 parameters, made for 224 px\n")
        assert all(f"seresnet50.{tag} " in out for tag in ("a1_in1k", "a2_in1k", "a3_in1k", "ra2_in1k"))
    _, out, _ = run(capsys, "info", "seresnet50", "--json")
    rows = {row["ref"]: row for row in json.loads(out)["checkpoints"]}
    assert rows["seresnet50.ra2_in1k"]["preprocess"]["crop"] == 0.875


def test_info_of_a_folder_and_of_a_file(capsys, ref, tmp_path):
    status, out, err = run(capsys, "info", ref)
    params = sum(x.size for x in jax.tree.leaves(se_flax.load_pretrained(ref).variables["params"]))
    assert (
        status == 0
        and err == ""
        and out.splitlines()
        == [
            f"seresnet20: {params:,} parameters",
            "classes: 3 (blue, green, red)",
            "channels: 3",
            "images: 16 px (bicubic, crop 1 center), mean 0.485 0.456 0.406, std 0.229 0.224 0.225",
        ]
    )
    state = se_flax.to_timm("seresnet20", se_flax.load_pretrained(ref).variables)
    safetensors.numpy.save_file({f"module.{k}": v for k, v in state.items()}, tmp_path / "x.safetensors")
    status, out, err = run(capsys, "info", tmp_path / "x.safetensors", "--name", "SE-ResNet20", "--json")
    found, note = json.loads(out), "the prefix 'module.' of all names in the checkpoint was removed"
    assert (found["name"], found["num_classes"], found["params"]) == ("seresnet20", 3, params)
    assumed = f"{tmp_path / 'x.safetensors'} does not say how its images are prepared; assumed: image_size=32, "
    assert found["notes"][0] == note and found["notes"][1].startswith(assumed)
    assert err.splitlines() == [f"se-flax: {line}" for line in found["notes"]]
    assert found["provenance"] == {"source": str(tmp_path / "x.safetensors")}


def test_what_was_asked_for_is_one_line_and_no_warning(capsys, ref, tmp_path):
    status, _, err = run(capsys, "convert", ref, tmp_path / "new", "--num-classes", 7)
    note = "seresnet20: the classifier was initialised anew for 7 classes (the checkpoint's: 3 classes)"
    assert status == 0 and err == f"se-flax: {note}\n"


@pytest.fixture
def headless(ref, tmp_path):
    """A file that says neither its network nor its classes."""
    state = se_flax.to_timm("seresnet20", se_flax.load_pretrained(ref).variables)
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({k: v for k, v in state.items() if not k.startswith("linear")}, path)
    return path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "{file}", "{photos}"], "which network it holds; pass --name=... (se-flax list gives all)"),
        (["info", "{file}"], "which network it holds; pass --name=... (se-flax list gives all)"),
        (["info", "{ref}", "--name", "resnet20"], "not the given --name=resnet20; leave that out"),
        (["convert", "{file}", "new", "--name", "seresnet20"], "pass --num-classes=0 for a network without one"),
        (["eval", "{file}", "{photos}", "--name", "seresnet20"], " (--num-classes is a flag of se-flax convert)"),
        (["convert", "{file}", "new", "--name", "seresnet51"], "unknown model 'seresnet51'; closest: "),
        (["convert", "{file}", "new", "--revision", "v2"], "got --revision='v2' with "),
        (["predict", "{ref}", "{photos}", "--image-size", "-3"], "got --image-size=-3; give a whole number"),
        (["export", "{ref}", "new", "--crop", "7"], "got --crop=7.0; give the share of the side that the crop keeps"),
        (["export", "{ref}", "{photos}"], "exists already; choose another folder, or pass --overwrite to replace it"),
        (["costs", "seresnet20", "--image-size", "-3"], "got --image-size=-3; give a positive whole number"),
        (["info", "seresnet20", "--name", "seresnet20"], "got --name with the network seresnet20; it goes with a file"),
    ],
)
def test_refusals_speak_of_the_flags_that_one_types(capsys, ref, photos, headless, words, message):
    status, _, err = run(capsys, *(word.format(ref=ref, photos=photos, file=headless) for word in words))
    assert status == 1 and message in err and err.count("\n") == 1
    assert not re.search(r"[^-\w](name|num_classes|in_channels|image_size|crop|revision|overwrite)=", err)


def test_a_layout_for_a_folder_is_refused(capsys, ref, tmp_path):
    status, _, err = run(capsys, "convert", ref, tmp_path / "folder", "--layout", "timm")
    assert status == 1 and "got --layout=timm for the folder" in err and "its own names; leave it out, or write" in err
    assert not (tmp_path / "folder").exists()


def test_without_a_connection_it_is_one_line(photos, tmp_path):
    """Nothing listens on the discard port of this machine, so the request ends at once."""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE", None)
    words = [sys.executable, "-m", "se_flax", "predict", "seresnet50.ra2_in1k", str(photos)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(
        r"se-flax: timm/seresnet50\.ra2_in1k is not in the cache and the hub cannot be reached; .*\n", done.stderr
    )


def test_predict_prints_the_likeliest_classes(capsys, ref, photos):
    picture = photos / "green" / "2.png"
    status, out, _ = run(capsys, "predict", ref, picture)
    lines = out.splitlines()
    assert status == 0 and lines[0] == str(picture) and len(lines) == 4
    assert lines[1].split()[1:] == ["%", "green"] and float(lines[1].split()[0]) > 99


def test_predict_as_json_over_a_folder(capsys, ref, photos):
    _, out, _ = run(capsys, "predict", ref, photos, "--json", "--batch-size", 4, "--top", 2)
    rows = json.loads(out)
    assert len(rows) == 9
    for row in rows:
        assert row["top"][0]["label"] in row["image"] and len(row["top"]) == 2
        assert row["top"][0]["label"] == NAMES[row["top"][0]["class"]]


@pytest.mark.parametrize("batch", [1, 4, 9, 32])
def test_eval_counts_every_picture_once(capsys, ref, photos, batch):
    status, out, _ = run(capsys, "eval", ref, photos, "--batch-size", batch)
    assert status == 0 and "top-1: 100.00 % (9 of 9)" in out
    assert "top-5" not in out  # of three classes


def test_hidden_files_are_no_pictures(capsys, ref, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    for name in ("._0.png", "red/._0.png", "red/.ipynb_checkpoints/0.png", "__MACOSX/red/0.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"no picture")
    _, out, _ = run(capsys, "predict", ref, tmp_path / "photos", "--json")
    assert len(json.loads(out)) == 9
    assert "(9 of 9)" in run(capsys, "eval", ref, tmp_path / "photos")[1]


def test_labels_that_are_numbers(capsys, ref, photos, tmp_path):
    """The same network, its classes called 1, 2 and 3."""
    loaded = se_flax.load_pretrained(ref)
    dataclasses.replace(loaded, labels=("1", "2", "3")).save(tmp_path / "numbered")
    dataclasses.replace(loaded, labels=None).save(tmp_path / "unnamed")
    for number, name in enumerate(NAMES, 1):
        shutil.copytree(photos / name, tmp_path / "data" / str(number))
    assert "top-1: 100.00 % (9 of 9)" in run(capsys, "eval", tmp_path / "numbered", tmp_path / "data")[1]
    status, out, err = run(capsys, "eval", tmp_path / "unnamed", tmp_path / "data", "--json")
    assert status == 0 and json.loads(out)["top1_count"] == 9
    assert "the network has no labels; the folders are its classes in sorted order: 1 = 0, 2 = 1, 3 = 2\n" in err
    (tmp_path / "data" / "1").rename(tmp_path / "data" / "0")
    status, _, err = run(capsys, "eval", tmp_path / "numbered", tmp_path / "data")
    assert (
        status == 1 and "the folder '0'" in err and "names none of the network's 3 classes (1 of 3 names do not)" in err
    )


def test_evals_rate_is_without_the_compilation(capsys, monkeypatch, ref, photos):
    """By a clock that moves with compilation and with reading pictures alone."""
    now = [0.0]

    def taking(function, seconds):
        def timed(*arguments, **keywords):
            now[0] += seconds
            return function(*arguments, **keywords)

        return timed

    monkeypatch.setattr("se_flax.cli.images.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("se_flax.cli.images._compiled", taking(images._compiled, 100.0))
    monkeypatch.setattr(Preprocess, "pixels", taking(Preprocess.pixels, 0.5))
    assert run(capsys, "eval", ref, photos)[1].endswith("\n4.5 s, 2.0 pictures/s\n")


def test_eval_finds_classes_by_file_name_too(capsys, ref, tmp_path):
    for i, name in enumerate(NAMES):
        Image.new("RGB", (16, 16), COLOURS[name]).save(tmp_path / f"{i:04d}_x.png")
    Image.new("RGB", (16, 16), COLOURS["red"]).save(tmp_path / "0_wrong.png")
    _, out, _ = run(capsys, "eval", ref, tmp_path, "--json")
    figures = json.loads(out)
    assert (figures["count"], figures["top1_count"]) == (4, 3) and "top5" not in figures


def test_convert_there_and_back(capsys, ref, photos, tmp_path):
    status, out, _ = run(capsys, "convert", ref, tmp_path / "seresnet20.safetensors")
    count = len(jax.tree.leaves(se_flax.load_pretrained(ref).variables))
    assert status == 0 and out.endswith(f"seresnet20.safetensors: seresnet20, {count} arrays, 1.1 MB\n")
    names = safetensors.numpy.load_file(tmp_path / "seresnet20.safetensors").keys()
    assert {"conv1.weight", "layer1.0.conv1.weight", "linear.weight"} <= names
    run(capsys, "convert", tmp_path / "seresnet20.safetensors", tmp_path / "own.npz", "--layout", "se-flax")
    assert "params/layer1_0/conv1/kernel" in np.load(tmp_path / "own.npz")
    first, second = (np.load(tmp_path / "own.npz")[k] for k in ("params/linear/kernel", "params/linear/bias"))
    loaded = se_flax.load_pretrained(ref)
    np.testing.assert_array_equal(first, loaded.variables["params"]["linear"]["kernel"])
    np.testing.assert_array_equal(second, loaded.variables["params"]["linear"]["bias"])
    status, _, err = run(capsys, "convert", ref, tmp_path / "seresnet20.safetensors")
    assert status == 1 and err.endswith("exists already; choose another name, or pass --overwrite to replace it\n")
    assert run(capsys, "convert", ref, tmp_path / "folder")[0] == 0
    assert run(capsys, "convert", ref, tmp_path / "folder", "--overwrite")[0] == 0
    assert "(9 of 9)" in run(capsys, "eval", tmp_path / "folder", photos)[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["list", "*seresnett50*"], "no network matches '*seresnett50*'; closest: seresnet50, "),
        (["info", "seresnet51"], "unknown model 'seresnet51'; closest: "),
        (["predict", "seresnet51.x", "{photos}"], "unknown checkpoint 'seresnet51.x'; closest: "),
        (["predict", "{ref}", "missing.jpg"], "missing.jpg: no such file or folder"),
        (["predict", "{ref}", "{photos}", "--top", "0"], "got --top=0; give 1 or more"),
        (["predict", "{ref}", "{photos}", "--image-size", "-3"], "got --image-size=-3; give a whole number"),
        (["predict", "{ref}", "{photos}", "--batch-size", "0"], "got --batch-size=0; give 1 or more"),
        (
            ["predict", "{ref}", __file__],
            "cannot be read as an image: not a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or PPM image",
        ),
        (["eval", "{ref}", "missing"], "missing: no such folder"),
        (["eval", "{ref}", "{photos}/red"], "names no class; without class folders a picture's name must begin with"),
        (["convert", "{ref}", "x.onnx"], "x.onnx is neither a folder nor a .safetensors or .npz file"),
        (["convert", "{ref}", "x.npz", "--layout", "keras"], "has no counterpart in keras.applications"),
    ],
)
def test_refusals_take_one_line(capsys, ref, photos, words, message):
    status, out, err = run(capsys, *(word.format(ref=ref, photos=photos) for word in words))
    assert status == 1 and message in err and err.startswith("se-flax: ") and err.count("\n") == 1
    assert "%" not in out


def test_a_class_that_the_network_does_not_know(capsys, ref, photos, tmp_path):
    for folder in ("red", "violet"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / folder / "x.png")
    status, _, err = run(capsys, "eval", ref, tmp_path)
    assert status == 1 and "the folder 'violet'" in err and "names none of the network's 3 classes" in err


@pytest.mark.parametrize("words", [[], ["prdict"], ["predict"], ["list", "--nope"]])
def test_a_wrong_command_line_is_status_2(capsys, words):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2 and "usage: se-flax" in capsys.readouterr().err


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "se_flax", "list", "seresnet20"], capture_output=True, text=True)
    assert done.returncode == 0 and "0.27 M" in done.stdout, done.stderr


def test_what_a_checkpoint_says_cannot_control_the_terminal(capsys, ref, photos, tmp_path):
    loaded = se_flax.load_pretrained(ref)
    labels = ("\x1b[2Jblue", "gr\x9bün", "r\u202eed")
    dataclasses.replace(loaded, labels=labels, provenance={"source": "\x1b]0;title\x07"}).save(tmp_path / "odd")
    for command in (("predict", tmp_path / "odd", photos / "red/0.png"), ("info", tmp_path / "odd")):
        status, out, err = run(capsys, *command)
        assert status == 0 and not set("\x1b\x9b\u202e\x07") & set(out + err)
        assert "?[2Jblue" in out and "gr?ün" in out and "r?ed" in out
    status, _, err = run(capsys, "predict", tmp_path / "no\x1b[2Jne", photos / "red/0.png")
    assert status == 1 and "no?[2Jne" in err and "\x1b" not in err
