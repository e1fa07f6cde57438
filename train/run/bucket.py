"""Work directories in buckets: the run works in a local folder, whose files are copied to the bucket.

A checkpoint is copied when it has its digests, and they come last: without them, what lies in the bucket is no
checkpoint. Nothing is renamed there. A checkpoint that replaces another one of its step gets a folder of its own,
`checkpoints/<step>.<n>`, and then the old one is deleted. All other files are copied when they have changed, every few
seconds and before each checkpoint.
"""

import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from se_flax.checkpoints.object_store import ObjectStore
from se_flax.checkpoints.resolve import OWN
from se_flax.errors import UserError
from train.run import lease, seal
from train.run.hosts import from_first, is_first
from train.run.lock import LOCK, locked
from train.run.report import say
from train.run.runtime import MODEL
from train.run.store import Store

CHECKPOINTS = "checkpoints"
# What is copied when it changes is everything else but these, and names that begin with a dot.
_APART = (CHECKPOINTS, "damaged")
# A run writes these folders anew, and old files must not lie among the new ones; the second name comes last.
_WHOLE = {"events": "", MODEL: OWN}
Stamps = dict[str, tuple[int, int]]  # size and time of change by name
_VERSION = re.compile(rf"{CHECKPOINTS}/(\d+)(?:\.(\d+))?/")


