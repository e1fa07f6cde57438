"""Runs that a signal stops, wherever it comes: the run after it ends with the files of one that was never stopped."""

import dataclasses
import json
import os
import signal
import struct
import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event
from test_run import arrays_of, copy_of, figures_of

import train.ctr.loop
import train.run.setup
import train.run.trainer
from train.config import Augment, Checkpoint, Config, Data, Model, Optim, Parallel
from train.data.loader import TrainLoader
from train.run.checkpoint import Checkpoints
from train.run.evaluate import evaluate
from train.run.loop import run
from train.run.report import read_metrics
from train.run.stopping import Stopped, stop_signals
from train.run.trainer import Trainer

STEPS = 12
# What the evaluations of steps 3, 6, 9 and 12 count: the second is the best, and its checkpoint is kept.
HITS = (100, 300, 150, 200)


def make_config():
    """Figures are recorded at steps 5, 10 and 12, evaluations are due at 3, 6, 9 and 12, checkpoints at 6 and 12."""
    return Config(
        model=Model(name="test_efficientnet"),
        data=Data(source="digits", image_size=8, batch_size=48, eval_batch_size=90),
        augment=Augment(flip=True, pad=1),
        optim=Optim(learning_rate=0.05, schedule="constant"),
        parallel=Parallel(devices=1),
        checkpoint=Checkpoint(every_steps=6, keep_last=1, keep_best=1),
        steps=STEPS,
        eval_every_epochs=0.1,
        log_every_steps=5,
        compilation_cache="",
    )


def with_counts(patch):
    """Evaluations count `HITS`, one after the other."""
    hits = iter(HITS)

    def counted(*arguments):
        result = evaluate(*arguments)
        return dataclasses.replace(result, top1=next(hits))

    patch.setattr(train.run.setup, "evaluate", counted)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        with_counts(patch)
        run(make_config(), workdir)
    return workdir


@pytest.fixture
def counts(monkeypatch):
    with_counts(monkeypatch)


def interrupt():
    os.kill(os.getpid(), signal.SIGTERM)


def after_step(patch, number, signal_=signal.SIGTERM):
    original = Trainer._advance

    def advance(self, *arguments):
        original(self, *arguments)
        if self.step == number:
            os.kill(os.getpid(), signal_)

    patch.setattr(Trainer, "_advance", advance)


def in_evaluation(patch, number):
    """Asks for a stop while the given evaluation reads its third batch."""
    original, evaluations = train.run.setup.eval_batches, iter(range(1, 10))

    def batches(*arguments, **keywords):
        due = next(evaluations) == number
        for i, batch in enumerate(original(*arguments, **keywords)):
            if due and i == 2:
                interrupt()
            yield batch

    patch.setattr(train.run.setup, "eval_batches", batches)


def before_step(patch, number):
    """Asks for a stop while the loop waits for the batch of the given step, which does not come."""
    original = TrainLoader.__next__

    def fetch(self):
        if self.get_state()["position"] == (number - 1) * 48:
            interrupt()
            threading.Event().wait(600)
        return original(self)

    patch.setattr(TrainLoader, "__next__", fetch)


def in_compilation(patch, number):
    original = Trainer.compile

    def compile_(self, batch):
        interrupt()
        return original(self, batch)

    patch.setattr(Trainer, "compile", compile_)


def best_and_newest(workdir):
    checkpoints = Checkpoints(workdir, keep_last=1, keep_best=1)
    steps = checkpoints.steps()
    checkpoints.close()
    return steps


@pytest.mark.parametrize(
    ("where", "number", "stops_at"),
    [
        (after_step, 3, 3),  # an evaluation is due
        (after_step, 5, 5),  # figures are recorded
        (after_step, 6, 6),  # an evaluation is due, and the checkpoint that it may be the best of
        (after_step, 7, 7),
        (after_step, STEPS, STEPS),
        (in_evaluation, 1, 3),
        (in_evaluation, 2, 6),
        (in_evaluation, 4, STEPS),
        (before_step, 9, 8),
        (in_compilation, 1, 0),
    ],
)
@pytest.mark.usefixtures("counts")
def test_a_stopped_run_leaves_the_files_of_an_uninterrupted_one(
    uninterrupted, tmp_path, monkeypatch, where, number, stops_at
):
    with monkeypatch.context() as patch:
        where(patch, number)
        stopped = run(make_config(), tmp_path)
    assert (stopped.completed, stopped.step) == (False, stops_at)
    assert str(stopped).startswith(f"stopped at step {stops_at} after")
    assert run(make_config(), tmp_path).completed
    assert figures_of(tmp_path) == figures_of(uninterrupted)
    # Two of the newest are kept, of which the one of the stop may be one.
    assert best_and_newest(uninterrupted) == [6, STEPS]
    assert {6, STEPS} <= set(best_and_newest(tmp_path)) <= {6, STEPS, stops_at}
    one, other = arrays_of(tmp_path, STEPS), arrays_of(uninterrupted, STEPS)
    assert all(np.array_equal(one[name], other[name]) for name in other) and one.keys() == other.keys()


