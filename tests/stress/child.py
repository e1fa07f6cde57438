"""A training in a process of its own, which may end itself by a signal at a named moment.

It writes a journal, one line at a time, which a kill does not take back: `begin`, `restored <step>`, `step <number>
<digest of the batch>`, `sealed <step>`, `signal`, and at the end `calls <moment> <number>`.
"""

import functools
import hashlib
import importlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Moment:
    """Something that a training does several times.

    Attributes:
      where: `module:function`, or the name of an event of Python's audit hooks.
      paths: of an event: what its paths must match, relative to the work directory and joined by a blank.
      kinds: of the runs that have it.
      order: -1 for what only the first start does, 1 for what comes when the run has done its steps.
    """

    where: str
    paths: str = ""
    kinds: tuple[str, ...] = ("images", "workers", "tables")
    order: int = 0


_IMAGES = ("images", "workers")
_TEMPORARY = r"checkpoints/\d+\.orbax-checkpoint-tmp\S*"
MOMENTS = {
    "a step": Moment("train.run.trainer:Trainer._advance", kinds=_IMAGES),
    "a step on rows": Moment("train.ctr.loop:Trainer._advance", kinds=("tables",)),
    "a save": Moment("train.run.checkpoint:Checkpoints.save"),
    "a file of a save": Moment("open", rf"{_TEMPORARY}/\S+"),
    "the rename of a save": Moment("os.rename", rf"{_TEMPORARY} checkpoints/\d+"),
    "the digest of a file": Moment("train.run.seal:_digest"),
    "writing the digests": Moment("open", r"checkpoints/\d+/\.digests\.json"),
    "the rename of the digests": Moment("os.rename", r"checkpoints/\d+/\.digests\.json \S+"),
    "the rename of an old save": Moment("os.rename", r"checkpoints/\d+ \.old/\S+"),
    "the deletion of an old save": Moment("os.remove", r"\.old/\S+|manifest\S*|metadata|\w{32}"),
    "an evaluation": Moment("train.run.trainer:Trainer.evaluate", kinds=_IMAGES),
    "an evaluation of rows": Moment("train.ctr.loop:Trainer.evaluate", kinds=("tables",)),
    "the start of a data worker": Moment("multiprocessing.popen_spawn_posix:Popen._launch", kinds=("workers",)),
    "a line of metrics": Moment("train.run.report:Metrics.write"),
    "half a line of metrics": Moment("train.run.report:Metrics.write"),
    "the rename of another file": Moment(
        "os.rename", r"\.(metrics\.jsonl|config\.json|encoder\.json)\.\w+ \S+", order=-1
    ),
    "a restore": Moment("train.run.checkpoint:Checkpoints.restore"),
    "the curves": Moment("train.run.report:draw_curves", kinds=_IMAGES),
    "the saved network": Moment("train.run.loop:save_model", kinds=_IMAGES, order=1),
    "a file of the saved network": Moment("open", r"\.model-\S+", kinds=_IMAGES, order=1),
    "the rename of the saved network": Moment("os.rename", r"\.model-\S+ model", kinds=_IMAGES, order=1),
}
HALF = "half a line of metrics"
_EVENTS = {moment.where for moment in MOMENTS.values() if ":" not in moment.where}


@dataclass(frozen=True)
class End:
    """When a training ends itself.

    Attributes:
      moment: one of `MOMENTS`.
      number: which of its calls, counted from 1.
      position: before | within | after the call; an event has no `after`.
      delay: seconds after the call's begin, for `within`.
      signal: that it sends itself.
    """

    moment: str
    number: int
    position: str = "before"
    delay: float = 0.0
    signal: int = signal.SIGKILL


class Journal:
    """Lines that are in the file as soon as they are written."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, text: str) -> None:
        os.write(self._file, f"{time.time():.6f} {text}\n".encode())


def train(words: list[str], workdir: Path, journal: Path, output: Path, end: End | None) -> None:
    """Runs the training program in this process and leaves with its exit code.

    Args:
      words: of its command line.
      workdir: of the run.
      journal: gets what happened.
      output: gets what the program says.
      end: when it ends itself.
    """
    os.setpgid(0, 0)
    stream = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    lines = Journal(journal)
    calls: Counter[str] = Counter()
    _keep_journal(lines)
    _watch(workdir, calls, lines, end)
    from train.cli import main

    lines.write("begin")
    code = main(words)
    sys.stdout.flush()
    for name, number in calls.items():
        lines.write(f"calls {number} {name}")
    sys.exit(code)


def _around(where: str, wrapper: Callable[..., Any]) -> None:
    """Replaces a function or method by `wrapper(function, *arguments)`."""
    module, _, path = where.partition(":")
    holder: Any = importlib.import_module(module)
    *parts, name = path.split(".")
    for part in parts:
        holder = getattr(holder, part)
    function = getattr(holder, name)

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        return wrapper(function, *arguments, **keywords)

    setattr(holder, name, call)


def _keep_journal(lines: Journal) -> None:
    import jax
    import numpy as np

    def step(function, trainer, *arguments):
        digest = hashlib.blake2b(digest_size=8)
        for array in jax.tree.leaves(arguments):
            if hasattr(array, "dtype"):  # of the batch
                digest.update(np.asarray(array).tobytes())
        function(trainer, *arguments)
        lines.write(f"step {trainer.step} {digest.hexdigest()}")

    def seal(function, folder):
        function(folder)
        lines.write(f"sealed {folder.name}")

    def restore(function, *arguments):
        found = function(*arguments)
        lines.write(f"restored {found.step if found else 0}")
        return found

    _around(MOMENTS["a step"].where, step)
    _around(MOMENTS["a step on rows"].where, step)
    _around("train.run.seal:seal", seal)
    _around(MOMENTS["a restore"].where, restore)


def _watch(workdir: Path, calls: Counter[str], lines: Journal, end: End | None) -> None:
    """Counts the calls of all moments, and ends the process at the one that was asked for."""

    def leave() -> None:
        lines.write("signal")
        os.kill(os.getpid(), end.signal)

    def due(name: str) -> bool:
        calls[name] += 1
        if end is None or (name, calls[name]) != (end.moment, end.number):
            return False
        if end.position == "before":
            leave()
        elif end.position == "within" and name != HALF:
            threading.Timer(end.delay, leave).start()
        return True

    def counted(name: str) -> Callable[..., Any]:
        def call(function, *arguments, **keywords):
            here = due(name)
            if here and name == HALF:
                metrics, step, epoch, figures = arguments
                text = json.dumps({"step": step, "epoch": epoch, **figures})
                with metrics._path.open("a") as stream:
                    stream.write(text[: len(text) // 2])
                leave()
            found = function(*arguments, **keywords)
            if here and end.position == "after":
                leave()
            return found

        return call

    events = {name: moment for name, moment in MOMENTS.items() if ":" not in moment.where}
    prefix = f"{workdir}/"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS or (event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
            return
        count = 2 if event == "os.rename" else 1
        paths = " ".join(str(path).removeprefix(prefix) for path in arguments[:count])
        for name, moment in events.items():
            if moment.where == event and re.fullmatch(moment.paths, paths):
                due(name)

    for name, moment in MOMENTS.items():
        if ":" in moment.where:
            _around(moment.where, counted(name))
    sys.addaudithook(hook)
