"""Batches: complete, disjoint over hosts, the same for any number of hosts and workers, and exact after a restart."""

import itertools
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from se_flax.errors import UserError
from train.config import Data
from train.data.loader import BadImages, DataSplits, eval_batches, open_data, steps_per_epoch, train_loader
from train.data.sources import ArraySource


def numbered(count, side=1):
    """A source whose example i shows i in red and green and has the label i % 7."""
    index = np.arange(count)
    pixels = np.stack([index % 256, index // 256, 0 * index], axis=-1).astype(np.uint8)
    images = np.broadcast_to(pixels[:, None, None], (count, side, side, 3)).copy()
    source = ArraySource(images, (index % 7).astype(np.int32), "numbers")
    return DataSplits(source, source, tuple("0123456"))


def numbers(batch):
    corner = batch["image"][:, 0, 0].astype(int)
    return (corner[:, 0] + 256 * corner[:, 1]).tolist()


def all_numbers(batches):
    return [number for batch in batches for number in numbers(batch)]


def take(loader, count):
    return list(itertools.islice(loader, count))


def joined(parts):
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key], strict=True)


def small(**changes):
    return Data(**({"image_size": 1, "batch_size": 4} | changes))


def one(splits, data, **changes):
    return train_loader(splits, data, **({"seed": 0, "process_index": 0, "process_count": 1} | changes))


def test_steps_per_epoch():
    assert steps_per_epoch(1437, 128) == 1437 / 128


# ---- training


def test_a_batch_is_what_the_docstring_says():
    batch = next(one(open_data(Data()), Data(batch_size=6)))
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "image": ((6, 32, 32, 3), "uint8"),
        "label": ((6,), "int32"),
    }


@given(
    count=st.integers(1, 30),
    local=st.integers(1, 5),
    hosts=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=25, deadline=None)
def test_stream_is_complete_and_the_same_for_any_number_of_hosts(count, local, hosts, seed):
    splits, data = numbered(count, side=3), small(batch_size=local * hosts)
    steps = 2 * count // data.batch_size + 1
    alone = take(one(splits, data, seed=seed), steps)
    per_host = [
        take(one(splits, data, seed=seed, process_index=host, process_count=hosts), steps) for host in range(hosts)
    ]
    assert_same(alone, [joined(parts) for parts in zip(*per_host, strict=True)])
    stream = all_numbers(alone)
    for epoch in range(len(stream) // count):  # no remainder is lost, although batches straddle epochs
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))
    labels = np.concatenate([batch["label"] for batch in alone])
    assert labels.tolist() == [number % 7 for number in stream]


def test_epochs_and_seeds_differ():
    splits, data = numbered(60), small(batch_size=60)
    first, second = map(numbers, take(one(splits, data), 2))
    (other,) = map(numbers, take(one(splits, data, seed=1), 1))
    assert first != second and first != other and sorted(first) == sorted(other)


def test_random_crops_differ_between_epochs_and_repeat_with_the_seed():
    picture = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), np.uint8)
    source = ArraySource(picture, np.zeros(2, np.int32), "pictures")
    splits, data = DataSplits(source, source, ("a",)), small(image_size=16, batch_size=2, train_crop="random_resized")
    batches = take(one(splits, data), 6)
    assert len({image.tobytes() for batch in batches for image in batch["image"]}) == 12
    assert_same(batches, take(one(splits, data), 6))


