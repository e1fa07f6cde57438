"""Measures the differences between our networks and timm's, and writes the table `docs/parity.md`.

    python -m benchmarks.parity NAME [NAME ...]     # these networks, then the table
    python -m benchmarks.parity --all               # every network with a fixture that has no complete result yet
    python -m benchmarks.parity --all --evaluation  # the same without training steps
    python -m benchmarks.parity                     # only the table, from the results so far

Results are appended to `benchmarks/results/parity.jsonl`, one line per network and run; the table shows the last one.
All numbers are float32 on the CPU against fixtures made with timm 1.0.31 and PyTorch 2.13 on another CPU, from the same
synthetic weights and images (`tests/parity`). Fixtures elsewhere are found with `--fixtures FOLDER`.
"""

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import se_flax

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from parity import compare, synthetic  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "parity.jsonl"
TABLE = ROOT / "docs" / "parity.md"
# A gradient below this share of the norm of all gradients is zero in exact arithmetic (a bias before a batch norm).
# Both networks have only rounding errors there, so it is not compared.
NOISE = 1e-5
HEAD = """# Parity with timm

Differences between each network and timm 1.0.31 (PyTorch 2.13) for the same weights and images, in float32 on a CPU.
Written by `python -m benchmarks.parity`; fixtures and synthetic weights are in `tests/parity`.

- **Logits**: two images in evaluation mode; largest difference over the largest logit.
- **Features**: the same for 64 sampled values of each feature map; the worst map.
- **Loss**: relative difference in one training step of eight images (networks under 30 M parameters).
- **Statistics**: running means and variances after that step, projected on a random vector, over the norm.
- **Gradients**: norm and projection of each parameter's gradient, over its norm; median and worst. Gradients that are
  zero in exact arithmetic (a bias before a batch norm) are left out. With ReLUs, rounding flips the sign of activations
  near zero and with it a gradient path; smooth activations do not jump. **float64** is the worst gradient in float64.
- Every state dict converts to our variables and back bit for bit.

| architecture | parameters | logits | features | loss | statistics | gradients: median | worst | float64 |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
"""


def measure(name: str, step: bool = True) -> dict[str, Any]:
    """Differences of one network from its fixture.

    Args:
      name: a network with a fixture.
      step: compare the training step too, which takes ten times as long.

    Returns:
      The differences by name, the parameter count, the key of the worst gradient and the seconds of the measurement.
    """
    start = time.perf_counter()
    reference = compare.fixture(name)
    variables = compare.check_names(name)
    model, images = se_flax.create_model(name), compare.nhwc(reference["input_shape"])
    logits, maps = compare.compiled(lambda v, x: model.apply(v, x, return_features=True), variables, images)
    expected = np.asarray(reference["logits"])
    result: dict[str, Any] = {
        "name": name,
        "parameters": reference["num_params"],
        "logits": float(np.abs(logits - expected).max() / np.abs(expected).max()),
        "features": max(_feature_error(*pair) for pair in zip(maps, compare.features(name), strict=True)),
    }
    if "train" in reference and step:
        value, grads, stats = compare.train_step(name, variables, np.float32)
        result |= _step_errors(name, reference["train"], value, grads, stats)
        result |= _double_errors(name, variables)
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def _feature_error(given: jax.Array, feature: dict[str, Any]) -> float:
    x = np.asarray(given).transpose(0, 3, 1, 2)
    if list(x.shape) != feature["shape"]:
        raise ValueError(f"a map is {list(x.shape)} instead of {feature['shape']}")
    sample = np.asarray(feature["sample"])
    return float(np.abs(x.ravel()[synthetic.sample_index(x.size)] - sample).max() / np.abs(sample).max())


def _step_errors(name: str, train: dict[str, Any], value: float, grads: Any, stats: Any) -> dict[str, Any]:
    total = np.sqrt(sum(norm**2 for norm, _ in train["grads"].values()))
    errors = compare.gradient_errors(name, grads)
    real = {key: max(pair) for key, pair in errors.items() if train["grads"][key][0] > NOISE * total}
    worst = max(real, key=lambda key: real[key])
    statistics = [
        abs(np.vdot(synthetic.probe(key, stats[key].shape), stats[key]) - projection) / np.linalg.norm(stats[key])
        for key, projection in train["stats"].items()
    ]
    return {
        "loss": abs(value - train["loss"]) / abs(train["loss"]),
        "statistics": float(max(statistics, default=0.0)),
        "gradients_median": float(np.median(list(real.values()))),
        "gradients_worst": float(real[worst]),
        "worst_gradient": worst,
        "zero_gradients": len(errors) - len(real),
    }


def _double_errors(name: str, variables: Any) -> dict[str, float]:
    """Differences of the gradients in float64, if timm's float64 gradients are available."""
    reference = compare.double_reference(name)
    if reference is None:
        return {}
    with compare.double_precision(pytest.MonkeyPatch()):
        _, grads, _ = compare.train_step(name, variables, np.float64)
    total = np.sqrt(sum(norm**2 for norm, _ in reference["grads"].values()))
    errors = compare.gradient_errors(name, grads, reference["grads"])
    return {
        "gradients_double": float(max(max(e) for k, e in errors.items() if reference["grads"][k][0] > NOISE * total))
    }


def _complete(name: str, row: dict[str, Any]) -> bool:
    """Whether a result has all differences that the references allow."""
    step = "loss" in row or "train" not in compare.fixture(name)
    return step and ("gradients_double" in row or compare.double_reference(name) is None)


def results() -> dict[str, dict[str, Any]]:
    """The last result of every network."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The document, with one line per network."""

    def number(row: dict[str, Any], key: str) -> str:
        return f"{row[key]:.1e}" if key in row else ""

    keys = ("logits", "features", "loss", "statistics", "gradients_median", "gradients_worst", "gradients_double")
    lines = [
        f"| `{name}` | {row['parameters']:,} | {' | '.join(number(row, key) for key in keys)} |\n"
        for name, row in sorted(rows.items())
    ]
    return HEAD + "".join(lines)


def main() -> None:
    """Measures the networks of the command line and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="networks to measure")
    parser.add_argument("--all", action="store_true", help="every network with a fixture and without a result")
    parser.add_argument("--evaluation", action="store_true", help="only logits and features, without a training step")
    parser.add_argument("--fixtures", type=Path, help="folder with `fixtures/NAME.json.gz`, instead of tests/parity")
    options = parser.parse_args()
    if options.fixtures:
        compare.HERE = options.fixtures
    names = list(options.names)
    if options.all:
        found = {path.name.split(".")[0] for path in (compare.HERE / "fixtures").glob("*.json.gz")}
        done = {name for name, row in results().items() if options.evaluation or _complete(name, row)}
        missing = (found & set(se_flax.list_models())) - done
        names += sorted(missing, key=lambda name: se_flax.get_variant(name).num_params)
    RESULTS.parent.mkdir(exist_ok=True)
    for name in names:
        row = measure(name, step=not options.evaluation)
        print(json.dumps(row), flush=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        jax.clear_caches()
        gc.collect()
    TABLE.write_text(table(results()))


if __name__ == "__main__":
    main()
