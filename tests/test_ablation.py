"""Ablations: cells, resuming, tables; one tiny real run, the rest with a stand-in for the training."""

import csv
import json
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest

import train.ablation
from configs.ablation import AXES, get_cells, get_config
from se_flax.errors import UserError
from train.ablation import main, read_study, run_study
from train.build import build_model
from train.config import Attention, Config, flatten

ROOT = Path(__file__).parents[1]
RECIPE = f"--config={ROOT}/configs/ablation.py"
TINY = [
    "--config.data.source=digits", "--config.data.image_size=8", "--config.data.batch_size=48",
    "--config.data.eval_batch_size=360", "--config.parallel.devices=1", "--config.steps=2",
    "--config.compilation_cache=",
]  # fmt: skip


# --- Cells -----------------------------------------------------------------------------------------------------------


# Hu et al. 2020, tables 10 to 16: top-1 and top-5 errors of SE-ResNet-50 by cell.
PAPER = {
    "reduction": {"2": (22.29, 6.00), "4": (22.25, 6.09), "8": (22.26, 5.99), "16": (22.28, 6.03), "32": (22.72, 6.20)},
    "squeeze": {"max": (22.57, 6.09), "mean": (22.28, 6.03)},
    "excitation": {"relu": (23.47, 6.98), "tanh": (23.00, 6.38), "sigmoid": (22.28, 6.03)},
    "stages": {"2": (23.03, 6.48), "3": (23.04, 6.32), "4": (22.68, 6.22), "all": (22.28, 6.03)},
    "placement": {"standard": (22.28, 6.03), "pre": (22.23, 6.00), "post": (22.78, 6.35), "identity": (22.20, 6.15)},
    "3x3": {"se": (22.28, 6.03), "3x3": (22.48, 6.02)},
    "nosqueeze": {"se": (22.28, 6.03), "nosqueeze": (22.93, 6.39)},
}
WORDS = {
    "reduction": lambda name: {"reduction": float(name)},
    "squeeze": lambda name: {"squeeze": name},
    "excitation": lambda name: {"gate": name},
    "stages": lambda name: {"stages": () if name == "all" else (int(name),)},
    "placement": lambda name: {"placement": name},
    "3x3": lambda name: {"placement": "3x3"} if name == "3x3" else {},
    "nosqueeze": lambda name: {"squeeze": "none"} if name == "nosqueeze" else {},
}


@pytest.mark.parametrize("axis", PAPER)
def test_an_axis_has_the_papers_cells_and_figures(axis):
    cells = {cell.name: cell for cell in get_cells(axis)}
    assert cells.pop("none").attention == Attention(kind="none")
    assert {name: (cell.paper.top1, cell.paper.top5) for name, cell in cells.items()} == PAPER[axis]
    for name, cell in cells.items():
        assert cell.attention == Attention(kind="se", bias=False, **WORDS[axis](name))


def test_every_axis_starts_without_attention_and_all_is_every_network_once():
    for cells in AXES.values():
        assert cells[0].attention.kind == "none" and (cells[0].paper.top1, cells[0].paper.top5) == (23.30, 6.55)
        assert len({cell.name for cell in cells}) == len({cell.key for cell in cells}) == len(cells)
    one_by_one = {cell.key for axis, cells in AXES.items() if axis != "all" for cell in cells}
    assert {cell.key for cell in AXES["all"]} == one_by_one and len(one_by_one) == 20


def test_the_recipe_and_the_cell_make_the_settings():
    config = get_config("reduction=4@cifar100:seresnet56")
    assert (config.model.name, config.data.source) == ("seresnet56", "tfds:cifar100")
    assert config.model.attention == Attention(kind="se", bias=False, reduction=4.0)
    assert get_config("stages").model.attention == Attention(kind="se", bias=False)
    assert get_config("stages=none@imagenet").model.name == "msra_seresnet50"
    for cell in AXES["attention"]:
        model = build_model(get_config(f"attention={cell.name}"), 10)
        given = getattr(model.attention, "func", model.attention)
        expected = {"none": None, "se": "SqueezeExcite", "eca": "ECA", "cbam": "CBAM", "gc": "GlobalContext"}[cell.name]
        assert getattr(given, "__name__", None) == expected


# --- A study with a stand-in for the training ------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(train.ablation, "network_costs", lambda config: {"params": 1234, "macs_paper": 5_670_000})
    words = [f"{RECIPE}:excitation", f"--workdir={tmp_path}", "--seeds=2", "--cells=none,tanh,sigmoid", *TINY]
    return read_study(words)


