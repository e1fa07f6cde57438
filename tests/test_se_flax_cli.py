"""The command `se-flax` as a person meets it: output, refusals, exit codes."""

import json
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
    assert status == 0 and "top-1: 100.00 % (9 of 9)" in out and "top-5: 100.00 % (9 of 9)" in out


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
    assert (figures["count"], figures["top1_count"], figures["top5_count"]) == (4, 3, 4)


def test_eval_numbers_unknown_folders_in_sorted_order(capsys, ref, tmp_path):
    for folder, name in zip(("a", "b", "c"), NAMES, strict=True):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (16, 16), COLOURS[name]).save(tmp_path / folder / "x.png")
    assert "(3 of 3)" in run(capsys, "eval", ref, tmp_path)[1]


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
        (["predict", "{ref}", "{photos}", "--image-size", "-3"], "got image_size=-3; give a whole number"),
        (["predict", "{ref}", "{photos}", "--batch-size", "0"], "got --batch-size=0; give 1 or more"),
        (["predict", "{ref}", __file__], "cannot be read as an image: not an image that Pillow knows"),
        (["eval", "{ref}", "missing"], "missing: no such folder"),
        (["eval", "{ref}", "{photos}/red"], "says no class: without class folders a picture's name begins with"),
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
