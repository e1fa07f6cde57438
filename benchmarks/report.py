"""Writes docs/performance.md and its plot from the results in `benchmarks/results`; nothing is measured here.

python -m benchmarks.report            # write
python -m benchmarks.report --check    # exit code 1 if the document differs
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.sides import ours

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "scaling.png"

Row = dict[str, Any]

HEAD = """# Performance

Compare time and memory with and without squeeze-and-excitation, and of se-flax with timm, Flax and Keras.

Every table has the command that measured it. Results are in `benchmarks/results`; `python -m benchmarks.report` writes
this page from them. Competitors are timed alternately in one run; compare ratios rather than times.
"""
ATTENTION = """
## Cost of squeeze-and-excitation on a TPU

The training step, compiled for TPU v5e without the hardware (`python -m train.aot`): bfloat16, SGD with momentum. Bytes
and memory are the compiler's figures for one device. Without attention: the same network with the attention removed.

| network | images per device | GiB accessed | without attention | ratio | peak memory, ratio | measured |
|---|---:|---:|---:|---:|---:|---|
"""
ATTENTION_NOTE = """
**Norm and gate in one pass.** Where a batch norm directly feeds the squeeze, the squeeze is the norm's per-image mean,
and the gate is part of the norm's affine map. As separate layers (first row), SE-ResNet-50's step accesses 1.1154 times
the bytes of ResNet-50's. The remainder above 1 comes from the attention's parameters, their momentum and all-reduce,
and the per-image means.

**Activation before the squeeze** (EfficientNet, MobileNetV3): the activation needs the statistics of the whole batch
first, so the feature map is read once more. `se_flax/lowering/gated_norm.py` adds only this read in the forward pass
and none in the backward pass.

**Lean** (`--config.lean=True`, `train.aot --lean`): the output of a bottleneck's last convolution, the widest feature
map, is neither written nor kept; norm and convolution are computed from its input, a quarter as wide
(`se_flax/lowering/deferred_conv.py`). Only the gate's gradient recomputes it, which raises the ratio, while both
networks access fewer bytes and take a fifth less memory. It costs 4 % more flops in ResNet-50 and 11 % in SE-ResNet-50.
It is off by default, since it has not been timed on a TPU.

SE-ResNet-50's peak memory is 74 MB above ResNet-50's: 20 MB parameters and momentum of the attention, 22 MB per-image
statistics (three float32 numbers per channel) for the backward pass, 11 MB code, 11 MB heap fragmentation, 11 MB other
temporaries. Source: `buffer-assignment` and `live-range` in FOLDER, with and without `--without-attention`:

    XLA_FLAGS="--xla_dump_to=FOLDER --xla_dump_hlo_as_text" python -m train.aot \\
        --model=seresnet50 --topology=v5e:2x2 \\
        --batch-per-device=128 --image-size=224 --json
"""
PLAIN = """
Compared with a ResNet-50 of Linen's layers, as in Flax's example (`benchmarks/plain_resnet.py`), compiled alike:

"""
# Suffix of the network's name in a row, and the key `lean` of its result.
FORMS = {"": False, ", lean": True}
SCALING = """
## Scaling over chips

Figures per device, with a fixed batch per device. They do not grow with the number of chips: batch norms use their own
replica's images, and the only communication is the all-reduce of the gradients.

| topology | chips | GFLOP | GiB accessed | peak memory, GiB | all-reduce, MB |
|---|---:|---:|---:|---:|---:|
"""
CPU = """
## CPU

Milliseconds, float32, 224 pixels, all cores (`python -m benchmarks.cpu`). Times are medians over rounds; the ratio is
the median of the competitor's time over ours in the same round, so above 1 we are faster. timm is the fastest of its
eager, channels-last and compiled modes. Our inference uses `se_flax.fuse`; in brackets the time without it.

| network | task, images | se-flax | competitor | ratio |
|---|---|---:|---:|---:|
"""
CPU_NOTE = """
Convolutions on a CPU have their own implementations (`se_flax/lowering/cpu`); TPU and GPU use XLA's.
`se_flax.runtime.keep_memory()`, called before JAX is used, keeps freed memory in the process, as `python -m train` and
`se-flax predict` do; by default glibc returns it after every call. All competitors run with this setting.
"""
ONEDNN = """
### oneDNN matrix products

XLA on x86 includes oneDNN, whose products of large matrices are faster and of small ones slower than XLA's default. It
pays for batches at inference. The XLA setting is experimental and not se-flax's default:

```python
options = {{
{options}
}}
logits = jax.jit(model.apply, compiler_options=options)(variables, images)
```

Milliseconds of fused networks, and default over oneDNN (`python -m benchmarks.cpu --onednn`):

