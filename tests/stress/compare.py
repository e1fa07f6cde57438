"""What a training leaves, compared with what another of the same settings leaves: bit for bit, timings apart."""

import json
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from tensorboardX.proto.event_pb2 import Event

from train.run import seal

TIMINGS = ("images_per_second", "data_wait", "seconds", "waited")
# Of the files that hold the saved network's arrays: Orbax draws their names.
_DRAWN = ("digests",)


@dataclass(frozen=True)
class Difference:
    """Something that is not as in the other run.

    Attributes:
      text: what, in words.
      lost: bytes of the other run that are missing here or have other values.
    """

    text: str
    lost: int = 0


@dataclass
class Left:
    """What a training left in its work directory, and in the journals of its processes.

    Attributes:
      arrays: of the last checkpoint, by path: parameters, batch statistics, optimizer state, average, key.
      network: of the saved network, likewise; empty without one.
      texts: other contents by name: settings, data position and progress of the last checkpoint, the encoder.
      lines: of `metrics.jsonl` without timings.
      events: of TensorBoard by name and step, with their value and how often they are there; timings have none.
      batches: digest of what each step read.
      steps: numbers of the whole checkpoints.
      names: of files and folders, as far as every run has them.
    """

    arrays: dict[str, np.ndarray]
    network: dict[str, np.ndarray]
    texts: dict[str, Any]
    lines: list[str]
    events: dict[tuple[str, int], tuple[float, int]]
    batches: dict[int, str]
    steps: list[int]
    names: list[str]
    faults: list[str] = field(default_factory=list)


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    """Every array of an Orbax folder by its path, read without the training program."""
    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore(folder.absolute())
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)}


def whole_steps(workdir: Path) -> list[int]:
    """Numbers of the checkpoints that agree with their digests, oldest first."""
    found = []
    for path in (workdir / "checkpoints").glob("*"):
        if path.name.isdigit():
            try:
                seal.check(path)
            except (OSError, ValueError):
                continue
            found.append(int(path.name))
    return sorted(found)


