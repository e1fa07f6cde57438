"""Writes docs/performance.md and its plot from the results in `benchmarks/results`; nothing is measured here.

python -m benchmarks.report            # write
python -m benchmarks.report --check    # exit code 1 if the document differs
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.sides import ours

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "scaling.png"

Row = dict[str, Any]

HEAD = """# Performance

Every figure here was measured by a command that stands beside it; the results are in `benchmarks/results`, and
`python -m benchmarks.report` writes this page from them. Ratios count: the sides of a comparison take turns in one run,
so that they meet the same machine.
"""
ATTENTION = """
## Squeeze-and-excitation's price on a TPU

The training step, compiled for TPU v5e chips that are not there (`python -m train.aot`): bfloat16, SGD with momentum.
Flops, bytes and memory are the compiler's own figures of one device and the same on every run. Without attention is the
same network with nothing in its place.

| network | images per device | GiB accessed | without attention | ratio | peak memory, ratio | of |
|---|---:|---:|---:|---:|---:|---|
"""
ATTENTION_NOTE = """
Where a batch norm directly feeds the squeeze, norm and gate are one affine per image and channel: the squeeze is the
norm's own per-image mean, and the gated map is written in the pass that the norm needs anyway. Written as a norm and
then an attention, SE-ResNet-50's step accesses 1.1154 times the bytes of ResNet-50's (the first line). What is left
above 1 is the attention's own parameters, their momentum and their all-reduce, and the per-image means.

Of the 74 MB that SE-ResNet-50's step takes more at its peak, by the compiler's own list of what is alive when, 20 are
the attention's parameters and their momentum, 11 compiled code, 22 the three float32 numbers per image and channel that
wait for the backward pass, 11 gaps between the buffers of its heap, and 11 temporaries outside that heap
(`XLA_FLAGS="--xla_dump_to=FOLDER --xla_dump_hlo_as_text" python -m train.aot --model=seresnet50 --topology=v5e:2x2
--batch-per-device=128 --image-size=224 --json`, and with `--without-attention`; the folder's `buffer-assignment` and
`live-range`).

Lean (`--config.lean=True`, `train.aot --lean`) leaves out a bottleneck's widest map: its last convolution is neither
written before its norm nor kept, since all that norm and convolution need of it follows from its input, a quarter as
wide (`se_flax/lowering/deferred_conv.py`). Only the gate's gradient needs the output again, and makes it in a pass that
reads that input and the gradient; so the ratio is higher than otherwise, while both networks access less and take a
fifth less memory. It costs arithmetic (4 % more flops in ResNet-50, 11 % in SE-ResNet-50), and no TPU has timed it yet;
so it is to be asked for.

Where an activation stands between (EfficientNet, MobileNetV3), the squeeze cannot be had from the norm's means, and the
activation needs the whole batch's statistics first: one read of the map more is the least.
`se_flax/lowering/gated_norm.py` adds that one and no other; the compiled backward pass has as many as without
attention.
"""
PLAIN = """
Beside ResNet-50 written with Linen's own layers as Flax's example has it (`benchmarks/plain_resnet.py`), compiled the
same way:

"""
# Suffix of the network's name in a row, and the key `lean` of its result.
FORMS = {"": False, ", lean": True}
SCALING = """
## More chips

The same recipe on more chips, the batch per device fixed; per device. Nothing grows but the number of chips: the batch
norms see their own replica, and the gradients' all-reduce is the only talk.

| topology | chips | GFLOP | GiB accessed | peak memory, GiB | all-reduce, MB |
|---|---:|---:|---:|---:|---:|
"""
CPU = """
## On a CPU

Milliseconds, float32, 224 pixels, all cores (`python -m benchmarks.cpu`); median of turns, and the median of the other
side's time over ours, turn by turn: above 1 we are faster. timm stands for the fastest of its eager, channels-last and
compiled modes that were run. Ours at inference is `se_flax.fuse`d; in brackets the network as it is.

| network | task | ours | other side | ratio |
|---|---|---:|---:|---:|
"""
CPU_NOTE = """
What a convolution becomes on a CPU is in `se_flax/lowering/cpu`; TPU and GPU keep XLA's own.
`se_flax.runtime.keep_memory()`, called before JAX is used, keeps freed memory in the process, as `python -m train` and
`se-flax predict` do; by default glibc gives the pages back after every call. PyTorch gains from the same settings as
JAX does, so in this table all sides have them.
"""
ONEDNN = """
### Matrix products by oneDNN

XLA on x86 brings oneDNN along beside the library that it takes by default, and its products of large matrices are
faster, those of small ones slower. So it pays for batches at inference and not for single images; it is an
experimental setting of XLA's, and not se-flax's default:

```python
options = {{
{options}
}}
logits = jax.jit(model.apply, compiler_options=options)(variables, images)
```

Milliseconds, fused networks, and the first over the second, turn by turn (`python -m benchmarks.cpu --onednn`):

| network | task | default | oneDNN | ratio |
|---|---|---:|---:|---:|
{rows}
{sources}"""
GPU = """
## On a GPU

Milliseconds, bfloat16 (`python -m benchmarks.gpu`); timm through `torch.compile` in channels-last memory, ours at
inference `se_flax.fuse`d. The ratio is timm's time over ours, turn by turn: above 1 we are faster. The attention's
price is ours over ours without attention.