@pytest.mark.usefixtures("counts")
def test_a_run_stopped_many_times_evaluates_and_records_once(uninterrupted, tmp_path, monkeypatch):
    """Also where the evaluation that is made up is given up itself."""
    for number in (3, 4, 6):
        with monkeypatch.context() as patch:
            after_step(patch, number, signal.SIGINT)
            assert run(make_config(), tmp_path).step == number
    with monkeypatch.context() as patch:
        in_evaluation(patch, 1)  # the one of step 6, made up
        assert run(make_config(), tmp_path).step == 6
    with monkeypatch.context() as patch:
        in_compilation(patch, 1)
        assert run(make_config(), tmp_path).step == 6
    assert run(make_config(), tmp_path).completed
    assert figures_of(tmp_path) == figures_of(uninterrupted)
    assert best_and_newest(tmp_path) == [6, STEPS]


def test_figures_of_steps_that_are_done_again_are_recorded_once(uninterrupted, tmp_path, monkeypatch):
    """A run that was killed between the record of a made-up evaluation and its checkpoint."""
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        with_counts(patch)
        after_step(patch, 6)
        run(make_config(), workdir)
        copy = copy_of(workdir, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(train.run.setup, "evaluate", lambda *a: dataclasses.replace(evaluate(*a), top1=HITS[1]))
        patch.setattr(Checkpoints, "save", lambda *a, **k: pytest.exit("killed"))
        with pytest.raises(pytest.exit.Exception):
            run(make_config(), workdir)
    assert Counter(row["step"] for row in read_metrics(workdir / "metrics.jsonl"))[6] == 1
    (copy / "metrics.jsonl").write_bytes((workdir / "metrics.jsonl").read_bytes())
    hits = iter(HITS[1:])
    monkeypatch.setattr(train.run.setup, "evaluate", lambda *a: dataclasses.replace(evaluate(*a), top1=next(hits)))
    run(make_config(), copy)
    assert figures_of(copy) == figures_of(uninterrupted)


def test_an_evaluation_is_given_up_between_two_batches():
    done = []

    def step(variables, batch):
        done.append(batch)
        if batch == 3:
            interrupt()
        return {"count": 1, "top1": 1, "top5": 1, "loss": 0.5}

    with stop_signals() as stop, pytest.raises(Stopped):
        evaluate(step, None, range(10), 10, stop)
    assert done == [0, 1, 2, 3]


@pytest.mark.parametrize("loop", [train.run.trainer.Trainer, train.ctr.loop.Trainer])
def test_a_signal_while_the_last_checkpoint_is_written_does_not_cut_it_off(loop, monkeypatch):
    """It comes when all steps are done: nothing but the checkpoint, which is under way, is to be waited for."""
    done = []

    def finish():
        interrupt()
        done.append("whole")

    trainer = object.__new__(loop)
    trainer.checkpoints = SimpleNamespace(finish=finish)
    trainer.progress, trainer.config = SimpleNamespace(over=lambda config: True), None
    monkeypatch.setattr(loop, "_train", lambda self, stop: None, raising=False)
    ended = []
    before = signal.signal(signal.SIGTERM, lambda *_: ended.append("killed"))  # what would end the program
    try:
        assert trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (done, ended) == (["whole"], [])


def test_the_second_signal_interrupts():
    with stop_signals() as stop:
        interrupt()
        with pytest.raises(Stopped):
            stop.look()
        with pytest.raises(KeyboardInterrupt):
            interrupt()
            signal.sigtimedwait([], 0)


def events_of(workdir):
    """What event files show, by name and step, read by the format alone: length, checksum, record, checksum."""
    shown = Counter()
    values = {}
    for path in (workdir / "events").iterdir():
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            for value in event.summary.value:
                shown[value.tag, event.step] += 1
                values[value.tag, event.step] = value.simple_value
    assert set(shown.values()) == {1}
    return values


@pytest.mark.usefixtures("counts")
def test_events_are_those_of_the_metrics_after_a_kill(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        after_step(patch, 7)
        run(make_config(), tmp_path)
    # What SIGKILL leaves: events that never reached the disk, and those of steps that are done again.
    for path in (tmp_path / "events").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with SummaryWriter(str(tmp_path / "events")) as writer:
        for step in (5, 9, 11):
            writer.add_scalar("train/loss", 99.0, step)
    (tmp_path / "events" / "notes.txt").write_text("a person's own file")
    run(make_config(), tmp_path)
    assert (tmp_path / "events" / "notes.txt").exists()
    (tmp_path / "events" / "notes.txt").unlink()
    expected = {}
    for row in (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()):
        for name in row.keys() - {"step", "epoch"}:
            tag = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
            expected[tag, row["step"]] = np.float32(row[name])
    assert events_of(tmp_path) == expected and ("eval/top1", 3) in expected and ("train/loss", 12) in expected
