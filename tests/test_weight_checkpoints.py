"""Checkpoints of PyTorch and Orbax as files of arrays; PyTorch is played by a stand-in, since it is not installed."""

import json
import os
import pickle
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from array_files import ARRAYS, BFLOAT16, HUGE, read, refuses

import se_flax
from se_flax.checkpoints.convert import variable_shapes
from se_flax.checkpoints.files import open_arrays
from se_flax.checkpoints.torch import torch_key, torch_shape
from train.run.checkpoint import Checkpoints
from train.run.step import TrainState

NETWORK = {
    "params": {"conv1": {"kernel": ARRAYS["columns"]}, "layer1_0": {"bn1": {"scale": ARRAYS["half"]}}},
    "batch_stats": {"bn1": {"mean": ARRAYS["conv1.weight"]}},
}


class Tensor:
    """As much of a tensor as is used of one."""

    def __init__(self, value, dtype=None, stored=None, layout="strided", device="cpu"):
        self.value, self.stored, self.layout = value, stored, layout
        self.dtype = f"torch.{dtype or value.dtype}"
        self.device = types.SimpleNamespace(type=device)
        self.shape = value.shape

    def untyped_storage(self):
        return types.SimpleNamespace(nbytes=lambda: self.value.nbytes if self.stored is None else self.stored)

    def numel(self):
        return self.value.size

    def element_size(self):
        return self.value.itemsize

    def detach(self):
        return self

    contiguous = detach

    def view(self, dtype):
        assert (self.dtype, dtype) == ("torch.bfloat16", "torch.int16")
        return Tensor(self.value.view(np.int16))

    def numpy(self):
        assert self.dtype != "torch.bfloat16"  # as PyTorch does
        return self.value


@pytest.fixture
def torch_that_loads(monkeypatch, tmp_path):
    """Pretends that PyTorch is installed and finds something in any file."""

    def pretend(content, version="2.10.1+cpu", start=b"\x80\x02"):
        path = tmp_path / "m.pth"
        path.write_bytes(start + bytes(40))

        def load(given, *, map_location, weights_only, mmap):
            zipped = zipfile.is_zipfile(path)
            assert (map_location, weights_only, mmap) == ("cpu", True, zipped)
            # Other formats come as mapped bytes, of which no declared length makes more.
            assert given == path if zipped else given[:] == path.read_bytes()
            if isinstance(content, Exception):
                raise content
            return content

        names = {"load": load, "Tensor": Tensor, "strided": "strided", "__version__": version}
        names |= {"bfloat16": "torch.bfloat16", "int16": "torch.int16"}
        monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(**names))
        return path

    return pretend


TENSORS = {name: Tensor(value) for name, value in ARRAYS.items()}


@pytest.mark.parametrize(
    "content",
    [
        TENSORS,
        {"state_dict": TENSORS, "epoch": 3},
        {"model": TENSORS, "optimizer": {"lr": 1}},
        {"state_dict": {"w": TENSORS["half"]}, "state_dict_ema": TENSORS},
        {"model_state_dict": TENSORS, "optimizer_state_dict": {"state": {}}},  # as PyTorch's tutorials save it
    ],
)
def test_pytorch_files(content, torch_that_loads):
    found = read(torch_that_loads(content))
    assert set(found) == set(ARRAYS)
    for name, expected in ARRAYS.items():
        np.testing.assert_array_equal(found[name], expected.astype(found[name].dtype))
    assert found["counter"].dtype == np.int64
    assert found["double"].dtype == found["half"].dtype == np.float32


@pytest.mark.parametrize("prefix", ["module.", "model._orig_mod."])
def test_a_prefix_of_pytorch_files_is_taken_off_and_said(prefix, torch_that_loads):
    shapes = variable_shapes(se_flax.create_model("seresnet20"), 32)
    given = {torch_key(path): np.full(torch_shape(path, leaf.shape), 0.5) for path, leaf in shapes.items()}
    path = torch_that_loads({"state_dict": {prefix + key: Tensor(value) for key, value in given.items()}})
    prepare = se_flax.Preprocess(image_size=32)
    loaded = se_flax.load_pretrained(path, name="seresnet20", preprocess=prepare)  # a warning would be an error here
    assert loaded.notes == (f"the prefix {prefix!r} of all names in the checkpoint was removed",)
    assert se_flax.to_timm("seresnet20", loaded.variables).keys() >= given.keys()