| network | task | pixels | ours | timm | ratio | without attention | attention's price |
|---|---|---:|---:|---:|---:|---:|---:|
"""
LIMITS = """
### Where the time goes

Every convolution of a network compiled and timed by itself, training's with both gradients, beside the whole
(`python -m benchmarks.limits`); the rest is norms, activations, attention, sums and the optimizer. A product of two
matrices of 2048 x 2048 tells what the processor can do, and the last line of each network what its time would be if
every convolution ran at that rate, which depthwise and grouped ones, with few products for the bytes they move, cannot.
Counted are the products of a convolution's definition; 3x3 ones of many channels take sixteen for 36 of them.

| network | task | part | ms | GFLOP/s |
|---|---|---|---:|---:|
"""
CONVOLUTION = """
### Convolutions

Ours / XLA's, milliseconds, and the ratio (`python -m benchmarks.convolution`), for the side of the map, the channels in
and out, the kernel, the stride and the groups.

| shape | images | forward | input's gradient | kernel's gradient |
|---|---:|---:|---:|---:|
"""
LOADER = """
## From JPEG to batch

Images per second of one core (`python -m benchmarks.loader`): decode, random resized crop to 224 pixels, flip,
normalised float32; all sides keep freed memory. `host` is what training with an accelerator takes from the host,
uint8; the accelerator does the rest, RandAugment included. Ratios are medians of rounds.

| side | row | images per second and core |
|---|---|---:|
"""
STARTUP = """
## Start-up

Seconds from the start of a process to the end of its first update of two images, float32 (`python -m
benchmarks.startup`): with an empty compilation cache (cold), and with the one that the cold start filled (warm).
`compile` is the drawing of the parameters and the compilation of the step together, what the cache can help. Medians.

| network | pixels | cold: all | compile | trace | warm: all | compile | trace | all, ratio | compile, ratio |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|
"""


def rows(name: str) -> list[Row]:
    """The recorded lines of one benchmark, oldest first."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def latest(lines: list[Row], *keys: str) -> list[Row]:
    """The last line of each combination of keys, in order of first occurrence."""
    return list({tuple(str(line.get(key)) for key in keys): line for line in lines}.values())


def attention_table(lines: list[Row]) -> str:
    """Networks with and without their attention."""
    text = ""
    for line in (line for line in lines if "ratios" in line):
        bare, ratios = line["without_attention"], line["ratios"]
        label = " (norm, then attention)" if line.get("state") == "before" else ", lean" if line.get("lean") else ""
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
    sources: dict[str, None] = {}
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
        sources[f"- `{line['command']}`: {line['date']}, {machine}; {versions}\n"] = None
    return CPU + text + CPU_NOTE + "\n" + "".join(sources) if text else ""


def onednn_table(lines: list[Row]) -> str:
    """Matrix products by another library."""
    kept = latest([line for line in lines if "onednn_ratio" in line], "model", "task", "batch", "image_size")
    text = ""
    sources: dict[str, None] = {}
    for line in kept:
        ms = line["milliseconds"]
        text += (
            f"| {line['model']} | {line['task']}, {line['batch']} | {ms['ours']:g} | {ms['ours onednn']:g} | "
            f"{line['onednn_ratio']:.2f} |\n"
        )
        sources[f"- `{line['command']}`: {line['date']}, jax {line['versions']['jax']}\n"] = None
    values = {name: json.dumps(value) if isinstance(value, str) else value for name, value in ours.ONEDNN.items()}
    options = "\n".join(f'    "{name}": {value},' for name, value in values.items())
    return ONEDNN.format(options=options, rows=text, sources="".join(sources)) if text else ""


def gpu_table(lines: list[Row]) -> str:
    """Networks on a GPU."""
    text = ""
    sources: dict[str, None] = {}
    # Without `attention_ratio` one of our processes failed.
    whole = [line for line in lines if "attention_ratio" in line]
    for line in latest(whole, "model", "task", "batch", "image_size"):
        ms = line["milliseconds"]
        cells = [f"{ms['ours']:g}"]
        cells += [f"{ms['timm compile']:g}", f"{line['ratio']:.2f}"] if "ratio" in line else ["", ""]
        cells += [f"{ms['ours without']:g}", f"{line['attention_ratio']:.2f}"]
        text += f"| {line['model']} | {line['task']}, {line['batch']} | {line['image_size']} | {' | '.join(cells)} |\n"
        versions = ", ".join(f"{name} {value}" for name, value in line["versions"].items() if name != "se_flax")
        sources[f"- `{line['command']}`: {line['date']}, {versions}\n"] = None
    return f"{GPU}{text}\n{''.join(sources)}" if text else ""


def limits_table(lines: list[Row]) -> str:
    """Parts of a network's time on a CPU."""
    text = ""
    for line in latest(lines, "model", "task", "batch"):
        parts = line["convolutions"]
        rest = line["whole_ms"] - sum(part["ms"] for part in parts.values())
        cells = [("**all**", line["whole_ms"], "")]
        cells += [(name, part["ms"], f"{1000 * part['gflop'] / part['ms']:.0f}") for name, part in parts.items()]
        product = line["product_gflops"]
        bound = rest + 1000 * sum(part["gflop"] for part in parts.values()) / product
        cells += [("rest", rest, ""), ("(a product)", None, f"{product:.0f}"), ("(all at that rate)", bound, "")]
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