class BucketStore(Store):
    """A run's local folder, and the copy of it in a bucket.

    Args:
      objects: of the bucket.
      folder: exists, and nothing else uses it.
    """

    def __init__(self, objects: ObjectStore, folder: Path):
        super().__init__(folder)
        self._bucket = objects
        self._lease = lease.Lease(self._bucket)
        self._there: dict[str, int] = {}  # names and sizes in the bucket
        self._sent: Stamps = {}  # of the files that were copied
        self._copying = threading.RLock()
        self._over = threading.Event()
        self._lost: UserError | None = None
        self._renewing = threading.Thread(target=self._renew, name="bucket", daemon=True)

    def name(self, path: Path) -> str:
        """The path's address in the bucket."""
        return f"{self._bucket.url}/{path.relative_to(self.folder.absolute()).as_posix()}"

    def start(self) -> None:
        """Takes the lease and copies what a run goes on from, checkpoints and figures, to the local folder.

        Raises:
          UserError: another run uses the folder in the bucket, or the bucket cannot be read or written.
        """
        for path in self.folder.iterdir():  # of a run that was killed; what counts is in the bucket
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._lease.take(say)
        self._renewing.start()
        with self._copying:
            self._there = self._bucket.find()
            chosen, rest = _checkpoints(self._there)
            self._delete(rest)
            for step, folder in chosen.items():
                names = {name: size for name, size in self._there.items() if name.startswith(folder)}
                self._bucket.download(names, self.folder / CHECKPOINTS / step, strip=folder)
            apart = (lease.NAME, "curves.png")
            files = {name: size for name, size in self._there.items() if "/" not in name and name not in apart}
            self._bucket.download(files, self.folder)
            self._sent = {name: _stamp(self.folder / name) for name in files}

    def check(self) -> None:
        """Raises `UserError` if another run has taken the lease."""
        if self._lost is not None:
            raise self._lost

    def add(self, checkpoint: Path) -> None:
        """Copies a checkpoint, and the figures before it."""
        self.check()
        with self._copying:
            self.push()
            old = self._copies(checkpoint)
            version = 1 + max((version for version, _ in old.values()), default=-1)
            to = f"{CHECKPOINTS}/{checkpoint.name}{f'.{version}' if version else ''}/"
            names = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()]
            self._upload(checkpoint, [name for name in names if name != seal.SEAL], to)
            self._upload(checkpoint, [seal.SEAL], to)
            self._delete(list(old))

    def remove(self, checkpoint: Path) -> None:
        """Deletes a checkpoint's copy."""
        with self._copying:
            self._delete(list(self._copies(checkpoint)))

    def move(self, checkpoint: Path, place: Path) -> None:
        """Moves a checkpoint's copy."""
        to = place.relative_to(self.folder.absolute()).as_posix() + "/"
        with self._copying:
            old = self._copies(checkpoint)
            for folder in {folder for _, folder in old.values()}:
                self._bucket.copy([name for name in old if name.startswith(folder)], folder, to)
            self._delete(list(old))

    def _copies(self, checkpoint: Path) -> dict[str, tuple[int, str]]:
        """Names of a step's objects in the bucket, with number and folder of the copy that they belong to."""
        found = {name: _VERSION.match(name) for name in self._there}
        return {n: (int(m[2] or 0), m[0]) for n, m in found.items() if m is not None and m[1] == checkpoint.name}

    def push(self) -> None:
        """Copies all other files that have changed since they were copied.

        Raises:
          UserError: the bucket cannot be written.
        """
        with self._copying:
            now = {}
            for path in self.folder.rglob("*"):
                name = path.relative_to(self.folder).as_posix()
                apart = name.startswith((".", *(f"{folder}/" for folder in _APART))) or "/." in name
                if apart or ".partial" in path.name:  # a file that is being written
                    continue
                with suppress(FileNotFoundError):  # it was replaced or deleted meanwhile
                    if path.is_file():
                        now[name] = _stamp(path)
            changed = {name: stamp for name, stamp in now.items() if self._sent.get(name) != stamp}
            for top, last in _WHOLE.items():
                self._push_whole(top, last, now, changed)
            self._send(changed)

    def _push_whole(self, top: str, last: str, now: Stamps, changed: Stamps) -> None:
        """Replaces a folder: what tells it apart from an unfinished one goes first and comes last."""
        inside = {name for name in now if name.startswith(f"{top}/")}
        manifest = f"{top}/{last}"
        if not inside or not inside & changed.keys() or (last and manifest not in inside):
            for name in inside:
                changed.pop(name, None)
            return
        self._delete([n for n in self._there if n == manifest or (n.startswith(f"{top}/") and n not in inside)])
        self._send({name: changed.pop(name) for name in inside & changed.keys() - {manifest}})
        if last:  # it was deleted above
            changed[manifest] = now[manifest]

    def _send(self, files: Stamps) -> None:
        for name, stamp in files.items():
            path = self.folder / name
            if path.suffix == ".jsonl":  # a line that is being written comes with the next copy
                data = path.read_bytes()
                self._bucket.write(name, data[: data.rfind(b"\n") + 1])
                self._there[name] = stamp[0]
            else:
                try:
                    self._upload(self.folder, [name], "")
                except UserError:
                    if path.exists():
                        raise
                    continue  # it was replaced or deleted meanwhile
            self._sent[name] = stamp

    def _upload(self, folder: Path, names: list[str], to: str) -> None:
        self._bucket.upload(folder, names, to)
        self._there.update({to + name: 0 for name in names})

    def _delete(self, names: list[str]) -> None:
        """Deletes objects; digests first, without which the others are no checkpoint."""
        for chosen in (True, False):
            self._bucket.delete([name for name in names if name.endswith(f"/{seal.SEAL}") is chosen])
        for name in names:
            self._there.pop(name, None)

    def _renew(self) -> None:
        """Renews the lease and copies small files until the end; in a thread of its own."""
        failed = False
        while not self._over.wait(lease.RENEW):
            try:
                self._lease.renew()
                # Not while a checkpoint is copied, which may take longer than the lease lasts.
                if self._copying.acquire(blocking=False):
                    try:
                        self.push()
                    finally:
                        self._copying.release()
                failed = False
            except lease.InUse as error:
                self._lost = error
                return
            except UserError as error:
                if not failed:
                    say(f"warning: {error}")
                failed = True
            except OSError as error:  # a file of the local folder
                say(f"warning: {error}")

    def close(self) -> None:
        """Copies what is left and gives the lease back. The local folder is kept where that fails."""
        self._over.set()
        if self._renewing.is_alive():
            self._renewing.join()
        try:
            if self._lost is None:
                self.push()
                self._lease.give_back()
        except UserError as error:
            say(f"warning: {error}; the files of this run are in {self.folder} until the next one starts")
            return
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def opened(url: str) -> Iterator[BucketStore]:
    """Copies a work directory from a bucket and holds its lock; at the end everything is in the bucket.

    Args:
      url: `gs://...` or `s3://...`.

    Raises:
      UserError: another run uses it, or the bucket cannot be read or written.
    """
    objects = ObjectStore(url)
    digest = hashlib.blake2b(f"{url.rstrip('/')} {os.getuid()}".encode(), digest_size=8).hexdigest()
    place = Path(tempfile.gettempdir()) / f"se-flax-{digest}"
    place.mkdir(mode=0o700, exist_ok=True)
    with locked(place, url):
        # The others write nothing, but some of them may be on the same machine.
        store = BucketStore(objects, place if is_first() else Path(tempfile.mkdtemp(prefix="se-flax-")))
        try:
            from_first(store.start)
            yield store
        finally:
            store.close() if is_first() else shutil.rmtree(store.folder, ignore_errors=True)


def _checkpoints(names: dict[str, int]) -> tuple[dict[str, str], list[str]]:
    """The folder of each step's newest copy that has its digests, and the names of all others."""
    versions: dict[str, tuple[int, str]] = {}
    for name in names:
        found = _VERSION.match(name)
        if found and name == found[0] + seal.SEAL:
            versions[found[1]] = max(versions.get(found[1], (-1, "")), (int(found[2] or 0), found[0]))
    chosen = {step: folder for step, (_, folder) in versions.items()}
    rest = [name for name in names if (found := _VERSION.match(name)) and found[0] not in chosen.values()]
    return chosen, rest


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
