"""Tables as data: readers, ids, streams and figures, against plain Python."""

import gzip
import itertools
import json
import math
import zlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from se_flax.errors import UserError
from train.ctr.config import Data, expand
from train.ctr.encode import Encoder, Hashed, LogBuckets, QuantileBuckets, Vocabulary, fit
from train.ctr.metrics import auc, log_loss
from train.ctr.sources import Table, open_splits, open_table, read_csv, read_libsvm
from train.ctr.stream import Block, batches, encoded, shuffled

EXAMPLES = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
CSV = """id,label,I1,I2,C1
a,1,3,0.5,red
b,0,,2,blue
c,0,10,-1,
d,1,3,nan,red
"""


def csv_data(path, text=CSV, **settings):
    path.write_text(text)
    return Data(**{"train": f"csv:{path}", "numeric": "I1-I2", "categorical": "C1", "eval_fraction": 0.0, **settings})


def rows_of(table):
    return [
        (label, *values)
        for chunk in table.read()
        for label, *values in zip(chunk.labels.tolist(), *chunk.columns, strict=True)
    ]


# --- Readers ----------------------------------------------------------------------------------------------------------

ROWS = [(1, "3", "0.5", "red"), (0, "", "2", "blue"), (0, "10", "-1", ""), (1, "3", "nan", "red")]


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_csv_with_a_header_is_read_by_names(tmp_path, chunk_rows):
    data = csv_data(tmp_path / "t.csv", chunk_rows=chunk_rows)
    table = open_table(data.train, data)
    assert table.fields == ("I1", "I2", "C1") and table.numeric == {"I1", "I2"}
    assert rows_of(table) == ROWS == rows_of(table)  # twice: it is read anew
    assert [len(chunk.labels) for chunk in table.read()] == [min(chunk_rows, 4 - i) for i in range(0, 4, chunk_rows)]


def test_csv_without_a_header_by_tabs_in_several_packed_files(tmp_path):
    lines = ["\t".join(line.split(",")) + "\n" for line in CSV.splitlines()[1:]]
    for name, part in (("part-0.gz", lines[:1]), ("part-1.gz", lines[1:])):
        with gzip.open(tmp_path / name, "wt") as stream:
            stream.writelines(part)
    settings = {"numeric": "I1-I2", "categorical": "C1", "columns": "id,label,I1-I2,C1", "delimiter": "\\t"}
    data = Data(train=f"csv:{tmp_path}/part-*.gz", **settings)
    assert rows_of(open_table(data.train, data)) == ROWS


def test_quotes_marks_and_empty_lines(tmp_path):
    data = csv_data(tmp_path / "t.csv", '\ufefflabel,C1\n1,"a, ""b"""\n\n0,c\n', numeric="")
    assert rows_of(open_table(data.train, data)) == [(1, 'a, "b"'), (0, "c")]


def test_libsvm_ids_by_their_place(tmp_path):
    path = tmp_path / "t.libsvm"
    path.write_text("# comment\n1 266:1 1244:1\n\n-1 0:7:1 9\n0 138:1.0 1296:1\n")
    table = open_table(f"libsvm:{path}", Data(chunk_rows=2))
    assert table.fields == ("field0", "field1") and not table.numeric
    assert rows_of(table) == [(1, "266", "1244"), (0, "7", "9"), (0, "138", "1296")]


def test_npz_arrays(tmp_path):
    path = tmp_path / "t.npz"
    np.savez(path, valid_ids=np.array([[266, 1244], [138, 1296]], np.int32), valid_y=np.array([1, 0], np.uint8))
    assert rows_of(open_table(f"npz:{path}:valid", Data())) == [(1, "266", "1244"), (0, "138", "1296")]