@pytest.fixture
def jpegs(tmp_path):
    """Two class folders of four JPEGs each."""
    rng = np.random.default_rng(0)
    for path in (tmp_path / "jpegs" / name / f"{i}.jpg" for name in "ab" for i in range(4)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    return small(source=f"folder:{tmp_path / 'jpegs'}", image_size=16, batch_size=3, train_crop="random_resized")


def test_crops_of_jpegs_follow_seed_and_position_alone(jpegs):
    splits = open_data(jpegs)
    batches = take(one(splits, jpegs), 6)
    assert len({image.tobytes() for batch in batches for image in batch["image"]}) == 18
    by_number = one(splits, jpegs).by_number()
    for number in (4, 0, 4, 5):  # in any order
        for key in ("image", "label"):
            np.testing.assert_array_equal(by_number[number][key], batches[number][key], strict=True)
    assert_same(batches[4:], take(one(splits, jpegs, start=12), 2))
    loader = one(splits, replace(jpegs, workers=1))
    try:
        assert_same(batches[:3], take(loader, 3))
    finally:
        loader.close()


def test_micro_batches_laid_end_to_end_are_the_batch():
    splits, data = numbered(50), small(batch_size=12)
    whole = [numbers(batch) for batch in take(one(splits, data), 5)]
    parts = take(one(splits, data, micro=3), 15)
    assert whole == [all_numbers(parts[i : i + 3]) for i in range(0, 15, 3)]


def test_a_batch_that_does_not_divide():
    with pytest.raises(UserError, match=r"data.batch_size=10 does not divide into 2 micro-batches on 3 hosts; .* 6\."):
        one(numbered(9), small(batch_size=10), micro=2, process_count=3)
    with pytest.raises(UserError, match="an evaluation batch of 10 does not divide over 3 hosts"):
        eval_batches(numbered(9), small(), batch_size=10, process_index=0, process_count=3)


def test_a_seed_out_of_range():
    with pytest.raises(UserError, match=r"seed=-1 is out of range: it must be at least 0 and below 2\*\*32"):
        one(numbered(9), small(), seed=-1)


# ---- resuming


def test_resume_is_exact_and_independent_of_batch_size_and_hosts():
    splits, data = numbered(23, side=9), small(image_size=4, train_crop="random_resized")
    loader = one(splits, data)
    take(loader, 7)
    state = json.loads(json.dumps(loader.get_state()))
    expected = take(loader, 8)
    assert state == {"position": 28, "seed": 0, "examples": 23}

    fresh = one(splits, data)
    fresh.set_state(state)
    assert fresh.get_state() == state
    assert_same(expected, take(fresh, 8))
    fresh.set_state(state)  # a loader in use can go back
    assert_same(expected, take(fresh, 8))
    assert_same(expected, take(one(splits, data, start=28), 8))

    pairs = take(one(splits, replace(data, batch_size=8), start=28), 4)
    assert_same([joined(expected[i : i + 2]) for i in range(0, 8, 2)], pairs)
    second_host = one(splits, data, start=28, process_index=1, process_count=2)
    assert_same([{key: value[2:] for key, value in batch.items()} for batch in expected], take(second_host, 8))


def test_a_position_of_other_data_is_refused():
    loader = one(numbered(23), small())
    with pytest.raises(UserError, match="the number of training examples was 24, and here it is 23"):
        loader.set_state({"position": 8, "seed": 0, "examples": 24})
    with pytest.raises(UserError, match="the seed of the data was 5, and here it is 0"):
        loader.set_state({"position": 8, "seed": 5, "examples": 23})


def test_state_goes_through_an_orbax_checkpoint(tmp_path):
    import grain
    import orbax.checkpoint as ocp

    splits, data = numbered(23), small()
    loader = one(splits, data)
    take(loader, 3)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(loader)))
        manager.wait_until_finished()
        fresh = one(splits, data)
        manager.restore(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)))
    assert_same(take(loader, 4), take(fresh, 4))


def test_a_closed_loader_stays_closed():
    loader = one(numbered(5), small())
    next(loader)
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        next(loader)


# ---- reading ahead


class Gated:
    """A source that lets `allowed` reads pass and holds all others until it is opened."""

    def __init__(self, source, allowed):
        self.source, self.allowed = source, allowed
        self.changed = threading.Condition()
        self.open, self.done, self.readers = False, 0, set()

    def __len__(self):
        return len(self.source)

    def name(self, index):
        return self.source.name(index)

    def __getitem__(self, index):
        with self.changed:
            self.readers.add(threading.get_ident())
            self.allowed -= 1
            if self.allowed < 0:
                self.changed.wait_for(lambda: self.open)
            self.done += 1
            self.changed.notify_all()
        return self.source[index]

    def let_all_pass(self):
        with self.changed:
            self.open = True
            self.changed.notify_all()


def test_batches_are_made_before_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # one thread reads, so that batches are made one after the other
    expected = [numbers(batch) for batch in take(one(numbered(40), small()), 4)]
    gate = Gated(numbered(40).train, allowed=8)
    loader = one(DataSplits(gate, gate, ("0",)), small())
    try:
        loader.start_prefetch()
        with gate.changed:
            assert gate.changed.wait_for(lambda: gate.done == 8, timeout=60)
        # No further image can be read: these two batches were read without anyone having asked for one.
        assert [numbers(batch) for batch in take(loader, 2)] == expected[:2]
        assert gate.done == 8
        assert threading.get_ident() not in gate.readers
        gate.let_all_pass()
        assert [numbers(batch) for batch in take(loader, 2)] == expected[2:]
    finally:
        gate.let_all_pass()
        loader.close()


# ---- evaluation


@given(count=st.integers(1, 40), local=st.integers(1, 6), hosts=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_evaluation_sees_every_example_exactly_once(count, local, hosts):
    splits, data = numbered(count), small()
    seen, lengths = [], set()
    for host in range(hosts):
        batches = list(eval_batches(splits, data, batch_size=local * hosts, process_index=host, process_count=hosts))
        lengths.add(len(batches))
        for batch in batches:
            assert batch["image"].shape == (local, 1, 1, 3) and batch["image"].dtype == np.uint8
            assert batch["label"].shape == (local,) and batch["label"].dtype == np.int32
            assert batch["mask"].shape == (local,) and batch["mask"].dtype == np.bool_
            assert set(batch) == {"image", "label", "mask"}
            seen += np.array(numbers(batch))[batch["mask"]].tolist()
            assert (batch["label"][batch["mask"]] == np.array(numbers(batch))[batch["mask"]] % 7).all()
            assert not batch["image"][~batch["mask"]].any() and not batch["label"][~batch["mask"]].any()
    assert len(lengths) == 1
    assert sorted(seen) == list(range(count))


def test_evaluation_batch_size_comes_from_the_settings():
    def size(**changes):
        return len(next(eval_batches(numbered(9), small(**changes), process_index=0, process_count=1))["label"])

    assert size() == 4
    assert size(eval_batch_size=3) == 3


def test_the_default_host_is_this_one():
    assert len(list(eval_batches(numbered(9), small()))) == 3
    assert len(next(train_loader(numbered(9), small(), seed=0))["label"]) == 4


# ---- unreadable images


@pytest.fixture
def damaged(tmp_path):
    """Two class folders of ten; `a/3`, `a/4` and the last, `b/9`, are unreadable."""
    for name, base in (("a", 0), ("b", 10)):
        for i in range(10):
            path = tmp_path / "images" / "train" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (1, 1), (base + i, 0, 0)).save(path)
    for bad in ("a/3", "a/4", "b/9"):
        (tmp_path / "images" / "train" / f"{bad}.png").write_bytes(b"not a picture")
    return small(
        source=f"folder:{tmp_path / 'images'}", train_split="train", eval_split="train", batch_size=5, bad_images="skip"
    )


