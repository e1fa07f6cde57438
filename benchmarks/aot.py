"""Compiles training steps for absent TPUs and records their costs.

    python -m benchmarks.aot attention      # networks with and without their attention, v5e:2x2
    python -m benchmarks.aot scaling        # one network from v5e:2x2 to v5e:16x16, with a fixed batch per device
    python -m benchmarks.aot plain          # ResNet-50 of Flax's example, for comparison
    python -m benchmarks.aot --model=... --topology=...     # any other command line of train.aot

Needs libtpu (`pip install 'se-flax[tpu]'`) and no TPU. Every result is one line of `benchmarks/results/aot.jsonl`, with
the command, the date and the versions; all figures but the compile time are the same on every run. The compilations run
one after the other, each in its own process; a result is written when its compilation ends.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from benchmarks.machine import record

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "aot.jsonl"

TABLES = {
    "attention": [
        [f"--model={name}", "--topology=v5e:2x2", "--batch-per-device=128", "--image-size=224", "--compare"]
        for name in ("seresnet50", "seresnext50_32x4d", "legacy_senet154", "efficientnet_b0", "mobilenetv3_large_100")
    ],
    # ResNet-18 compiles in a fraction of ResNet-50's time; the topology has the same effect on both.
    "scaling": [
        ["--model=seresnet18", f"--topology=v5e:{layout}", "--batch-per-device=128", "--image-size=224"]
        for layout in ("2x2", "4x4", "8x8", "16x16")
    ],
}


def record_command(words: list[str]) -> bool:
    """Compiles one step and appends its result.

    Args:
      words: command line of `train.aot`, without `--json`.

    Returns:
      Whether it succeeded; errors are on standard error.
    """
    command = ["python", "-m", "train.aot", *words, "--json"]
    print(shlex.join(command), flush=True)
    done = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return False
    record(RESULTS, shlex.join(command), json.loads(done.stdout))
    return True


def record_plain() -> bool:
    """Compiles `benchmarks.plain_resnet` with the step of `train.aot` and appends its result."""
    import dataclasses

    from benchmarks.plain_resnet import PlainResNet50
    from train import aot
    from train.tools.topology import find_topology

    topology = find_topology("v5e:2x2")
    config = aot.with_batch(aot.settings_for_model("resnet50", 224), 128, len(topology.devices))
    costs, _ = aot.compile_run(config, topology, model=PlainResNet50())
    row = {
        "model": "plain_resnet50",
        "attention": False,
        **aot.circumstances(config, topology, 128),
        **dataclasses.asdict(costs),
        "versions": aot.versions(),
    }
    record(RESULTS, "python -m benchmarks.aot plain", row)
    return True


def main() -> int:
    """Runs the table or the single command of the command line; returns 1 if anything failed."""
    words = sys.argv[1:]
    if words == ["plain"]:
        return 0 if record_plain() else 1
    known = len(words) == 1 and words[0] in TABLES
    if not words or (not known and not all(word.startswith("--") for word in words)) or "--help" in words:
        print(__doc__)
        return 2
    worked = [record_command(line) for line in (TABLES[words[0]] if known else [words])]
    return 0 if all(worked) else 1


if __name__ == "__main__":
    sys.exit(main())