def test_readers_read_no_further_ahead_than_a_chunk():
    read = itertools.count()

    def endless(line):
        while True:
            next(read)
            yield line

    def seen():
        return next(read)  # one more than lines were taken; counting it is harmless

    chunks = read_csv(endless("1,x\n"), "t", names=("label", "c"), label="label", fields=("c",), chunk_rows=50)
    assert len(next(chunks).labels) == 50 and seen() <= 51
    read = itertools.count()
    assert len(next(read_libsvm(endless("1 5:1\n"), "t", chunk_rows=50)).labels) == 50 and seen() <= 51


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        (CSV, {"categorical": "C2"}, r"no column 'C2'; allowed: C1, I1, I2, id, label \(data\.columns names them"),
        (CSV, {"label": "clicked"}, r"has no column 'clicked'"),
        (CSV + "e,1,2\n", {}, r"line 6 of .*t\.csv has 3 values, and there are 5 columns; mend the line"),
        (CSV + "e,2,3,4,red\n", {}, r"the label in line 6 of .*t\.csv is '2'; a label is 0 or 1"),
        (CSV, {"columns": "id,label,I1-I2,C1"}, r"the label in line 1 of .*t\.csv is 'label'"),
        (CSV, {"numeric": "", "categorical": ""}, r"data\.numeric and data\.categorical are empty; name the columns"),
        (CSV, {"categorical": "I1"}, r"column 'I1' is named twice"),
        (CSV, {"train": "csv:/nowhere/x.csv"}, r"there is no file '/nowhere/x\.csv'; give the path of one"),
        (
            CSV,
            {"train": "parquet:x"},
            r"unknown table 'parquet:x'; give csv:<path>, libsvm:<path> or npz:<path>:<name>",
        ),
    ],
)
def test_a_table_that_cannot_be_read_is_one_sentence(tmp_path, text, settings, message):
    data = csv_data(tmp_path / "t.csv", text, **settings)
    with pytest.raises(UserError, match=message) as error:
        rows_of(open_table(data.train, data))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2:1 3:1\n0 2:1\n", r"line 2 of .* has 1 ids, and 2 are expected: the place in the line is the field"),
        ("1 2:0.5\n", r"'2:0\.5' in line 1 of .* is no id; an entry is id, id:1 or field:id:1"),
        ("yes 2:1\n", r"the label in line 1 of .* is 'yes'"),
        ("\n", r"has no rows; give a file with lines such as '1 266:1 1244:1'"),
    ],
)
def test_a_broken_libsvm_file_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "t"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        rows_of(open_table(f"libsvm:{path}", Data()))


@pytest.mark.parametrize(
    ("arrays", "name", "message"),
    [
        ({"a_ids": np.zeros((2, 2), int), "a_y": np.zeros(2)}, "b", r"has no array 'b_ids'; closest: a_ids"),
        ({"a_ids": np.zeros((2, 2)), "a_y": np.zeros(2)}, "a", r"a_ids of .* is float64 \(2, 2\).*integers \[rows, fi"),
        ({"a_ids": np.zeros((2, 2), int), "a_y": np.array([0, 5])}, "a", r"a_y of .* has values other than 0 and 1"),
    ],
)
def test_a_broken_archive_is_one_sentence(tmp_path, arrays, name, message):
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(UserError, match=message):
        open_table(f"npz:{tmp_path}/t.npz:{name}", Data())


def test_what_is_no_archive_is_one_sentence(tmp_path):
    (tmp_path / "t.npz").write_text("no")
    with pytest.raises(UserError, match=r"t\.npz is damaged, it begins with b'no', no \.npz file; download or s"):
        open_table(f"npz:{tmp_path}/t.npz:a", Data())
    with pytest.raises(UserError, match="give npz:<path>:<name>"):
        open_table("npz:t.npz", Data())


def test_ranges_of_columns():
    assert expand("label, I1-I3,C09-C11,x-y") == ("label", "I1", "I2", "I3", "C9", "C10", "C11", "x-y")
    with pytest.raises(UserError, match="the range of columns 'I3-I1' ends before it starts; write I1-I3"):
        expand("I3-I1")