# Correct answers of 360 by cell and seed.
TOP1 = {
    ("none", 0): 300,
    ("none", 1): 310,
    ("tanh", 0): 290,
    ("tanh", 1): 320,
    ("sigmoid", 0): 330,
    ("sigmoid", 1): 325,
}


class Training:
    """Stands in for `train.run.loop.run`: hands out results, and stops or fails where it is told."""

    def __init__(self, stop=(), interrupt=(), fail=None):
        self.runs, self.stop, self.interrupt, self.fail = [], stop, interrupt, fail or {}

    def __call__(self, config, folder):
        run = Path(folder).parent.name, config.seed
        assert Path(folder).name == f"seed{config.seed}"
        assert config.model.attention.gate == (run[0] if run[0] != "none" else "sigmoid")
        self.runs.append(run)
        if run in self.interrupt:
            raise KeyboardInterrupt
        if run in self.fail:
            raise UserError(self.fail[run])
        result = SimpleNamespace(count=360, top1=TOP1[run], top5=355, loss=0.5)
        return SimpleNamespace(completed=run not in self.stop, result=result)


def table(study):
    with (study.workdir / "table.csv").open() as stream:
        return {row["cell"]: row for row in csv.DictReader(stream)}


def test_a_stopped_study_goes_on_with_what_is_left(study):
    stopped = Training(stop=[("tanh", 0)])
    lines = []
    assert not run_study(study, stopped, lines.append)
    assert stopped.runs == [("none", 0), ("tanh", 0)]
    assert "run 2 of 6: excitation tanh, seed 0" in lines
    assert table(study)["none"]["runs"] == "1" and table(study)["tanh"]["top1_mean"] == ""
    interrupted = Training(interrupt=[("none", 1)])
    with pytest.raises(KeyboardInterrupt):
        run_study(study, interrupted, lines.append)
    assert interrupted.runs == [("tanh", 0), ("sigmoid", 0), ("none", 1)]
    finished = Training()
    assert run_study(study, finished, lines.append)
    assert "3 of 6 runs are finished already" in lines
    assert finished.runs == [("none", 1), ("tanh", 1), ("sigmoid", 1)]
    again = Training()
    assert run_study(study, again, lines.append) and again.runs == []


def test_the_table_has_mean_spread_and_the_papers_column(study):
    assert run_study(study, Training(), lambda line: None)
    rows = table(study)
    for name in ("none", "tanh", "sigmoid"):
        errors = [100 - TOP1[name, seed] / 3.6 for seed in (0, 1)]
        assert float(rows[name]["top1_mean"]) == pytest.approx(statistics.mean(errors), abs=1e-5)
        assert float(rows[name]["top1_std"]) == pytest.approx(statistics.stdev(errors), abs=1e-5)
        differences = [(TOP1["none", seed] - TOP1[name, seed]) / 3.6 for seed in (0, 1)]
        assert float(rows[name]["difference_mean"]) == pytest.approx(statistics.mean(differences), abs=1e-5)
    text = (study.workdir / "table.md").read_text()
    assert "# excitation: seresnet20 on digits, 2 steps" in text
    # 70 and 40 wrong of 360; 10 more and 10 fewer than without attention.
    (line,) = re.findall(r"^\| tanh .*$", text, re.MULTILINE)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "tanh",
        "2",
        "15.28 ± 5.89",
        "1.39 ± 0.00",
        "+0.00 ± 3.93",
        "1,234",
        "5.67",
        "23.00",
        "6.38",
        "",
        "",
    ]


def test_among_at_most_five_classes_the_table_has_no_top5(study):
    class FiveClasses(Training):
        def __call__(self, config, folder):
            outcome = super().__call__(config, folder)
            outcome.result.top5 = None
            return outcome

    assert run_study(study, FiveClasses(), lambda line: None)
    assert {row["top5_mean"] for row in table(study).values()} == {""}
    (line,) = re.findall(r"^\| tanh .*$", (study.workdir / "table.md").read_text(), re.MULTILINE)
    assert [cell.strip() for cell in line.strip("|").split("|")][2:5] == ["15.28 ± 5.89", "", "+0.00 ± 3.93"]


def test_a_network_that_diverges_is_a_finding(study):
    training = Training(fail={("tanh", 1): "the loss became nan and the gradient's norm nan at step 8"})
    assert run_study(study, training, lambda line: None)
    assert len(training.runs) == 6
    row = table(study)["tanh"]
    assert (row["runs"], row["diverged"], row["top1_std"]) == ("1", "1", "")
    assert "| tanh | 1 and 1 diverged | 19.44 |" in (study.workdir / "table.md").read_text()


def test_another_error_ends_the_study(study):
    with pytest.raises(UserError, match="no such data"):
        run_study(study, Training(fail={("none", 0): "no such data"}), lambda line: None)


