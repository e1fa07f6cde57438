"""CPU time of a network, compared with the sum of its convolutions timed separately.

    python -m benchmarks.limits                                         # SE-ResNet-50 and EfficientNet-B0
    python -m benchmarks.limits --models seresnet50 --tasks infer:16

Every convolution of the network is compiled and timed separately (for training with both gradients), and so are the
whole network and a product of two square matrices, for the processor's peak rate. The rest of the network's time is
norms, activations, attention, sums and the optimizer. Float32, all cores; medians over rounds, each of which times
everything once. Every row is one line of `benchmarks/results/limits.jsonl`.
"""

import argparse
import collections
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import se_flax
from benchmarks.convolution import tasks
from benchmarks.machine import command_line, describe, record
from benchmarks.sides.ours import inference, train_step
from benchmarks.turns import task
from se_flax.lowering.convolution import convolve
from se_flax.nn.conv import Conv
from se_flax.runtime import keep_memory

TASKS = (("infer", 16), ("train", 16))
RESULTS = Path(__file__).resolve().parent / "results" / "limits.jsonl"
SIDE = 224
# Size of the square matrices whose product gives the processor's peak rate.
MATRIX = 2048

# Shape of the input, of the kernel, stride, padding, groups.
Shape = tuple[tuple[int, ...], tuple[int, ...], int, tuple[tuple[int, int], ...], int]


def convolutions(model: nn.Module, batch: int) -> collections.Counter[Shape]:
    """The shapes of a network's convolutions, with their counts."""
    found: collections.Counter[Shape] = collections.Counter()

    def note(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        conv = context.module
        if isinstance(conv, Conv) and args[0].shape[1] > 1:
            size = (conv.kernel_size,) * 2 if isinstance(conv.kernel_size, int) else conv.kernel_size
            x = (batch, *args[0].shape[1:])
            if conv.padding == "symmetric":
                pads = tuple(((k - 1) // 2,) * 2 for k in size)
            else:
                given = conv.padding
                pads = tuple(
                    jax.lax.padtype_to_pads(x[1:3], size, (conv.strides,) * 2, given) if given == "SAME" else given
                )
            found[x, (*size, x[-1] // conv.groups, conv.features), conv.strides, pads, conv.groups] += 1
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)))
    return found


def kind(shape: Shape) -> str:
    """Name of a kind of convolution in the table."""
    x, kernel, _, _, groups = shape
    if x[-1] == 3:
        return "first"
    if groups > 1:
        return "depthwise" if groups == x[-1] else "grouped"
    return f"{kernel[0]}x{kernel[1]}"


def calls(shape: Shape, task: str) -> tuple[list[Callable[[], Any]], float]:
    """The compiled calls of one convolution, and their total multiply-adds."""
    x_shape, kernel_shape, stride, pads, groups = shape
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in (x_shape, kernel_shape))
    compiled = tasks(convolve, (stride, stride), pads, (1, 1), groups)
    y = compiled["forward"](x, kernel, None)
    # The images need no gradient.
    wanted = ["forward"] if task == "infer" else ["forward", "kernel", *(["input"] if x_shape[-1] > 3 else [])]

    def of(name: str) -> Callable[[], Any]:
        return lambda: compiled[name](x, kernel, y)

    return [of(name) for name in wanted], y.size * math.prod(kernel_shape[:3]) * len(wanted)


def seconds(call: Callable[[], Any]) -> float:
    """Mean seconds per call, over a tenth of a second of calls and at least two, after one call that is not timed.

    The untimed call refills caches and pages that the calls before it have evicted.
    """
    jax.block_until_ready(call())
    begun, count = time.perf_counter(), 0
    while count < 2 or time.perf_counter() - begun < 0.1:
        jax.block_until_ready(call())
        count += 1
    return (time.perf_counter() - begun) / count


def measure(name: str, task: str, batch: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a network and of its convolutions, by kind."""
    model = se_flax.create_model(name)
    shapes = convolutions(model, batch)
    whole = inference(model, batch, SIDE, set()) if task == "infer" else train_step(model, batch, SIDE)
    matrix = jnp.ones((MATRIX, MATRIX))
    product = jax.jit(jnp.matmul)
    parts = {shape: calls(shape, task) for shape in shapes}
    times: dict[Any, list[float]] = collections.defaultdict(list)
    # The first round warms up.
    for turn in range(rounds + 1):
        for key, call in [("whole", whole), ("product", lambda: product(matrix, matrix))]:
            times[key].append(seconds(call))
        for shape, (pieces, _) in parts.items():
            times[shape].append(sum(seconds(piece) for piece in pieces))
        print(f"\r{name} {task}:{batch} round {turn} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    medians = {key: statistics.median(values[1:]) for key, values in times.items()}
    kinds: dict[str, dict[str, float]] = {}
    for shape, count in shapes.items():
        entry = kinds.setdefault(kind(shape), {"ms": 0.0, "gflop": 0.0})
        entry["ms"] += 1000 * count * medians[shape]
        entry["gflop"] += 2e-9 * count * parts[shape][1]
    return {
        "model": name,
        "task": task,
        "batch": batch,
        "whole_ms": round(1000 * medians["whole"], 1),
        "convolutions": {key: {k: round(v, 2) for k, v in entry.items()} for key, entry in sorted(kinds.items())},
        "product_gflops": round(2e-9 * MATRIX**3 / medians["product"], 1),
    }


def main() -> int:
    """Measures and records every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["seresnet50", "efficientnet_b0"], help="networks")
    parser.add_argument("--tasks", nargs="+", type=task, default=TASKS, help="tasks (infer:16 train:16)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds for the medians (3)")
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    keep_memory()
    for name in options.models:
        for kind, batch in options.tasks:
            row = measure(name, kind, batch, options.rounds)
            print(json.dumps(row), flush=True)
            if not options.dry_run:
                about = {"jax": jax.__version__, "machine": describe()}
                record(RESULTS, command_line("benchmarks.limits"), row | about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
