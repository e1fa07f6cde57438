"""Checkpoints of a run in its work directory, written by Orbax.

A checkpoint is one directory `<workdir>/checkpoints/<step>` with three items: `state` (parameters, batch statistics,
optimizer, moving average, step, random key), `data` (the position in the training data) and `run` (settings, class
names). Orbax writes into a temporary directory and renames it, so a step's directory exists only when it is whole.
`<workdir>/digests/<step>.json`, written after that, holds the digest of every file, so damage done later is noticed
too.
"""

import contextlib
import errno
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import orbax.checkpoint as ocp
from etils import epath

from se_flax.checkpoints.orbax import quiet
from se_flax.errors import UserError
from train.run.replaced import forget, put_back, set_aside

PyTree = Any
State = flax.struct.PyTreeNode  # `train.run.step.TrainState`, or another one
_ITEMS = ("state", "data", "run")
# A file this large is read in pieces when its digest is taken.
_PIECE = 1 << 22


@dataclass(frozen=True)
class Restored:
    """What a checkpoint held.

    Attributes:
      step: its number.
      state: the training state, on the devices of the state it was restored like.
      data: the position in the training data.
      run: settings and class names.
      skipped: one sentence for each newer checkpoint that was damaged.
    """

    step: int
    state: Any
    data: dict[str, Any]
    run: dict[str, Any]
    skipped: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """What a person should know about it."""
        for text in self.skipped:
            yield f"warning: {text}; an older one is used"
        yield f"resuming from step {self.step:,}"


def _tree(state: State) -> dict[str, PyTree]:
    """The state as a dictionary without the parts it does not have."""
    return {name: value for name, value in vars(state).items() if value is not None}


