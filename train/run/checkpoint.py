"""Checkpoints of a run in its work directory, written by Orbax.

A checkpoint is one directory `<workdir>/checkpoints/<step>` with three items: `state` (parameters, batch statistics,
optimizer, moving average, step, random key), `data` (the position in the training data) and `run` (settings, class
names, the evaluation). Orbax writes into a temporary directory and renames it. Then the digests of all files are
written beside them (`train.run.seal`), and only with these the checkpoint counts: what was damaged later, or was cut
short by a crash, is noticed.

The first host of a run reads and writes them and tells the others; the state is the same on all of them.
"""

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from se_flax.checkpoints.orbax import quiet
from se_flax.errors import UserError
from train.run import seal
from train.run.hosts import arrays_from_first, from_first, is_first
from train.run.non_finite import NonFinite
from train.run.saved_state import Restored, State, abstract, arrays_of, orbax_writer, placed
from train.run.store import Store
from train.run.write_errors import error_number, newest_whole, silence_background_errors, unwritten

PyTree = Any
# The newest checkpoint is known to be good when the loss of the step after it was finite. Until then, the one before
# is the good one.
_LEAST = 2
_REPLACED = "-replaced"


class Checkpoints:
    """The checkpoints of one work directory. What is there is compared with its digests first.

    Where a run has several hosts, all of them must call each method together, but for `path`, `steps`, `newest` and
    `explained`.

    Args:
      workdir: the run's directory.
      keep_last: newest ones to keep; two are kept at least.
      keep_best: ones with the best evaluation to keep beside those.
      metric: the figure of an evaluation that says which is best; more is better.
    """

    def __init__(self, workdir: str | Path | Store, *, keep_last: int, keep_best: int, metric: str = "eval_top1"):
        self._store = workdir if isinstance(workdir, Store) else Store(Path(workdir))
        self._root = self._store.folder.absolute()  # Orbax requires it
        self._keep_last, self._keep_best, self._metric = max(keep_last, _LEAST), keep_best, metric
        self.directory = self._root / "checkpoints"
        self._old = self._root / ".old"  # what is being deleted, and what waits for its replacement
        self._damaged = self._root / "damaged"
        self._whole: dict[int, float | None] = {}  # evaluation's figure by step
        self._problems: dict[int, Exception] = {}
        self._saving: tuple[int, threading.Thread | None] | None = None
        self._error: BaseException | None = None
        silence_background_errors()
        self._writer = orbax_writer() if is_first() else None
        self._learn(from_first(self._look))

    def _look(self) -> list[tuple[int, float | None]]:
        """Finds the whole checkpoints, with the figure of their evaluation."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._recover()
        except OSError as error:
            raise self.explained(error) from error
        for step in self._on_disk():
            try:
                seal.check(self.path(step))
                self._whole[step] = self._read(step, "run").get("evaluation", {}).get(self._metric)
            except (OSError, ValueError) as problem:
                self._problems[step] = problem
        return list(self._whole.items())

    def _learn(self, whole: list[tuple[int, float | None]]) -> None:
        """What the first host found."""
        self._whole = dict(whole)

    def _on_disk(self) -> list[int]:
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit() and path.is_dir())

    def steps(self) -> list[int]:
        """Numbers of the whole checkpoints, oldest first; without the one that is being written."""
        return sorted(self._whole)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.directory / str(step)

    def newest(self, before: int | None = None) -> str:
        """Where the newest whole checkpoint lies; empty without one.

        Args:
          before: only of those before this step.
        """
        steps = [step for step in self.steps() if before is None or step < before]
        return self._store.name(self.path(steps[-1])) if steps else ""

    def save(
        self,
        step: int,
        state: State,
        *,
        data: Mapping[str, Any],
        run: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts writing a checkpoint; it counts when its digests are written, at the latest after `finish`.

        Args:
          step: updates done; a checkpoint of the same number is replaced.
          state: the training state; copied off the devices before this returns.
          data: the data loader's position.
          run: settings and class names, JSON-able.
          metrics: evaluation's, of this step.

        Raises:
          UserError: this checkpoint or the one before could not be written, or the parameters or statistics are not
            finite; earlier checkpoints are whole.
        """
        self.finish()
        self._refuse_non_finite(step, state)
        figure = float(metrics[self._metric]) if metrics else None
        evaluation = {} if figure is None else {"evaluation": {self._metric: figure}}
        self._whole.pop(step, None)
        if self._writer is None:
            self._saving = step, None
            return
        tree = arrays_of(state)
        if jax.process_count() > 1:  # Orbax would wait for the devices of other hosts
            tree = jax.tree.map(np.asarray, tree)
        with self._writing(step):
            self._store.check()
            self.directory.mkdir(parents=True, exist_ok=True)
            if self.path(step).exists():
                self._old.mkdir(exist_ok=True)
                self.path(step).rename(self._old / f"{step}{_REPLACED}")
            with quiet():
                self._writer.save(
                    self.path(step),
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(tree),
                        data=ocp.args.JsonSave(dict(data)),
                        run=ocp.args.JsonSave({**run, **evaluation}),
                    ),
                )
        thread = threading.Thread(target=self._complete, args=(step, figure), name="checkpoint", daemon=True)
        self._saving = step, thread
        thread.start()

    def _complete(self, step: int, figure: float | None) -> None:
        """Waits for Orbax, writes the digests, and only then deletes older checkpoints; in a thread of its own."""
        try:
            assert self._writer is not None
            self._writer.wait_until_finished()
            seal.seal(self.path(step))
            self._store.add(self.path(step))
            self._whole[step] = figure
            shutil.rmtree(self._old / f"{step}{_REPLACED}", ignore_errors=True)
            for old in set(self._whole) - self._kept():
                del self._whole[old]
                self._store.remove(self.path(old))
                self._delete(old)
        except BaseException as error:
            self._error = error

    def _kept(self) -> set[int]:
        """The newest and the best of the whole checkpoints."""
        ranked = sorted((figure, step) for step, figure in self._whole.items() if figure is not None)
        best = ranked[-self._keep_best :] if self._keep_best else []
        return set(self.steps()[-self._keep_last :]) | {step for _, step in best}

    def _delete(self, step: int) -> None:
        """Takes a checkpoint away as a whole: a crash while its files are deleted leaves no half of one."""
        self._old.mkdir(exist_ok=True)
        self.path(step).rename(self._old / str(step))
        shutil.rmtree(self._old, ignore_errors=True)

    def _recover(self) -> None:
        """Ends what a crash interrupted: a checkpoint without its replacement comes back, other remains are deleted."""
        for path in self._old.glob(f"*{_REPLACED}"):
            step = int(path.name.removesuffix(_REPLACED))
            try:
                seal.check(self.path(step))
            except (OSError, ValueError):
                shutil.rmtree(self.path(step), ignore_errors=True)
                path.rename(self.path(step))
        for path in (self._old, *self.directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*")):
            shutil.rmtree(path, ignore_errors=True)

    def finish(self) -> None:
        """Waits for the checkpoint that is being written and for its digests.

        Raises:
          UserError: it could not be written.
        """
        if self._saving is not None:
            self._learn(from_first(self._join))
            self._saving = None

    def _join(self) -> list[tuple[int, float | None]]:
        """Waits for this host's thread that writes a checkpoint."""
        if self._saving is not None:
            (step, thread), self._saving = self._saving, None
            if thread is not None:
                thread.join()
            with self._writing(step):
                if (error := self._error) is not None:
                    self._error = None
                    raise error
        return list(self._whole.items())

    def close(self) -> None:
        """Finishes writing and frees Orbax's threads."""
        self.finish()
        if self._writer is not None:
            self._writer.close()

    def _candidates(self, before: int | None = None) -> list[int]:
        """What may be restored, newest first: whole ones, then those without digests, which are better than nothing."""
        unsealed = [step for step, problem in self._problems.items() if isinstance(problem, seal.Unsealed)]
        found = sorted(self._whole, reverse=True) + sorted(unsealed, reverse=True)
        return [step for step in found if before is None or step < before]

    def newest_run(self) -> dict[str, Any] | None:
        """Settings of the checkpoint that `restore` will read, without its arrays; None without one."""
        run: dict[str, Any] | None = from_first(self._newest_run)
        return run

    def _newest_run(self) -> dict[str, Any] | None:
        for step in self._candidates():
            try:
                return self._read(step, "run")
            except (OSError, ValueError):
                continue
        return None

    def _read(self, step: int, item: str) -> dict[str, Any]:
        """An item of JSON."""
        read = json.loads((self.path(step) / item / "metadata").read_bytes())
        if not isinstance(read, dict):
            raise ValueError(f"{item}/metadata is changed")
        return read

    def restore(self, like: State, before: int | None = None) -> Restored | None:
        """Reads the newest checkpoint that is whole; one without digests only if there is no other, and says so.

        Args:
          like: a state of the same run, or its `jax.ShapeDtypeStruct`, for shapes, dtypes and devices.
          before: only one of those before this step; later ones are deleted.

        Returns:
          The checkpoint, or None when there is none at all.

        Raises:
          UserError: there are checkpoints, and none is whole.
        """
        self.finish()
        # Every host needs arrays to receive into; one host reads them where they belong.
        several = jax.process_count() > 1
        read = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype) if several else abstract(x), arrays_of(like))

        def answer() -> dict[str, Any] | None:
            nonlocal read
            if (found := self._newest(read, before)) is None:
                return None
            said, read = found
            return {**said, "skipped": list(self._set_aside(said["step"])), "whole": list(self._whole.items())}

        said = from_first(answer)
        if said is None:
            return None
        self._learn(said["whole"])
        items = arrays_from_first(read)
        if several:
            items = jax.tree.map(placed, arrays_of(like), items)
        return Restored(said["step"], like.replace(**items), said["data"], said["run"], tuple(said["skipped"]))

    def _newest(self, template: PyTree, before: int | None) -> tuple[dict[str, Any], PyTree] | None:
        """Reads the newest checkpoint that can be read: number, data and settings, and the state."""
        assert self._writer is not None
        for step in self._candidates(before):
            try:
                said = {"step": step, "data": self._read(step, "data"), "run": self._read(step, "run")}
                with quiet():
                    items = self._writer.restore(
                        self.path(step), args=ocp.args.Composite(state=ocp.args.StandardRestore(template))
                    )
            except Exception as error:  # what a damaged file raises depends on where it is damaged
                self._whole.pop(step, None)
                self._problems[step] = error
                continue
            for later in [other for other in self._whole if before is not None and other >= before]:
                del self._whole[later]
                self._store.remove(self.path(later))
                self._delete(later)
            return said, items.state
        if self._problems:
            found = "; ".join(self._problem(step) for step in sorted(self._problems, reverse=True))
            raise UserError(
                f"none of the {len(self._problems)} checkpoints in {self._store.name(self.directory)} is whole: "
                f"{found}; restore a copy, or start anew with another --workdir"
            )
        return None

    def _set_aside(self, restored: int) -> Iterator[str]:
        """Moves damaged checkpoints out of the way, so that their numbers can be written again; says what was done."""
        for step in sorted(self._problems, reverse=True):
            text = self._problem(step)
            if step == restored:
                seal.seal(self.path(step))
                self._store.add(self.path(step))
                self._whole[step] = None
                yield f"{text}; it is used, since there is no other, but damage to it would not have been noticed"
                continue
            place = self._damaged / str(step)
            self._damaged.mkdir(exist_ok=True)
            shutil.rmtree(place, ignore_errors=True)
            self._store.move(self.path(step), place)
            self.path(step).rename(place)
            yield f"{text}; it is not used and was moved to {self._store.name(place)}"
        self._problems.clear()

    def _problem(self, step: int) -> str:
        problem = self._problems[step]
        kind = "is unconfirmed" if isinstance(problem, seal.Unsealed) else "is damaged"
        return f"checkpoint {self._store.name(self.path(step))} {kind} ({_first_line(problem)})"

    def _refuse_non_finite(self, step: int, state: State) -> None:
        """Parameters, statistics and their averages must be finite. The optimizer's own state may hold infinities."""
        parts = {name: tree for name, tree in arrays_of(state).items() if name != "opt_state"}
        # On the host, which gets a copy for the checkpoint anyway: a program for hundreds of arrays compiles slowly.
        if all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(parts)):
            return
        raise NonFinite(
            f"the parameters or the statistics are not finite after step {step}",
            f"{self.last_good(step)}; lower optim.learning_rate and start in a new --workdir",
            before=step,
        )

    def last_good(self, bad: int) -> str:
        """Names the newest checkpoint before the first state that is not good.

        Args:
          bad: updates done in that state; its parameters, its evaluation or its next loss are not finite.
        """
        self.finish()
        newest = self.newest(before=bad)
        return f"the last good checkpoint is {newest}" if newest else "no good checkpoint was written yet"

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            yield
        except UserError as error:  # of the bucket
            raise UserError(f"{error}; {newest_whole(self.newest())}; then run the same command to resume") from error
        except Exception as error:
            number = error_number(error)
            if number is None:
                raise
            what = f"the checkpoint of step {step} in {self._store.name(self.directory)}"
            raise unwritten(number, what, self.newest()) from error

    def explained(self, error: OSError) -> Exception:
        """One sentence for what the operating system refused, which names the newest whole checkpoint."""
        if error.errno is None:
            return error
        with contextlib.suppress(UserError):  # the checkpoint under way may be whole
            self._join()
        return unwritten(error.errno, str(error.filename or "a file of the run"), self.newest())


def _first_line(error: BaseException) -> str:
    text = (str(error) or type(error).__name__).strip().splitlines()[0]
    return text if len(text) <= 160 else text[:157] + "..."
