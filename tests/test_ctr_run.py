"""Runs of the training program on small tables: learning, stopping, resuming, the command line and its errors."""

import itertools
import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import train.ctr.__main__
import train.ctr.loop
from se_flax.ctr import FM, FiBiNET, LogisticRegression
from se_flax.errors import UserError
from train.cli import main, parse, settings_help
from train.config import flatten
from train.ctr.config import Checkpoint, Config, Data, Model, Optim, check
from train.ctr.loop import run
from train.ctr.step import build_model, embedding_penalty
from train.run.report import read_metrics

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def clicks(tmp_path_factory):
    """A table in which only pairs of values tell: y depends on whether two fields agree, and on no field alone."""
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(0, 6, (3, 3000))
    p = np.where(a % 2 == b % 2, 0.9, 0.1)
    y = rng.random(3000) < p
    x = np.where(rng.random(3000) < 0.1, "", np.round(rng.exponential(5, 3000), 2).astype(str))
    path = tmp_path_factory.mktemp("clicks") / "clicks.csv"
    rows = "".join(f"{int(y[i])},{x[i]},a{a[i]},b{b[i]},c{c[i]}\n" for i in range(3000))
    path.write_text("label,I1,C1,C2,C3\n" + rows)
    return path


def settings(clicks, **changes):
    config = Config(
        model=Model(embedding_size=4, hidden=(8,)),
        data=Data(
            train=f"csv:{clicks}",
            numeric="I1",
            categorical="C1-C3",
            quantiles=4,
            eval_fraction=0.2,
            test_fraction=0.2,
            chunk_rows=256,
            shuffle_rows=1000,
            batch_size=128,
        ),
        optim=Optim(learning_rate=0.02),
        epochs=6,
        log_every_steps=5,
        compilation_cache="",
    )
    return replace(config, **changes)


def test_fibinet_learns_what_logistic_regression_cannot(clicks, tmp_path):
    outcome = run(settings(clicks), tmp_path / "fibinet")
    assert outcome.completed and outcome.test.rows == pytest.approx(600, abs=80)
    # The best possible AUC is 0.9; two standard deviations of 600 rows are 0.03.
    assert outcome.test.auc > 0.8 and outcome.test.log_loss < 0.55
    plain = run(settings(clicks, model=Model(name="lr"), epochs=2), tmp_path / "lr")
    assert 0.4 < plain.test.auc < 0.6
    rows = [json.loads(line) for line in (tmp_path / "fibinet" / "metrics.jsonl").read_text().splitlines()]
    assert max(row["eval_auc"] for row in rows if "eval_auc" in row) == outcome.eval.auc
    assert rows[0]["loss"] > 0.6 and re.match(r"done in \d+ min \d+ s; best epoch \d\nevaluation AUC", str(outcome))
    # Once more: nothing is left to do, and the figures are the same.
    again = run(settings(clicks), tmp_path / "fibinet")
    assert (again.test, again.eval, again.epoch, again.step) == (
        outcome.test,
        outcome.eval,
        outcome.epoch,
        outcome.step,
    )


def arrays_of(workdir, step):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        state = reader.restore(Path(workdir) / "checkpoints" / str(step) / "state")
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(state)}


def stop_at(patch, step, batch=None):
    """Asks for a stop at a step, or at a batch of evaluations, counted over all of them."""
    original, evaluation = train.ctr.loop.Trainer._advance, train.ctr.loop.make_eval_step

    def advance(self, *arguments):
        original(self, *arguments)
        if self.step == step and batch is None:
            os.kill(os.getpid(), signal.SIGTERM)

    def make(model):
        made, calls = evaluation(model), itertools.count(1)

        def eval_step(*arguments):
            if next(calls) == batch:
                os.kill(os.getpid(), signal.SIGTERM)
            return made(*arguments)

        return eval_step

    patch.setattr(train.ctr.loop.Trainer, "_advance", advance)
    patch.setattr(train.ctr.loop, "make_eval_step", make)


