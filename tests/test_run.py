"""Whole runs: stopped and resumed, damaged, evaluated, diverging; and the files they leave."""

import dataclasses
import errno
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import se_flax
import train.data.augment
import train.data.sources
import train.optim.optimizers
import train.run.loop
import train.run.program
import train.validate
from se_flax.errors import UserError
from train.config import Augment, Checkpoint, Config, Data, Model, Optim, Parallel
from train.data.sources import open_data
from train.run.checkpoint import Checkpoints
from train.run.loop import run
from train.run.report import Report, read_metrics
from train.run.trainer import Trainer

ROOT = Path(__file__).parents[1]
STEPS = 12


def make_config():
    return Config(
        model=Model(name="seresnet20", drop_path_rate=0.1),
        data=Data(source="digits", image_size=8, batch_size=48, eval_batch_size=90),
        augment=Augment(flip=True, pad=1, mixup=0.2),
        optim=Optim(learning_rate=0.05, schedule="constant", ema_decay=0.9, label_smoothing=0.1),
        parallel=Parallel(devices=1),
        checkpoint=Checkpoint(every_steps=4, keep_last=2, keep_best=1),
        steps=STEPS,
        eval_every_epochs=0.2,
        log_every_steps=2,
        compilation_cache="",  # the test run's own, see conftest.py
    )


@pytest.fixture
def config():
    return make_config()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    outcome = run(make_config(), workdir)
    return workdir, outcome


def arrays_of(workdir, step):
    """Every array of a checkpoint's state, read without the training program."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore(Path(workdir) / "checkpoints" / str(step) / "state")
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)}


def figures_of(workdir):
    """Rows of metrics.jsonl without the timings."""
    return [
        {k: v for k, v in row.items() if k not in ("images_per_second", "data_wait")}
        for row in read_metrics(workdir / "metrics.jsonl")
    ]


def assert_same_bits(one, other):
    a, b = arrays_of(one, STEPS), arrays_of(other, STEPS)
    assert a.keys() == b.keys()
    assert any("opt_state" in k for k in a) and any("ema" in k for k in a) and any("key" in k for k in a)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def stop_after(step, monkeypatch, number=signal.SIGTERM):
    """Sends this process a signal when it has started the given step."""
    original = Trainer._advance

    def advance(self, *arguments):
        original(self, *arguments)
        if self.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "_advance", advance)


def test_a_finished_run_is_a_checkpoint_to_load(uninterrupted):
    """The moving average, ready for `se-flax predict`, right as often as the run says."""
    workdir, outcome = uninterrupted
    loaded = se_flax.load_pretrained(workdir)
    assert loaded.name == "seresnet20" and loaded.labels == tuple("0123456789")
    averages = {k.split("['ema']")[1]: v for k, v in arrays_of(workdir, STEPS).items() if "['ema']" in k}
    saved = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(loaded.variables)}
    assert averages.keys() == saved.keys()
    for key, value in saved.items():
        np.testing.assert_array_equal(value, averages[key], err_msg=key)
    test = open_data(make_config().data).eval
    images = [np.asarray(test[i]["image"]) for i in range(len(test))]
    logits = jax.jit(loaded.model.apply)(loaded.variables, loaded.preprocess(images))
    right = int((np.asarray(logits).argmax(-1) == [test[i]["label"] for i in range(len(test))]).sum())
    assert (len(test), right) == (360, outcome.result.top1)
    assert loaded.provenance["evaluation"] == {
        "count": 360,
        "top1_count": right,
        "top5_count": outcome.result.top5,
    }


@pytest.mark.parametrize(("step", "number"), [(3, signal.SIGTERM), (7, signal.SIGINT)])
def test_a_stopped_run_continues_bit_for_bit(config, uninterrupted, tmp_path, monkeypatch, step, number):
    with monkeypatch.context() as patch:
        stop_after(step, patch, number)
        stopped = run(config, tmp_path)
    assert not stopped.completed and stopped.step == step
    assert str(stopped).startswith(f"stopped at step {step} after") and "run the same command to resume" in str(stopped)
    finished = run(config, tmp_path)
    assert finished.completed and finished.step == STEPS
    assert_same_bits(tmp_path, uninterrupted[0])
    assert figures_of(tmp_path) == figures_of(uninterrupted[0])


def test_a_clock_that_jumps_changes_nothing(config, uninterrupted, tmp_path, monkeypatch):
    """Every look at it finds it ten minutes earlier; files of the first start are of the future and out of order."""
    times = itertools.count(time.time(), -600)
    monkeypatch.setattr(time, "time", lambda: next(times))
    monkeypatch.setattr(time, "time_ns", lambda: int(next(times) * 1e9))
    with monkeypatch.context() as patch:
        stop_after(7, patch)
        assert run(config, tmp_path).step == 7
    for number, path in enumerate(sorted(tmp_path.rglob("*"))):
        os.utime(path, (4e9 - number, 4e9 - number))
    assert run(config, tmp_path).completed
    assert_same_bits(tmp_path, uninterrupted[0])
    assert figures_of(tmp_path) == figures_of(uninterrupted[0])
    folders = [sorted(path.name for path in (each / "checkpoints").iterdir()) for each in (tmp_path, uninterrupted[0])]
    assert folders[0] == folders[1]


KILLED = """
import sys
from pathlib import Path
from tests.stress.child import End, train