def test_results_of_other_settings_are_refused(study, tmp_path):
    run_study(study, Training(), lambda line: None)
    words = [f"{RECIPE}:excitation", f"--workdir={tmp_path}", "--seeds=2", *TINY, "--config.optim.learning_rate=0.3"]
    text = r"none/seed0 holds a result of another study \(optim.learning_rate=0.1 there and 0.3 here\); use another"
    with pytest.raises(UserError, match=text):
        run_study(read_study(words), Training(), lambda line: None)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], r"--config=configs/ablation.py:reduction is missing"),
        ([f"{RECIPE}:reduction"], r"--workdir=runs/reduction is missing"),
        ([f"{RECIPE}:reductoin", "--workdir=x"], r"unknown axis ablation.py:reductoin; closest: reduction"),
        ([f"{RECIPE}:reduction=4", "--workdir=x"], r"name an axis, such as .*ablation.py:reduction"),
        ([RECIPE, "--workdir=x"], r"name an axis, such as .*ablation.py:reduction"),
        ([f"--config={ROOT}/configs/digits.py:reduction", "--workdir=x"], r"digits.py is no study"),
        ([f"{RECIPE}:reduction", "--workdir=x", "--cells=none,3"], r"the axis reduction has no cell '3'; closest: 32"),
        ([f"{RECIPE}:reduction", "--workdir=x", "--seeds=0"], r"got --seeds=0; give how many \(3\), or different"),
        ([f"{RECIPE}:reduction", "--workdir=x", "--seeds=1,1"], r"got --seeds=1,1; give how many"),
        ([f"{RECIPE}:reduction", "--workdir=x", "--seed=1"], r"unknown argument '--seed=1'"),
        ([f"{RECIPE}:reduction@cifr10", "--workdir=x"], r"there is no recipe .*cifr10.py'; closest: .*cifar10.py"),
        ([f"{RECIPE}:reduction@folder", "--workdir=x"], r"names no network; add one, such as --config.model.name="),
        ([f"{RECIPE}:reduction", "--workdir=x", "--config.optim.rate=1"], r"unknown setting 'optim.rate'"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(words, text, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.search(text, err), err
    assert err.startswith("error: ") and len(err.splitlines()) == 1


def test_help_names_every_axis_and_flag(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in (*AXES, "--seeds=", "--cells=", "--workdir=", "python -m train.ablation"):
        assert word in text


def test_seeds_are_a_number_or_a_list():
    words = [f"{RECIPE}:squeeze", "--workdir", "x", *TINY]
    assert read_study([*words, "--seeds", "2"]).seeds == (0, 1)
    assert read_study([*words, "--seeds=7,"]).seeds == (7,)
    study = read_study([*words, "--seeds=5,3"])
    assert study.seeds == (5, 3)
    config = study.config(study.cells[1], 5)
    assert (config.seed, config.model.attention.squeeze, config.steps) == (5, "max", 2)
    assert flatten(config).keys() == flatten(Config()).keys()


# --- A real run ------------------------------------------------------------------------------------------------------


def test_a_cell_is_really_trained_after_an_interruption(tmp_path, capsys, monkeypatch):
    words = [f"{RECIPE}:attention", f"--workdir={tmp_path}", "--seeds=1", "--cells=none,se", *TINY]
    words.append("--config.model.name=resnet20")
    really, runs = train.ablation._run, []

    def run(config, folder):
        runs.append(config.model.attention.kind)
        if len(runs) == 1:
            result = SimpleNamespace(count=360, top1=90, top5=180, loss=2.0)
            return SimpleNamespace(completed=True, result=result)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return really(config, folder)

    monkeypatch.setattr(train.ablation, "_run", run)
    assert main(words) == 130
    assert "interrupted; run the same command to resume" in capsys.readouterr().err
    assert main(words) == 0
    assert runs == ["none", "se", "se"]
    assert capsys.readouterr().out.strip() == (tmp_path / "table.md").read_text().strip()
    results = {name: json.loads((tmp_path / name / "seed0" / "result.json").read_text()) for name in ("none", "se")}
    # resnet20 with ten classes, and with SE of r = 16 without biases in nine blocks.
    assert results["none"]["params"] == 269_722
    assert results["se"]["params"] == 269_722 + 2 * 3 * (16 * 1 + 32 * 2 + 64 * 4)
    metrics = [json.loads(x) for x in (tmp_path / "se" / "seed0" / "metrics.jsonl").read_text().splitlines()]
    (evaluation,) = (row for row in metrics if "eval_top1_count" in row)
    assert (results["se"]["count"], results["se"]["top1"]) == (360, evaluation["eval_top1_count"])
    assert evaluation["step"] == 2