def test_a_stopped_run_continues_bit_for_bit(clicks, tmp_path, monkeypatch, capsys):
    config = settings(clicks, model=Model(name="fibinet", embedding_size=2, hidden=(4,), dropout=0.3), epochs=3)
    whole = run(config, tmp_path / "whole")
    per_epoch = whole.step // 3
    # In the middle of an epoch and of a record, at an epoch's end, in its evaluation of five batches, and in the next.
    for step, batch in ((7, None), (per_epoch, None), (per_epoch, 2), (2 * per_epoch, 7)):
        with monkeypatch.context() as patch:
            stop_at(patch, step, batch)
            stopped = run(config, tmp_path / "stopped")
        assert not stopped.completed and stopped.step == step
        assert "run the same command to resume" in str(stopped)
    resumed = run(config, tmp_path / "stopped")
    assert f"resuming from step {2 * per_epoch}" in capsys.readouterr().err
    one, other = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "stopped"))
    assert one == other and len(one) > 6
    assert (resumed.step, resumed.eval, resumed.test) == (whole.step, whole.eval, whole.test)
    one, other = (arrays_of(tmp_path / name, whole.step) for name in ("whole", "stopped"))
    assert one.keys() == other.keys() and any("opt_state" in path for path in one)
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path)

    with pytest.raises(UserError, match=r"another run \(optim\.learning_rate=0\.02 there and 0\.5 here\)"):
        run(replace(config, optim=Optim(learning_rate=0.5)), tmp_path / "stopped")
    (tmp_path / "stopped" / "encoder.json").write_text("{")
    with pytest.raises(UserError, match=r"encoder\.json belongs to the checkpoints beside it and cannot be read"):
        run(config, tmp_path / "stopped")


def test_patience_ends_a_run_and_the_best_parameters_are_tested(clicks, tmp_path, monkeypatch):
    figures = iter([0.6, 0.8, 0.7, 0.75])
    real = train.ctr.loop.auc
    monkeypatch.setattr(train.ctr.loop, "auc", lambda x, y: next(figures, None) or real(x, y))
    config = settings(clicks, model=Model(name="fm", embedding_size=2), checkpoint=Checkpoint(every_steps=10))
    outcome = run(config, tmp_path)
    per_epoch = outcome.step // 4
    assert outcome.completed and outcome.epoch == 2 and outcome.eval.auc == 0.8
    assert outcome.step == 4 * per_epoch
    kept = arrays_of(tmp_path, outcome.step)
    best = {path.replace("'best'", "'params'"): x for path, x in kept.items() if "'best'" in path}
    at_best = arrays_of(tmp_path, 2 * per_epoch)  # the checkpoint of the best evaluation is kept
    assert best and all(np.array_equal(at_best[path], x) for path, x in best.items())
    assert any(not np.array_equal(kept[path], x) for path, x in best.items())


def test_the_seed_decides_and_l2_shrinks(clicks, tmp_path):
    config = settings(clicks, model=Model(name="fm", embedding_size=2), epochs=1)
    one, same = (run(config, tmp_path / name) for name in ("one", "same"))
    other = run(replace(config, seed=1), tmp_path / "other")
    assert one.eval == same.eval != other.eval
    shrunk = run(replace(config, optim=Optim(learning_rate=0.02, l2=0.1)), tmp_path / "shrunk")
    norms = []
    for name, outcome in (("one", one), ("shrunk", shrunk)):
        arrays = arrays_of(tmp_path / name, outcome.step)
        norms.append(sum(np.square(x).sum() for path, x in arrays.items() if "'params'" in path))
    assert norms[1] < 0.5 * norms[0]


def test_the_penalty_is_half_the_squares_of_all_tables():
    params = {"first_order": {"linear": {"embedding": np.array([[1.0], [2.0]])}, "bias": np.array(7.0)}}
    params["embedding"] = {"embedding": np.array([[3.0, 0.0]])}
    assert float(embedding_penalty(params)) == 0.5 * (1 + 4 + 9)


def test_a_loss_that_is_not_finite_stops_the_run(clicks, tmp_path):
    config = settings(clicks, optim=Optim(learning_rate=1e30), checkpoint=Checkpoint(every_steps=1), log_every_steps=1)
    with pytest.raises(UserError) as caught:
        run(config, tmp_path)
    # The checkpoint of step 1 is finite, and gives this loss: it is no good one.
    assert re.fullmatch(
        r"the loss became (nan|inf) at step 2; no good checkpoint was written yet; "
        r"lower optim\.learning_rate=1e\+30 and start in a new --workdir",
        str(caught.value),
    )


