"""Compares the speed of networks on a CPU with timm on PyTorch, and with the nearest JAX networks.

    python -m benchmarks.cpu --torch-python A/bin/python                      # the table, about half an hour
    python -m benchmarks.cpu --torch-python A/bin/python --models seresnet50 --tasks train:16
    python -m benchmarks.cpu --keras-python B/bin/python --models peers       # Flax's example network, Keras on JAX

Float32, all cores. Every library runs in its own process and environment; the processes take turns of half a second, so
that other load of the machine affects all of them. The figure of a turn is its mean time per call, that of a library
the median over its turns; a ratio is the median over the turns of the other library's time over ours: above 1 we are
faster. timm runs eagerly, eagerly in channels-last memory and through `torch.compile`; the fastest of these counts.

- `infer:N`: logits of N images; ours with `se_flax.fuse`, and without it (`plain`). With `--onednn` also fused and with
  oneDNN's matrix products (`benchmarks/sides/ours.py` has the compiler's options).
- `train:N`: one update with N images by SGD with momentum.

All processes keep freed memory, by glibc's settings in their environment: `se_flax.runtime.keep_memory` does the same
in `python -m train`, and PyTorch gains from it as JAX does. Every row is appended as one line to
`benchmarks/results/cpu.jsonl` with the command, the date, the machine and the versions.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.turns import record_rows, take_turns, task, turn_ratio

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu.jsonl"
MODELS = ("seresnet50", "efficientnet_b0", "seresnext50_32x4d", "mobilenetv3_large_100")
TASKS = (("infer", 1), ("infer", 16), ("train", 16))
TIMM_MODES = ("eager", "channels_last", "compile")
# Our network, and the library of the other JAX network.
PEERS = {"resnet50": "flax", "efficientnet_b0": "keras"}


def commands(model: str, task: str, batch: int, options: argparse.Namespace) -> dict[str, list[str]]:
    """The commands that start the processes of one row."""
    words = [model, task, str(batch), str(options.image_size)]
    ours = [sys.executable, "-m", "benchmarks.sides.ours", *words]
    found = {"ours": ours}
    if task == "infer":
        found["ours plain"] = [*ours, "plain"]
        if options.onednn:
            found["ours onednn"] = [*ours, "onednn"]
    if options.torch_python and not options.peers:
        script = str(ROOT / "benchmarks" / "sides" / "timm_side.py")
        found |= {f"timm {mode}": [options.torch_python, script, *words, mode] for mode in options.modes}
    if options.peers:
        python = options.keras_python if PEERS[model] == "keras" else sys.executable
        if python:
            found[PEERS[model]] = [python, "-m", "benchmarks.sides.peers", PEERS[model], *words]
    return found


def measure(model: str, task: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table.

    Returns:
      `milliseconds` by process, `ratio` to the fastest other library, its name, the versions.
    """
    settings = {"JAX_PLATFORMS": "cpu", "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0", "KERAS_BACKEND": "jax"}
    environment = {**settings, "PYTHONPATH": str(ROOT)}
    count = max(options.repetitions or (5 if task == "train" else 15), 3)
    seconds, versions = take_turns(f"{model} {task}:{batch}", commands(model, task, batch, options), environment, count)
    medians = {name: statistics.median(turns) for name, turns in seconds.items()}
    others = [name for name in seconds if not name.startswith("ours")]
    row: dict[str, Any] = {
        "model": model,
        "task": task,
        "batch": batch,
        "image_size": options.image_size,
        "repetitions": count,
        "milliseconds": {name: round(1000 * value, 1) for name, value in medians.items()},
    }
    if others:
        fastest = min(others, key=lambda name: medians[name])
        row |= {"fastest_other": fastest, "ratio": turn_ratio(seconds[fastest], seconds["ours"])}
    if "ours onednn" in seconds:
        row["onednn_ratio"] = turn_ratio(seconds["ours"], seconds["ours onednn"])
    return row | {"versions": versions}


def main() -> int:
    """Measures and records the rows of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="interpreter with torch and timm; without it, timm is left out")
    parser.add_argument("--keras-python", help="interpreter with keras and jax, for --models peers")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help=f"networks ({' '.join(MODELS)}), or peers")
    parser.add_argument("--tasks", nargs="+", type=task, default=TASKS, help="tasks (infer:1 infer:16 train:16)")
    parser.add_argument("--modes", nargs="+", default=list(TIMM_MODES), choices=TIMM_MODES, help="modes of timm")
    parser.add_argument("--onednn", action="store_true", help="also time inference with oneDNN's matrix products")
    parser.add_argument("--image-size", type=int, default=224, help="image size in pixels (224)")
    parser.add_argument("--repetitions", type=int, help="turns of every process (15; training 5)")
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    options = parser.parse_args()
    options.peers = options.models == ["peers"]
    models = PEERS if options.peers else options.models
    measured = partial(measure, options=options)
    record_rows("benchmarks.cpu", RESULTS, models, options.tasks, measured, dry_run=options.dry_run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