def test_parts_are_disjoint_complete_and_free_of_the_chunk_size(tmp_path):
    text = "label,C1\n" + "".join(f"{i % 2},{i}\n" for i in range(400))
    settings = {"numeric": "", "eval_fraction": 0.2, "test_fraction": 0.3, "split_seed": 5}
    found = []
    for chunk_rows in (7, 1000):
        splits = open_splits(csv_data(tmp_path / "t.csv", text, chunk_rows=chunk_rows, **settings))
        found.append([[value for _, value in rows_of(table)] for table in splits])
    assert found[0] == found[1]
    assert sorted(map(int, itertools.chain(*found[0]))) == list(range(400))
    assert [len(part) for part in found[0]] == pytest.approx([200, 80, 120], abs=40)
    other = open_splits(csv_data(tmp_path / "t.csv", text, **{**settings, "split_seed": 6}))
    assert [value for _, value in rows_of(other.eval)] != found[0][1]


# --- Ids --------------------------------------------------------------------------------------------------------------


@EXAMPLES
@hypothesis.given(st.one_of(st.floats(-1e12, 1e12), st.integers(-3, 100).map(float)))
def test_log_buckets_are_the_formula_above_two_and_the_number_below(x):
    (given,) = LogBuckets().encode([repr(x)])
    small = 1 if x < 0 else 2 + math.floor(x)
    assert given == (5 + min(500, math.floor(math.log(x) ** 2)) if x > 2 else small)
    assert 0 < given < LogBuckets().size


def test_missing_numbers_and_infinities_have_buckets():
    part = LogBuckets(limit=9)
    assert part.encode(["", "nan", "inf", "-inf", "1e300"]).tolist() == [0, 0, part.size - 1, 1, part.size - 1]
    part = QuantileBuckets((0.0, 5.0))
    assert part.encode(["", "nan", "-inf", "-1", "0", "4.9", "5", "inf"]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert part.size == 4


@EXAMPLES
@hypothesis.given(st.lists(st.integers(-5, 5), min_size=1, max_size=40), st.integers(2, 6))
def test_quantile_buckets_count_edges_not_above(values, buckets):
    columns = ([str(v) for v in values],)
    table = Table("t", ("x",), frozenset(["x"]), lambda: iter([_chunk(columns)]))
    (part,) = fit(table, Data(quantiles=buckets)).parts
    edges = sorted(set(np.quantile(values, [i / buckets for i in range(1, buckets)]).tolist()))
    expected = [1 + sum(edge <= value for edge in edges) for value in values]
    assert part.encode(columns[0]).tolist() == expected and max(expected) < part.size


def _chunk(columns):
    from train.ctr.sources import Chunk

    return Chunk(np.zeros(len(columns[0]), np.float32), columns)


def test_hashes_are_crc32_and_stable():
    part = Hashed("C1", 1000)
    # Of any CRC-32 (IEEE 802.3): the check value of "123456789" is cbf43926.
    assert zlib.crc32(b"123456789") == 0xCBF43926
    expected = [zlib.crc32(b"C1" + text.encode()) % 1000 + 1 for text in ("68fd1e64", "ü", " ")]
    assert part.encode(["68fd1e64", "ü", " ", ""]).tolist() == [*expected, 0]
    assert part.size == 1001
    spread = np.bincount(part.encode([f"{i:08x}" for i in range(20_000)]), minlength=1001)[1:]
    assert spread.min() >= 2 and spread.max() <= 50  # Poisson of mean 20
    assert Hashed("C2", 1000).encode(["68fd1e64"]) != part.encode(["68fd1e64"])


def test_vocabularies_keep_what_is_frequent(tmp_path):
    text = "label,C1\n" + "".join(f"0,{value}\n" for value in ["b", "a", "b", "", "", "c", "a", "b"])
    data = csv_data(tmp_path / "t.csv", text, numeric="", min_count=2, chunk_rows=3)
    encoder = fit(open_table(data.train, data), data)
    assert encoder.parts == (Vocabulary(("a", "b")),)
    assert encoder([["", "a", "b", "c", "z"]]).ravel().tolist() == [0, 2, 3, 1, 1]


def test_fields_have_ranges_of_their_own_and_json_keeps_them(tmp_path):
    data = csv_data(tmp_path / "t.csv", quantiles=2, missing="NA")
    table = open_table(data.train, data)
    encoder = fit(table, data)
    assert [part.size for part in encoder.parts] == [3, 3, 4] and encoder.num_ids == 10
    ids = encoder([["3", "NA", "4"], ["", "0", "1"], ["red", "NA", "grey"]])
    # Medians of the finite numbers are 3 and 0.5; the words are blue, red.
    assert ids.dtype == np.int32 and ids.tolist() == [[2, 3, 9], [0, 4, 6], [2, 5, 7]]
    again = Encoder.from_json(json.loads(json.dumps(encoder.to_json())))
    assert again == encoder
    hashed = Encoder(("a", "b"), (Hashed("a", 7), LogBuckets()), "?")
    assert Encoder.from_json(json.loads(json.dumps(hashed.to_json()))) == hashed


def test_nothing_is_read_where_nothing_need_be_learned():
    def read():
        pytest.fail("was read")
        yield

    table = Table("t", ("x", "c"), frozenset(["x"]), read)
    encoder = fit(table, Data(bucketing="log", encoding="hash", hash_buckets=9))
    assert encoder.parts == (LogBuckets(), Hashed("c", 9))


def test_quantiles_of_more_numbers_than_are_kept(monkeypatch):
    monkeypatch.setattr("train.ctr.encode.SAMPLE", 500)
    chunks = [_chunk(([str(i) for i in range(start, start + 1000)],)) for start in range(0, 20_000, 1000)]
    table = Table("t", ("x",), frozenset(["x"]), lambda: iter(chunks))
    one, two = (fit(table, Data(quantiles=4)) for _ in range(2))
    assert one == two
    np.testing.assert_allclose(one.parts[0].edges, [5000, 10_000, 15_000], atol=1500)  # 3 deviations


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label,I1,I2,C1\n1,x,2,a\n", r"got 'x' in a numeric column; it must be a number or empty"),
        ("label,I1,I2,C1\n", r"t\.csv has no rows to train on"),
    ],
)
def test_what_cannot_be_learned_from_is_one_sentence(tmp_path, text, message):
    data = csv_data(tmp_path / "t.csv", text)
    with pytest.raises(UserError, match=message):
        fit(open_table(data.train, data), data)