| network | task, images | default | oneDNN | ratio |
|---|---|---:|---:|---:|
{rows}
{sources}"""
GPU = """
## GPU

Milliseconds, bfloat16 (`python -m benchmarks.gpu`). timm uses `torch.compile` and channels-last memory; our inference
uses `se_flax.fuse`. The ratio is timm's time over ours in the same round: above 1 we are faster. The attention's cost
is our time over our time without attention.

| network | task, images | pixels | se-flax | timm | ratio | without attention | attention's cost |
|---|---|---:|---:|---:|---:|---:|---:|
"""
LIMITS = """
### Time per kind of convolution

Every convolution is compiled and timed by itself, for training with both gradients (`python -m benchmarks.limits`).
"Rest" is norms, activations, attention, sums and the optimizer. "Matrix product" is the rate of a 2048 x 2048 product;
"bound" is the network's time if every convolution ran at that rate, which depthwise and grouped convolutions cannot.
GFLOP/s count the products of the definition; Winograd's algorithm for 3x3 convolutions needs 16 of 36 of them.

| network | task, images | part | ms | GFLOP/s |
|---|---|---|---:|---:|
"""
CONVOLUTION = """
### Single convolutions

Ours / XLA's in milliseconds, and the ratio (`python -m benchmarks.convolution`). A shape is height and width x input
channels x output channels x kernel x stride x groups.

| shape | images | forward | input gradient | kernel gradient |
|---|---:|---:|---:|---:|
"""
LOADER = """
## Input pipeline

Images per second and core (`python -m benchmarks.loader`): decode, random resized crop to 224 pixels, flip, normalised
float32. `host` is the host's part of training on an accelerator, which gives uint8; the accelerator does the rest,
RandAugment included. Ratios are medians over rounds.

| loader | work | images per second and core |
|---|---|---:|
"""
STARTUP = """
## Start-up

Seconds from the start of the process to the end of the first update of two images, float32 (`python -m
benchmarks.startup`), with an empty compilation cache (cold) and a filled one (warm). `compile` is the initialisation of
the parameters and the compilation of the step. Medians.

| network | pixels | cold: total | compile | trace | warm: total | compile | trace | total, ratio | compile, ratio |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|
"""


def rows(name: str) -> list[Row]:
    """The recorded lines of one benchmark, oldest first."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def sources(commands: Iterable[tuple[str, str]]) -> str:
    """Lists of commands, each under the date, machine and versions of its runs."""
    found: dict[str, dict[str, None]] = {}
    for command, where in commands:
        found.setdefault(where, {})[f"- `{command}`\n"] = None
    return "\n".join(f"{where}:\n\n{''.join(lines)}" for where, lines in found.items())


def latest(lines: list[Row], *keys: str) -> list[Row]:
    """The last line of each combination of keys, in order of first occurrence."""
    return list({tuple(str(line.get(key)) for key in keys): line for line in lines}.values())


def attention_table(lines: list[Row]) -> str:
    """Networks with and without their attention."""
    text = ""
    for line in (line for line in lines if "ratios" in line):
        bare, ratios = line["without_attention"], line["ratios"]
        label = " (separate layers)" if line.get("state") == "before" else ", lean" if line.get("lean") else ""
        text += (
            f"| {line['model']}{label} | {line['batch_per_device']} | {line['bytes_accessed'] / 2**30:.2f} | "
            f"{bare['bytes_accessed'] / 2**30:.2f} | {ratios['bytes_accessed']:.4f} | "
            f"{ratios['peak_memory_bytes']:.4f} | {line['date']}, {line['topology']} |\n"
        )
    return ATTENTION + text + ATTENTION_NOTE if text else ""


def plain_line(lines: list[Row]) -> str:
    """Our networks beside Flax's."""
    plain = [line for line in lines if line["model"] == "plain_resnet50"]
    ours = [line for line in lines if line["model"] == "seresnet50" and "without_attention" in line]
    forms = {label: [line for line in ours if bool(line.get("lean")) == lean] for label, lean in FORMS.items()}
    if not plain:
        return ""
    sides = {"ResNet-50, plain": plain[-1]}
    sides |= {f"ResNet-50{label}": found[-1]["without_attention"] for label, found in forms.items() if found}
    sides |= {f"SE-ResNet-50{label}": found[-1] for label, found in forms.items() if found}
    base = plain[-1]
    text = "".join(
        f"| {name} | {side['bytes_accessed'] / base['batch_per_device'] / 2**20:.1f} | "
        f"{side['bytes_accessed'] / base['bytes_accessed']:.3f} | {side['peak_memory_bytes'] / 1e9:.3f} | "
        f"{side['peak_memory_bytes'] / base['peak_memory_bytes']:.3f} |\n"
        for name, side in sides.items()
    )
    return PLAIN + "| | MiB per image | ratio | peak memory, GB | ratio |\n|---|---:|---:|---:|---:|\n" + text


