"""Exported networks against the network itself, in the programs that serve them."""

import importlib.util
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from random_variables import FAMILIES, random_variables

import se_flax
from se_flax import Preprocess, Pretrained, UserError
from se_flax.cli import main

DOCS = Path(__file__).parents[1] / "docs" / "export.md"


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"the optional package {package} is not installed")


def trained(name="seresnet20", side=32, **attributes):
    """A network as if it had been loaded."""
    attributes = {"num_classes": 5, **FAMILIES.get(name, {}), **attributes}
    model = se_flax.create_model(name, **attributes)
    labels = tuple(f"kind {i}" for i in range(model.num_classes)) or None
    prepare = Preprocess(image_size=side, crop=0.9, mean=(0.4, 0.5, 0.6), interpolation="bilinear")
    variables = random_variables(model, 1, side, side, 3)
    return Pretrained(name, model, variables, prepare, labels, attributes, {"licence": "mit"})


def images(count, side=32, seed=0):
    return np.random.default_rng(seed).standard_normal((count, side, side, 3)).astype(np.float32)


def logits_of(loaded, x):
    return np.asarray(jax.jit(loaded.model.apply)(loaded.variables, x))


def close(ours, theirs, share=1e-4):
    assert ours.shape == theirs.shape
    assert np.max(np.abs(ours - theirs)) <= share * np.max(np.abs(theirs))


@pytest.fixture(scope="module")
def loaded():
    return trained()


# --- StableHLO --------------------------------------------------------------------------------------------------------


@needs("flatbuffers")
def test_stablehlo_is_one_file_for_every_platform_and_batch(loaded, tmp_path):
    described = se_flax.export_pretrained(tmp_path / "served", loaded)
    assert sorted(path.name for path in (tmp_path / "served").iterdir()) == ["model.stablehlo", "serving.json"]
    assert json.loads((tmp_path / "served" / "serving.json").read_text()) == described
    exported = jax.export.deserialize(bytearray((tmp_path / "served" / "model.stablehlo").read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert str(exported.in_avals[0].shape) == "(batch, 32, 32, 3)" and exported.in_avals[0].dtype == np.float32
    for count in (1, 3):
        close(np.asarray(exported.call(images(count))), logits_of(loaded, images(count)))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_traced_with_a_free_batch(name):
    model = se_flax.create_model(name, num_classes=5, **FAMILIES[name])
    (batch,) = jax.export.symbolic_shape("b")
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    traced = partial(jax.export.export(jax.jit(model.apply), platforms=("cpu", "cuda", "tpu")), shapes)
    exported = traced(jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32))
    assert exported.out_avals[0].shape == (batch, 5)
    # Picking elements by an index would be slow where a slice is meant.
    assert "gather" not in exported.mlir_module()


def test_mixed_kernels_and_mixed_maps_are_the_same():
    loaded = trained("tf_efficientnet_cc_b0_4e", side=16)
    model = loaded.model
    (batch,) = jax.export.symbolic_shape("b")
    spec = jax.ShapeDtypeStruct((batch, 16, 16, 3), jnp.float32)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), loaded.variables)
    exported = jax.export.export(jax.jit(model.apply))(shapes, spec)
    x = images(2, 16)
    close(np.asarray(exported.call(loaded.variables, x)), logits_of(loaded, x))


# --- ONNX -------------------------------------------------------------------------------------------------------------


@needs("onnx")
@needs("onnxruntime")
@pytest.mark.parametrize("name", FAMILIES)
def test_onnx_of_every_family(name):
    import onnxruntime

    from se_flax.export import onnx_program

    loaded = trained(name)
    apply = partial(loaded.model.apply, loaded.variables)
    program = onnx_program.to_onnx(apply, (32, 32, 3))
    # Maps are [N, C, H, W] from the images to the end.
    assert [list(node.input) for node in program.graph.node if node.op_type == "Transpose"] == [["images"]]
    assert "GlobalAveragePool" in [node.op_type for node in program.graph.node]
    session = onnxruntime.InferenceSession(program.SerializeToString(), providers=["CPUExecutionProvider"])
    (takes,), (gives,) = session.get_inputs(), session.get_outputs()
    assert (takes.name, takes.shape, gives.name, gives.shape) == (
        "images",
        ["batch", 32, 32, 3],
        "logits",
        ["batch", 5],
    )
    x = images(3)
    close(session.run(None, {"images": x})[0], logits_of(loaded, x))
    close(session.run(None, {"images": x[:1]})[0], logits_of(loaded, x)[:1])


