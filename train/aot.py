"""Ahead-of-time compilation of a run's step, for absent TPUs or the CPU at hand, with its costs.

The step, its state and its spreading over devices are those of `python -m train`. The state exists as shapes only:
nothing is read, drawn or allocated.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp

import se_flax
from se_flax.cli.layout import reflowed
from se_flax.errors import UserError
from train import cli
from train.build import build_model
from train.config import Config, Data, Model, Optim
from train.data.sources import ImageData
from train.optim.finetune import complete
from train.run.evaluate import padded_size
from train.run.init import trace
from train.run.length import total_steps
from train.run.parallel import Replicas, make_replicas
from train.run.program import Program, make_program
from train.tools.costs import Costs, compile_step
from train.tools.topology import GIB, Topology, find_topology
from train.validate import check_batch, check_settings_of_run

# The length of a run is a constant of its schedule; any number compiles to the same operations.
_STEPS_PER_EPOCH = 1000
# What --compare divides.
_RATIOS = ("flops", "bytes_accessed", "peak_memory_bytes", "temporary_bytes", "collective_bytes")


# --- Compiling --------------------------------------------------------------------------------------------------------


def lower_train_step(config: Config, program: Program, replicas: Replicas) -> Any:
    """Traces the training step of a run.

    Args:
      config: the settings, for the size of batch and images.
      program: of the run.
      replicas: on the devices to compile for.

    Returns:
      A `jax.stages.Lowered`.
    """
    state = replicas.replicated_shapes(jax.eval_shape(program.init))
    batch = replicas.sharded_shapes(_batch_shapes(config.data.batch_size, config.data.image_size))
    step: Any = replicas.spread(program.train_step, donate=True)
    return step.lower(state, batch)


def lower_eval_step(config: Config, program: Program, replicas: Replicas) -> Any:
    """Traces the evaluation step of a run; arguments and result as for `lower_train_step`."""
    variables = replicas.replicated_shapes(jax.eval_shape(program.init).variables())
    size = padded_size(config.data.eval_batch_size or config.data.batch_size, replicas.count)
    shapes = _batch_shapes(size, config.data.image_size)
    shapes["mask"] = jax.ShapeDtypeStruct((size,), jnp.bool_)
    step: Any = replicas.spread(program.eval_step)
    return step.lower(variables, replicas.sharded_shapes(shapes))


def _batch_shapes(size: int, side: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        "image": jax.ShapeDtypeStruct((size, side, side, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32),
    }


# --- Settings ---------------------------------------------------------------------------------------------------------


def settings_for_model(name: str, image_size: int) -> Config:
    """A recipe for a network by itself: SGD with momentum, bfloat16, no augmentation.

    Args:
      name: of the network.
      image_size: side of the images; 0 takes the one that the network was designed for.

    Returns:
      The settings; the batch size is for the caller to set.

    Raises:
      UserError: unknown network.
    """
    side = image_size or se_flax.get_variant(name).input_size
    return Config(
        model=Model(name=name, num_classes=_own_classes(name)),
        data=Data(image_size=side),
        optim=Optim(name="sgd", momentum=0.9, nesterov=False, weight_decay=1e-4, schedule="constant"),
        precision="bfloat16",
    )


def _own_classes(name: str) -> int:
    return se_flax.create_model(name).num_classes


def _has_attention(config: Config) -> bool:
    return getattr(build_model(config, 1), "attention", None) is not None


def without_attention(config: Config) -> Config:
    """The same run with a network that carries no attention.

    Args:
      config: the settings.

    Returns:
      A copy.

    Raises:
      UserError: the network has none that could be left out.
    """
    if not _has_attention(config):
        raise UserError(
            f"{config.model.name} has no attention that could be left out; "
            "leave out --compare and --without-attention, or name a network such as seresnet50"
        )
    attention = dataclasses.replace(config.model.attention, kind="none")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention=attention))


def with_batch(config: Config, per_device: int, devices: int) -> Config:
    """The same run with a batch of so many images on each device, in training and in evaluation."""
    size = per_device * devices
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=size, eval_batch_size=size))


# --- The command ------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; python -m train.aot --help lists what there is")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "python -m train.aot",
        description=reflowed(__doc__ or ""),
        epilog=reflowed(
            "--config=FILE takes a recipe, and --config.A.B=VALUE overrides one setting, as in python -m train."
        ),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--topology", default="cpu", metavar="NAME", help="cpu (the default), or a TPU: v5e:2x2, v4:2x2x1, v6e:4x4 ...")
    add("--model", metavar="NAME", help="a network instead of a recipe: SGD with momentum, bfloat16")
    add("--image-size", type=_positive, metavar="N", help="with --model: side of the images; default: the network's")
    add("--batch-per-device", type=_positive, metavar="N", help="images; default: the recipe's batch, 128 with --model")
    add("--lean", action="store_true", help="with --model: what --config.lean=True is in a recipe")
    add("--eval", action="store_true", help="the evaluation step instead of the training step")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--without-attention", action="store_true", help="the same network without its attention")
    which.add_argument("--compare", action="store_true", help="with and without attention, and the ratios")
    add("--hlo", type=Path, metavar="FILE", help="where to write the optimised program as text")
    add("--json", action="store_true", help="one line of JSON")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, a whole number from 1 is expected")
    return int(text)


def _settings(options: argparse.Namespace, words: Sequence[str]) -> Config:
    """The settings before the devices are known."""
    for word in words:
        if not word.startswith(("--config=", "--config.", "-config")):
            raise UserError(f"unknown argument {word!r}; python -m train.aot --help lists what there is")
    if bool(options.model) == any(not word.startswith("--config.") for word in words):
        raise UserError("give either --config=configs/<recipe>.py or --model=<network>, and not both")
    if options.model:
        if words:
            raise UserError(f"got {words[0]} with --model; overrides are for a recipe: give --config=<recipe>.py")
        return dataclasses.replace(settings_for_model(options.model, options.image_size or 0), lean=options.lean)
    if options.image_size:
        raise UserError("--image-size goes with --model; with a recipe give --config.data.image_size")
    if options.lean:
        raise UserError("--lean goes with --model; with a recipe give --config.lean=True")
    config, _ = cli.parse([*words, "--workdir=none"])
    if not config.model.name:
        raise UserError(
            "the recipe leaves its network to the checkpoint in init_from, which is not read here; "
            "name it with --config.model.name"
        )
    return complete(config, None, None)


def compile_run(
    config: Config, topology: Topology, *, evaluation: bool = False, model: nn.Module | None = None
) -> tuple[Costs, str]:
    """Compiles the step of a run for a topology.

    Args:
      config: the settings; one that is left empty keeps what the network and ImageNet have.
      topology: from `find_topology`.
      evaluation: the evaluation step instead of the training step.
      model: network in place of the settings' own, to compare the two.

    Returns:
      The costs and the optimised HLO of one device.

    Raises:
      UserError: settings that do not work, or a batch that does not divide.
    """
    config = complete(config, None, None)

    def count(images: ImageData) -> int:
        """Of data that lies on this machine; else as many as the network has by default."""
        there = 0 if config.data.source.startswith("tfds:") else images.count_classes()
        return there or _own_classes(config.model.name)

    checked = check_settings_of_run(config, count)
    replicas = make_replicas(config.parallel.backend, config.parallel.devices, topology.devices)
    check_batch(config, replicas)
    total = total_steps(config.steps, config.epochs, _STEPS_PER_EPOCH)
    network = checked.network if model is None else trace(model, config.data.image_size)
    program = make_program(
        config, checked.num_classes, _STEPS_PER_EPOCH, total, updates=checked.updates, network=network
    )
    lowered = (lower_eval_step if evaluation else lower_train_step)(config, program, replicas)
    return compile_step(lowered, topology.memory_bytes)


def run(argv: Sequence[str]) -> dict[str, Any]:
    """Does what a command line asks for.

    Args:
      argv: its words, without the program's name.

    Returns:
      What `--json` prints: the costs, and what they are of. With `--compare` the top level is the network as it is,
      `without_attention` the costs of the other one and `ratios` the quotients.

    Raises:
      UserError: wrong words, settings or topology.
    """
    options, words = _parser().parse_known_args(argv)
    config = _settings(options, words)
    topology = find_topology(options.topology)
    devices = config.parallel.devices or len(topology.devices)
    per_device = options.batch_per_device or (128 if options.model else 0)
    if per_device:
        config = with_batch(config, per_device, devices)
    bare = without_attention(config) if options.compare or options.without_attention else config
    size = config.data.batch_size
    if options.eval:
        size = padded_size(config.data.eval_batch_size or size, devices)
    costs, text = compile_run(bare if options.without_attention else config, topology, evaluation=options.eval)
    if options.hlo:
        options.hlo.write_text(text)
    result = {
        "model": config.model.name,
        "attention": _has_attention(config) and not options.without_attention,
        **circumstances(config, topology, size // devices, evaluation=options.eval),
        **dataclasses.asdict(costs),
    }
    if options.compare:
        other, _ = compile_run(bare, topology, evaluation=options.eval)
        result["without_attention"] = dataclasses.asdict(other)
        result["ratios"] = _ratios(result, result["without_attention"])
    return {**result, "versions": versions()}


def circumstances(config: Config, topology: Topology, per_device: int, *, evaluation: bool = False) -> dict[str, Any]:
    """What a compiled step's costs depend on beside its network.

    Args:
      config: the settings.
      topology: that it was compiled for.
      per_device: images on each device.
      evaluation: the evaluation step instead of the training step.

    Returns:
      Entries of what `--json` prints.
    """
    return {
        "step": "eval" if evaluation else "train",
        "topology": topology.name,
        "device_kind": topology.devices[0].device_kind,
        "devices": config.parallel.devices or len(topology.devices),
        "batch_per_device": per_device,
        "image_size": config.data.image_size,
        "precision": config.precision,
        "lean": config.lean,
        "memory_bytes": topology.memory_bytes,
    }


def _ratios(a: dict[str, Any], b: dict[str, Any]) -> dict[str, float]:
    return {name: round(a[name] / b[name], 4) for name in _RATIOS if a[name] and b[name]}


def versions() -> dict[str, str]:
    """Of JAX and of the compilers."""
    found = {"jax": jax.__version__}
    for name in ("jaxlib", "libtpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # the CPU needs no libtpu
            continue
    return found


# --- For people -------------------------------------------------------------------------------------------------------

_ROWS = {
    "flops": "floating-point operations",
    "bytes_accessed": "bytes accessed",
    "argument_bytes": "arguments",
    "output_bytes": "outputs",
    "donated_bytes": "of these in the arguments' memory",
    "temporary_bytes": "temporaries",
    "peak_memory_bytes": "peak memory",
    "collective_bytes": "collectives",
}


def describe(result: dict[str, Any]) -> str:
    """The result of `run` as a table."""
    step = {"train": "training step", "eval": "evaluation step"}[result["step"]]
    network = result["model"] + ("" if result["attention"] else " without attention")
    lines = [
        f"{network}, {step}: {result['devices']} x {result['device_kind']} ({result['topology']}), "
        f"{result['batch_per_device']} images of {result['image_size']} pixels on each, {result['precision']}",
    ]
    other, ratios = result.get("without_attention"), result.get("ratios", {})
    heads = ["with attention", "without", "ratio"] if other else ["per device", "per image"]
    lines.append(_row("", *heads))
    for name, title in _ROWS.items():
        value = result[name]
        cells = [_human(name, value)]
        if other:
            cells += [_human(name, other[name]), f"{ratios[name]:.4f}" if name in ratios else ""]
        elif name in ("flops", "bytes_accessed") and value is not None:
            cells.append(_human(name, value / result["batch_per_device"]))
        lines.append(_row(title, *cells))
    for kind, found in result["collectives"].items():
        lines.append(_row(f"  {kind}", f"{found['count']} calls"))
    both = [result, other] if other else [result]
    limit = f"of {result['memory_bytes'] / GIB:.1f} GiB"
    lines.append(_row("fits", *("yes" if each["fits"] else f"NO, {limit}" for each in both)))
    lines.append(_row("compiled in", *(f"{each['compile_seconds']:.1f} s" for each in both)))
    return "\n".join(line.rstrip() for line in lines)


def _row(title: str, *cells: str) -> str:
    return f"{title:<34}" + "".join(f"{cell:>18}" for cell in cells)


def _human(name: str, value: float | None) -> str:
    if value is None:
        return "?"
    if name == "flops":
        return f"{value / 1e9:,.1f} G"
    return f"{value / GIB:,.3f} GiB" if value >= GIB / 10 else f"{value / 2**20:,.3f} MiB"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
      argv: words of the command line, without the program's name; the process's own when None.

    Returns:
      The exit code: 0 done (whether it fits or not), 2 a mistake of the user's (one sentence on stderr).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)  # the time is that of a compilation
    try:
        result = run(words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
    print(json.dumps(result) if "--json" in words else describe(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