def scaling_lines(lines: list[Row]) -> list[Row]:
    """One network on several topologies."""
    found = [line for line in lines if "ratios" not in line and line["model"] == "seresnet18"]
    return sorted(latest(found, "topology"), key=lambda line: line["devices"])


def scaling_table(lines: list[Row]) -> str:
    """Per-device figures by topology, and the plot."""
    if len(lines) < 2:
        return ""
    text = "".join(
        f"| {line['topology']} | {line['devices']} | {line['flops'] / 1e9:,.1f} | "
        f"{line['bytes_accessed'] / 2**30:.3f} | {line['peak_memory_bytes'] / 2**30:.3f} | "
        f"{line['collective_bytes'] / 1e6:.2f} |\n"
        for line in lines
    )
    first = lines[0]
    about = f"\n{first['model']}, {first['batch_per_device']} images per device, `{first['command']}` and so on.\n"
    return SCALING + text + about + "\n![Per-device figures by number of chips](scaling.png)\n"


def plot(lines: list[Row], path: Path) -> None:
    """Per-device figures over the number of chips, each relative to the smallest topology."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    chips = [line["devices"] for line in lines]
    markers = {"flops": "o", "bytes_accessed": "s", "peak_memory_bytes": "^", "collective_bytes": "x"}
    names = {"flops": "flops", "bytes_accessed": "bytes accessed", "peak_memory_bytes": "peak memory"}
    for key, marker in markers.items():
        values = [line[key] / lines[0][key] for line in lines]
        axes.plot(chips, values, marker=marker, label=names.get(key, "all-reduce bytes"), alpha=0.8)
    axes.set(xscale="log", ylim=(0.9, 1.1), xlabel="chips (TPU v5e)", ylabel=f"per device, {chips[0]} chips = 1")
    axes.set_xticks(chips, [str(n) for n in chips])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def cpu_table(lines: list[Row]) -> str:
    """Networks on a CPU."""
    text = ""
    commands: list[tuple[str, str]] = []
    # A network can be compared with timm and with another JAX library. "timm compile" is one of timm's modes.
    named = [{**line, "other": line["fastest_other"].split()[0]} for line in lines if "ratio" in line]
    kept = latest(named, "other", "model", "task", "batch", "image_size")
    places = {key: list(dict.fromkeys(line[key] for line in kept)) for key in ("other", "model")}

    def place(line: Row) -> tuple[Any, ...]:
        return *(names.index(line[key]) for key, names in places.items()), line["task"], line["batch"]

    for line in sorted(kept, key=place):
        ms, other = line["milliseconds"], line["fastest_other"]
        bare = f" ({ms['ours plain']:g})" if "ours plain" in ms else ""
        text += (
            f"| {line['model']} | {line['task']}, {line['batch']} | {ms['ours']:g}{bare} | {ms[other]:g} ({other}) | "
            f"{line['ratio']:.2f} |\n"
        )
        shown = {name: number for name, number in line["versions"].items() if name not in ("se_flax", "device")}
        versions = ", ".join(f"{name} {number}" for name, number in shown.items())
        machine = f"{line['machine']['cores']} cores of {line['machine']['processor']}"
        commands.append((line["command"], f"{line['date']}, {machine}; {versions}"))
    return CPU + text + CPU_NOTE + "\n" + sources(commands) if text else ""


def onednn_table(lines: list[Row]) -> str:
    """Matrix products by another library."""
    kept = latest([line for line in lines if "onednn_ratio" in line], "model", "task", "batch", "image_size")
    text = ""
    commands: list[tuple[str, str]] = []
    for line in kept:
        ms = line["milliseconds"]
        text += (
            f"| {line['model']} | {line['task']}, {line['batch']} | {ms['ours']:g} | {ms['ours onednn']:g} | "
            f"{line['onednn_ratio']:.2f} |\n"
        )
        commands.append((line["command"], f"{line['date']}, jax {line['versions']['jax']}"))
    values = {name: json.dumps(value) if isinstance(value, str) else value for name, value in ours.ONEDNN.items()}
    options = "\n".join(f'    "{name}": {value},' for name, value in values.items())
    return ONEDNN.format(options=options, rows=text, sources=sources(commands)) if text else ""


def gpu_table(lines: list[Row]) -> str:
    """Networks on a GPU."""
    text = ""
    commands: list[tuple[str, str]] = []
    # Without `attention_ratio` one of our processes failed.
    whole = [line for line in lines if "attention_ratio" in line]
    for line in latest(whole, "model", "task", "batch", "image_size"):
        ms = line["milliseconds"]
        cells = [f"{ms['ours']:g}"]
        cells += [f"{ms['timm compile']:g}", f"{line['ratio']:.2f}"] if "ratio" in line else ["", ""]
        cells += [f"{ms['ours without']:g}", f"{line['attention_ratio']:.2f}"]
        text += f"| {line['model']} | {line['task']}, {line['batch']} | {line['image_size']} | {' | '.join(cells)} |\n"
        versions = ", ".join(f"{name} {value}" for name, value in line["versions"].items() if name != "se_flax")
        commands.append((line["command"], f"{line['date']}, {versions}"))
    return f"{GPU}{text}\n{sources(commands)}" if text else ""


def limits_table(lines: list[Row]) -> str:
    """Parts of a network's time on a CPU."""
    text = ""
    for line in latest(lines, "model", "task", "batch"):
        parts = line["convolutions"]
        rest = line["whole_ms"] - sum(part["ms"] for part in parts.values())
        cells = [("**total**", line["whole_ms"], "")]
        cells += [(name, part["ms"], f"{1000 * part['gflop'] / part['ms']:.0f}") for name, part in parts.items()]
        product = line["product_gflops"]
        bound = rest + 1000 * sum(part["gflop"] for part in parts.values()) / product
        cells += [("rest", rest, ""), ("matrix product", None, f"{product:.0f}"), ("bound", bound, "")]
        for name, ms, rate in cells:
            task = f"{line['task']}, {line['batch']}"
            text += f"| {line['model']} | {task} | {name} | {'' if ms is None else f'{ms:.0f}'} | {rate} |\n"
    return LIMITS + text if text else ""


