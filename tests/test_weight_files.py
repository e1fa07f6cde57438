"""Files of arrays: whatever is in them, either the array comes out, or one sentence says what is wrong."""

import io
import json
import os
import pickle
import resource
import socket
import struct
import subprocess
import sys
import textwrap
import tracemalloc
import zipfile
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from array_files import ARRAYS, BFLOAT16, HUGE, read, refuses
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from se_flax import UserError
from se_flax.weights import files, lazy
from se_flax.weights.files import open_arrays, write_arrays


def save_safetensors(path, arrays, metadata=None):
    safetensors.numpy.save_file({k: np.asarray(v, order="C") for k, v in arrays.items()}, path, metadata)


def save_h5(path, arrays, **options):
    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            file.create_dataset(name, data=value, **(options if value.size > 9 else {}))


SAVE = {
    "safetensors": save_safetensors,
    "npz": lambda path, arrays: np.savez(path, **arrays),
    "h5": save_h5,
}
SAVE["packed.npz"] = lambda path, arrays: np.savez_compressed(path, **arrays)
SAVE["packed.hdf5"] = lambda path, arrays: save_h5(path, arrays, chunks=(2, 2), compression="gzip", shuffle=True)


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


def raw_safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def raw_npz(shape, data, method=zipfile.ZIP_STORED, name="w.npy", dtype="<f4"):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr(name, header.getvalue() + data)
    return out.getvalue()


def write_huge(folder):
    """Files of a few kilobytes that claim terabytes, by name."""
    entry = {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4]}
    (folder / "shape.safetensors").write_bytes(raw_safetensors({"w": entry}, bytes(4)))
    entry = entry | {"data_offsets": [0, 4 * HUGE]}
    (folder / "offsets.safetensors").write_bytes(raw_safetensors({"w": entry}, bytes(4)))
    (folder / "header.safetensors").write_bytes(struct.pack("<Q", HUGE) + b"{}" + bytes(100))
    (folder / "shape.npz").write_bytes(raw_npz((HUGE,), bytes(4)))
    data = raw_npz((HUGE,), bytes(4))
    length = len(data)
    central = data.index(b"PK\x01\x02")
    size = struct.pack("<I", 4_000_000_000)  # both lists of members agree that the member is long
    data = data[:22] + size + data[26 : central + 24] + size + data[central + 28 :]
    assert len(data) == length
    (folder / "member.npz").write_bytes(data.replace(repr((HUGE,)).encode(), b"(999999968,)   "))
    (folder / "packed.npz").write_bytes(raw_npz((HUGE,), bytes(4), zipfile.ZIP_DEFLATED))
    with h5py.File(folder / "chunks.h5", "w") as file:
        file.create_dataset("w", (HUGE,), "f4", chunks=(1024,))
    with h5py.File(folder / "filtered.h5", "w") as file:
        file.create_dataset("w", (HUGE,), "f4", chunks=(1024,), compression="gzip")[:10] = 1
    with h5py.File(folder / "plain.h5", "w") as file:
        file.create_dataset("w", (HUGE,), "f4")
    return sorted(folder.iterdir())


def test_a_claimed_size_is_not_allocated(tmp_path):
    paths = write_huge(tmp_path)
    for path in paths:
        tracemalloc.start()
        refuses(path, "declares shape|damaged|no .safetensors file")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1 << 20, (path.name, peak)
    # The libraries' own memory is not traced: the same once more where there is little.
    program = """
        import resource, sys
        import h5py, numpy
        from se_flax import UserError
        from se_flax.weights.files import open_arrays
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
        for path in sys.argv[1:]:
            try:
                with open_arrays(path) as arrays:
                    numpy.asarray(arrays["w"])
            except UserError as error:
                assert "memory" not in str(error), error
                print("refused")
    """
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, paths)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.stdout.split() == ["refused"] * len(paths), done.stderr


