"""Costs of a compiled step from XLA: operations, bytes, memory, collectives."""

import dataclasses
import re
import time
from dataclasses import dataclass
from typing import Any

import jax

from train.tools.hlo import Collective, collectives


@dataclass(frozen=True)
class Costs:
    """Costs of a compiled step on each device.

    All figures are XLA's. XLA counts the body of a loop once, and so one micro-batch of `optim.accumulate`. For a
    program that does not fit into memory, figures that the compiler did not give are None.

    Attributes:
      flops: floating-point operations; a multiply-add is two.
      bytes_accessed: bytes that all operations read and write.
      argument_bytes: size of state and batch.
      output_bytes: size of new state and metrics.
      donated_bytes: size of outputs that reuse the memory of arguments.
      temporary_bytes: size of the temporaries.
      peak_memory_bytes: arguments, outputs that are not donated, temporaries and the program itself; for a program that
        does not fit, the least size that the compiler reported.
      collective_bytes: size of the operands of collective operations.
      collectives: collective operations by kind.
      compile_seconds: without tracing, and without a cache.
      fits: whether the peak fits into the device's memory.
    """

    flops: float | None
    bytes_accessed: float | None
    argument_bytes: int | None
    output_bytes: int | None
    donated_bytes: int | None
    temporary_bytes: int | None
    peak_memory_bytes: int | None
    collective_bytes: int | None
    collectives: dict[str, Collective]
    compile_seconds: float
    fits: bool


def compile_step(lowered: Any, memory_bytes: int) -> tuple[Costs, str]:
    """Compiles a step and reads its costs.

    Args:
      lowered: from `lower_train_step` or `lower_eval_step`.
      memory_bytes: of one device.

    Returns:
      The costs, and the optimised HLO of one device (empty if it does not fit).
    """
    begun = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        peak = _used_memory(str(error))
        if peak is None and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        nothing: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(Costs))
        seconds = round(time.monotonic() - begun, 1)
        known: dict[str, Any] = {
            "peak_memory_bytes": peak,
            "collectives": {},
            "compile_seconds": seconds,
            "fits": False,
        }
        return Costs(**{**nothing, **known}), ""
    seconds = time.monotonic() - begun
    cost, memory, text = compiled.cost_analysis(), compiled.memory_analysis(), compiled.as_text()
    spoken = collectives(text)
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    # Not the analysis's own peak, which adds the TPU's small fast memory to its HBM.
    peak = memory.argument_size_in_bytes + new + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    costs = Costs(
        flops=cost["flops"],
        bytes_accessed=cost["bytes accessed"],
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        donated_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_memory_bytes=peak,
        collective_bytes=sum(kind.bytes for kind in spoken.values()),
        collectives=spoken,
        compile_seconds=round(seconds, 1),
        fits=peak <= memory_bytes,
    )
    return costs, text


def _used_memory(error: str) -> int | None:
    """Memory in bytes that a program needs, from the TPU compiler's out-of-memory error.

    Before scheduling, the compiler reports only the temporaries; after it, everything.
    """
    match = re.search(
        r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds|Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", error
    )
    if match is None:
        return None
    number, unit = (match[1], match[2]) if match[1] else (match[3], match[4])
    return round(float(number) * 1024 ** " KMGT".index(unit or " "))