def test_too_many_ids_are_refused():
    with pytest.raises(UserError, match=r"the fields have 3,000,000,001 ids; lower data\.hash_buckets or raise"):
        Encoder(("a",), (Hashed("a", 3_000_000_000),))


# --- Streams ----------------------------------------------------------------------------------------------------------


def blocks(sizes):
    start = 0
    for size in sizes:
        rows = np.arange(start, start + size, dtype=np.int32)
        yield Block(np.stack([rows, rows], axis=1), (rows % 2).astype(np.float32))
        start += size


SIZES = st.lists(st.integers(1, 30), min_size=0, max_size=8)


@EXAMPLES
@hypothesis.given(SIZES, st.integers(0, 50), st.integers(0, 3))
def test_shuffling_keeps_every_row_once_with_its_label(sizes, rows, seed):
    found = list(shuffled(blocks(sizes), rows, (seed,)))
    order = [int(i) for block in found for i in block.ids[:, 0]]
    assert sorted(order) == list(range(sum(sizes)))
    assert all((block.labels == block.ids[:, 1] % 2).all() for block in found)
    again = [int(i) for block in shuffled(blocks(sizes), rows, (seed,)) for i in block.ids[:, 0]]
    assert again == order
    if rows == 0:
        assert order == sorted(order)


def test_a_shuffle_as_large_as_the_stream_is_uniform():
    first = [next(iter(shuffled(blocks([5, 5]), 100, (seed,)))).ids[0, 0] for seed in range(600)]
    counts = np.bincount(first, minlength=10)
    assert counts.min() > 30 and counts.max() < 95  # binomial of mean 60, four deviations


def test_a_shuffle_mixes_beyond_its_blocks():
    order = np.concatenate([block.ids[:, 0] for block in shuffled(blocks([10] * 100), 200, (0,))])
    displaced = np.abs(order - np.arange(1000))
    assert displaced.mean() > 80
    early = np.flatnonzero(order >= 900)
    assert early.min() > 690  # no row comes out before the buffer had to make place for it