def test_a_shape_that_numpy_cannot_count_is_refused(tmp_path):
    path = tmp_path / "w.npz"
    path.write_bytes(raw_npz((0, 2**62, 2**62), b""))
    refuses(path, r"array 'w' has the impossible shape \(0, 4611686018427387904, ")
    path.write_bytes(raw_npz((-1, -4), bytes(16)))
    refuses(path, r"impossible shape \(-1, -4\)")
    path = tmp_path / "w.safetensors"
    path.write_bytes(raw_safetensors({"w": {"dtype": "F32", "shape": [0] * 40, "data_offsets": [0, 0]}}))
    refuses(path, "impossible shape")


@pytest.mark.parametrize(
    "name",
    ["../w", "a/../../w", "/etc/passwd", "a//b", "a/./b", "", "a\nb", "a\x1b[31mb", "a\\b", "\u202eb", "w" * 513],
)
def test_names_that_could_become_paths_are_refused(name, tmp_path):
    save_safetensors(tmp_path / "w.safetensors", {name: ARRAYS["half"]})
    refuses(tmp_path / "w.safetensors", r"could be misused as a path|has \d+ characters; allowed: 1 to 512")
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive, archive.open(name + ".npy", "w") as member:
        np.lib.format.write_array(member, ARRAYS["half"])
    refuses(tmp_path / "w.npz", "could be misused|characters")
    for suffix in ("npz", "safetensors"):
        target = tmp_path / f"new.{suffix}"
        with pytest.raises(UserError, match=r"cannot be written: the name .*(could be misused|characters)"):
            write_arrays(target, {name: ARRAYS["half"]})
        assert not target.exists()


def test_other_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(lazy, "MAX_ARRAYS", 2)
    for suffix in SAVE:
        SAVE[suffix](tmp_path / f"m.{suffix}", ARRAYS)
        refuses(tmp_path / f"m.{suffix}", "it holds over 2 arrays, more than any network; give one with fewer")
    with pytest.raises(UserError, match="cannot be written: it holds over 2 arrays"):
        write_arrays(tmp_path / "new.npz", ARRAYS)
    monkeypatch.undo()
    header = b'{"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' + b" " * lazy.MAX_HEADER_BYTES + b"}"
    (tmp_path / "m.safetensors").write_bytes(raw_safetensors(header))
    refuses(tmp_path / "m.safetensors", r"its header claims 67,108,918 bytes; allowed: 67,108,864")


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (np.asarray([{"a": 1}], object), "Object arrays|dtype object"),
        (np.asarray(["text"]), "has dtype <U4; allowed: int8"),
        (np.zeros(2, [("a", "f4")]), "has dtype .*; allowed"),
        (np.zeros(2, np.complex64), "has dtype complex64; allowed"),
        (np.zeros(2, "M8[s]"), "has dtype datetime64"),
    ],
)
def test_npz_of_other_things_than_numbers(value, match, tmp_path):
    np.savez(tmp_path / "m.npz", good=ARRAYS["half"], w=value)
    refuses(tmp_path / "m.npz", match)


def test_a_pickle_in_an_npz_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    np.savez(tmp_path / "m.npz", w=np.asarray([Evil()], object), allow_pickle=True)
    refuses(tmp_path / "m.npz", "array 'w' has dtype object; allowed: int8, ")
    (tmp_path / "p.npz").write_bytes(pickle.dumps(Evil()))
    refuses(tmp_path / "p.npz", r"is a Python pickle, no \.npz file; download or save it again")
    assert not (tmp_path / "ran").exists()


