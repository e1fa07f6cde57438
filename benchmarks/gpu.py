"""Compares the speed of networks on a GPU with timm through `torch.compile`, and with the same networks without SE.

    python -m benchmarks.gpu --torch-python A/bin/python                      # the table
    python -m benchmarks.gpu --torch-python A/bin/python --models seresnet50 --tasks train:128

Needs JAX for the GPU in this environment (`pip install 'se-flax[cuda]'`), and in the other PyTorch for the GPU and
timm. Bfloat16, at each network's own image size; timm in channels-last memory. Parameters are float32 in training and
bfloat16 at inference, in both libraries; ours at inference is `se_flax.fuse`d. Each runs in its own process; the
processes take turns of half a second, as in `benchmarks.cpu`. A ratio is the median over the turns of timm's time over
ours: above 1 we are faster. `attention_ratio` is our time over ours without attention: 1 means that attention is free.

- `infer:N`: logits of N images.
- `train:N`: one update with N images by SGD with momentum.

Every row is appended as one line to `benchmarks/results/gpu.jsonl` with the command, the date, the machine and the
versions.
"""

import argparse
import os
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax

import se_flax
from benchmarks.turns import record_rows, take_turns, task, turn_ratio

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu.jsonl"
MODELS = ("seresnet50", "efficientnet_b0", "efficientnet_b4", "mobilenetv3_large_100")
TASKS = (("infer", 256), ("train", 128))


def commands(model: str, task: str, batch: int, side: int, torch_python: str | None) -> dict[str, list[str]]:
    """The commands that start the processes of one row."""
    words = [model, task, str(batch), str(side)]
    ours = [sys.executable, "-m", "benchmarks.sides.ours", *words, "bfloat16"]
    found = {"ours": ours, "ours without": [*ours, "without"]}
    if torch_python:
        script = str(ROOT / "benchmarks" / "sides" / "timm_side.py")
        found["timm compile"] = [torch_python, script, *words, "compile", "bfloat16"]
    return found


def measure(model: str, task: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table.

    Returns:
      `milliseconds` by process, `ratio` to timm, `attention_ratio` to the network without attention, the versions.
    """
    side = options.image_size or se_flax.get_variant(model).input_size
    found = commands(model, task, batch, side, options.torch_python)
    count = max(options.repetitions, 3)
    seconds, versions = take_turns(f"{model} {task}:{batch}", found, {"PYTHONPATH": str(ROOT)}, count)
    row: dict[str, Any] = {
        "model": model,
        "task": task,
        "batch": batch,
        "image_size": side,
        "repetitions": count,
        "milliseconds": {name: round(1000 * statistics.median(turns), 2) for name, turns in seconds.items()},
    }
    if {"ours", "ours without"} <= seconds.keys():
        row["attention_ratio"] = turn_ratio(seconds["ours"], seconds["ours without"])
    if {"ours", "timm compile"} <= seconds.keys():
        row["ratio"] = turn_ratio(seconds["timm compile"], seconds["ours"])
    return row | {"versions": versions}


def main() -> int:
    """Measures and records the rows of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="interpreter with torch and timm; without it, timm is left out")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help=f"networks ({' '.join(MODELS)})")
    parser.add_argument("--tasks", nargs="+", type=task, default=TASKS, help="tasks (infer:256 train:128)")
    parser.add_argument("--image-size", type=int, help="image size in pixels (each network's own)")
    parser.add_argument("--repetitions", type=int, default=15, help="turns of every process (15)")
    parser.add_argument("--dry-run", action="store_true", help="record nothing; the only way without a GPU")
    options = parser.parse_args()
    # This process and those that it starts share the GPU's memory, of which JAX would preallocate three quarters.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if jax.default_backend() != "gpu" and not options.dry_run:
        parser.error(
            f"JAX computes on the {jax.default_backend().upper()} here, and the table is a GPU's; install JAX for it "
            "(pip install 'se-flax[cuda]'), or give --dry-run to try the command"
        )
    measured = partial(measure, options=options)
    record_rows("benchmarks.gpu", RESULTS, options.models, options.tasks, measured, dry_run=options.dry_run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
