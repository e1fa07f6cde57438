"""Times convolutions on a CPU, ours (`se_flax.lowering.cpu`) and XLA's, and records them.

    python -m benchmarks.convolution              # all shapes, a few minutes
    python -m benchmarks.convolution --batch 1 --dry-run

Float32. The forward pass, the input gradient and the kernel gradient are compiled separately, and the two
implementations are timed in turns. A ratio is the median over the turns of XLA's time over ours. Every shape is one
line of `benchmarks/results/convolution.jsonl`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import command_line, describe, record
from se_flax.lowering.convolution import convolve
from se_flax.lowering.xla import xla_convolution
from se_flax.runtime import keep_memory

RESULTS = Path(__file__).resolve().parent / "results" / "convolution.jsonl"
# Map size, input and output channels, kernel size, stride, groups: layers of the networks in `benchmarks.cpu`.
SHAPES = (
    (224, 3, 64, 7, 2, 1),
    (56, 64, 64, 3, 1, 1),
    (14, 256, 256, 3, 1, 1),
    (7, 512, 512, 3, 1, 1),
    (56, 256, 512, 1, 2, 1),
    (56, 64, 256, 1, 1, 1),
    (14, 1024, 256, 1, 1, 1),
    (56, 128, 128, 3, 1, 32),
    (56, 256, 256, 3, 2, 32),
    (14, 512, 512, 3, 1, 32),
    (112, 32, 32, 3, 1, 32),
    (28, 240, 240, 5, 1, 240),
    (56, 144, 144, 5, 2, 144),
)


def tasks(convolution: Callable[..., Any], *arguments: Any) -> dict[str, Callable[[Any, Any, Any], Any]]:
    """The compiled forward pass and gradients of a convolution."""

    def of(x: Any, kernel: Any) -> Any:
        return convolution(x, kernel, *arguments)

    return {
        "forward": jax.jit(lambda x, k, dy: of(x, k)),
        "input": jax.jit(lambda x, k, dy: jax.vjp(lambda x: of(x, k), x)[1](dy)),
        "kernel": jax.jit(lambda x, k, dy: jax.vjp(lambda k: of(x, k), k)[1](dy)),
    }


def measure(batch: int, shape: tuple[int, ...], turns: int) -> dict[str, Any]:
    """Milliseconds and ratios of one shape."""
    side, channels, features, size, stride, groups = shape
    pad = (size - 1) // 2
    arguments = ((stride, stride), ((pad, pad), (pad, pad)), (1, 1), groups)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch, side, side, channels)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((size, size, channels // groups, features)), jnp.float32)
    sides = {"ours": tasks(convolve, *arguments), "xla": tasks(xla_convolution, *arguments)}
    dy = jnp.ones_like(sides["ours"]["forward"](x, kernel, None))
    row: dict[str, Any] = {"batch": batch, "shape": list(shape)}
    for task in ("forward", "input", "kernel"):
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(turns + 2):
            for name, compiled in sides.items():
                begun = time.perf_counter()
                jax.block_until_ready(compiled[task](x, kernel, dy))
                if turn > 1:
                    seconds[name].append(time.perf_counter() - begun)
        pairs = zip(seconds["xla"], seconds["ours"], strict=True)
        row[task] = {name: round(1000 * statistics.median(values), 2) for name, values in seconds.items()}
        row[task]["ratio"] = round(statistics.median(a / b for a, b in pairs), 2)
    return row


def main() -> int:
    """Measures every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="batch size (16)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each implementation (5)")
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    keep_memory()
    for shape in SHAPES:
        row = measure(options.batch, shape, options.turns)
        figures = "   ".join(
            f"{task} {row[task]['ours']:7.2f} / {row[task]['xla']:7.2f} ms {row[task]['ratio']:6.2f}"
            for task in ("forward", "input", "kernel")
        )
        print(f"{'x'.join(map(str, shape)):24} {figures}", flush=True)
        if not options.dry_run:
            about = {"jax": jax.__version__, "machine": describe()}
            record(RESULTS, command_line("benchmarks.convolution"), row | about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
