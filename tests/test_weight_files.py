"""Files of arrays: whatever is in them, either the array comes out, or one sentence says what is wrong."""

import contextlib
import os
import resource
import socket
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from array_files import ARRAYS, BFLOAT16, SAVE, read, refuses, save_h5, save_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from se_flax import UserError
from se_flax.checkpoints import files
from se_flax.checkpoints.files import open_arrays, write_arrays


@pytest.mark.parametrize("suffix", SAVE)
def test_what_the_usual_programs_save_is_read(suffix, tmp_path):
    path = tmp_path / f"model.{suffix}"
    SAVE[suffix](path, ARRAYS)
    with open_arrays(path) as arrays:
        assert set(arrays) == set(ARRAYS)
        assert len(arrays) == len(ARRAYS)
        for name, expected in ARRAYS.items():
            assert arrays[name].shape == np.shape(arrays[name]) == expected.shape
            assert arrays[name].dtype == expected.dtype
            value = np.asarray(arrays[name])
            assert value.dtype == (np.float32 if expected.dtype.kind == "f" else expected.dtype)
            np.testing.assert_array_equal(value, expected.astype(value.dtype))
        assert np.asarray(arrays["half"], np.float64).dtype == np.float64
        with pytest.raises(ValueError, match="without a copy"):
            np.asarray(arrays["half"], copy=False)
    with pytest.raises(ValueError, match="is closed; read its arrays inside the with block"):
        np.asarray(arrays["half"])


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_what_is_written_is_read_by_the_usual_programs(suffix, tmp_path):
    path = tmp_path / f"model.{suffix}"
    # The names are those of numpy.savez's own arguments.
    write_arrays(path, ARRAYS | {"file": BFLOAT16, "allow_pickle": ARRAYS["half"].astype(">f2")})
    if suffix == "npz":
        with np.load(path, allow_pickle=False) as archive:
            found = dict(archive)
    else:
        found = safetensors.numpy.load_file(path)
        assert found["file"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.pop("file").astype(np.float32), BFLOAT16.astype(np.float32))
    np.testing.assert_array_equal(found.pop("allow_pickle"), ARRAYS["half"])
    assert set(found) == set(ARRAYS)
    for name, expected in ARRAYS.items():
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name], expected)
    first = path.read_bytes()
    with open_arrays(path) as arrays:
        write_arrays(path, arrays)  # onto itself, from an open file
    np.testing.assert_array_equal(read(path)["double"], ARRAYS["double"].astype(np.float32))
    write_arrays(path, ARRAYS | {"file": BFLOAT16, "allow_pickle": ARRAYS["half"].astype(">f2")})
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_bfloat16_and_metadata_of_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    save_safetensors(path, {"b": BFLOAT16}, {"format": "pt"})
    with open_arrays(path) as arrays:
        assert arrays["b"].dtype == ml_dtypes.bfloat16
        assert arrays.metadata == {"format": "pt"}
        value = np.asarray(arrays["b"])
    assert value.dtype == np.float32
    # bfloat16 is the upper half of a float32.
    np.testing.assert_array_equal(value, (BFLOAT16.view(np.uint16).astype(np.uint32) << 16).view(np.float32))


def test_bytes_in_the_other_order(tmp_path):
    swapped = {"w": np.arange(5, dtype=">f4"), "n": np.arange(5, dtype=">i4")}
    for suffix in ("npz", "h5"):
        SAVE[suffix](tmp_path / f"m.{suffix}", swapped)
        for name, value in read(tmp_path / f"m.{suffix}").items():
            assert value.dtype == swapped[name].dtype.newbyteorder("=")
            np.testing.assert_array_equal(value, np.arange(5))


def test_a_float64_beyond_float32_is_refused(tmp_path):
    save_h5(tmp_path / "a.h5", {"w": np.asarray([1e300])})
    refuses(tmp_path / "a.h5", "overflow")


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    path = tmp_path / "model.npz"
    np.savez(path, first=np.arange(10_000.0), second=np.arange(50.0))
    data = bytearray(path.read_bytes())
    data[data.index(np.arange(10_000.0).tobytes()) + 40_000] ^= 1
    path.write_bytes(data)
    with open_arrays(path) as arrays:
        assert arrays["first"].shape == (10_000,)
        assert np.asarray(arrays["second"])[-1] == 49
        with pytest.raises(UserError, match=r"model\.npz is damaged.*CRC"):
            np.asarray(arrays["first"])


SMALL = {"a.weight": ARRAYS["conv1.weight"], "n": ARRAYS["counter"], "b": np.arange(40, dtype=np.float16)}


