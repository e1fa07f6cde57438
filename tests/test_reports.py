"""Documents that are written from recorded results say what the results say."""

import argparse
import json
import os
import re
import sys

import pytest

import se_flax
from benchmarks import gpu, parity, report, turns


def test_the_documents_are_what_the_results_give():
    assert report.DOCUMENT.read_text() == report.document()
    assert parity.TABLE.read_text() == parity.table(parity.results())


def test_every_network_with_a_fixture_is_in_the_parity_table_and_within_its_bounds():
    rows = parity.results()
    fixtures = {path.name.split(".")[0] for path in (parity.compare.HERE / "fixtures").glob("*.json.gz")}
    assert fixtures & set(se_flax.list_models()) == rows.keys()
    for name, row in rows.items():
        assert max(row["logits"], row["features"]) < 1e-4, name
        tolerance = parity.compare.DEEP.get(name, 1e-5)
        assert row.get("loss", 0.0) < tolerance and row.get("statistics", 0.0) < 1e-4, name
        # Where float32 flips the sign of a ReLU unit, float64 decides.
        assert row.get("gradients_double", row.get("gradients_worst", 0.0)) < 1e-3, name


def test_no_ratio_stands_without_its_command():
    lines = [*report.rows("aot"), *report.rows("cpu"), *report.rows("loader"), *report.rows("limits")]
    for line in lines:
        assert line["command"].startswith("python -m ") and re.fullmatch(r"\d{4}-\d\d-\d\d", line["date"])


def test_seresnet50_costs_at_most_a_hundredth_over_resnet50_on_record():
    lines = [line for line in report.rows("aot") if "ratios" in line and line["model"] == "seresnet50"]
    assert [line for line in lines if not line.get("lean")][-1]["ratios"]["bytes_accessed"] <= 1.01


def test_lean_resnet50_costs_a_tenth_less_than_the_plain_one_on_record():
    (plain,) = (line for line in report.rows("aot") if line["model"] == "plain_resnet50")
    lean = [line for line in report.rows("aot") if line["model"] == "seresnet50" and line.get("lean")][-1]
    for costs, memory in ((lean["without_attention"], 0.8), (lean, 0.81)):
        assert costs["peak_memory_bytes"] <= memory * plain["peak_memory_bytes"]
    assert lean["without_attention"]["bytes_accessed"] <= 0.9 * plain["bytes_accessed"]
    assert lean["bytes_accessed"] < 0.93 * plain["bytes_accessed"]


def test_a_gpus_rows_become_a_table():
    line = {
        "command": "python -m benchmarks.gpu",
        "date": "2026-01-02",
        "model": "seresnet50",
        "task": "train",
        "batch": 128,
        "image_size": 224,
        "milliseconds": {"ours": 50.5, "ours without": 48.25, "timm compile": 60.0},
        "ratio": 1.188,
        "attention_ratio": 1.047,
        "versions": {"jax": "0.10.2", "device": "a GPU"},
    }
    broken = {key: value for key, value in line.items() if key not in ("ratio", "attention_ratio")}
    assert report.gpu_table([]) == report.gpu_table([{**broken, "milliseconds": {"timm compile": 60.0}}]) == ""
    table = report.gpu_table([{**line, "ratio": 9.0}, line])
    assert "| seresnet50 | train, 128 | 224 | 50.5 | 60 | 1.19 | 48.25 | 1.05 |" in table and "9.00" not in table
    assert table.endswith("\n2026-01-02, jax 0.10.2, device a GPU:\n\n- `python -m benchmarks.gpu`\n")


def test_a_gpus_table_is_refused_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu", "--models", "seresnet18"])
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")

    def backend():
        # Whoever looks for a GPU takes most of its memory by default, and leaves the sides none.
        assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
        return "cpu"

    monkeypatch.setattr("jax.default_backend", backend)
    with pytest.raises(SystemExit):
        gpu.main()
    assert "JAX computes on the CPU here, and the table is a GPU's; install JAX for it" in capsys.readouterr().err


def test_sides_take_turns_and_one_that_breaks_is_left_out(capfd):
    side = 'import sys; print(\'{{"name": "{0}"}}\', flush=True); [print({1}, flush=True) for _ in sys.stdin]'
    commands = {
        "slow": [sys.executable, "-c", side.format("slow", 3.0)],
        "broken": [sys.executable, "-c", "raise SystemExit(2)"],
        "fast": [sys.executable, "-c", side.format("fast", 1.5)],
    }
    seconds, about = turns.take_turns("a test", commands, {}, 3)
    assert seconds == {"slow": [3.0] * 3, "fast": [1.5] * 3} and about == {"name": "fast"}
    assert turns.turn_ratio(seconds["slow"], seconds["fast"]) == 2.0
    assert "a test: broken broke" in capfd.readouterr().err


@pytest.mark.parametrize("words", ["train", "infer:", "infer:0", "evaluate:16", "train:-1"])
def test_a_task_that_is_none_is_refused(words):
    assert turns.task("train:16") == ("train", 16)
    with pytest.raises(argparse.ArgumentTypeError, match=f"got the task '{words}'; give infer:N or train:N, N images"):
        turns.task(words)


def test_rows_are_recorded_unless_it_is_a_trial(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["turns", "--models", "a"])
    row = {"model": "a", "milliseconds": {"ours": 2.0, "theirs": 3.0}, "fastest_other": "theirs", "ratio": 1.5}
    path = tmp_path / "rows.jsonl"
    for dry_run in (True, False):
        turns.record_rows("benchmarks.x", path, ["a"], [("infer", 4)], lambda *_: row, dry_run=dry_run)
        assert path.exists() is not dry_run
    (line,) = (json.loads(text) for text in path.read_text().splitlines())
    assert line["command"] == "python -m benchmarks.x --models a" and row.items() <= line.items() and line["machine"]
    assert "ours 2.0 ms, theirs 3.0 ms, fastest other theirs, ratio 1.5" in capsys.readouterr().out