def test_npz_that_numpy_would_not_save(tmp_path):
    path, numbers = tmp_path / "m.npz", np.arange(1000, dtype=np.float32).tobytes()
    path.write_bytes(raw_npz((1000,), numbers))
    np.testing.assert_array_equal(read(path)["w"], np.arange(1000))
    path.write_bytes(raw_npz((1000,), numbers, zipfile.ZIP_BZIP2))
    refuses(path, r"array 'w' is encrypted or packed unusually; save it with numpy\.savez")
    encrypted = bytearray(raw_npz((1000,), numbers))
    encrypted[6] |= 1
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(encrypted)
    refuses(path, "encrypted")
    path.write_bytes(raw_npz((1000,), numbers, name="readme.txt"))
    refuses(path, r"its member 'readme\.txt' is no \.npy array")
    path.write_bytes(raw_npz((999,), numbers))
    refuses(path, r"array 'w' declares shape \(999,\), which its bytes cannot hold; save it again")
    path.write_bytes(raw_npz((1000,), numbers) + b"more")
    refuses(path, "its end is missing")
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for _ in range(2):
            with archive.open("w.npy", "w") as member:
                np.lib.format.write_array(member, ARRAYS["half"])
    refuses(path, r"its member 'w\.npy' occurs twice")


def test_npz_whose_members_overlap(tmp_path):
    """One long member, listed many times under different names: the bomb that needs no nesting."""
    data = raw_npz((4000,), bytes(16000))
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    entries = [data[start:end].replace(b"w.npy", b"%c.npy" % letter) for letter in b"abcdef"]
    directory = b"".join(entries)
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, len(entries), len(entries), len(directory), start, 0)
    (tmp_path / "m.npz").write_bytes(data[:start] + directory + tail)
    refuses(tmp_path / "m.npz", "its members claim more bytes than the file has|damaged")


def test_hdf5_that_leads_out_of_the_file(tmp_path):
    path, other = tmp_path / "m.h5", tmp_path / "other.h5"
    save_h5(other, {"secret": ARRAYS["half"]})
    for link in (h5py.ExternalLink(other, "secret"), h5py.SoftLink("/elsewhere")):
        with h5py.File(path, "w") as file:
            file.create_group("deep/er")["w"] = link
        refuses(path, "'deep/er/w' is a link that could lead out of the file; save the arrays themselves")
    (tmp_path / "raw").write_bytes(bytes(40))
    with h5py.File(path, "w") as file:
        file.create_dataset("w", (10,), "f4", external=[(tmp_path / "raw", 0, 40)])
    refuses(path, "array 'w' lies in other files; save it in this one")
    layout = h5py.VirtualLayout((5,), "f2")
    layout[:] = h5py.VirtualSource(other, "secret", (5,))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("w", layout)
    refuses(path, "array 'w' lies in other files")


def test_hdf5_of_other_things_than_numbers(tmp_path):
    path = tmp_path / "m.h5"
    for value in (["text"], np.zeros(2, [("a", "f4")]), np.zeros(2, np.complex64), np.zeros(2, "S3")):
        with h5py.File(path, "w") as file:
            file["w"] = value
        refuses(path, "array 'w' has dtype .*; allowed: int8, ")
    with h5py.File(path, "w") as file:
        file["w"] = h5py.Empty("f4")
    refuses(path, "'w' is no array; save arrays alone")
    with h5py.File(path, "w") as file:
        file["w"] = np.dtype("f4")
    refuses(path, "'w' is no array")


def test_hdf5_groups_that_hold_themselves_are_read_once(tmp_path):
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        file["a/b/w"] = ARRAYS["half"]
        file["a/b/again"] = file["a"]
        file["a/root"] = file["/"]
    assert set(read(tmp_path / "m.weights.h5")) == {"a/b/w"}


def test_hdf5_with_a_chunk_larger_than_its_array(tmp_path):
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file.create_dataset("w", (4,), "f4", maxshape=(None,), chunks=(1 << 24,), compression="gzip")[:] = 1
    refuses(tmp_path / "m.h5", r"array 'w' declares shape \(4,\), which its [\d,]+ bytes cannot hold")


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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "m.npz").touch(mode=0)
    refuses(tmp_path / "m.npz", "cannot be read .Permission denied.")


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "h5", "hdf5", "pth", "pt", "bin"])
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