class Checkpoints:
    """The checkpoints of one work directory.

    Args:
      workdir: the run's directory, local or on a bucket.
      keep_last: newest ones to keep.
      keep_best: ones with the best evaluation to keep beside those.
      metric: the figure of an evaluation that says which is best; more is better.
    """

    def __init__(self, workdir: epath.PathLike, *, keep_last: int, keep_best: int, metric: str = "eval_top1"):
        self._root = epath.Path(workdir)
        self._metric = metric
        self.directory = self._root / "checkpoints"
        self._digests = self._root / "digests"
        put_back(self._root, self.directory)
        policies = ocp.checkpoint_managers
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=_ITEMS,
            options=ocp.CheckpointManagerOptions(
                create=True,
                best_fn=lambda m: m[metric],  # without it Orbax does not store the figure
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep_last),
                        # A checkpoint between evaluations has no figure and must not crowd out one that has.
                        policies.BestN(
                            get_metric_fn=lambda m: m[metric], n=keep_best, keep_checkpoints_without_metrics=False
                        ),
                    ]
                ),
            ),
        )
        self._unsealed: list[int] = []

    def steps(self) -> list[int]:
        """Numbers of the checkpoints that are there, oldest first."""
        return sorted(self._manager.all_steps())

    def path(self, step: int) -> epath.Path:
        """Where the checkpoint of a step lies."""
        return self.directory / str(step)

    def newest(self) -> str:
        """Where the newest checkpoint lies; empty without one."""
        steps = self.steps()
        return str(self.path(steps[-1])) if steps else ""

    def save(
        self,
        step: int,
        state: State,
        *,
        data: Mapping[str, Any],
        run: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts writing a checkpoint; it is whole when the next one starts, or after `finish`.

        One of this step that is there is replaced; it is used as long as the new one is not whole.

        Args:
          step: updates done.
          state: the training state; copied off the devices before this returns.
          data: the data loader's position.
          run: settings and class names, JSON-able.
          metrics: evaluation's, of this step.

        Raises:
          UserError: the disk is full; earlier checkpoints are whole.
        """
        with self._writing(step):
            self.finish()
            self.directory.mkdir(parents=True, exist_ok=True)
            if step in self.steps():
                set_aside(self._root, self.path(step))
                self._manager.reload()
                (self._digests / f"{step}.json").unlink(missing_ok=True)
            # Between evaluations there is no figure to rank by, and Orbax would say so each time.
            with quiet():
                self._manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(_tree(state)),
                        data=ocp.args.JsonSave(dict(data)),
                        run=ocp.args.JsonSave(dict(run)),
                    ),
                    metrics={self._metric: float(metrics[self._metric])} if metrics else None,
                    force=True,
                )
            self._unsealed.append(step)

    def finish(self) -> None:
        """Waits for the checkpoint being written and seals it with its digests.

        Raises:
          UserError: the disk is full.
        """
        with self._writing(self._unsealed[-1] if self._unsealed else 0):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            for step in self._unsealed:
                if jax.process_index() == 0 and self.path(step).exists():
                    self._digests.mkdir(parents=True, exist_ok=True)
                    (self._digests / f"{step}.json").write_text(json.dumps(_digests(self.path(step)), indent=0))
            self._unsealed.clear()
            forget(self._root)
            if jax.process_index() == 0 and self._digests.exists():
                kept = {f"{step}.json" for step in self._manager.all_steps()}
                for old in self._digests.iterdir():
                    if old.name not in kept:
                        old.unlink()

    def close(self) -> None:
        """Finishes writing and frees Orbax's threads."""
        self.finish()
        self._manager.close()

    def newest_run(self) -> dict[str, Any] | None:
        """Settings of the newest checkpoint that can be read, without its arrays; None without one."""
        for step in reversed(self.steps()):
            try:
                return self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
            except Exception:  # what a damaged file raises depends on where it is damaged
                continue
        return None

    def restore(self, like: State) -> Restored | None:
        """Reads the newest checkpoint that is whole.

        Args:
          like: a state of the same run, for shapes, dtypes and devices.

        Returns:
          The checkpoint, or None when there is none at all.

        Raises:
          UserError: there are checkpoints, and none is whole.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _tree(like))
        skipped: list[str] = []
        for step in reversed(self.steps()):
            try:
                self._check_digests(step)
                with quiet():
                    items = self._manager.restore(
                        step,
                        args=ocp.args.Composite(
                            state=ocp.args.StandardRestore(abstract),
                            data=ocp.args.JsonRestore(),
                            run=ocp.args.JsonRestore(),
                        ),
                    )
            except Exception as error:  # what a damaged file raises depends on where it is damaged
                skipped.append(f"checkpoint {self.path(step)} is damaged ({_first_line(error)})")
                continue
            state = like.replace(**items.state)
            return Restored(step, state, items.data, items.run, tuple(skipped))
        if skipped:
            raise UserError(
                f"none of the {len(skipped)} checkpoints in {self.directory} is whole: {skipped[0]}; "
                "restore a copy, or start anew with another --workdir"
            )
        return None

    def forget_after(self, step: int) -> None:
        """Deletes checkpoints newer than a step: the damaged ones that `restore` passed over.

        Resuming would otherwise refuse to write their numbers again.
        """
        for newer in self.steps():
            if newer > step:
                self._manager.delete(newer)

    def _check_digests(self, step: int) -> None:
        """Compares a checkpoint with its digests; one that was never sealed (a crash right after it) passes."""
        seal = self._digests / f"{step}.json"
        if not seal.exists():
            return
        expected = json.loads(seal.read_text())
        found = _digests(self.path(step))
        for name, digest in expected.items():
            if found.get(name) != digest:
                raise ValueError(f"{name} is {'changed' if name in found else 'missing'}")

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not _is_disk_full(error):
                raise
            whole = [s for s in self.steps() if s not in self._unsealed]
            self._unsealed.clear()
            kept = f"the newest whole checkpoint is {self.path(max(whole))}" if whole else "no checkpoint is whole yet"
            raise UserError(
                f"the disk is full: the checkpoint of step {step} could not be written to {self.directory}; "
                f"{kept}; free some space, then run the same command to resume"
            ) from error


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, says that no space is left (TensorStore says so only in words)."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "RESOURCE_EXHAUSTED: Error writing" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _digests(directory: epath.Path) -> dict[str, str]:
    """Digest of every file below a directory, by relative name."""
    found = {}
    for path in sorted(directory.iterdir()):  # a recursive glob is refused on buckets
        if path.is_dir():
            found.update({f"{path.name}/{name}": digest for name, digest in _digests(path).items()})
        else:
            digest = hashlib.blake2b(digest_size=16)
            with path.open("rb") as stream:
                while piece := stream.read(_PIECE):
                    digest.update(piece)
            found[path.name] = digest.hexdigest()
    return found


def _first_line(error: BaseException) -> str:
    text = (str(error) or type(error).__name__).strip().splitlines()[0]
    return text if len(text) <= 160 else text[:157] + "..."
