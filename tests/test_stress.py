"""The short form of the stress program (`make stress`): a few kills of a run on a table, and its own comparison."""

import copy
import json
import random
import signal
import struct
import sys

import numpy as np
import pytest
from stress import fuzz, kills, mutations, table
from stress.child import End
from stress.compare import Left, batches_of, differences

# Before the digests are written nothing counts; a line that ends in its middle; a signal while the digests are written.
ENDS = [
    ("the rename of the digests", End("the rename of the digests", 2)),
    ("half a line of metrics", End("half a line of metrics", 2, "within")),
    (kills.TERM, End("the digest of a file", 120, signal=signal.SIGTERM)),
]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_run_on_a_table_is_killed_and_ends_as_if_it_was_not(tmp_path):
    ended, found = kills.Stress(tmp_path, 0, ["tables"]).once(0, ENDS)
    assert [each.moment for each in ended] == [name for name, _ in ENDS]
    assert not found and not [text for each in ended for text in each.faults]
    assert ended[0].lost >= 2 and ended[-1].lost == 0, "the second save was lost with its steps, and none by SIGTERM"


LEFT = Left(
    arrays={"['params']": np.arange(6, dtype=np.float32), "['ema']": np.ones(2, np.float32)},
    network={"['params']": np.arange(6, dtype=np.float32)},
    texts={"config.json": {"seed": 0}},
    lines=['{"step": 1}', '{"step": 2}', '{"step": 3}'],
    events={("train/loss", 1): (0.5, 1)},
    batches={1: "aa", 2: "bb"},
    steps=[4, 20, 24],
    names=["checkpoints", "metrics.jsonl"],
)


def changed(change):
    here = copy.deepcopy(LEFT)
    change(here)
    return [(difference.text, difference.lost) for difference in differences(here, LEFT)]


def set_last_bit(left):
    left.arrays["['params']"].view(np.uint8)[0] ^= 1


@pytest.mark.parametrize(
    ("change", "text", "lost"),
    [
        (set_last_bit, "array ['params'] differs", 1),
        (lambda left: left.arrays.pop("['ema']"), "array ['ema'] is missing", 8),
        (lambda left: left.network.clear(), "saved network ['params'] is missing", 24),
        (lambda left: left.texts.clear(), "config.json differs", 11),
        (lambda left: left.lines.pop(1), 'metrics.jsonl lacks {"step": 2}', 12),
        (lambda left: left.lines.append('{"step": 3}'), 'metrics.jsonl has {"step": 3} twice', 0),
        (lambda left: left.lines.reverse(), "metrics.jsonl has its lines in another order", 0),
        (lambda left: left.events.clear(), "event train/loss of step 1 is none instead of (0.5, 1)", 4),
        (lambda left: left.batches.update({2: "cc"}), "step 2 read another batch", 0),
        (lambda left: left.steps.remove(4), "the checkpoints [20, 24] are kept instead of [4, 20, 24]", 0),
        (lambda left: left.names.append(".old"), "these files are left behind: .old", 0),
    ],
)
def test_a_difference_is_found(change, text, lost):
    assert changed(change) == [(text, lost)]
    assert changed(lambda left: None) == []


def test_a_batch_that_changes_when_a_step_is_done_again_is_found(tmp_path):
    """A line that a kill cut short is none."""
    for number, text in enumerate(["1.0 begin\n2.0 step 1 aa\n3.0 step 2 b", "1.0 step 1 aa\n2.0 step 2 bb\n"]):
        (tmp_path / str(number)).write_text(text)
    (tmp_path / "2").write_text("1.0 step 2 cc\n")
    paths = [tmp_path / str(number) for number in range(3)]
    assert batches_of(paths[:2]) == ({1: "aa", 2: "bb"}, [])
    assert batches_of(paths) == ({1: "aa", 2: "bb"}, ["step 2 read another batch when it was done again"])


def test_the_table_is_written_between_its_lines(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}old\n{table.FINISH}after\n")
    ended = [kills.Ended("tables", "a save", 3), kills.Ended("images", kills.TERM, 0, 2.5, ("left a process",))]
    table.write(page, table.of(ended, 1, {0: [kills.Difference("a line", 7)]}, seed=3, minutes=2.0))
    text = page.read_text()
    assert text.startswith(f"before\n{table.BEGIN}") and text.endswith(f"{table.FINISH}after\n") and "old" not in text
    assert "seed 3, 2 minutes: **2 ends in 1 runs, 1 differences, 7 bytes lost.**" in text
    assert "| a save | 0 | 1 | 0 | 3 |\n| SIGTERM | 1 | 0 | 1 | 0 |" in text and "2.5 s at most" in text


def test_mutations_keep_lengths_and_checksums():
    assert mutations.crc32c(b"123456789") == 0xE3069283  # RFC 3720, appendix B.4
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    data = struct.pack("<Q", len(header)) + header + bytes(4)
    changed = [mutations.safetensors(data, random.Random(seed)) for seed in range(20)]
    assert sum(bytes(4) == each[8 + int.from_bytes(each[:8], "little") :] for each in changed) >= 5
    assert len(set(changed)) >= 15


def test_a_fuzzed_format_replaces_its_own_row_alone(tmp_path):
    file = tmp_path / "fuzz.jsonl"
    h5 = fuzz.Result("h5", skipped="no h5py", conditions="one day")
    fuzz.merged([fuzz.Result("CSV", 10, 3, 7, conditions="one day"), h5], file)
    found = fuzz.merged([fuzz.Result("npz", 9, 0, 8, ["KeyError at x.py:1"], conditions="another day")], file)
    assert [each.name for each in found] == ["npz", "h5", "CSV"]  # in the order of the targets
    found = fuzz.merged([fuzz.Result("CSV", 2000, 500, 1500, mib=31, seconds=0.5, conditions="another day")], file)
    lines = fuzz.as_table(found).splitlines()
    assert lines[0] == "**2,009 inputs, 1 findings.**"
    assert lines[4:7] == [
        "| npz | 9 | 0 | 8 | 1 | 0 (512) | 0.00 s |",
        "| h5 | none: no h5py | | | | | |",
        "| CSV | 2,000 | 500 | 1,500 | 0 | 31 (512) | 0.50 s |",
    ]
    assert lines[-2:] == ["- another day: npz, CSV.", "- one day: h5."]
