"""Documents that are written from recorded results say what the results say."""

import re

import se_flax
from benchmarks import parity, report


def test_the_documents_are_what_the_results_give():
    assert report.DOCUMENT.read_text() == report.document()
    assert parity.TABLE.read_text() == parity.table(parity.results())


def test_every_network_with_a_fixture_is_in_the_parity_table_and_within_its_bounds():
    rows = parity.results()
    fixtures = {path.name.split(".")[0] for path in (parity.compare.HERE / "fixtures").glob("*.json.gz")}
    assert fixtures & set(se_flax.list_models()) == rows.keys()
    for name, row in rows.items():
        assert max(row["logits"], row["features"]) < 1e-4, name
        assert row.get("loss", 0.0) < 1e-5 and row.get("statistics", 0.0) < 1e-4, name
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