def spoil(patch, numbers):
    """Makes the labels of these steps NaN, counted from 0."""
    original = train.ctr.loop.make_train_step

    def make(*arguments):
        step = original(*arguments)

        def spoiled(state, batch):
            bad = int(state.step) in numbers
            return step(state, {**batch, "labels": np.full_like(batch["labels"], np.nan)} if bad else batch)

        return spoiled

    patch.setattr(train.ctr.loop, "make_train_step", make)


def test_updates_that_are_not_finite_can_be_left_out(clicks, tmp_path, monkeypatch):
    optim = Optim(learning_rate=0.02, non_finite="skip")
    config = settings(clicks, model=Model(name="lr"), optim=optim, epochs=2, log_every_steps=2)
    spoil(monkeypatch, {2, 3, 6})
    whole = run(config, tmp_path / "whole")
    assert f"\n3 of {whole.step} updates left out: the loss or the gradient was not finite\n" in str(whole)
    one = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    lines = [row for row in one if "skipped" in row]
    assert [(row["step"], row["skipped"], "loss" in row) for row in lines[:4]] == [
        (2, 0, True),
        (4, 2, False),
        (6, 0, True),
        (8, 1, True),
    ]
    with monkeypatch.context() as patch:
        stop_at(patch, 3, None)
        assert run(config, tmp_path / "parts").step == 3
    again = run(config, tmp_path / "parts")
    assert (again.skips, again.eval) == (whole.skips, whole.eval)
    assert read_metrics(tmp_path / "parts" / "metrics.jsonl") == one
    spoil(monkeypatch, range(9, 99))
    with pytest.raises(UserError, match=r"^the loss or the gradient's norm was not finite in 20 steps in a row, up to"):
        run(replace(config, epochs=3), tmp_path / "bad")