def whole(suffix, folder):
    path = folder / f"whole.{suffix}"
    SAVE[suffix](path, SMALL)
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    save_h5(folder / "a.h5", SMALL, chunks=(20,), compression="gzip")
    return {
        "safetensors": whole("safetensors", folder),
        "npz": whole("npz", folder),
        "packed.npz": whole("packed.npz", folder),
        "h5": (folder / "a.h5").read_bytes(),
    }


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "packed.npz", "h5"])
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_gives_arrays_of_the_declared_shape_or_one_sentence(suffix, data, whole_files, tmp_path):
    content = bytearray(whole_files[suffix])
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[place:]
        shorter = True
    else:
        content[place] ^= data.draw(st.integers(1, 255))
        shorter = False
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(content)
    try:
        with open_arrays(path) as arrays:
            values = {name: (value.shape, np.asarray(value)) for name, value in arrays.items()}
    except UserError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return
    assert all(value.shape == shape for shape, value in values.values())
    if shorter and values:  # what is still found is unchanged
        assert all(np.array_equal(value, SMALL[name]) for name, (_, value) in values.items())


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "m.npz")
    refuses(tmp_path / "m.npz", r"is a named pipe; give a regular file: \.safetensors, \.npz, ")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    refuses(tmp_path / "zero.safetensors", "is a device; give a regular file")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.h5"))
        refuses(tmp_path / "s.h5", "is a socket")
    (tmp_path / "loop.npz").symlink_to(tmp_path / "loop.npz")
    refuses(tmp_path / "loop.npz", "cannot be read .*; give a file that can")
    save_safetensors(tmp_path / "blob", SMALL)
    (tmp_path / "cached.safetensors").symlink_to(tmp_path / "blob")  # as the Hugging Face cache lays it out
    assert set(read(tmp_path / "cached.safetensors")) == set(SMALL)
    refuses(tmp_path / "blob" / "m.npz", "cannot be read .Not a directory.")
    refuses(tmp_path / ("n" * 300 + ".npz"), "cannot be read .File name too long.")


@contextlib.contextmanager
def without_roots_rights():
    """A new folder of a user who may not read everything; in a container the tests may run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    finally:
        if root:
            os.seteuid(0)


def test_a_file_that_may_not_be_read():
    with without_roots_rights() as folder:
        (folder / "m.npz").touch(mode=0)
        refuses(folder / "m.npz", "cannot be read .Permission denied.")


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "h5", "hdf5", "pth", "pt", "bin", "ckpt", "tar"])
def test_a_file_of_another_format(suffix, tmp_path):
    path = tmp_path / f"m.{suffix}"
    refuses(path, r"does not exist; give \.safetensors, \.npz, \.h5, ")
    path.touch()
    refuses(path, rf"is empty, no \.{suffix} file; download or save it again")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refuses(path, "is a Git LFS pointer, not the file that it stands for, no ")
    path.write_bytes(b"<!DOCTYPE html><html>404</html>")
    refuses(path, "is a web page, no ")
    path.write_bytes(b"\x00\x01\x02")
    refuses(path, r"is damaged, it begins with b'\\x00\\x01\\x02', no ")
    if suffix not in ("h5", "hdf5"):
        save_h5(tmp_path / "m.h5", SMALL)
        path.write_bytes((tmp_path / "m.h5").read_bytes())
        refuses(path, "is an HDF5 file, no ")


def test_a_suffix_that_is_not_known(tmp_path):
    (tmp_path / "m.onnx").touch()
    refuses(tmp_path / "m.onnx", r"ends in \.onnx; allowed: \.safetensors")
    (tmp_path / "m").touch()
    refuses(tmp_path / "m", "ends in nothing; allowed")
    (tmp_path / "m.keras").touch()
    refuses(tmp_path / "m.keras", r"unzip it and give the model\.weights\.h5 in it")
    with pytest.raises(UserError, match="embedded null"):
        read("a\0.npz")
    with pytest.raises(UserError, match=r"m\.h5 ends in \.h5; arrays are written to \.safetensors or \.npz"):
        write_arrays(tmp_path / "m.h5", SMALL)


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_a_full_disk_leaves_the_older_file(suffix, tmp_path, monkeypatch):
    path = tmp_path / f"m.{suffix}"
    write_arrays(path, SMALL)
    older = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(
            UserError, match=r"could not be written \(the disk is full\), nothing was changed; free some"
        ):
            write_arrays(path, ARRAYS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            UserError, match=r"could not be written \(File too large\), nothing was changed; give another"
        ):
            write_arrays(path, {"w": np.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == older
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_where_nothing_can_be_written(tmp_path):
    with pytest.raises(UserError, match=r"could not be written \(No such file or directory\), nothing was changed"):
        write_arrays(tmp_path / "missing" / "m.npz", SMALL)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"\(Not a directory\)"):
        write_arrays(tmp_path / "file" / "m.npz", SMALL)
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(UserError, match=r"\(Is a directory\)"):
        write_arrays(tmp_path / "folder.npz", SMALL)
    with pytest.raises(UserError, match="cannot be written: array 'w' has dtype <U4; allowed: int8"):
        write_arrays(tmp_path / "m.npz", {"w": np.asarray(["text"])})
    assert {p.name for p in tmp_path.iterdir()} == {"file", "folder.npz"}