def journal_of(path: Path) -> list[tuple[float, list[str]]]:
    """Times and words of a journal; a kill may have cut its last line."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [(float(time), words) for time, *words in (line.split(" ") for line in lines)]


def batches_of(journals: list[Path]) -> tuple[dict[int, str], list[str]]:
    """Digest of what each step read, and a sentence for each step that read something else when it was done again."""
    batches: dict[int, str] = {}
    faults = []
    for path in journals:
        for _, words in journal_of(path):
            if words[0] == "step":
                step, digest = int(words[1]), words[2]
                if batches.setdefault(step, digest) != digest:
                    faults.append(f"step {step} read another batch when it was done again")
    return batches, faults


def _reproducible(value: Any) -> Any:
    """Without what no two runs have in common."""
    if isinstance(value, Mapping):
        return {name: _reproducible(part) for name, part in value.items() if name not in TIMINGS + _DRAWN}
    return value


def _events(folder: Path) -> dict[tuple[str, int], tuple[float, int]]:
    """Events by the file format alone: length, checksum, record, checksum."""
    times: Counter[tuple[str, int]] = Counter()
    values: dict[tuple[str, int], float] = {}
    for path in folder.glob("events.out.tfevents.*"):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            for value in event.summary.value:
                times[value.tag, event.step] += 1
                values[value.tag, event.step] = value.simple_value
    timed = tuple(f"train/{name}" for name in TIMINGS)
    return {key: (0.0 if key[0] in timed else values[key], count) for key, count in times.items()}


def _names(workdir: Path) -> list[str]:
    """Files and folders by name; what was damaged is kept for a person, and random names stand for themselves."""
    tops = [path.relative_to(workdir) for path in workdir.iterdir() if path.name not in ("damaged", "events")]
    inner = [path.relative_to(workdir) for path in (workdir / "checkpoints").iterdir() if not path.name.isdigit()]
    return sorted(re.sub(r"[0-9a-f]{8}$|-\w{8}$", "<random>", str(path)) for path in [*tops, *inner])


def left(workdir: Path, journals: list[Path]) -> Left:
    """Reads what a finished training left.

    Args:
      workdir: of the run.
      journals: of its processes, in their order.
    """
    steps = whole_steps(workdir)
    last = workdir / "checkpoints" / str(steps[-1])
    texts = {
        f"{item} of the last checkpoint": _reproducible(json.loads((last / item / "metadata").read_bytes()))
        for item in ("data", "run")
    }
    for name in ("config.json", "encoder.json", "model/se_flax.json"):
        if (workdir / name).exists():
            texts[name] = _reproducible(json.loads((workdir / name).read_text()))
    model = workdir / "model" / "variables"
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    batches, faults = batches_of(journals)
    return Left(
        arrays=arrays_of(last / "state"),
        network=arrays_of(model) if model.exists() else {},
        texts=texts,
        lines=[json.dumps(_reproducible(row)) for row in rows],
        events=_events(workdir / "events"),
        batches=batches,
        steps=steps,
        names=_names(workdir),
        faults=faults,
    )


def differences(here: Left, there: Left, *, stopped: bool = False) -> Iterator[Difference]:
    """Compares two runs of the same settings.

    Args:
      here: the run that was interrupted.
      there: the one that was not.
      stopped: whether a signal made it save at steps of its own, of which the newest two may be.
    """
    for text in here.faults:
        yield Difference(text)
    yield from _of_arrays("array", here.arrays, there.arrays)
    yield from _of_arrays("saved network", here.network, there.network)
    for name in sorted(here.texts.keys() | there.texts.keys()):
        if here.texts.get(name) != there.texts.get(name):
            yield Difference(f"{name} differs", len(json.dumps(there.texts.get(name, ""))))
    mine, other = Counter(here.lines), Counter(there.lines)
    for line in (other - mine).elements():
        yield Difference(f"metrics.jsonl lacks {line}", len(line) + 1)
    for line in (mine - other).elements():
        yield Difference(f"metrics.jsonl has {line} {'twice' if line in other else 'as well'}")
    if mine == other and here.lines != there.lines:
        yield Difference("metrics.jsonl has its lines in another order")
    for key in sorted(here.events.keys() | there.events.keys()):
        mine_, other_ = here.events.get(key, "none"), there.events.get(key, "none")
        if mine_ != other_:
            yield Difference(f"event {key[0]} of step {key[1]} is {mine_} instead of {other_}", 4)
    for step in sorted(here.batches.keys() | there.batches.keys()):
        if here.batches.get(step) != there.batches.get(step):
            yield Difference(f"step {step} read another batch")
    if missing := set(there.names) - set(here.names):
        yield Difference(f"these files are missing: {', '.join(sorted(missing))}")
    if more := set(here.names) - set(there.names):
        yield Difference(f"these files are left behind: {', '.join(sorted(more))}")
    wanted = {*there.steps[:-2], there.steps[-1]}
    if not wanted <= set(here.steps) if stopped else here.steps != there.steps:
        yield Difference(f"the checkpoints {here.steps} are kept instead of {there.steps}")


def _of_arrays(what: str, here: Mapping[str, np.ndarray], there: Mapping[str, np.ndarray]) -> Iterator[Difference]:
    for name in sorted(here.keys() | there.keys()):
        if name not in here:
            yield Difference(f"{what} {name} is missing", there[name].nbytes)
        elif name not in there:
            yield Difference(f"{what} {name} is there as well")
        elif here[name].dtype != there[name].dtype or here[name].shape != there[name].shape:
            yield Difference(f"{what} {name} has another shape or dtype", there[name].nbytes)
        elif here[name].tobytes() != there[name].tobytes():
            bits = np.frombuffer(here[name].tobytes(), np.uint8) != np.frombuffer(there[name].tobytes(), np.uint8)
            yield Difference(f"{what} {name} differs", int(bits.sum()))
