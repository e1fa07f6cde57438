"""Devices to compile for: the local CPU, or absent TPUs."""

import importlib.util
import math
import os
import re
from dataclasses import dataclass

import jax

from se_flax.errors import UserError, closest

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A generation of TPUs.

    Attributes:
      memory_gib: high-bandwidth memory of a chip in GiB.
      axes: number of axes of the interconnect, and so of the topology's name.
      accelerator: name of a small slice, which libtpu requires; the compiled program does not depend on it.
      config: libtpu's name of the configuration in which the cores of a chip are one device.
      source: of the memory's size.
    """

    memory_gib: int
    axes: int
    accelerator: str
    config: str
    source: str


CHIPS = {
    "v4": Chip(32, 3, "v4-8", "megacore", "https://cloud.google.com/tpu/docs/v4"),
    "v5e": Chip(16, 2, "v5litepod-4", "default", "https://cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip(95, 3, "v5p-8", "default", "https://cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip(32, 2, "v6e-4", "default", "https://cloud.google.com/tpu/docs/v6e"),
}


@dataclass(frozen=True)
class Topology:
    """Devices that a step is compiled for.

    Attributes:
      name: as the user gave it.
      devices: compile-only devices, or the CPU's.
      memory_bytes: memory of one device.
    """

    name: str
    devices: tuple[jax.Device, ...]
    memory_bytes: int


def find_topology(name: str) -> Topology:
    """Finds the devices of a topology.

    The function restricts JAX to the CPU, so that a TPU or GPU in the machine is not used. Call it before JAX looks for
    devices.

    Args:
      name: `cpu`, or a generation of TPUs and the number of chips along each axis: `v5e:2x2`, `v4:2x2x1`.

    Returns:
      The devices.

    Raises:
      UserError: there is no such generation or layout, or libtpu is not installed.
    """
    generation, _, layout = name.partition(":")
    if name != "cpu":
        _check_layout(name, generation, layout)
    jax.config.update("jax_platforms", "cpu")
    if name == "cpu":
        devices = tuple(jax.devices("cpu"))
        # The CPU's devices share one memory.
        return Topology(name, devices, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices))
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise UserError(
            f"--topology={name} needs the TPU compiler, which is not installed; pip install 'se-flax[tpu]' "
            "(or pip install libtpu), on Linux x86_64 and without any TPU, or give --topology=cpu"
        )
    chip = CHIPS[generation]
    return Topology(name, _tpu_devices(name, chip, math.prod(map(int, layout.split("x")))), chip.memory_gib * GIB)


def _check_layout(name: str, generation: str, layout: str) -> None:
    if generation not in CHIPS:
        hint = closest(generation, ["cpu", *CHIPS])
        raise UserError(f"unknown topology {name!r}; {hint}; give cpu, or a TPU such as v5e:2x2 or v4:2x2x1")
    axes = CHIPS[generation].axes
    if not re.fullmatch("x".join([r"[1-9]\d*"] * axes), layout):
        example = {2: "2x2, 2x4 or 16x16", 3: "2x2x1, 2x2x2 or 4x4x4"}[axes]
        raise UserError(
            f"got --topology={name}; {generation} has {axes} axes: give the chips along each, as {generation}:{example}"
        )


def _tpu_devices(name: str, chip: Chip, chips: int) -> tuple[jax.Device, ...]:
    """Compile-only devices of libtpu."""
    from jax.experimental.topologies import get_topology_desc

    settings = {
        "TPU_SKIP_MDS_QUERY": "1",  # do not query the cloud's metadata server
        "TPU_ACCELERATOR_TYPE": chip.accelerator,
        "TPU_WORKER_HOSTNAMES": "localhost",
        # Compiling does not open the chips, so it may run beside a program that uses them, or another compilation.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for variable, value in settings.items():
        os.environ.setdefault(variable, value)
    # A host has four chips, 2x2; only the smallest slices have one.
    one_chip = {"chips_per_host_bounds": (1, 1, 1)} if chips == 1 else {}
    try:
        found = get_topology_desc(name, platform="tpu", chip_config_name=chip.config, **one_chip)
    except jax.errors.JaxRuntimeError as error:
        text = str(error).splitlines()[0].rstrip(".")
        if "lockfile" in text:
            raise UserError(
                "another process holds the TPU compiler's lock /tmp/libtpu_lockfile; wait for it to end (remove the "
                "file if there is none), or set ALLOW_MULTIPLE_LIBTPU_LOAD=1, as compiling opens no chip"
            ) from error
        raise UserError(f"libtpu does not know --topology={name} ({text}); give a layout that is sold") from error
    return tuple(found.devices)