def test_pytorch_bfloat16(torch_that_loads):
    path = torch_that_loads({"b": Tensor(BFLOAT16, "bfloat16")})
    with open_arrays(path) as arrays:
        assert arrays["b"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(np.asarray(arrays["b"]), BFLOAT16.astype(np.float32))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"w": 3}, "'w' is a int, not a plain array; give a state dict alone"),
        ({"w": Tensor(BFLOAT16, layout="sparse")}, "'w' is a Tensor, not a plain array"),
        ({"w": Tensor(ARRAYS["half"], device="meta")}, "'w' is a Tensor, not a plain array"),
        ({"w": Tensor(ARRAYS["half"], "qint8")}, "array 'w' has dtype qint8; allowed"),
        ({1: Tensor(ARRAYS["half"])}, "holds a dict, not a state dict; give a dictionary of arrays by name"),
        ([Tensor(ARRAYS["half"])], "holds a list, not a state dict"),
        ({"w": Tensor(np.broadcast_to(np.float16(1), (HUGE,)), stored=2)}, r"declares shape \(1000000000000,\), which"),
        ({"../w": Tensor(ARRAYS["half"])}, "could be misused as a path"),
        (
            RuntimeError("file in archive is\nbroken"),
            r"no plain arrays in it \(file in archive is\); download it again",
        ),
        (RuntimeError("set weights_only to False"), "finds no plain arrays in it; download it again"),
        (
            pickle.UnpicklingError("weights_only\nUnsupported global: GLOBAL posix.system was not allowed"),
            "it refers to posix.system, not to arrays alone, and such files can run code; if you trust it, save",
        ),
    ],
)
def test_pytorch_files_with_other_things(content, match, torch_that_loads):
    refuses(torch_that_loads(content), match)


def test_without_pytorch_or_with_an_unsafe_one(torch_that_loads, monkeypatch):
    refuses(torch_that_loads(TENSORS, "2.9.1"), r"PyTorch 2\.9\.1 can be made to run code .* 'torch>=2\.10'")
    path = torch_that_loads(TENSORS)
    monkeypatch.setitem(sys.modules, "torch", None)
    refuses(path, r"it is not installed; pip install torch, or convert the file to \.safetensors where it is")


def names_of(tree, prefix=""):
    flat = {}
    for key, value in tree.items():
        flat |= names_of(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return flat


def assert_network(path, factor=1):
    found, expected = read(path), names_of(NETWORK)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], value.astype(np.float32) * factor)


@pytest.mark.parametrize("packed", [True, False])
def test_orbax_checkpoints(packed, tmp_path):
    with ocp.PyTreeCheckpointer(use_ocdbt=packed) as checkpointer:
        checkpointer.save(tmp_path / "c", {**NETWORK, "step": 3, "opt_state": [np.ones(3)], "note": "text", "no": None})
    assert_network(tmp_path / "c")
    assert_network(str(tmp_path / "c"))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        items = ocp.args.Composite(model=ocp.args.StandardSave(NETWORK), run=ocp.args.JsonSave({"a": 1}))
        checkpointer.save(tmp_path / "items", items)
    assert_network(tmp_path / "items")
    with ocp.PyTreeCheckpointer(use_ocdbt=packed) as checkpointer:
        checkpointer.save(tmp_path / "inner", {"trainer": {"model": {**NETWORK, "step": 3}}})
    assert_network(tmp_path / "inner")
    with open_arrays(tmp_path / "inner") as arrays:
        assert arrays.notes == ("the prefix 'trainer/model/' of all names in the checkpoint was removed",)


def doubled(tree):
    return {key: doubled(value) if isinstance(value, dict) else value * 2 for key, value in tree.items()}


@pytest.mark.parametrize(("average", "factor"), [(None, 1), (doubled(NETWORK), 2)])
def test_orbax_checkpoint_of_a_run(average, factor, tmp_path):
    state = TrainState(step=np.asarray(5), opt_state=(NETWORK,), ema=average, key=np.zeros(2, np.uint32), **NETWORK)
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=1)
    checkpoints.save(5, state, data={}, run={})
    checkpoints.close()
    assert_network(tmp_path / "checkpoints" / "5", factor)
    refuses(tmp_path, "it is a run's folder; give that of one step, such as checkpoints/1000 in it")


def test_folders_that_are_no_checkpoint_of_a_network(tmp_path):
    refuses(tmp_path, r"it is a folder without an Orbax checkpoint \(no _METADATA in it\); give that of one step")
    with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
        checkpointer.save(tmp_path / "a", {"weights": np.ones(3)})
        checkpointer.save(tmp_path / "b", NETWORK)
    refuses(
        tmp_path / "a",
        "has neither params nor batch_stats at its top level, but: weights; save variables under these names",
    )
    refuses(tmp_path, "it holds several trees of arrays; give the folder of one: a, b")
    metadata = tmp_path / "b" / "_METADATA"
    text = metadata.read_text()
    metadata.write_text(text.replace('"conv1"', '"../../a"'))
    refuses(tmp_path / "b", "the name 'params/../../a/kernel' could be misused as a path")
    metadata.write_text(text[:100])
    refuses(tmp_path / "b", "is damaged or of another format")
    metadata.write_text(text)
    array = tmp_path / "b" / "params.conv1.kernel"
    declared = json.loads((array / ".zarray").read_text())
    (array / ".zarray").write_text(json.dumps(declared | {"shape": [HUGE, HUGE]}))
    refuses(tmp_path / "b", "impossible shape|cannot hold")
    (array / ".zarray").write_text(json.dumps(declared | {"shape": [HUGE, 4]}))
    refuses(tmp_path / "b", r"its arrays declare 16,000,000,000,\d+ bytes, which its [\d,]+ bytes cannot hold")
    (array / ".zarray").write_text(json.dumps(declared))
    (array / "0.0").unlink()
    refuses(tmp_path / "b", "is damaged or of another format")
    os.mkfifo(array / "0.0")
    refuses(tmp_path / "b", "'0.0' in it is no regular file; copy the checkpoint again")