@needs("onnx")
@needs("onnxruntime")
def test_onnx_carries_its_description_and_how_exact_it_is(loaded, tmp_path):
    import onnx

    described = se_flax.export_pretrained(tmp_path / "served", loaded, format="onnx")
    assert 0 <= described["difference"] < 1e-5 and described["fused"]
    properties = {p.key: json.loads(p.value) for p in onnx.load(tmp_path / "served" / "model.onnx").metadata_props}
    assert Preprocess.from_json(properties["preprocess"]) == loaded.preprocess
    assert tuple(properties["labels"]) == loaded.labels and properties["architecture"] == "seresnet20"


@needs("onnx")
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: jnp.sort(x, axis=1)[:, 0, 0], r"the operation 'sort', which has no ONNX form here; export it as s"),
        (lambda x: jnp.argmax(x, axis=-1), r"operation 'argmax'"),
        (lambda x: x[:, jnp.int32(x.sum()) % 2], r"(operation 'rem'|indexes by what it computes)"),
        (lambda x: x[:, np.array([0, 1]), :, np.array([1, 2])], r"indexes several axes by one list"),
        (lambda x: jax.lax.conv_transpose(x, jnp.ones((2, 2, 3, 4)), (2, 2), "SAME"), r"has a transposed convolution"),
    ],
)
def test_onnx_refuses_what_it_does_not_know(function, reason):
    from se_flax.export import onnx_program

    with pytest.raises(UserError, match=reason):
        onnx_program.to_onnx(function, (4, 4, 3))