def test_a_shuffle_holds_a_buffer_and_no_more():
    taken = itertools.count()

    def endless():
        for block in blocks(itertools.repeat(10)):
            next(taken)
            yield block

    stream = shuffled(endless(), 100, (0,))
    for _ in range(20):
        next(stream)
    assert next(taken) <= 10 + 20 + 1


@EXAMPLES
@hypothesis.given(SIZES, st.integers(1, 40))
def test_batches_have_one_size_and_hold_every_row_once(sizes, size):
    found = list(batches(blocks(sizes), size))
    total = sum(sizes)
    assert len(found) == -(-total // size)
    assert all(b["ids"].shape == (size, 2) and b["weights"].shape == b["labels"].shape == (size,) for b in found)
    kept = [row for b in found for row, weight in zip(b["ids"][:, 0], b["weights"], strict=True) if weight]
    assert kept == list(range(total))
    assert sum(b["weights"].sum() for b in found) == total


def test_a_whole_table_streams_through_a_fixed_window(tmp_path):
    """From an endless file to batches: what was read stays within buffer, chunk and batch of what came out."""
    lines = itertools.count()

    def endless():
        for i in itertools.count():
            next(lines)
            yield f"{i % 2},{i}\n"

    def read():
        return read_csv(endless(), "t", names=("label", "c"), label="label", fields=("c",), chunk_rows=64)

    table = Table("t", ("c",), frozenset(), read)
    stream = batches(shuffled(encoded(table, Encoder(("c",), (Hashed("c", 50),))), 256, (0,)), 100)
    for _ in range(50):
        next(stream)
    assert next(lines) <= 256 + 50 * 100 + 64 + 100 + 1


# --- Figures ----------------------------------------------------------------------------------------------------------


@st.composite
def scored(draw):
    scores = draw(st.lists(st.one_of(st.integers(-3, 3).map(float), st.floats(-10, 10)), min_size=2, max_size=40))
    labels = draw(st.lists(st.integers(0, 1), min_size=len(scores), max_size=len(scores)))
    hypothesis.assume(0 < sum(labels) < len(labels))
    return np.array(scores), np.array(labels)


@EXAMPLES
@hypothesis.given(scored())
def test_auc_is_its_definition(data):
    scores, labels = data
    clicks, others = scores[labels == 1], scores[labels == 0]
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in clicks for b in others]
    assert auc(scores, labels) == pytest.approx(sum(wins) / len(wins), abs=1e-15)
    assert auc(-scores, labels) == pytest.approx(1 - auc(scores, labels), abs=1e-15)


def test_auc_of_many_rows_agrees_with_scikit_learn():
    from sklearn.metrics import log_loss as their_log_loss
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    labels = rng.random(20_000) < 0.25
    logits = np.round(rng.normal(labels, 1.5), 1).astype(np.float32)
    assert auc(logits, labels) == pytest.approx(roc_auc_score(labels, logits), abs=1e-12)
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert log_loss(logits, labels) == pytest.approx(their_log_loss(labels, probabilities), rel=1e-12)


def test_auc_extremes_and_refusals():
    assert auc([0.1, 0.2, 0.9], [0, 0, 1]) == 1.0
    assert auc([1.0, 1.0, 1.0], [0, 1, 1]) == 0.5
    with pytest.raises(UserError, match=r"got 0 clicks among 3 rows; AUC needs rows with and without a click"):
        auc([1, 2, 3], [0, 0, 0])
    with pytest.raises(UserError, match=r"1 of 2 scores are not numbers"):
        auc([1.0, np.nan], [0, 1])


def test_log_loss_is_its_definition_and_stays_finite():
    assert log_loss([0.0, 0.0], [0, 1]) == pytest.approx(math.log(2))
    assert log_loss([2.0], [1]) == pytest.approx(-math.log(1 / (1 + math.exp(-2))))
    assert log_loss(np.array([1000.0, -1000.0], np.float32), [0, 1]) == 1000.0
