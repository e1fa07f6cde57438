"""Tables that are damaged, or that claim more than a table has: one sentence each."""

import gzip
import io
import zipfile

import numpy as np
import pytest

from se_flax.errors import UserError
from train.ctr.config import Data, expand
from train.ctr.sources import open_table


def test_an_archive_that_declares_more_than_it_holds_is_one_sentence(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (10**12, 2)})
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
        for name in ("a_ids", "a_y"):
            archive.writestr(f"{name}.npy", header.getvalue())
    with pytest.raises(UserError, match=r"t\.npz: array 'a_ids' declares shape \(1000000000000, 2\), which"):
        open_table(f"npz:{tmp_path}/t.npz:a", Data())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a_ids": b"no array", "a_y": b"neither"},
            "t.npz: its member 'a_ids' is no .npy array; save ",
        ),
        ({"a_ids.npy": np.zeros((2, 2), "i4"), "a_y.npy": np.zeros(2, "V3")}, r"array 'a_y' has dtype \|V3, raw bytes"),
    ],
    ids=["bytes", "records"],
)
def test_an_archive_of_something_else_is_one_sentence(tmp_path, files, message):
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
        for name, value in files.items():
            raw = io.BytesIO()
            if isinstance(value, np.ndarray):
                np.lib.format.write_array(raw, value)
            archive.writestr(name, value if isinstance(value, bytes) else raw.getvalue())
    with pytest.raises(UserError, match=message):
        open_table(f"npz:{tmp_path}/t.npz:a", Data())


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("t.csv", b"label,C1\n1," + b"x" * 200_000, r"line 2 of .* is no CSV \(field larger than field limit"),
        ("t.csv", b"label,C1\n1,a\n1," + b"x," * (1 << 19), "line 3 of .* is longer than 1,048,576 characters"),
        ("t.csv.gz", gzip.compress(b"label,C1\n1,a\n")[:-9], r"cannot be read \(.*end-of-stream"),
        ("t.csv.gz", b"\x1f\x8b\x08" + bytes(30), r"cannot be read \("),
        ("t.csv.gz", b"label", r"cannot be read \(Not a gzipped file"),
    ],
    ids=["field", "line", "cut", "header", "text"],
)
def test_a_damaged_csv_file_is_one_sentence(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    data = Data(train=f"csv:{tmp_path / name}", categorical="C1")
    with pytest.raises(UserError, match=message):
        list(open_table(data.train, data).read())


@pytest.mark.parametrize("delimiter", ["", ",,", '"', "\n"])
def test_a_delimiter_is_one_character(tmp_path, delimiter):
    (tmp_path / "t.csv").write_text("label,C1\n1,a\n")
    data = Data(train=f"csv:{tmp_path}/t.csv", categorical="C1", delimiter=delimiter)
    with pytest.raises(UserError, match=r"got data\.delimiter=.*; give one character"):
        open_table(data.train, data)


@pytest.mark.parametrize("names", ["I1-I999999999", "I1-I60000,C1-C60000"])
def test_more_columns_than_a_table_has_are_refused(names):
    with pytest.raises(UserError, match="names over 100,000 columns"):
        expand(names)
    assert expand("I²-I³,I1-I99999999999") == ("I²-I³", "I1-I99999999999")  # names, no ranges