@needs("onnx")
@needs("onnxruntime")
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, ::2, 1:],
        lambda x: x[:, 3, ::2][..., np.array([2, 0, 1])],
        lambda x: x[:, 0, :, 1] * jnp.asarray([2.0, -1.0, 0.5, 3.0]),
        lambda x: jnp.where(x > 0, x, -jnp.log1p(jnp.abs(x))),
        lambda x: jax.nn.gelu(x, approximate=False) + jax.nn.gelu(x) + x**3,
        lambda x: jax.nn.softmax(x, axis=-1) @ jnp.ones((3, 2)),
        lambda x: jnp.einsum("nhwc,nhwd->ncd", x, jnp.clip(x, -1, 0.5)),
        lambda x: jnp.concatenate([x, jnp.ones_like(x), jnp.broadcast_to(jnp.arange(3.0), x.shape)], axis=1),
        lambda x: sum(jnp.unstack(jnp.stack([x, -2 * x], axis=1), axis=1)),
        lambda x: jnp.var(x, axis=(1, 2)) / jax.lax.rsqrt(jnp.square(x[:, 0, 0]) + 1e-3),
        lambda x: (x.astype(jnp.bfloat16).astype(jnp.float32) >= x).astype(jnp.float32),
    ],
)
def test_onnx_operations_one_by_one(function):
    import onnxruntime

    from se_flax.export import onnx_program

    session = onnxruntime.InferenceSession(
        onnx_program.to_onnx(function, (4, 4, 3)).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = images(2, 4)
    close(session.run(None, {"images": x})[0], np.asarray(function(jnp.asarray(x))), 1e-5)


def test_onnx_without_its_package_is_one_sentence(loaded, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "se_flax.export.onnx_program", raising=False)
    with pytest.raises(UserError, match=r'^the format onnx needs the package onnx: pip install "se-flax\[onnx\]"$'):
        se_flax.export_pretrained(tmp_path / "served", loaded, format="onnx")
    assert not list(tmp_path.iterdir())


# --- SavedModel -------------------------------------------------------------------------------------------------------


def test_savedmodel_without_tensorflow_is_one_sentence(loaded, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match=r"^the format savedmodel needs TensorFlow \(tensorflow is missing\): pip inst"):
        se_flax.export_pretrained(tmp_path / "served", loaded, format="savedmodel")


# --- The folder -------------------------------------------------------------------------------------------------------


@needs("flatbuffers")
def test_fused_or_not_is_the_same_network(loaded, tmp_path):
    norms = {}
    for fuse in (True, False):
        folder = tmp_path / str(fuse)
        assert se_flax.export_pretrained(folder, loaded, fuse=fuse)["fused"] is fuse
        exported = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
        norms[fuse] = exported.mlir_module().count("stablehlo.rsqrt")
    assert norms[True] == 0 < norms[False]


@needs("flatbuffers")
def test_a_network_without_batch_norms_goes_as_it_is(tmp_path):
    loaded = trained("resnet20", depth=1, norm=se_flax.nn.norm.GroupNorm, num_classes=0)
    described = se_flax.export_pretrained(tmp_path / "served", loaded)
    assert not described["fused"] and described["labels"] is None
    assert described["output"] == {"name": "features", "dtype": "float32", "shape": ["batch", 64]}


@needs("flatbuffers")
def test_what_is_there_is_not_overwritten_unasked(loaded, tmp_path):
    folder = tmp_path / "served"
    se_flax.export_pretrained(folder, loaded)
    before = (folder / "serving.json").stat().st_mtime_ns
    with pytest.raises(UserError, match="served exists already; choose another folder, or pass overwrite=True"):
        se_flax.export_pretrained(folder, loaded)
    assert (folder / "serving.json").stat().st_mtime_ns == before
    se_flax.export_pretrained(folder, loaded, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="mine exists and is not an exported network; choose another folder"):
        se_flax.export_pretrained(tmp_path / "mine", loaded, overwrite=True)
    with pytest.raises(UserError, match="unknown format 'onx'; closest: onnx"):
        se_flax.export_pretrained(tmp_path / "other", loaded, format="onx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "served"]


@needs("flatbuffers")
def test_the_command(loaded, tmp_path, capsys):
    loaded.save(tmp_path / "model")
    words = [str(tmp_path / "model"), str(tmp_path / "served"), "--image-size", "24", "--no-fuse"]
    assert main(["export", *words]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'served'}: seresnet20, stablehlo, [batch, 24, 24, 3] -> [batch, 5], ")
    described = json.loads((tmp_path / "served" / "serving.json").read_text())
    assert described["preprocess"]["image_size"] == 24 and not described["fused"]
    assert described["labels"] == list(loaded.labels) and described["provenance"] == {"licence": "mit"}
    assert main(["export", *words]) == 1
    assert "exists already" in capsys.readouterr().err


# --- The documented programs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "format",
    [
        pytest.param("stablehlo", marks=needs("flatbuffers")),
        pytest.param("onnx", marks=[needs("onnx"), needs("onnxruntime")]),
        pytest.param("savedmodel", marks=needs("tensorflow")),
    ],
)
def test_the_documented_server_sees_what_the_package_sees(format, loaded, tmp_path):
    """Each program of the page runs as it stands, without this package, on a picture to be turned and resized."""
    section = DOCS.read_text().split(f"## {format}")[1]
    program = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    assert "se_flax" not in program and len(program.splitlines()) <= 24
    se_flax.export_pretrained(tmp_path / "served", loaded, format=format)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "cat.png", exif=exif)
    (tmp_path / "serve.py").write_text(program)
    run = subprocess.run(
        [sys.executable, "serve.py", "cat.png"], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr
    logits = logits_of(loaded, loaded.preprocess(tmp_path / "cat.png"))[0]
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    expected = [f"{100 * shares[i]:.1f} % {loaded.labels[i]}" for i in np.argsort(-logits)]
    assert run.stdout.splitlines() == expected
