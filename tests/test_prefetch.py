"""The step and the data overlap: decided by the order of events, not by time."""

import contextlib
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

import train.run.trainer
import train.run.window
from train.config import Config, Data
from train.run.evaluate import Result
from train.run.feed import Feed

STEPS, LAG = 6, train.run.trainer.LAG


class Figure:
    """A metric on its way from the device; looking at it waits for its step."""

    def __init__(self, look, value=1.0):
        self.look, self.value = look, value

    def __float__(self):
        self.look()
        return self.value


class Batches:
    """A loader of what an iterator gives."""

    def __init__(self, batches):
        self.batches = batches

    def __next__(self):
        return next(self.batches)

    def get_state(self):
        return {}


def make_trainer(tmp_path, *, loader, shard=dict, step=lambda: None, look=lambda number: None, log_every=3):
    """A trainer whose parts only tell when they are used; its records are in `trainer.report.rows`."""
    counter = itertools.count(1)

    def train_step(state, batch):
        del batch
        number = next(counter)
        step()
        names = ("loss", "accuracy", "grad_norm", "learning_rate")
        return state, {name: Figure(lambda: look(number)) for name in names}

    rows = []
    report = SimpleNamespace(
        rows=rows,
        start=lambda: None,
        paused=contextlib.nullcontext,
        say=lambda text: None,
        advance=lambda *_: None,
        write=lambda step, epoch, row: rows.append(row) if "loss" in row else None,
        draw=lambda: None,
        sync=lambda: None,
    )
    compiled = SimpleNamespace(compile=lambda: train_step)
    return train.run.trainer.Trainer(
        config=Config(data=Data(batch_size=4), log_every_steps=log_every),
        workdir=tmp_path,
        state=SimpleNamespace(variables=lambda: None),
        total=STEPS,
        per_epoch=100.0,
        feed=Feed(Batches(loader)),
        train_step=SimpleNamespace(lower=lambda state, batch: compiled),
        evaluation=lambda variables, stop: Result(count=1, top1=1, top5=None, loss=0.0),
        replicas=SimpleNamespace(shard=shard),
        checkpoints=SimpleNamespace(save=lambda *_, **__: None, finish=lambda: None),
        report=report,
        run_info={},
    )


def test_the_next_batches_are_on_the_device_before_a_step_is_waited_for(tmp_path):
    events = []
    fetched = itertools.count(1)

    def batches():
        for number in fetched:
            events.append(("fetched", number))
            yield {"number": number}

    trainer = make_trainer(
        tmp_path,
        loader=batches(),
        shard=lambda batch: events.append(("on the device", batch["number"])) or batch,
        step=lambda: events.append(("started", 1 + sum(name == "started" for name, _ in events))),
        look=lambda number: events.append(("waited for", number)),
    )
    assert trainer.train() and LAG >= 1
    at = {event: events.index(event) for event in events}  # the first time of each
    for number in range(1, STEPS - LAG + 1):
        for ahead in range(1, LAG + 1):
            assert at["on the device", number + ahead] < at["waited for", number]
            assert at["started", number + ahead] < at["waited for", number]
    # No further ahead than that: batches on the device take its memory.
    for number in range(1, STEPS - LAG):
        assert at["waited for", number] < at["on the device", number + LAG + 1]
    assert [number for name, number in events if name == "fetched"] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(("loading", "computing", "share"), [(0, 5, 0.0), (3, 1, 0.75), (2, 0, 1.0)])
def test_the_log_says_what_share_of_the_time_was_spent_waiting_for_data(
    tmp_path, monkeypatch, loading, computing, share
):
    now = 100.0
    for module in (train.run.trainer, train.run.window):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))

    def later(seconds):
        nonlocal now
        now += seconds

    def batches():
        while True:
            later(loading)
            yield {"image": np.zeros(0)}

    trainer = make_trainer(tmp_path, loader=batches(), step=lambda: later(computing), log_every=1)
    trainer.train()
    # Not the first record, whose clock starts after the compilation, nor those of the last steps, written all at once.
    shares = [row["data_wait"] for row in trainer.report.rows]
    assert shares[1 : STEPS - LAG] == pytest.approx([share] * (STEPS - LAG - 1), abs=1e-4)
