"""Files of an ablation's results: runs of several machines in one file, and the page that is made of them."""

import json
import re
import statistics

import numpy as np
import pytest
from scipy import stats
from test_ablation import RECIPE, TINY, TOP1, Training

from benchmarks import trained
from se_flax.errors import UserError
from train import ablation
from train.ablation import main, read_study, run_study
from train.config import Config, flatten
from train.tools import results_file


def study_of(workdir, results, *more, cells="none,tanh,sigmoid"):
    words = [f"{RECIPE}:excitation", f"--workdir={workdir}", "--seeds=2", f"--cells={cells}", f"--results={results}"]
    return read_study([*words, *TINY, *more])


@pytest.fixture(autouse=True)
def costs(monkeypatch):
    monkeypatch.setattr(ablation, "network_costs", lambda config: {"params": 1234, "macs_paper": 5_670_000})


@pytest.fixture
def results(tmp_path):
    """Of a study whose runs were divided among two machines."""
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    run_study(study_of(tmp_path / "a", here, cells="none,tanh"), Training(), lambda line: None)
    run_study(study_of(tmp_path / "b", there, cells="none,sigmoid"), Training(), lambda line: None)
    merged = tmp_path / "merged.jsonl"
    merged.write_text(here.read_text() + there.read_text())
    return merged


def test_a_merged_file_has_every_run_once_and_nothing_is_trained_again(results, tmp_path):
    assert len(results.read_text().splitlines()) == 8  # `none` on both machines
    runs = results_file.runs_of(results_file.read(results), "excitation")
    assert {run: row["top1"] for run, row in runs.items()} == TOP1
    again = Training()
    assert run_study(study_of(tmp_path / "c", results), again, lambda line: None) and again.runs == []
    more = Training(fail={("sigmoid", 1): "never"})
    cut = results.read_text().splitlines(keepends=True)
    results.write_text("".join(cut[:-1]) + cut[-1][:40])  # the last line was cut off: its run is missing
    with pytest.raises(UserError, match="never"):
        run_study(study_of(tmp_path / "c", results), more, lambda line: None)


def test_data_may_lie_elsewhere_and_machines_may_differ(results, tmp_path):
    study = study_of(tmp_path / "c", results, "--config.data.workers=0", "--config.parallel.devices=2")
    again = Training()
    assert run_study(study, again, lambda line: None) and again.runs == []


def test_a_shared_file_does_not_say_where_a_folder_lay(tmp_path):
    results_file.append(
        tmp_path / "a.jsonl", "x", ("se", 0), {"config": {"data.source": "folder:/home/me/cats"}}, tmp_path
    )
    results_file.append(tmp_path / "a.jsonl", "x", ("se", 1), {"config": {"data.source": "tfds:a/b:1"}}, tmp_path)
    sources = [row["config"]["data.source"] for row in results_file.read(tmp_path / "a.jsonl")]
    assert sources == ["folder:cats", "tfds:a/b:1"]


def test_runs_of_other_settings_are_refused(results, tmp_path):
    text = r"merged.jsonl have runs of other settings in the study excitation \(steps=2 there and 3 here\); give every"
    with pytest.raises(UserError, match=text):
        run_study(study_of(tmp_path / "c", results, "--config.steps=3"), Training(), lambda line: None)
    rows = results_file.read(results)
    rows[3]["config"]["optim.learning_rate"] = 0.7
    with pytest.raises(UserError, match=r"\(optim.learning_rate=0.1 there and 0.7 here\)"):
        results_file.runs_of(rows, "excitation")
    rows = results_file.read(results)
    rows[3]["count"] = 10_000
    with pytest.raises(
        UserError, match=r"mix evaluations on 360 and 10,000 images in the study excitation; merge only"
    ):
        results_file.runs_of(rows, "excitation")


@pytest.mark.parametrize("line", ['{"study": "a"}', "[]", "not JSON"])
def test_a_file_of_something_else_is_refused(line, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{line}\n{{"study": "a", "cell": "b", "seed": 0}}\n')
    with pytest.raises(UserError, match=r"line 1 of .*x.jsonl is no result of an ablation; remove it, or give another"):
        results_file.read(path)


def test_curves_are_those_of_the_run(tmp_path):
    rows = [{"step": i, "epoch": i / 10, "loss": 1 / i, "accuracy": 0.5} for i in range(1, 251)]
    rows += [{"step": 100, "epoch": 10.0, "eval_top1": 0.25, "eval_count": 4}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = results_file.curves_of(path)
    assert curves["eval_top1"] == [[10.0, 0.25]]
    assert 50 <= len(curves["train_loss"]) <= 100 and curves["train_loss"][-1] == [25.0, 0.004]
    assert results_file.curves_of(tmp_path / "none.jsonl") == {"train_loss": [], "eval_top1": []}


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.3, -0.2, 0.1, 0.4, 0.25], list(np.linspace(-1, 2, 11))])
def test_the_interval_is_students(values):
    expected = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    np.testing.assert_allclose(trained.interval(values), expected, rtol=1e-3)
    assert trained.interval(values[:1]) is None


def test_the_page_has_paired_differences(results, tmp_path):
    rows = results_file.read(results)
    for number, row in enumerate(rows):
        row["curves"] = {"train_loss": [[1, 2.0], [2, 1.0 + number]], "eval_top1": [[2, row["top1"] / 360]]}
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = trained.page(results_file.read(results))
    (line,) = re.findall(r"^\| `tanh` .*$", text, re.MULTILINE)
    differences = [(TOP1["none", seed] - TOP1["tanh", seed]) / 3.6 for seed in (0, 1)]
    low, high = stats.t.interval(0.95, 1, np.mean(differences), stats.sem(differences))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[7] == "23.00 (-0.30)"  # Hu et al. 2020, table 12: 23.30 without SE
    assert cells[1:4] == ["2", "15.28 ± 5.89", f"{statistics.mean(differences):+.2f}"]
    np.testing.assert_allclose([float(bound) for bound in cells[4].split(" to ")], [low, high], rtol=1e-3)
    assert "2 steps: `excitation`" in text and "evaluated on 360 images" in text
    figure = trained.picture(results_file.runs_of(rows, "excitation"), ("none", "sigmoid"))
    losses = figure.axes[0].lines
    assert len(losses) == 2 * (2 + 1)  # two seeds and their mean, each
    np.testing.assert_allclose(losses[2].get_ydata(), [2.0, np.mean([line.get_ydata()[1] for line in losses[:2]])])


def test_the_page_is_what_the_results_give():
    assert trained.PAGE.read_text() == trained.page(results_file.read(trained.RESULTS))


def test_the_command_line_takes_the_file(results, tmp_path, capsys):
    words = [f"{RECIPE}:excitation", f"--workdir={tmp_path / 'c'}", "--seeds=2", "--cells=none", *TINY]
    assert main([*words, f"--results={results}"]) == 0
    assert "| none | 2 | 15.28 ± 1.96 |" in capsys.readouterr().out
    assert flatten(Config()).keys() == results_file.read(results)[0]["config"].keys()
