"""Signals that ask a run to stop, and the points at which it can."""

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

T = TypeVar("T")


class Stopped(BaseException):
    """The run was asked to stop, at a point where its state can be saved.

    No `Exception`, as `KeyboardInterrupt` is none: it may come within a data reader, which would take it for an error.
    """


class Stop:
    """Whether a run was asked to stop; it looks between steps and between batches of an evaluation.

    A step runs on all hosts or on none. So where there are several, all of them are told and stop at the same look,
    whichever host got the signal: JAX listens for SIGTERM itself then and agrees on a look. Every host must look
    equally often, so several hosts do not look while they wait for data.
    """

    def __init__(self) -> None:
        self._several = jax.process_count() > 1
        self._asked = self._waiting = False
        self._looks = 0

    def ask(self, number: int, frame: Any) -> None:
        """The signals' handler; the second signal interrupts the program.

        Raises:
          KeyboardInterrupt: the run was asked before.
          Stopped: the run waits for data.
        """
        del number, frame
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        elif self._waiting:
            raise Stopped

    def look(self) -> None:
        """Raises `Stopped` if the run was asked to stop."""
        self._looks += 1
        # JAX agrees on the number after the highest one that it was asked with: 1, 2, ..., none left out.
        if multihost_utils.reached_preemption_sync_point(self._looks) if self._several else self._asked:
            raise Stopped

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For work that can be given up at any point, such as waiting for data: a signal raises `Stopped` at once."""
        self._waiting = not self._several
        try:
            if self._waiting and self._asked:
                raise Stopped
            yield
        finally:
            self._waiting = False

    def between(self, items: Iterable[T]) -> Iterator[T]:
        """Looks before each item, and while one is waited for."""
        iterator = iter(items)
        while True:
            with self.waiting():
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            self.look()
            yield item


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turns the first Ctrl-C or SIGTERM into something that the run looks at; the second one interrupts."""
    stop = Stop()
    previous: dict[signal.Signals, Any] = {}
    for name in (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM):
        # Only the main thread may set handlers; a run started from another one is not stopped by signals.
        try:
            previous[name] = signal.signal(name, stop.ask)
        except ValueError:
            break
    try:
        yield stop
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)
