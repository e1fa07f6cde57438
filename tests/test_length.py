"""A run that is resumed with another length: what is said of its learning rate."""

import dataclasses
import math

import pytest

from se_flax.errors import UserError
from train.config import Config, Data, Optim, check_same_run, flatten
from train.optim.optimizers import Updates
from train.run.length import length_change

PER_EPOCH = 10.0


def change(now, done, *, was=None, **optim):
    """What is said of a run of 4 epochs (or as `was` says) that goes on after `done` steps."""
    before = Config(epochs=4.0, optim=Optim(learning_rate=0.4, **optim))
    saved = flatten(dataclasses.replace(before, **(was or {})))
    return length_change(saved, dataclasses.replace(before, **now), Updates(before.optim), PER_EPOCH, done)


def cosine(done, total):
    """Loshchilov and Hutter, "SGDR", equation 5."""
    return 0.2 * (1 + math.cos(math.pi * min(done / total, 1.0)))


@pytest.mark.parametrize(("epochs", "done"), [(8.0, 20), (3.0, 20), (8.0, 40)], ids=["longer", "shorter", "finished"])
def test_another_cosine_is_said_with_both_rates(epochs, done):
    total = int(epochs * PER_EPOCH)
    assert change({"epochs": epochs}, done, schedule="cosine") == (
        f"the run is {total} steps long now and was 40 when the checkpoint was written: from here on the learning rate "
        f"is that of the cosine schedule over {total} steps, {cosine(done, total):.4g} at this step instead of "
        f"{cosine(done, 40):.4g}"
    )


@pytest.mark.parametrize(
    "optim",
    [
        {"schedule": "constant"},
        {"schedule": "step", "boundaries": (1.0, 3.0)},
        {"schedule": "exponential", "decay_every_epochs": 0.5},
        {"schedule": "constant", "warmup_epochs": 1.0},
    ],
    ids=lambda optim: "-".join(map(str, optim.values())),
)
@pytest.mark.parametrize(("epochs", "done"), [(8.0, 20), (3.0, 20), (8.0, 40)], ids=["longer", "shorter", "finished"])
def test_a_schedule_that_does_not_depend_on_the_length_is_left_as_it_is(optim, epochs, done):
    assert change({"epochs": epochs}, done, **optim) == (
        f"the run is {epochs * PER_EPOCH:.0f} steps long now and was 40 when the checkpoint was written; the learning "
        f"rate ({optim['schedule']}) does not change by that"
    )


def test_a_run_that_is_shorter_than_what_is_done_is_said_to_be_over():
    assert change({"epochs": 1.0}, 20) == (
        "the run is 10 steps long now and was 40 when the checkpoint was written: its 20 steps are all that is trained"
    )


@pytest.mark.parametrize(
    ("now", "was"),
    [({}, {}), ({"steps": 40}, {}), ({"epochs": 9.0, "steps": 40}, {"epochs": 2.0, "steps": 40})],
    ids=["same", "in other words", "overridden"],
)
def test_the_same_length_needs_no_words(now, was):
    assert change(now, 20, was=was) is None


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (Config(data=Data(batch_size=256)), "data.batch_size=128 there and 256 here"),
        (Config(optim=Optim(accumulate=2)), "optim.accumulate=1 there and 2 here"),
        (Config(optim=Optim(warmup_epochs=2.0)), "optim.warmup_epochs=0.0 there and 2.0 here"),
        (Config(optim=Optim(final_learning_rate=0.01)), "optim.final_learning_rate=0.0 there and 0.01 here"),
        (Config(optim=Optim(schedule="constant")), "optim.schedule='cosine' there and 'constant' here"),
    ],
)
def test_what_else_would_change_the_schedule_is_another_run(other, text):
    with pytest.raises(UserError) as error:
        check_same_run(flatten(Config()), other, "runs/x")
    assert f"holds the checkpoint of another run ({text}); use another --workdir" in str(error.value)