def test_an_evaluation_that_is_not_finite_stops_the_run(clicks, tmp_path):
    """One step in all, so no later loss shows it."""
    config = settings(clicks, optim=Optim(learning_rate=3e38), epochs=1)
    config.data.batch_size = 4096
    with pytest.raises(UserError, match=r"the evaluation after step 1 has logits that are not finite; no good check.*"):
        run(config, tmp_path)
    assert not any("eval_auc" in line for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_checkpoint_at_the_end_of_an_epoch_has_its_evaluation(clicks, tmp_path):
    """It replaces the one that was due by the number of steps."""
    outcome = run(settings(clicks, epochs=1, checkpoint=Checkpoint(every_steps=1, keep_last=1)), tmp_path)
    newest = Path(outcome.checkpoint)
    assert newest.name == str(outcome.step)
    held = json.loads((newest / "run" / "metadata").read_text())
    assert held["evaluation"] == {"eval_auc": outcome.eval.auc}
    assert json.loads((newest / "data" / "metadata").read_text())["epoch"] == 1


def test_networks_by_their_settings():
    assert build_model(Model(name="lr"), 9) == LogisticRegression(9)
    assert build_model(Model(name="fm", embedding_size=3), 9) == FM(9, 3)
    model = build_model(Model(attention="sigmoid", reduction=2, hidden=(), bilinear="all"), 9)
    assert isinstance(model, FiBiNET) and model.bilinear == "all" and model.hidden == ()
    attention = model.attention()
    assert (attention.gate, attention.reduction, attention.rounding) == ("sigmoid", 2, "ceil")
    attention = build_model(Model(), 9).attention()
    assert (attention.gate, attention.reduction, attention.use_bias) == ("relu", 3, False)
    assert build_model(Model(attention="none"), 9).attention is None


# --- The command line -------------------------------------------------------------------------------------------------

FRAPPE, WORKDIR = f"--config={ROOT}/configs/ctr_frappe.py", "--workdir=unused"


def test_the_training_program_runs_a_recipe_for_tables(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "t.libsvm"
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 9, (400, 3))
    path.write_text("".join(f"{int(a < 5)} {a}:1 {b + 10}:1 {c + 20}:1\n" for a, b, c in ids))
    words = ["--config=configs/ctr_frappe.py:lr", f"--config.data.train=libsvm:{path}", "--config.data.eval="]
    words += ["--config.data.test=", "--config.epochs=2", "--config.data.batch_size=64", f"--workdir={tmp_path}/run"]
    assert main([*words, "--config.compilation_cache="]) == 0
    out, err = capsys.readouterr()
    assert re.search(
        r"done in .*; best epoch \d\nevaluation AUC 1\.0000, log loss 0\.\d+ \(\d+ rows\)\ncheckpoint: .*/run/", out
    )
    assert re.search(r"lr: 34 parameters; 3 fields with 33 ids", err)  # 3 x (9 + missing + unknown), and a bias
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["epochs"] == 2 and saved["model.name"] == "lr"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([f"{FRAPPE}:fibnet", WORKDIR], r"unknown recipe ctr_frappe\.py:fibnet; closest: fibinet"),
        (
            [f"--config={ROOT}/configs/ctr_criteo.py:tiny", WORKDIR],
            r"unknown recipe ctr_criteo\.py:tiny; allowed: full",
        ),
        ([FRAPPE, WORKDIR, "--config.optim.rate=1"], r"unknown setting 'optim\.rate'; .*\(python -m train\.ctr --help"),
        ([FRAPPE, WORKDIR, "--config.epochs=many"], r"got --config\.epochs=many; a whole number is expected"),
        ([FRAPPE, WORKDIR, "--config.model.name=ffm"], r"unknown model\.name 'ffm'; closest: fm"),
        ([FRAPPE, WORKDIR, "--config.model.hidden=(0,)"], r"got model\.hidden=\(0,\); widths must be at least 1"),
        (
            [FRAPPE, WORKDIR, "--config.optim.non_finite=rollback"],
            r"got optim\.non_finite='rollback', which runs on tables do not have; give stop or skip",
        ),
        ([FRAPPE, WORKDIR, "--config.model.dropout=1"], r"got model\.dropout=1\.0; a probability below 1"),
        ([FRAPPE, WORKDIR, "--config.data.train="], r"data\.train is empty; give --config\.data\.train=csv:<path>"),
        ([FRAPPE, WORKDIR, "--config.data.batch_size=0"], r"got data\.batch_size=0; it must be at least 1"),
        ([FRAPPE, WORKDIR, "--config.data.eval_fraction=1"], r"got data\.eval_fraction=1\.0; a share below 1"),
        (
            [FRAPPE, WORKDIR, "--config.data.eval=", "--config.data.eval_fraction=0"],
            r"there is nothing to evaluate on: set data\.eval to a file, or data\.eval_fraction above 0",
        ),
        (
            [FRAPPE, WORKDIR, "--config.data.eval_fraction=0.5", "--config.data.test_fraction=0.5"],
            r"data\.eval_fraction=0\.5 and data\.test_fraction=0\.5 leave nothing to train on",
        ),
        ([FRAPPE, WORKDIR], r"there is no file 'data/frappe/train\.libsvm'"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(words, text, capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--config.compilation_cache="]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.search(text, err), err
    assert err.startswith("error: ") and len(err.splitlines()) == 1


def test_help_lists_every_setting_of_tables(capsys):
    text = settings_help(Config)
    for name in flatten(Config()):
        assert f"--config.{name}=" in text
    assert train.ctr.__main__.main(["--help"]) == 0
    assert "python -m train.ctr --config=configs/ctr_frappe.py" in capsys.readouterr().out


ARGUMENTS = ["", ":no_se", ":sigmoid", ":fm", ":lr"]
RECIPES = [f"ctr_frappe{a}" for a in ARGUMENTS] + ["ctr_criteo", "ctr_criteo:sample", "ctr_criteo:sample,no_se"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_passes_validation(recipe):
    name, _, argument = recipe.partition(":")
    config, _ = parse([f"--config={ROOT}/configs/{name}.py" + (f":{argument}" if argument else ""), WORKDIR])
    check(config)
    head = (ROOT / "configs" / f"{name}.py").read_text().split('"""')[1]
    assert f"--config=configs/{name}.py" in head


def test_every_recipe_for_tables_is_tested():
    assert {p.stem for p in (ROOT / "configs").glob("ctr_*.py")} == {recipe.partition(":")[0] for recipe in RECIPES}


def test_the_shallow_network_can_be_asked_for():
    config, _ = parse([FRAPPE, WORKDIR, "--config.model.hidden=()"])
    assert flatten(config)["model.hidden"] == []


def test_tables_of_one_run_have_the_same_fields(clicks, tmp_path):
    other = tmp_path / "t.libsvm"
    other.write_text("1 2:1\n")
    with pytest.raises(UserError, match=r"t\.libsvm has 1 fields and .*clicks\.csv has 4; all tables of a run"):
        run(replace(settings(clicks), data=replace(settings(clicks).data, eval=f"libsvm:{other}")), tmp_path / "run")