def test_unreadable_images_are_replaced_or_left_out(damaged):
    splits = open_data(damaged)
    bad = BadImages(splits, damaged)
    assert bad.report() is None
    stream = all_numbers(take(one(splits, damaged, bad=bad), 4))
    good = [i for i in range(20) if i not in (3, 4, 19)]
    assert sorted(stream) == sorted([*good, 5, 5, 0])  # the next readable one, and after the last the first
    assert bad.train == {3, 4, 19} and not bad.eval

    batches = list(eval_batches(splits, damaged, process_index=0, process_count=1, bad=bad))
    mask = np.concatenate([batch["mask"] for batch in batches])
    assert np.flatnonzero(~mask).tolist() == [3, 4, 19]
    assert bad.eval == {3, 4, 19}
    report = bad.report()
    assert report.startswith("3 of 20 training images could not be read and were replaced: ")
    assert f"{Path('a', '3.png')} (not a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or PPM image), " in report
    assert "; 3 of 20 evaluation images could not be read and were left out: " in report


def test_an_unreadable_image_is_an_error_by_default(damaged):
    data = replace(damaged, bad_images="error")
    splits = open_data(data)
    message = r"[ab]/\d.png could not be read \(not a JPEG, .* image\); .*--config.data.bad_images=skip"
    with pytest.raises(UserError, match=message):
        take(one(splits, data), 4)
    with pytest.raises(UserError, match=r"a/3.png could not be read"):
        list(eval_batches(splits, data, process_index=0, process_count=1))


def test_a_vanished_file_is_unreadable(damaged):
    splits = open_data(damaged)
    Path(splits.train.name(0)).unlink()
    bad = BadImages(splits, damaged)
    list(eval_batches(splits, damaged, process_index=0, process_count=1, bad=bad))
    assert "0.png (No such file or directory)" in bad.report()


def test_nothing_but_damage_ends_in_an_error(damaged):
    splits = open_data(damaged)
    for i in range(20):
        Path(splits.train.name(i)).write_bytes(b"")
    with pytest.raises(UserError, match=r"20 images in a row from .* on could not be read"):
        next(one(splits, damaged))


# ---- worker processes


def test_workers_change_nothing(damaged):
    damaged = replace(damaged, image_size=3, train_crop="random_resized")
    splits = open_data(damaged)
    bad, bad_with_workers = BadImages(splits, damaged), BadImages(splits, damaged)
    expected = take(one(splits, damaged, bad=bad), 9)
    loader = one(splits, replace(damaged, workers=2), bad=bad_with_workers)
    try:
        assert_same(expected[:5], take(loader, 5))
        assert bad_with_workers.train == bad.train == {3, 4, 19}
        assert loader.get_state()["position"] == 25
        loader.set_state({**loader.get_state(), "position": 15})
        assert_same(expected[3:], take(loader, 6))
    finally:
        loader.close()


def test_errors_in_workers_arrive_whole(damaged):
    data = replace(damaged, bad_images="error", workers=1)
    loader = one(open_data(data), data)
    try:
        with pytest.raises(
            UserError, match=r"could not be read \(not a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or PPM image\)"
        ):
            take(loader, 4)
    finally:
        loader.close()


def test_evaluation_with_workers(monkeypatch):
    import train.data.loader

    monkeypatch.setattr(train.data.loader, "_EVAL_IMAGES_PER_WORKER", 5)
    splits = numbered(11)
    expected = list(eval_batches(splits, small(), process_index=0, process_count=1))
    assert_same(expected, list(eval_batches(splits, small(workers=2), process_index=0, process_count=1)))


def test_workers_of_a_program_started_as_a_module(tmp_path):
    (tmp_path / "program.py").write_text(
        "from train.config import Data\n"
        "from train.data.loader import open_data, train_loader\n"
        "if __name__ == '__main__':\n"
        "    data = Data(batch_size=8, workers=1)\n"
        "    loader = train_loader(open_data(data), data, seed=0, process_index=0, process_count=1)\n"
        "    print(next(loader)['label'].tolist())\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "program"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    data = Data(batch_size=8)
    assert done.stdout.strip() == str(next(one(open_data(data), data))["label"].tolist())