def convolution_table(lines: list[Row]) -> str:
    """Single convolutions on a CPU."""
    text = ""
    for line in latest(lines, "shape", "batch"):
        cells = " | ".join(
            f"{line[task]['ours']:g} / {line[task]['xla']:g}, {line[task]['ratio']:.1f}"
            for task in ("forward", "input", "kernel")
        )
        text += f"| {' x '.join(map(str, line['shape']))} | {line['batch']} | {cells} |\n"
    if not text:
        return ""
    last = lines[-1]
    machine = f"{last['machine']['cores']} cores of {last['machine']['processor']}"
    return f"{CONVOLUTION}{text}\n{last['date']}, `{last['command']}`, {machine}, JAX {last['jax']}.\n"


def loader_table(lines: list[Row]) -> str:
    """The input pipeline."""
    with_ratios = [line for line in lines if line.get("ratios")]
    if not with_ratios:
        return ""
    line = with_ratios[-1]
    text = "".join(
        f"| {side} | {row} | {figures['images_per_second_per_core']:,.0f} |\n"
        for side, table in line["figures"].items()
        for row, figures in table.items()
    )
    ratios = "".join(
        f"- {row}: " + ", ".join(f"{value:.2f} times {side}" for side, value in found.items()) + "\n"
        for row, found in line["ratios"].items()
    )
    return f"{LOADER}{text}\n{ratios}\n{line['date']}, `{line['command']}`.\n"


def startup_table(lines: list[Row]) -> str:
    """Cold and warm starts."""
    text = ""
    for line in latest(lines, "model", "image_size"):
        cells = " | ".join(
            f"{one['all']:.1f} | {one['parameters'] + one['compile']:.1f} | {one['trace']:.1f}"
            for one in (line["seconds"]["cold"], line["seconds"]["warm"])
        )
        ratios = f"{line['ratios']['all']:.1f} | {line['ratios']['compile']:.1f}"
        text += f"| {line['model']} | {line['image_size']} | {cells} | {ratios} |\n"
    if not text:
        return ""
    last = lines[-1]
    machine = f"{last['machine']['cores']} cores of {last['machine']['processor']}"
    return f"{STARTUP}{text}\n{last['date']}, `{last['command']}`, {machine}, JAX {last['versions']['jax']}.\n"


def document() -> str:
    """The whole page."""
    aot = rows("aot")
    return (
        HEAD
        + attention_table(aot)
        + plain_line(aot)
        + scaling_table(scaling_lines(aot))
        + cpu_table(rows("cpu"))
        + onednn_table(rows("cpu"))
        + limits_table(rows("limits"))
        + convolution_table(rows("convolution"))
        + gpu_table(rows("gpu"))
        + loader_table(rows("loader"))
        + startup_table(rows("startup"))
    )


def main() -> int:
    """Writes the page, or checks it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare; exit code 1 if they differ")
    if parser.parse_args().check:
        return 0 if DOCUMENT.exists() and DOCUMENT.read_text() == document() else 1
    DOCUMENT.write_text(document())
    lines = scaling_lines(rows("aot"))
    if len(lines) > 1:
        plot(lines, PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