workdir = Path(sys.argv[2])
if __name__ == "__main__":
    end = End("the rename of the digests", 2)
    train(sys.argv[1:2] + [f"--workdir={workdir}"], workdir, Path(sys.argv[3]), Path(sys.argv[4]), end)
"""


def test_a_killed_run_continues_bit_for_bit_from_its_last_checkpoint(config, uninterrupted, tmp_path, capsys):
    """SIGKILL gives no chance to save: step 8 has no digests yet, so the run falls back to step 4, to the same bits."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\nimport test_run\n"
        "def get_config(): return test_run.make_config()\n"
    )
    workdir, output = tmp_path / "run", tmp_path / "output"
    words = [sys.executable, "-c", KILLED, f"--config={recipe}", str(workdir), str(tmp_path / "journal"), str(output)]
    code = subprocess.run(words, cwd=ROOT, timeout=300, check=False).returncode
    assert code == -signal.SIGKILL, output.read_text()
    run(config, workdir)
    said = capsys.readouterr().err
    assert "8 is unconfirmed (digests.json is missing)" in said and "resuming from step 4" in said
    assert_same_bits(workdir, uninterrupted[0])
    assert figures_of(workdir) == figures_of(uninterrupted[0])


def test_a_finished_run_leaves_what_people_look_at(uninterrupted):
    workdir, outcome = uninterrupted
    assert outcome.completed
    ended, figures, checkpoint = str(outcome).splitlines()
    assert re.fullmatch(r"done in \d+ min \d+ s; best top-1 \d+\.\d\d %", ended)
    assert f"({outcome.result.top1:,} of 360)" in figures and len(figures) <= 80
    assert checkpoint == f"checkpoint: {workdir}/checkpoints/{STEPS}"
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 8, 10, 12]
    evals = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evals] == [6, 12]  # a fifth of an epoch is 5.99 steps
    assert evals[-1]["eval_count"] == 360 and evals[-1]["eval_top1_count"] == outcome.result.top1
    with Image.open(workdir / "curves.png") as picture:
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50  # something is drawn
    (events,) = (workdir / "events").iterdir()
    assert events.name.startswith("events.out.tfevents") and events.stat().st_size > 500
    assert json.loads((workdir / "config.json").read_text())["optim.ema_decay"] == 0.9


def test_the_last_and_the_best_checkpoints_are_kept(uninterrupted):
    workdir, _ = uninterrupted
    checkpoints = Checkpoints(workdir, keep_last=2, keep_best=1)
    assert checkpoints.steps()[-2:] == [8, 12]
    assert len(checkpoints.steps()) <= 3
    checkpoints.close()


def test_resuming_a_finished_run_evaluates_it_again(config, uninterrupted):
    workdir, before = uninterrupted
    rows = figures_of(workdir)
    again = run(config, workdir)
    assert again.completed and again.result == before.result
    assert figures_of(workdir) == rows, "the same step is recorded once"


