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
    """What a compiled step needs on each device.

    Every figure is XLA's own. It counts the body of a loop once, and so one micro-batch of `optim.accumulate`. A
    program that did not fit has None where the compiler gave no figure.

    Attributes:
      flops: floating-point operations, a multiply-add being two.
      bytes_accessed: what all operations read and write: the traffic between memory and arithmetic.
      argument_bytes: state and batch.
      output_bytes: new state and metrics.
      donated_bytes: of the outputs, those in the memory of arguments.
      temporary_bytes: reserved for everything in between.
      peak_memory_bytes: arguments, outputs that are not donated, temporaries and the program itself; of a program that
        did not fit, what the compiler said it wants at least.
      collective_bytes: operands of the collective operations.
      collectives: the same by kind.
      compile_seconds: without the tracing, and without any cache.
      fits: whether the device's memory holds the peak.
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
    # Not the analysis's own peak, which takes the TPU's small fast memory and the large one together.
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
    """Bytes that a program wants, from the error of a TPU's compiler that refuses it for its size.

    Before it schedules the program, the compiler names the temporaries alone; after that, everything.
    """
    match = re.search(
        r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds|Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", error
    )
    if match is None:
        return None
    number, unit = (match[1], match[2]) if match[1] else (match[3], match[4])
    return round(float(number) * 1024 ** " KMGT".index(unit or " "))
