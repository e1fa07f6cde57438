"""Files of arrays that lie: about sizes, names, links and kinds."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import textwrap
import tracemalloc
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from array_files import ARRAYS, HUGE, SAVE, read, refuses, save_h5, save_safetensors

from se_flax import UserError
from se_flax.checkpoints import array_file
from se_flax.checkpoints.files import write_arrays


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
        from se_flax.checkpoints.files import open_arrays
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


def test_a_length_in_a_bare_pickle_is_not_allocated(tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "w.pth"
    path.write_bytes(b"\x80\x02X" + struct.pack("<I", (1 << 31) - 1) + b"abc")
    tracemalloc.start()
    refuses(path, "PyTorch finds no plain arrays in it")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 256 << 20, peak


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
    monkeypatch.setattr(array_file, "MAX_ARRAYS", 2)
    for suffix in SAVE:
        SAVE[suffix](tmp_path / f"m.{suffix}", ARRAYS)
        refuses(tmp_path / f"m.{suffix}", "it holds over 2 arrays, more than any network; give one with fewer")
    with pytest.raises(UserError, match="cannot be written: it holds over 2 arrays"):
        write_arrays(tmp_path / "new.npz", ARRAYS)
    monkeypatch.undo()
    header = b'{"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' + b" " * array_file.MAX_HEADER_BYTES + b"}"
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


def test_a_small_file_of_large_zeros_is_refused(tmp_path, monkeypatch):
    """A bare file's classifier may have any number of classes, so its shapes alone say nothing."""
    np.savez_compressed(tmp_path / "zeros.npz", w=np.zeros(50_000, np.float32))
    with h5py.File(tmp_path / "zeros.h5", "w") as file:
        file.create_dataset("w", data=np.zeros(50_000, np.float32), compression="gzip")
    np.savez_compressed(tmp_path / "weights.npz", w=np.random.default_rng(0).normal(size=50_000).astype(np.float32))
    read(tmp_path / "zeros.npz")
    monkeypatch.setattr(array_file, "FREE_BYTES", 1000)
    for name in ("zeros.npz", "zeros.h5"):
        refuses(tmp_path / name, r"its arrays take 200,000 bytes of memory, \d+ times the file's .*without compression")
    read(tmp_path / "weights.npz")