def test_a_run_is_checked_built_and_traced_once(config, uninterrupted, tmp_path, monkeypatch):
    """Also where it is resumed; the number of classes comes from the data in both."""
    counts = dict.fromkeys(["build_model", "trace", "init", "optim", "data", "augment"], 0)

    def count(name, holder, attribute):
        original = getattr(holder, attribute)

        def counted(*arguments, **keywords):
            counts[name] += 1
            return original(*arguments, **keywords)

        monkeypatch.setattr(holder, attribute, counted)

    for module in (train.validate, train.run.program):
        count("build_model", module, "build_model")
        count("trace", module, "trace")
    count("init", type(se_flax.create_model("seresnet20")), "init")
    count("optim", train.optim.optimizers, "check")
    count("data", train.data.sources, "check_settings")
    count("augment", train.data.augment, "check")
    monkeypatch.setattr(train.run.loop, "save_model", lambda *arguments: None)
    run(dataclasses.replace(config, steps=1), tmp_path)
    assert counts == dict.fromkeys(counts, 1)
    run(config, copy_of(uninterrupted[0], tmp_path))
    assert counts == dict.fromkeys(counts, 2)


def test_a_wrong_network_is_refused_before_the_data_is_read(config, tmp_path, monkeypatch):
    monkeypatch.setattr(train.data.sources, "_open_digits", lambda data: pytest.fail("read the data"))
    config.model.attention.kind, config.model.attention.gate = "se", "sigmod"
    with pytest.raises(UserError, match="unknown gate 'sigmod'; closest: sigmoid"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def copy_of(workdir, target):
    import shutil

    return Path(shutil.copytree(workdir, target / "copy"))


def state_files(workdir, step):
    folder = workdir / "checkpoints" / str(step) / "state"
    return sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("damage", ["flipped", "cut short", "missing"])
def test_a_damaged_checkpoint_is_passed_over_and_named(config, uninterrupted, tmp_path, damage, capsys):
    workdir = copy_of(uninterrupted[0], tmp_path)
    victim = state_files(workdir, STEPS)[-1]
    content = bytearray(victim.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "cut short":
        victim.write_bytes(content[: len(content) // 2])
    else:
        victim.unlink()
    outcome = run(config, workdir)
    err = capsys.readouterr().err
    assert f"warning: checkpoint {workdir}/checkpoints/12 is damaged" in err
    assert "resuming from step 8" in err
    assert outcome.step == STEPS
    assert_same_bits(workdir, uninterrupted[0])


def test_a_half_written_checkpoint_is_not_seen(config, uninterrupted, tmp_path, capsys):
    """What a crash leaves while Orbax writes: a temporary directory, or a step's directory without all of its items."""
    import shutil

    workdir = copy_of(uninterrupted[0], tmp_path)
    shutil.rmtree(workdir / "checkpoints" / "12" / "data")
    (workdir / "checkpoints" / "12" / "digests.json").unlink()
    run(config, workdir)
    assert "resuming from step 8" in capsys.readouterr().err
    assert_same_bits(workdir, uninterrupted[0])


def test_nothing_but_damaged_checkpoints_is_an_error(config, uninterrupted, tmp_path):
    workdir = copy_of(uninterrupted[0], tmp_path)
    for folder in (workdir / "checkpoints").iterdir():
        if folder.is_dir():
            state_files(workdir, folder.name)[-1].unlink()
    with pytest.raises(
        UserError, match=r"none of the \d checkpoints in .* is whole: .*start anew with another --workdir"
    ):
        run(config, workdir)


def test_another_runs_work_directory_is_refused(config, uninterrupted):
    config.optim.learning_rate = 0.07
    config.augment.flip = False
    text = (
        r"holds the checkpoint of another run \(augment.flip=True there and False here; "
        r"optim.learning_rate=0.05 there and 0.07 here\); use another --workdir"
    )
    with pytest.raises(UserError, match=text):
        run(config, uninterrupted[0])


def test_a_run_may_be_prolonged_and_spread_differently(config, uninterrupted, tmp_path, capsys):
    workdir = copy_of(uninterrupted[0], tmp_path)
    config.steps, config.parallel.devices, config.eval_every_epochs = STEPS + 2, 2, 100.0
    outcome = run(config, workdir)
    assert outcome.step == STEPS + 2
    said = capsys.readouterr().err
    assert "resuming from step 12" in said
    assert (
        "the run is 14 steps long now and was 12 when the checkpoint was written; the learning rate (constant)" in said
    )


@pytest.mark.parametrize(
    ("batch_size", "devices", "backend"), [(7, 1, "shard_map"), (100, 8, "shard_map"), (500, 3, "pmap")]
)
def test_evaluation_counts_are_exact_for_any_batch_and_devices(
    config, uninterrupted, tmp_path, batch_size, devices, backend
):
    """The same integers as the run itself counted, though 360 divides by none of these."""
    workdir = copy_of(uninterrupted[0], tmp_path)
    config.data.eval_batch_size = batch_size
    config.parallel.devices, config.parallel.backend = devices, backend
    again = run(config, workdir).result
    expected = uninterrupted[1].result
    assert (again.count, again.top1, again.top5) == (360, expected.top1, expected.top5)
    assert again.loss == pytest.approx(expected.loss, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(config, tmp_path):
    config.optim.schedule, config.optim.decay_factor, config.optim.boundaries = "step", 1e30, (6 / (1437 / 48),)
    config.optim.weight_decay = 0.0
    with pytest.raises(UserError) as caught:
        run(config, tmp_path)
    assert "the loss became" in str(caught.value) and "at step 8" in str(caught.value)
    assert f"the last good checkpoint is {tmp_path}/checkpoints/4" in str(caught.value)
    assert "lower optim.learning_rate" in str(caught.value)


@pytest.mark.parametrize(
    ("rate", "steps", "text"),
    [
        # The state of step 1 is not finite, and no later step shows it.
        (3e38, 1, "the loss of the evaluation became (nan|inf) at step 1; no good checkpoint was written yet"),
        # That of step 1 is finite, and the step after it is not.
        (1e30, 4, "the loss became (nan|inf) and the gradient's norm .* at step 2; no good checkpoint was written yet"),
    ],
)
def test_a_state_that_is_not_finite_is_no_end(config, tmp_path, rate, steps, text):
    config.optim.learning_rate, config.optim.weight_decay, config.optim.ema_decay = rate, 0.0, 0.0
    config.steps, config.checkpoint.every_steps, config.log_every_steps = steps, 1, 1
    with pytest.raises(UserError, match=f"{text}; lower optim.learning_rate"):
        run(config, tmp_path)
    assert not (tmp_path / "model").exists()

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_a_full_disk_names_the_checkpoint_that_is_whole(config, tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    original = ocp.AsyncCheckpointer.save

    def full(self, directory, **kwargs):
        if directory.name == "8":
            raise ValueError("RESOURCE_EXHAUSTED: Error writing") from OSError(errno.ENOSPC, "No space left on device")
        return original(self, directory, **kwargs)

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", full)
    with pytest.raises(UserError) as caught:
        run(config, tmp_path)
    assert str(caught.value) == (
        f"the disk is full: the checkpoint of step 8 in {tmp_path}/checkpoints could not be written (No space left on "
        f"device); the newest whole checkpoint is {tmp_path}/checkpoints/4; free some space, then run the same command "
        "to resume"
    )


def test_a_full_disk_under_the_metrics_is_one_sentence(config, tmp_path, capsys, monkeypatch):
    from train import cli

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    monkeypatch.setattr(Report, "write", full)
    monkeypatch.setattr(cli, "parse", lambda words: (config, str(tmp_path)))
    assert cli.main([]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the disk is full") and "free some space" in error


def test_a_workdir_that_is_a_file_is_refused(config, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"cannot write to --workdir=.*taken.*; name a directory that can be created"):
        run(config, tmp_path / "taken")


def test_a_workdir_with_another_address_is_refused_and_makes_no_folder(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(UserError, match=r"got https://host/run; give a folder, gs://<bucket>/<folder> or s3://"):
        run(config, "https://host/run")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_images_trains_and_names_its_bad_ones(config, tmp_path, monkeypatch):
    # Another host has met two images of other shares; tests/test_hosts.py has real ones tell each other.
    monkeypatch.setattr(train.run.loop, "of_all", lambda found: found | {0, 1})
    rng = np.random.default_rng(0)
    for name in ("day", "night"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(30):
            pixels = rng.integers(0, 100, (20, 24, 3)) + (120 if name == "day" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / name / f"{i}.jpg")
    (tmp_path / "images" / "day" / "3.jpg").write_bytes(b"not an image")
    config.data.source, config.data.bad_images = f"folder:{tmp_path}/images", "skip"
    config.data.train_crop, config.data.batch_size, config.steps = "random_resized", 20, 8
    outcome = run(config, tmp_path / "run")
    assert outcome.completed
    training, evaluation = outcome.bad_images.split("; ")
    assert training.startswith("3 of ") and "3.jpg" in training and evaluation.startswith("2 of ")


def test_a_profile_is_written_on_request(config, tmp_path):
    config.profile, config.steps = True, 17
    run(config, tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
