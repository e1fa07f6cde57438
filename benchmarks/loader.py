"""Compares the input pipeline, in JPEG files per second and core, with timm's loader and tf.data.

    python -m benchmarks.loader --data FOLDER --torch-python A/bin/python --tf-python B/bin/python
    python -m benchmarks.loader --data FOLDER --decoders [--size 64]    # compares decoders and resizers

FOLDER is searched for .jpg and .jpeg files at any depth. All libraries read the same files and make the same kind of
batch: random resized crop (area 0.08 to 1, aspect ratio 3/4 to 4/3, bilinear), flip, normalised float32. Rows:

- `plain`: without RandAugment.
- `randaugment`: with RandAugment (2 operations, magnitude 9), all on this CPU.
- `host`: the host's part of our training in both cases, uint8; the accelerator does the rest.
- `equal work`: tf.data with torchvision's crops and an antialiased resize, as timm and we have. As tf.data is usually
  written (`plain`), its crops are smaller on average and its resize is not antialiased.

Ours is the training program's stream (`train.data.loader`) and the operations of its step before the network: flip,
RandAugment, normalisation, compiled for the CPU. timm's is `timm.data.create_loader` (Pillow, torchvision), tf.data's
the chain of `decode_and_crop_jpeg`, `resize` and, for RandAugment, Keras. The code is in `loader_sides.py`.

Each library runs in its own process and environment, pinned to one core with one thread. The processes take turns,
round by round, so that other load of the machine affects all of them. A figure is the median over the rounds of images
per second of *processor time*, which for one busy core is images per second; reading ahead after a round counts. `busy`
is processor time over wall time within the round. A ratio is the median of the rounds' ratios, above 1 if we are
faster. The result is appended as one line to `benchmarks/results/loader.jsonl`.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import command_line, describe, record
from benchmarks.worker import Worker
from se_flax.images.class_folders import pictures_below

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "loader.jsonl"
ENVIRONMENT = {  # of the processes
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "OMP_NUM_THREADS": "1",
}
# Name, our row, the others' row. With an accelerator the host's work is the same with and without RandAugment.
RATIOS = (
    ("plain", "plain", "plain"),
    ("plain to equal work", "plain", "equal work"),
    ("randaugment", "randaugment", "randaugment"),
    ("host to plain", "host", "plain"),
    ("host to randaugment", "host", "randaugment"),
)

Round = dict[str, float]  # "cpu": seconds; "busy"


def images_below(folder: Path) -> list[str]:
    """The JPEG files of a folder, sorted."""
    return [str(folder / path) for path in pictures_below(folder) if path.lower().endswith((".jpg", ".jpeg"))]


def start(name: str, python: str, files: list[str], options: argparse.Namespace) -> Worker:
    """Starts the process of a library; its `about` will have `rows` and `versions`."""
    task = {"side": name, "batch": options.batch, "batches": options.batches, "size": options.size}
    script = str(ROOT / "benchmarks" / "loader_sides.py")
    worker = Worker([python, script, json.dumps(task)], ENVIRONMENT, quiet=not options.verbose)
    worker.send(files)
    return worker


def figures_of(rounds: list[Round], images: int) -> dict[str, float]:
    """Medians over the rounds, for one row of one library."""
    return {
        "images_per_second_per_core": round(statistics.median(images / each["cpu"] for each in rounds), 1),
        "busy": round(statistics.median(each["busy"] for each in rounds), 3),
    }


def ratio_of(mine: list[Round], theirs: list[Round]) -> float:
    """Median over the rounds of their time over mine."""
    return round(statistics.median(b["cpu"] / a["cpu"] for a, b in zip(mine, theirs, strict=True)), 3)


def compare(sides: dict[str, Worker], options: argparse.Namespace) -> dict[str, Any]:
    """Times the libraries in turns.

    Returns:
      `figures[side][row]` and `ratios[row][side]`, with a library as side.
    """
    known = dict.fromkeys(row for side in sides.values() for row in side.about["rows"])
    rows = [row for row in known if row in (options.rows or known)]
    rounds: dict[tuple[str, str], list[Round]] = {}
    for _ in range(options.rounds):
        for row in rows:
            for name, side in sides.items():
                if row in side.about["rows"]:
                    rounds.setdefault((name, row), []).append(side.ask(row))
    figures: dict[str, Any] = {name: {} for name in sides}
    for (name, row), measured in rounds.items():
        figures[name][row] = figures_of(measured, options.batch * options.batches)
    ratios: dict[str, Any] = {}
    for title, row, others in RATIOS:
        mine = rounds.get(("ours", row))
        theirs = {name: rounds.get((name, others)) for name in sides if name != "ours"}
        found = {name: ratio_of(mine, there) for name, there in theirs.items() if mine and there}
        ratios |= {title: found} if found else {}
    return {"figures": figures, "ratios": ratios}


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = []
    for side, rows in result["figures"].items():
        for row, figures in rows.items():
            speed, busy = figures["images_per_second_per_core"], figures["busy"]
            lines.append(f"{side:9} {row:28} {speed:8.1f} images/s per core   busy {busy:.2f}")
    for row, ratios in result["ratios"].items():
        lines.append(f"ratio     {row:28} " + ", ".join(f"{value:.2f} x {side}" for side, value in ratios.items()))
    return "\n".join(lines)


def main() -> int:
    """Measures and records the rows of the command line; returns 1 if a requested library failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with JPEG files")
    parser.add_argument(
        "--torch-python", help="interpreter with torch, torchvision and timm; without it, timm is left out"
    )
    parser.add_argument("--tf-python", help="interpreter with tensorflow; without it, tf.data is left out")
    parser.add_argument("--decoders", action="store_true", help="compare decoders in our pipeline instead")
    parser.add_argument("--size", type=int, default=224, help="size of the crops in pixels (224)")
    parser.add_argument("--batch", type=int, default=50, help="images per batch (50)")
    parser.add_argument("--batches", type=int, default=3, help="batches per round (3)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds (9)")
    parser.add_argument("--rows", nargs="+", help="only these rows")
    parser.add_argument("--json", action="store_true", help="print the recorded figures instead of a table")
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    parser.add_argument("--verbose", action="store_true", help="show the output of the processes")
    options = parser.parse_args()
    files = images_below(options.data)
    if len(files) < options.batch:
        parser.error(f"{len(files)} JPEG files in {options.data}, fewer than --batch={options.batch}")

    pythons = {"ours": sys.executable, "timm": options.torch_python, "tf.data": options.tf_python}
    if options.decoders:
        pythons = {"decoders": sys.executable}
    sides, broken = {}, []
    for name, python in pythons.items():
        if not python:
            print(f"{name}: skipped, no interpreter given", file=sys.stderr)
            continue
        side = start(name, python, files, options)
        if side.wait():
            sides[name] = side
        else:
            print(f"{name}: broke; --verbose shows why", file=sys.stderr)
            broken.append(name)
    result = compare(sides, options)
    for side in sides.values():
        side.close()
    row = {
        "machine": describe(),
        "versions": {name: side.about["versions"] for name, side in sides.items()},
        "data": {"files": len(files), "bytes_per_file": sum(os.path.getsize(file) for file in files) // len(files)},
        "size": options.size,
        "rounds": options.rounds,
        "images_per_round": options.batch * options.batches,
        **result,
    }
    if not options.dry_run and not broken:
        record(RESULTS, command_line("benchmarks.loader"), row)
    print(json.dumps(row) if options.json else table(result))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
